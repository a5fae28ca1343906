package nkv

import (
	"container/list"
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// greetingLenMax is the longest answer to the greeting: until then it is not known who answers.
	greetingLenMax = 64 << 10
	// batchLen is how many bytes of requests are taken at a time. Later ones can still be taken back.
	batchLen = 64 << 10
	// chunkLen is how many bytes are given to the socket at a time.
	chunkLen = 256 << 10
	// slowWrite is the time from which on a write had to wait for the peer.
	slowWrite = 20 * time.Millisecond
	// lingering is how long a connection on which nothing can be sent is still read.
	lingering = time.Second
)

// link is one connection. Its fields below mu are guarded by the mutex of the client.
type link struct {
	conn  net.Conn
	in    *decoder
	epoch string
	// beginsAnew says that revisions from before say nothing, as in another epoch.
	beginsAnew bool
	valueMax   uint64
	features   []string
	patience   time.Duration
	// heard is when the peer last gave a sign of life, as nanoseconds since the start of the link.
	heard atomic.Int64
	start time.Time
	dead  chan struct{}

	// mu, that of the client, guards the rest.
	err      error // why it is dead
	isBroken bool  // nothing can be sent any more
	controls []*call
	pending  map[uint64]*call
	order    *list.List // of those pending, as they were sent
	hellos   []*call    // the subscribes that have no answer
	written  uint64     // bytes that the socket has taken
	encoded  uint64     // bytes that were given to the writer
	beat     *time.Timer
	lastRev  uint64    // the highest revision of a notification, outside snapshots
	stale    time.Time // since when what the server shows may be old
}

// signed is a connection that notes when bytes come.
type signed struct{ *link }

func (s signed) Read(into []byte) (int, error) {
	n, err := s.conn.Read(into)
	if n > 0 {
		s.sign()
	}
	return n, err
}

func (l *link) sign() { l.heard.Store(int64(time.Since(l.start))) }

func (l *link) silence() time.Duration {
	return time.Since(l.start) - time.Duration(l.heard.Load())
}

func (l *link) offers(feature string) bool { return slices.Contains(l.features, feature) }

// openLink connects and greets. The server is to have what was seen, if that is not empty.
func openLink(ctx context.Context, network, address, seen string, o *options) (*link, error) {
	cannot := func(err error) error {
		status := 0
		var known *Error
		if errors.As(err, &known) {
			status = known.Status
		}
		return &Error{Kind: ErrCannotConnect, Message: "to " + address, Status: status, Err: err}
	}
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, o.connectTimeout)
	defer cancel()
	conn, err := dialAbandonable(ctx, network, address, o)
	if err != nil {
		return nil, cannot(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	l := &link{conn: conn, start: time.Now(), dead: make(chan struct{}), pending: map[uint64]*call{}, order: list.New()}
	err = l.greet(seen, o)
	if !stop() { // the context ended, and has closed the connection
		err = context.Cause(ctx)
		if outer.Err() == nil {
			err = &Error{Kind: ErrTimeout, Message: "no answer within " + o.connectTimeout.String()}
		}
	}
	if err != nil {
		_ = conn.Close()
		return nil, cannot(err)
	}
	return l, nil
}

// dialAbandonable returns when the context ends, whatever the dialer does.
func dialAbandonable(ctx context.Context, network, address string, o *options) (net.Conn, error) {
	type dialed struct {
		conn net.Conn
		err  error
	}
	result := make(chan dialed, 1)
	go func() {
		conn, err := o.dial(ctx, network, address)
		result <- dialed{conn, err}
	}()
	select {
	case d := <-result:
		return d.conn, d.err
	case <-ctx.Done():
		go func() {
			if d := <-result; d.err == nil {
				_ = d.conn.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// features are what this client understands beyond the first version of the protocol.
var features = []string{"reset", "exact", "names", "alive", "stale"}

func (l *link) greet(seen string, o *options) error {
	r := newRequest("Connect", 0)
	r.text("client_uuid", o.clientUUID).text("values", "payload").texts("features", features)
	if o.name != "" {
		r.text("name", o.name)
	}
	if o.token != "" {
		r.text("token", o.token)
	}
	if seen != "" {
		r.text("seen", seen)
	}
	if _, err := l.conn.Write(r.end()); err != nil {
		return err
	}
	l.in = newDecoder(signed{l}, min(greetingLenMax, uint64(o.messageLenMax)))
	for {
		message, err := l.in.next()
		if err != nil {
			return err
		}
		if message.body == nil {
			continue // not known
		}
		body := message.body
		switch {
		case message.kind != "Base":
			return protocolError("a %q instead of an answer to the greeting", message.kind)
		case body.Status != http.StatusOK:
			return answerError(body, "", false)
		}
		l.in.lenMax = uint64(o.messageLenMax)
		l.epoch, l.features, l.beginsAnew = body.Epoch, body.Features, body.BeginsAnew
		l.valueMax = ^uint64(0)
		if body.MaxValue != nil {
			l.valueMax = *body.MaxValue
		}
		if body.PatienceMS != nil && l.offers("alive") {
			l.patience = time.Duration(min(*body.PatienceMS, uint64(24*time.Hour/time.Millisecond))) * time.Millisecond
		}
		return nil
	}
}

// fail ends the link. The first error counts. It is called with the lock held.
func (l *link) fail(err error) {
	if l.err != nil {
		return
	}
	l.err = err
	close(l.dead)
	_ = l.conn.Close()
	if l.beat != nil {
		l.beat.Stop()
	}
}

// register notes a call as sent. It is called with the lock held.
func (l *link) register(c *call) {
	c.state = callSent
	c.start = l.encoded
	l.encoded += uint64(len(c.frame))
	l.pending[c.id] = c
	c.place = l.order.PushBack(c)
	if c.kind == callSubscribe {
		l.hellos = append(l.hellos, c)
	}
}

// settle takes a call from those pending. It is called with the lock held.
func (l *link) settle(id uint64) *call {
	c := l.pending[id]
	if c == nil {
		return nil
	}
	delete(l.pending, id)
	l.order.Remove(c.place)
	c.place = nil
	if c.kind == callSubscribe {
		l.hellos = slices.DeleteFunc(l.hellos, func(other *call) bool { return other == c })
	}
	return c
}

// write gives frames to the socket, and returns how many bytes it took.
func (l *link) write(frames [][]byte) (uint64, error) {
	written := uint64(0)
	for _, frame := range frames {
		for len(frame) > 0 {
			chunk := frame[:min(len(frame), chunkLen)]
			began := time.Now()
			n, err := l.conn.Write(chunk)
			written += uint64(n)
			if err != nil {
				return written, err
			}
			if time.Since(began) > slowWrite {
				l.sign() // the peer took something that had to wait for it
			}
			frame = frame[n:]
		}
	}
	return written, nil
}
