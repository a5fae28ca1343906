package nkv

import (
	"container/list"
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// healthy is how long a connection must last to end a row of failures.
const healthy = 10 * time.Second

// Client is a connection to a server that is made again whenever it is lost. Any number of goroutines may use it.
type Client struct {
	options options
	network string
	address string
	ctx     context.Context
	cancel  context.CancelFunc
	wake    chan struct{}
	lastID  atomic.Uint64
	// valueMax is the longest value that the server takes, as far as is known.
	valueMax atomic.Uint64

	mu       sync.Mutex
	isClosed bool
	link     *link
	trouble  error      // why there is no link
	seen     seen       // the next server must have it too
	queue    *list.List // of calls that wait for a link
	hub      hub
}

// seen is the epoch of the data and the highest revision that any message of it had; zero before the first.
type seen struct {
	epoch    string
	revision uint64
}

// text returns the form of the field `seen` of a Connect; empty if nothing was seen.
func (s seen) text() string {
	if s.epoch == "" {
		return ""
	}
	return s.epoch + "-" + strconv.FormatUint(s.revision, 10)
}

// note records the revisions of a message.
func (s *seen) note(epoch string, body *body) {
	if body.Revision == nil && len(body.Revisions) == 0 {
		return
	}
	if s.epoch != epoch {
		*s = seen{epoch: epoch}
	}
	if body.Revision != nil {
		s.revision = max(s.revision, *body.Revision)
	}
	for _, revision := range body.Revisions {
		s.revision = max(s.revision, revision)
	}
}

// Dial connects to a server. The address is host:port, nkv://host:port, unix:PATH or /PATH; the port is 4222 if not given.
//
// The context counts for connecting alone. The error is [ErrInvalidAddress], [ErrInvalidOption] or [ErrCannotConnect].
func Dial(ctx context.Context, addr string, opts ...Option) (*Client, error) {
	c, err := newClient(addr, opts)
	if err != nil {
		return nil, within("dial", "", err)
	}
	deadline := time.Now().Add(c.options.waitForServer)
	for failures := 0; ; failures++ {
		l, err := openLink(ctx, c.network, c.address, "", &c.options)
		if err == nil {
			c.run(l)
			return c, nil
		}
		rest := time.Until(deadline)
		if rest <= 0 || ctx.Err() != nil {
			c.cancel()
			return nil, within("dial", "", err)
		}
		sleep(ctx, min(c.pause(failures), rest))
	}
}

// Start returns a client that connects by itself, whether the server is there already or not. Calls wait for the connection
// within their own limits. The error is [ErrInvalidAddress] or [ErrInvalidOption].
func Start(addr string, opts ...Option) (*Client, error) {
	c, err := newClient(addr, opts)
	if err != nil {
		return nil, within("start", "", err)
	}
	c.run(nil)
	return c, nil
}

func newClient(addr string, opts []Option) (*Client, error) {
	network, address, err := parseAddress(addr)
	if err != nil {
		return nil, err
	}
	options, err := newOptions(opts)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Client{options: options, network: network, address: address, ctx: ctx, cancel: cancel}
	c.wake = make(chan struct{}, 1)
	c.queue = list.New()
	c.hub = hub{client: c, wires: map[string]*wire{}}
	c.valueMax.Store(^uint64(0))
	return c, nil
}

// ClientUUID returns what identifies the client.
func (c *Client) ClientUUID() string { return c.options.clientUUID }

// Connected reports whether there is a connection now.
func (c *Client) Connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.link != nil && c.link.err == nil
}

// StaleSince reports whether the server says that what it shows may be old, and since when: it does not see its engine, or not in
// time, and writes may be refused. It is false without a connection.
func (c *Client) StaleSince() (since time.Time, isStale bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == nil || c.link.err != nil {
		return time.Time{}, false
	}
	return c.link.stale, !c.link.stale.IsZero()
}

// Close closes the connection. Calls that wait end with [ErrClosed], or a write that was sent with
// [ErrOutcomeUnknown]; subscriptions and watches end. It returns at once, also while the client connects, and always nil.
func (c *Client) Close() error {
	c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isClosed {
		return nil
	}
	c.isClosed = true
	if c.link != nil {
		c.link.fail(closedError())
		for _, call := range c.link.pending {
			c.drop(call, closedError())
		}
	}
	for place := c.queue.Front(); place != nil; place = place.Next() {
		place.Value.(*call).finish(result{err: closedError()})
	}
	c.queue.Init()
	c.hub.endAll(closedError())
	return nil
}

// drop ends a call that was sent, because the connection is lost.
func (c *Client) drop(call *call, cause error) {
	if call.kind == callWrite {
		call.finish(result{err: unknownError(cause)})
	} else {
		call.finish(result{err: cause})
	}
}

// run serves in the background, with a link that is there already or without.
func (c *Client) run(l *link) {
	if l != nil {
		c.attach(l)
	}
	go func() {
		for failures := 0; ; {
			if l == nil {
				if l = c.connect(&failures); l == nil {
					return // closed
				}
				c.attach(l)
			}
			began := time.Now()
			c.serve(l)
			if time.Since(began) >= healthy {
				failures = 0
			}
			l = nil
			sleep(c.ctx, c.pause(failures))
			failures++
		}
	}()
}

