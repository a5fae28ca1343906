package nkv

import (
	"context"
	"maps"
	"sync"
)

// watcher is a sink that is to know the client's own writes before their callers do.
type watcher interface {
	sink
	isWatcher()
}

// present is what a watch knows. It is changed by the connection and read by the program.
type present struct {
	mu       sync.Mutex
	entries  map[string]Entry
	len      int
	isLive   bool
	revision Revision
	missed   []missedKey // what the snapshot under way does not have
	changed  chan struct{}
	err      error
}

type missedKey struct {
	key      string
	revision Revision
}

func newPresent() *present { return &present{entries: map[string]Entry{}} }

func (p *present) isWatcher() {}

func (p *present) wake() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

func (p *present) reach(revision Revision) {
	if revision.After(p.revision) || revision.epoch != p.revision.epoch {
		p.revision = revision
	}
}

func (p *present) update(entry Entry, _ uint64, _ bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remove(entry.Key)
	p.entries[entry.Key] = entry
	p.len += len(entry.Value)
	p.reach(entry.Revision)
	p.wake()
	return p.len
}

func (p *present) remove(key string) {
	p.len -= len(p.entries[key].Value)
	delete(p.entries, key)
}

func (p *present) gone(key string, revision Revision, reason Reason, _ uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if reason == Missed {
		p.missed = append(p.missed, missedKey{key, revision}) // all of them go in one step
		return
	}
	p.remove(key)
	p.reach(revision)
	p.wake()
}

func (p *present) synced(revision Revision, _ bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, missed := range p.missed {
		p.remove(missed.key)
	}
	p.missed = nil
	p.reach(revision)
	p.isLive = true
	p.wake()
}

func (p *present) lost(bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isLive = false
	p.wake()
}

func (p *present) beginAnew() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revision = Revision{}
}

func (p *present) connected(string) {}

func (p *present) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isLive = false
	if p.err == nil {
		p.err = err
	}
	p.wake()
}

func (p *present) get(key string) (Entry, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	entry, ok := p.entries[key]
	return entry, ok
}

func (p *present) live() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.isLive
}

func (p *present) nextChange() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.changed == nil {
		p.changed = make(chan struct{})
		if p.err != nil {
			close(p.changed)
		}
	}
	return p.changed
}

func (p *present) reason() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// wait waits until is is true, which is asked after each change.
func (p *present) wait(ctx context.Context, is func() bool) error {
	for {
		changed := p.nextChange()
		if is() {
			return nil
		}
		if err := p.reason(); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Watch is the value of one key, always as it is now. While the connection is lost it is the last value that was known.
type Watch struct {
	following
	present *present
}

// Watch follows the value of a key, and waits until the present value is known.
//
// The context counts for the whole life of the watch: it ends when the context does, or by its method Close.
func (c *Client) Watch(ctx context.Context, key string) (*Watch, error) {
	const op = "watch"
	if err := checkKey(key); err != nil {
		return nil, within(op, key, err)
	}
	w := &Watch{present: newPresent()}
	l := newLocal(key, true, c.options.subscriptionLenMax, w.present)
	l.atSynced = true
	if err := c.follow(ctx, op, l, &w.following); err != nil {
		return nil, err
	}
	return w, nil
}

// Get returns the key with its value; false if there is no such key.
func (w *Watch) Get() (Entry, bool) { return w.present.get(w.local.pattern) }

// Live reports whether this is the present state: false while the connection is lost, and from the end on.
func (w *Watch) Live() bool { return w.present.live() }

// Changed returns a channel that is closed at the next change of anything that the watch says. Ask for it before looking,
// and no change is missed.
func (w *Watch) Changed() <-chan struct{} { return w.present.nextChange() }

// Wait waits until is returns true, which is asked now and after each change.
func (w *Watch) Wait(ctx context.Context, is func(entry Entry, ok bool) bool) error {
	return w.present.wait(ctx, func() bool { return is(w.Get()) })
}

// Err returns why the watch has ended, and nil before that.
func (w *Watch) Err() error { return w.present.reason() }

// Branch is a map of the keys that a pattern covers, always as it is now. While the connection is lost it is the last state
// that was known. What was missed is in it before it is live again.
type Branch struct {
	following
	present *present
}

// WatchBranch follows all keys that a pattern covers, with their values, and waits until the present state is known.
//
// The context counts for the whole life of the branch: it ends when the context does, or by its method Close.
func (c *Client) WatchBranch(ctx context.Context, pattern string) (*Branch, error) {
	const op = "watch"
	if err := checkPattern(pattern); err != nil {
		return nil, within(op, pattern, err)
	}
	b := &Branch{present: newPresent()}
	l := newLocal(pattern, false, c.options.subscriptionLenMax, b.present)
	l.atSynced = true
	if err := c.follow(ctx, op, l, &b.following); err != nil {
		return nil, err
	}
	return b, nil
}

// Get returns a key with its value; false if there is no such key.
func (b *Branch) Get(key string) (Entry, bool) { return b.present.get(key) }

// Len returns the number of keys.
func (b *Branch) Len() int {
	b.present.mu.Lock()
	defer b.present.mu.Unlock()
	return len(b.present.entries)
}

// Entries returns a copy of the map.
func (b *Branch) Entries() map[string]Entry {
	b.present.mu.Lock()
	defer b.present.mu.Unlock()
	return maps.Clone(b.present.entries)
}

// Range calls visit for each key, in no order, until it returns false. All it sees is of one moment. Changes wait
// meanwhile, and with them the connection: visit must be quick, and must not call the client or the branch.
func (b *Branch) Range(visit func(entry Entry) bool) {
	b.present.mu.Lock()
	defer b.present.mu.Unlock()
	for _, entry := range b.present.entries {
		if !visit(entry) {
			return
		}
	}
}

// Revision returns the highest revision of a change that is in it, or of the state that it was synced with.
func (b *Branch) Revision() Revision {
	b.present.mu.Lock()
	defer b.present.mu.Unlock()
	return b.present.revision
}

// Live reports whether this is the present state: false while the connection is lost and until what was missed is in it, and
// from the end on.
func (b *Branch) Live() bool { return b.present.live() }

// Changed returns a channel that is closed at the next change of anything that the branch says. Ask for it before looking,
// and no change is missed.
func (b *Branch) Changed() <-chan struct{} { return b.present.nextChange() }

// Wait waits until is returns true, which is asked now and after each change.
func (b *Branch) Wait(ctx context.Context, is func(b *Branch) bool) error {
	return b.present.wait(ctx, func() bool { return is(b) })
}

// Err returns why the branch has ended, and nil before that.
func (b *Branch) Err() error { return b.present.reason() }
