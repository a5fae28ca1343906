package nkv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"time"
	"unicode"
	"unicode/utf8"
)

// Option is an option of [Dial] and [Start].
type Option func(*options)

type options struct {
	clientUUID         string
	name               string
	token              string
	waitForServer      time.Duration
	requestTimeout     time.Duration
	connectTimeout     time.Duration
	heartbeat          time.Duration
	backoffMin         time.Duration
	backoffMax         time.Duration
	messageLenMax      int
	subscriptionLenMax int
	dial               func(ctx context.Context, network, address string) (net.Conn, error)
}

// WithClientUUID identifies the client across connections, at most 1,024 bytes. Random if not given. Two clients that
// have the same one take each other's subscriptions away.
func WithClientUUID(uuid string) Option { return func(o *options) { o.clientUUID = uuid } }

// WithName sets a name for people, which the server shows in its list of clients: at most 256 bytes, without control
// characters. It identifies nothing, and any number of clients may share it.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithToken sets the credential to show to the server.
func WithToken(token string) Option { return func(o *options) { o.token = token } }

// WithWaitForServer sets for how long [Dial] tries again while no server answers. Not at all if not given.
func WithWaitForServer(patience time.Duration) Option {
	return func(o *options) { o.waitForServer = patience }
}

// WithRequestTimeout sets how long a call takes at most whose context has no deadline. 5 s if not given; 0 means no limit.
func WithRequestTimeout(timeout time.Duration) Option {
	return func(o *options) { o.requestTimeout = timeout }
}

// WithConnectTimeout sets how long an attempt to connect takes at most, the greeting included. 5 s if not given.
func WithConnectTimeout(timeout time.Duration) Option {
	return func(o *options) { o.connectTimeout = timeout }
}

// WithHeartbeat sets after which silence the server is asked for a sign of life; after twice that the connection counts
// as lost. 15 s if not given. A server that keeps requests waiting gives a sign every few seconds.
func WithHeartbeat(interval time.Duration) Option {
	return func(o *options) { o.heartbeat = interval }
}

// WithBackoff sets how long to wait before connecting again: at least half of a span that doubles from shortest to longest,
// at random. 50 ms and 5 s if not given. The span begins anew once a connection has lasted 10 s.
func WithBackoff(shortest, longest time.Duration) Option {
	return func(o *options) { o.backoffMin, o.backoffMax = shortest, longest }
}

// WithMessageLenMax sets the longest message taken from the server, in bytes; a longer one ends the connection. 80 MiB
// if not given: an answer holds 64 MiB of keys and values at most.
func WithMessageLenMax(lenMax int) Option { return func(o *options) { o.messageLenMax = lenMax } }

// WithSubscriptionLenMax sets how many bytes may be kept for a subscription or watch: the keys that it knows, and its
// backlog or values, with 200 for each besides its own. One that needs more ends with [ErrTooMuch]. 1 GiB if not given.
func WithSubscriptionLenMax(lenMax int) Option {
	return func(o *options) { o.subscriptionLenMax = lenMax }
}

// WithDialer sets what opens connections, such as a tunnel. The network is "tcp" or "unix".
func WithDialer(dial func(ctx context.Context, network, address string) (net.Conn, error)) Option {
	return func(o *options) { o.dial = dial }
}

func newOptions(given []Option) (options, error) {
	o := options{
		requestTimeout:     5 * time.Second,
		connectTimeout:     5 * time.Second,
		heartbeat:          15 * time.Second,
		backoffMin:         50 * time.Millisecond,
		backoffMax:         5 * time.Second,
		messageLenMax:      80 << 20,
		subscriptionLenMax: 1 << 30,
		dial:               (&net.Dialer{}).DialContext,
	}
	for _, option := range given {
		option(&o)
	}
	if o.clientUUID == "" {
		var random [16]byte
		if _, err := rand.Read(random[:]); err != nil {
			return o, &Error{Kind: ErrCannotConnect, Message: "no randomness for the client's name", Err: err}
		}
		o.clientUUID = hex.EncodeToString(random[:])
	}
	// A pause of nothing would never grow.
	o.backoffMin = max(o.backoffMin, time.Millisecond)
	o.backoffMax = max(o.backoffMax, o.backoffMin)
	o.heartbeat = max(o.heartbeat, time.Millisecond)
	return o, o.check()
}

func (o *options) check() error {
	for _, text := range []struct {
		name, value string
		lenMax      int
	}{{"client UUID", o.clientUUID, 1024}, {"name", o.name, 256}, {"token", o.token, 1 << 20}} {
		what := ""
		switch {
		case !utf8.ValidString(text.value):
			what = "is not UTF-8"
		case len(text.value) > text.lenMax:
			what = fmt.Sprintf("has more than %d bytes", text.lenMax)
		}
		if text.name == "name" {
			for _, char := range text.value {
				if unicode.IsControl(char) {
					what = "has a control character"
				}
			}
		}
		if what != "" {
			return &Error{Kind: ErrInvalidOption, Message: "the " + text.name + " " + what}
		}
	}
	return nil
}

// PutOption is an option of [Client.Put].
type PutOption func(*putOptions)

type putOptions struct {
	ifRevision *Revision
	ttl        *time.Duration
}

// IfRevision makes a put conditional: only if the key is at this revision. The zero [Revision] means: only if there is no
// such key.
func IfRevision(revision Revision) PutOption {
	return func(o *putOptions) { o.ifRevision = &revision }
}

// IfAbsent makes a put conditional: only if there is no such key.
func IfAbsent() PutOption { return IfRevision(Revision{}) }

// TTL makes the value end by itself after this time, which is rounded up to milliseconds.
func TTL(ttl time.Duration) PutOption { return func(o *putOptions) { o.ttl = &ttl } }

// PageOptions say which part of the keys a page is to have.
type PageOptions struct {
	// Limit is the largest number of keys; 0 leaves it to the server.
	Limit int
	// After leaves out all keys up to this one, which need not exist, in key order.
	After string
}

// SubscribeOption is an option of [Client.Subscribe].
type SubscribeOption func(*subscribeOptions)

type subscribeOptions struct {
	also       []string
	exact      bool
	noSnapshot bool
}

// Also subscribes to these patterns too, as one stream: a change that several cover comes once, and [Synced] comes once all
// have had their present state. With the end of one, such as by [ErrReplaced], the subscription ends.
func Also(patterns ...string) SubscribeOption {
	return func(o *subscribeOptions) { o.also = append(o.also, patterns...) }
}

// Exact subscribes to a key alone, or to several, without what is below them.
func Exact() SubscribeOption { return func(o *subscribeOptions) { o.exact = true } }

// WithoutSnapshot leaves out the present state: only what changes after the call has returned is delivered.
func WithoutSnapshot() SubscribeOption { return func(o *subscribeOptions) { o.noSnapshot = true } }