// connect returns nil if the client is closed.
func (c *Client) connect(failures *int) *link {
	for c.ctx.Err() == nil {
		c.mu.Lock()
		seen := c.seen.text()
		c.mu.Unlock()
		l, err := openLink(c.ctx, c.network, c.address, seen, &c.options)
		if err == nil {
			return l
		}
		c.mu.Lock()
		c.trouble = err
		c.mu.Unlock()
		sleep(c.ctx, c.pause(*failures))
		*failures++
	}
	return nil
}

// pause is how long to wait after a number of failures: at least half of a span that doubles.
func (c *Client) pause(failures int) time.Duration {
	span := c.options.backoffMin
	for ; failures > 0 && span < c.options.backoffMax; failures-- {
		span *= 2
	}
	half := min(span, c.options.backoffMax) / 2
	return half + rand.N(half+1)
}

func sleep(ctx context.Context, pause time.Duration) {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (c *Client) wakeWriter() {
	select {
	case c.wake <- struct{}{}:
	default: // it is to be woken already
	}
}

// attach makes a link the present one: everything is subscribed again, then come the calls that wait.
func (c *Client) attach(l *link) {
	c.valueMax.Store(l.valueMax)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isClosed {
		l.fail(closedError())
		return
	}
	c.link, c.trouble = l, nil
	if l.beginsAnew || l.epoch != c.seen.epoch {
		c.seen = seen{}
	}
	l.sign()
	l.beat = time.AfterFunc(c.options.heartbeat, func() { c.beat(l) })
	c.hub.attach(l)
	c.wakeWriter()
}

// serve reads until the link is lost, while another goroutine writes.
func (c *Client) serve(l *link) {
	writer := make(chan struct{})
	go func() {
		defer close(writer)
		c.write(l)
	}()
	for {
		message, err := l.in.next()
		c.mu.Lock()
		if err == nil && l.err == nil {
			err = c.receive(l, message)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			l.fail(&Error{Kind: ErrCannotConnect, Message: "connection lost", Err: err})
		}
		isDead := l.err != nil
		c.mu.Unlock()
		if isDead {
			break
		}
	}
	<-writer
	c.detach(l)
}

// write sends what waits until the link is lost.
func (c *Client) write(l *link) {
	var frames [][]byte
	for {
		frames = c.take(l, frames[:0])
		if len(frames) == 0 {
			select {
			case <-c.wake:
				continue
			case <-l.dead:
				return
			}
		}
		written, err := l.write(frames)
		c.mu.Lock()
		l.written += written
		if err != nil {
			// What the server had answered before is still read.
			l.isBroken = true
			_ = l.conn.SetReadDeadline(time.Now().Add(lingering))
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
	}
}

// take registers calls as sent, up to a number of bytes, and returns what is to be written.
func (c *Client) take(l *link, frames [][]byte) [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.err != nil {
		return frames
	}
	length := 0
	var small []byte // frames that are joined to be written at once
	add := func(ask *call) {
		l.register(ask)
		length += len(ask.frame)
		if len(ask.frame) < batchLen/4 {
			small = append(small, ask.frame...)
			return
		}
		if len(small) > 0 {
			frames, small = append(frames, small), nil
		}
		frames = append(frames, ask.frame)
	}
	for _, ask := range l.controls {
		add(ask)
	}
	l.controls = nil
	for length < batchLen {
		front := c.queue.Front()
		if front == nil {
			break
		}
		ask := front.Value.(*call)
		c.queue.Remove(front)
		if ask.epoch != "" && ask.epoch != l.epoch {
			what := "the server's data is of another epoch than the revision of the condition: read the key anew"
			ask.finish(result{err: &Error{Kind: ErrOtherEpoch, Message: what}})
			continue
		}
		add(ask)
	}
	if len(small) > 0 {
		frames = append(frames, small)
	}
	return frames
}

// control sends a request of the client's own. It is called with the lock held.
func (c *Client) control(l *link, ask *call) {
	l.controls = append(l.controls, ask)
	c.wakeWriter()
}

func (c *Client) newControl(kind callKind, frame func(id uint64) []byte) *call {
	id := c.lastID.Add(1)
	return &call{id: id, kind: kind, frame: frame(id), done: make(chan result, 1)}
}

// beat judges the silence of the server.
func (c *Client) beat(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.err != nil {
		return
	}
	heartbeat, silence := c.options.heartbeat, l.silence()
	if silence < heartbeat {
		l.beat.Reset(heartbeat - silence)
		return
	}
	// A server that gives no signs of life may be busy with the first request that is due, while its caller has the patience.
	isPatient := false
	if front := l.order.Front(); front != nil && l.patience == 0 {
		first := front.Value.(*call)
		isPatient = first.isUser() && first.state == callSent
	}
	switch {
	case len(l.pending) == 0:
		c.control(l, c.newControl(callOther, func(id uint64) []byte { return newRequest("Health", id).end() }))
	case silence >= max(2*heartbeat, l.patience) && !isPatient:
		err := &Error{Kind: ErrTimeout, Message: "nothing heard for " + silence.Round(time.Millisecond).String()}
		l.fail(&Error{Kind: ErrCannotConnect, Message: "connection lost", Err: err})
		return
	}
	l.beat.Reset(heartbeat)
}

// detach sorts out what becomes of the calls of a lost link: what the socket took nothing of and reads are sent again, in
// their order.
func (c *Client) detach(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == l {
		c.link, c.trouble = nil, l.err
	}
	for place := l.order.Back(); place != nil; place = place.Prev() {
		call := place.Value.(*call)
		switch {
		case !call.isUser() || call.state == callDone:
		case c.isClosed:
			c.drop(call, closedError())
		case call.kind == callRead || call.start >= l.written:
			call.state = callWaiting
			call.place = c.queue.PushFront(call)
		default:
			call.finish(result{err: unknownError(l.err)})
		}
	}
	l.order.Init()
	l.pending, l.controls, l.hellos = nil, nil, nil
	if !c.isClosed {
		c.hub.detach()
	}
}

// receive handles a message. It is called with the lock held.
func (c *Client) receive(l *link, message message) error {
	body := message.body
	if body == nil && message.kind != "Hello" {
		return nil // a sign of life, or what a later version of the protocol says
	}
	if body != nil {
		c.seen.note(l.epoch, body)
	}
	switch message.kind {
	case "Hello":
		if len(l.hellos) == 0 {
			return protocolError("a 'Hello' that no subscription asked for")
		}
		ask := l.settle(l.hellos[0].id)
		ask.wire.asked--
		return c.hub.begin(ask.wire, ask.exact)
	case "Update":
		if len(body.values) != 1 || body.Revision == nil {
			return protocolError("an 'Update' without value or revision")
		}
		entry := Entry{Key: body.Key, Value: body.values[0], Revision: revisionIn(l.epoch, *body.Revision)}
		c.hub.update(entry, body.Skipped)
	case "Close":
		switch reason := Reason(body.Reason); reason {
		case Deleted, Expired:
			if body.Revision == nil {
				return protocolError("the end of a key without its revision")
			}
			c.hub.gone(body.Key, revisionIn(l.epoch, *body.Revision), reason, body.Skipped)
		case "unsubscribed":
			c.hub.ended(body.Key, ErrUnsubscribed)
		case "replaced":
			c.hub.ended(body.Key, ErrReplaced)
		}
	case "Synced":
		if body.Revision == nil {
			return protocolError("a 'Synced' without revision")
		}
		return c.hub.end(revisionIn(l.epoch, *body.Revision))
	case "Reset":
		known := c.hub.wires[body.Key]
		if known == nil {
			known = newWire(body.Key) // its subscription has just ended
		}
		return c.hub.begin(known, known.exact)
	case "Stale":
		l.stale = time.Time{}
		if body.SinceMS != nil {
			since := min(*body.SinceMS, uint64(math.MaxInt64/time.Millisecond))
			l.stale = time.Now().Add(-time.Duration(since) * time.Millisecond)
		}
	case "Base", "Get", "List", "Trace", "Version", "Stats":
		return c.answer(l, message)
	}
	return nil
}

func (c *Client) answer(l *link, message message) error {
	body := message.body
	ask := l.settle(parseID(body.ID))
	if ask == nil {
		if body.Status == http.StatusOK {
			return protocolError("an answer to no request")
		}
		return answerError(body, l.epoch, false) // what a server says before it closes the connection
	}
	if body.Status == http.StatusOK && ask.isUser() && message.kind != answerKind(ask.request) {
		err := protocolError("a %q in answer to a %q", message.kind, ask.request)
		c.drop(ask, err)
		return err
	}
	switch ask.kind {
	case callSubscribe:
		if body.Status == http.StatusOK {
			return protocolError("an answer other than 'Hello' to a subscription")
		}
		ask.wire.asked--
		c.hub.refused(ask.wire, answerError(body, l.epoch, false), body.Status)
	case callWrite:
		if body.Status == http.StatusOK && body.Revision != nil && !isWildcard(ask.key) {
			c.hub.wrote(ask, revisionIn(l.epoch, *body.Revision))
		}
		ask.finish(result{body: body, epoch: l.epoch})
	default:
		ask.finish(result{body: body, epoch: l.epoch})
	}
	return nil
}

// answerKind is the kind of the answer to a request that was served.
func answerKind(request string) string {
	switch request {
	case "Put", "Delete", "Exists", "Health":
		return "Base"
	}
	return request
}

// parseID returns 0, the id of the greeting, for what is no id of ours.
func parseID(id []byte) uint64 {
	number := uint64(0)
	for _, digit := range id {
		if digit < '0' || digit > '9' || len(id) > 19 {
			return 0
		}
		number = number*10 + uint64(digit-'0')
	}
	return number
}
