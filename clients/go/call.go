package nkv

import (
	"container/list"
	"context"
	"errors"
	"time"
)

type callState int

const (
	callWaiting callState = iota // for a connection: it can be taken back
	callSent                     // the socket may have some of it
	callDone
)

type callKind int

const (
	callRead callKind = iota
	callWrite
	callSubscribe // internal, as the following
	callOther     // its answer is passed over
)

// call is a request and who waits for its answer. All but the first fields are guarded by the mutex of the client.
type call struct {
	id      uint64
	kind    callKind
	request string // what the protocol calls it
	key     string
	epoch   string // of the revision in its condition; "" if there is none
	done    chan result

	state callState
	frame []byte
	value []byte // of a put: the part of the frame that is its value
	place *list.Element
	start uint64 // the number of its first byte on the connection
	wire  *wire  // of a subscribe
	exact bool   // of a subscribe: to its key alone
}

// result is an answer, and the epoch in which its revisions count; or an error.
type result struct {
	body  *body
	epoch string
	err   error
}

// finish hands the result over. It is called with the lock held.
func (c *call) finish(r result) {
	if c.state == callDone {
		return
	}
	c.state, c.frame, c.value = callDone, nil, nil
	c.done <- r
}

// isUser says whether a caller waits, or waited, for it.
func (c *call) isUser() bool { return c.kind == callRead || c.kind == callWrite }

// exchange sends a request and returns its answer, whatever it says.
func (c *Client) exchange(ctx context.Context, ask *call) (*body, string, error) {
	if err := ctx.Err(); err != nil {
		return nil, "", c.gaveUp(ctx, false, 0)
	}
	var expired <-chan time.Time
	limit := c.options.requestTimeout
	if _, ok := ctx.Deadline(); !ok && limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		expired = timer.C
	}
	c.mu.Lock()
	if c.isClosed {
		c.mu.Unlock()
		return nil, "", closedError()
	}
	ask.place = c.queue.PushBack(ask)
	c.mu.Unlock()
	c.wakeWriter()

	select {
	case r := <-ask.done:
		return r.body, r.epoch, r.err
	case <-ctx.Done():
	case <-expired:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if ask.state == callDone { // its answer came at the last moment
		r := <-ask.done
		return r.body, r.epoch, r.err
	}
	wasSent := ask.state == callSent
	if !wasSent {
		c.queue.Remove(ask.place)
	}
	ask.state, ask.frame, ask.value = callDone, nil, nil
	return nil, "", c.gaveUpLocked(ctx, wasSent && ask.kind == callWrite, limit)
}

func (c *Client) gaveUp(ctx context.Context, isUnknown bool, limit time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gaveUpLocked(ctx, isUnknown, limit)
}

// gaveUpLocked is the error of a call whose caller waits no longer.
func (c *Client) gaveUpLocked(ctx context.Context, isUnknown bool, limit time.Duration) error {
	err := &Error{Kind: ErrTimeout, Err: ctx.Err()}
	if err.Err == nil {
		err.Message, err.Err = "no answer within "+limit.String(), context.DeadlineExceeded
	}
	if isUnknown {
		err.Kind = ErrOutcomeUnknown
	} else if errors.Is(err.Err, context.Canceled) {
		err.Kind = nil
		err.Message = "cancelled"
	}
	if c.link == nil && c.trouble != nil {
		err.Message = join(err.Message, c.trouble.Error())
	}
	return err
}

func join(a, b string) string {
	if a == "" {
		return b
	}
	return a + ": " + b
}

func closedError() error { return &Error{Kind: ErrClosed} }

func unknownError(cause error) error { return &Error{Kind: ErrOutcomeUnknown, Err: cause} }
