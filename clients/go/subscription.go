package nkv

import (
	"context"
	"errors"
	"sync"
	"time"
)

// Subscription is a stream of what happens to the keys that a pattern covers, or several do.
//
// First comes an [Update] for each present key, then [Synced], then changes as they happen. When the connection is lost,
// [Reconnecting] comes; once it is there again, [Connected], then what was missed as if it had just happened, then
// [Synced]. For one key, revisions only grow within an epoch, and nothing comes twice.
//
// A reader that falls behind gets the newest state of each key, and how many changes were skipped. It never holds up other
// subscriptions or calls.
//
// It is read with [Subscription.Events] or with [Subscription.Next], not with both.
type Subscription struct {
	following
	queue  *queue
	once   sync.Once
	events chan Event
}

// following is what subscriptions and watches have in common.
type following struct {
	client *Client
	local  *local
	ctx    context.Context
	stop   func() bool
	ended  chan struct{} // closed by Close
	close  sync.Once
	toEnd  func(err error)
}

// end ends it from the program's side.
func (f *following) end(err error) {
	f.close.Do(func() {
		f.client.mu.Lock()
		for _, l := range f.local.group.locals {
			f.client.hub.remove(l)
		}
		f.client.mu.Unlock()
		f.toEnd(err)
		close(f.ended)
	})
}

// Close ends it, and its subscription at the server. It returns at once, and always nil.
func (f *following) Close() error {
	f.stop()
	f.end(closedError())
	return nil
}

// follow adds a local subscription with its group, and waits until all are ready. The context counts for their whole life.
func (c *Client) follow(ctx context.Context, op string, l *local, f *following) error {
	*f = following{client: c, local: l, ctx: ctx, ended: make(chan struct{}), toEnd: l.sink.end}
	if q, ok := l.sink.(*queueSink); ok {
		f.toEnd = func(err error) { q.queue.end(err, true) }
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
		return within(op, l.pattern, closedError())
	}
	var all []chan error
	for _, one := range l.group.locals {
		all = append(all, one.ready)
		c.hub.add(one)
	}
	c.mu.Unlock()
	var err error
	for _, ready := range all {
		select {
		case err = <-ready:
		case <-ctx.Done():
			err = c.gaveUp(ctx, false, limit)
		case <-expired:
			err = c.gaveUp(ctx, false, limit)
		}
		if err != nil {
			break
		}
	}
	if err == nil && ctx.Err() != nil {
		err = c.gaveUp(ctx, false, limit)
	}
	if err != nil {
		f.end(err)
		return within(op, l.pattern, err)
	}
	f.stop = context.AfterFunc(ctx, func() { f.end(context.Cause(ctx)) })
	return nil
}

// queueSink is the client's side of a queue: one pattern of those that feed it.
type queueSink struct {
	*queue
	feed *feed
	has  *Revision // what it was synced with on this connection
}

// feed is what the patterns that feed a queue have in common. The lock of the client guards it.
type feed struct {
	sinks  []*queueSink
	isLost bool
}

// synced says that all are synced once the last of them is, up to the lowest of their revisions.
func (s *queueSink) synced(revision Revision, isFirst bool) {
	if !isFirst {
		return
	}
	s.has = &revision
	lowest := revision
	for _, one := range s.feed.sinks {
		if one.has == nil {
			return
		}
		if one.has.number < lowest.number {
			lowest = *one.has
		}
	}
	s.postSynced(lowest)
}

func (s *queueSink) beginAnew() {}

func (s *queueSink) lost(isReady bool) {
	s.has = nil
	if isReady && !s.feed.isLost {
		s.feed.isLost = true
		s.connection(Reconnecting{})
	}
}

func (s *queueSink) connected(epoch string) {
	if s.feed.isLost {
		s.feed.isLost = false
		s.connection(Connected{Epoch: epoch})
	}
}

func (s *queueSink) end(err error) { s.queue.end(err, errors.Is(err, ErrClosed)) }

// Subscribe subscribes to a key and all below it, to all below it ("a.*"), or to everything ("*"), and waits until the
// server has accepted it. The present state comes first. [Also] adds other patterns.
//
// The context counts for the whole life of the subscription: it ends when the context does, or by
// [Subscription.Close].
func (c *Client) Subscribe(ctx context.Context, pattern string, opts ...SubscribeOption) (*Subscription, error) {
	const op = "subscribe"
	var o subscribeOptions
	for _, option := range opts {
		option(&o)
	}
	check := checkPattern
	if o.exact {
		check = checkKey
	}
	patterns := append([]string{pattern}, o.also...)
	for _, pattern := range patterns {
		if err := check(pattern); err != nil {
			return nil, within(op, pattern, err)
		}
	}
	s := &Subscription{queue: newQueue()}
	all, feed := &group{}, &feed{}
	for _, pattern := range disjoint(patterns, o.exact) {
		sink := &queueSink{queue: s.queue, feed: feed}
		feed.sinks = append(feed.sinks, sink)
		l := newLocal(pattern, o.exact, c.options.subscriptionLenMax, sink)
		l.noSnapshot, l.atSynced, l.group = o.noSnapshot, o.noSnapshot, all
		all.locals = append(all.locals, l)
	}
	if err := c.follow(ctx, op, all.locals[0], &s.following); err != nil {
		return nil, err
	}
	return s, nil
}

// Pattern returns what it covers; of several patterns, the first.
func (s *Subscription) Pattern() string { return s.local.pattern }

// Patterns returns what it covers: the patterns that were asked for, without those that another one includes.
func (s *Subscription) Patterns() []string {
	var patterns []string
	for _, l := range s.local.group.locals {
		patterns = append(patterns, l.pattern)
	}
	return patterns
}

// Next waits for the next event. A wait that the context ends loses no event. Once the subscription has ended, the error is
// that of [Subscription.Err].
func (s *Subscription) Next(ctx context.Context) (Event, error) { return s.queue.next(ctx) }

// Events returns the channel on which events come. It is closed when the subscription has ended; [Subscription.Err] says
// why. The channel has no buffer: what waits is conflated until it is read. Close the subscription to stop before that.
func (s *Subscription) Events() <-chan Event {
	s.once.Do(func() {
		s.events = make(chan Event)
		go s.pump()
	})
	return s.events
}

func (s *Subscription) pump() {
	defer close(s.events)
	for {
		event, err := s.queue.next(context.Background())
		if err != nil {
			return
		}
		select {
		case s.events <- event:
		case <-s.ended:
			return
		}
	}
}

// Err returns why the subscription has ended, and nil before that: [ErrClosed], the error of its context, [ErrReplaced],
// [ErrUnsubscribed], [ErrRefused] or [ErrTooMuch].
func (s *Subscription) Err() error { return s.queue.reason() }
