package nkv

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

const (
	// conflictMin is the span of which the pause after a conflict is a random part; it doubles with each, up to conflictMax.
	conflictMin = time.Millisecond
	conflictMax = 128 * time.Millisecond
)

// Update changes a value that others may change too: it reads the key, calls change with what it holds (nil if there is no
// such key), and writes what change returns if the key is still as it was read. If it is not, all of that is done again, after
// a random pause of at most 128 ms. It returns the revision of what the key holds then; zero if there is no such key.
//
// If change returns [ErrKeep], nothing is written, and the error is nil. Any other error of change is returned as it is. What
// is written has no TTL.
//
// The limit of time counts for all of it: that of the context, or else the request timeout. The errors are those of [Client.Get]
// and [Client.Put]: [ErrConflict] if others were faster until time ran out. After [ErrOutcomeUnknown] it is not tried again.
func (c *Client) Update(ctx context.Context, key string, change func(old *Entry) ([]byte, error)) (Revision, error) {
	if _, ok := ctx.Deadline(); !ok && c.options.requestTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.options.requestTimeout)
		defer cancel()
	}
	for span := conflictMin; ; span = min(2*span, conflictMax) {
		entry, ok, err := c.Get(ctx, key)
		if err != nil {
			return Revision{}, err
		}
		var old *Entry
		if ok {
			old = &entry
		}
		value, err := change(old)
		if errors.Is(err, ErrKeep) {
			return entry.Revision, nil
		}
		if err != nil {
			return Revision{}, err
		}
		revision, err := c.Put(ctx, key, value, IfRevision(entry.Revision))
		if !errors.Is(err, ErrConflict) && !errors.Is(err, ErrOtherEpoch) {
			return revision, err
		}
		pause := rand.N(span)
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= pause {
			return Revision{}, err
		}
		sleep(ctx, pause)
	}
}
