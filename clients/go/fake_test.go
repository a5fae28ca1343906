package nkv_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	nkv "github.com/nkv-store/nkv/clients/go"
)

// fake is a server that does what a test says.
type fake struct {
	t        *testing.T
	listener net.Listener
	address  string
	mu       sync.Mutex
	conns    map[net.Conn]bool
	accepted int
	all      sync.WaitGroup
}

// peer is a connection of a client.
type peer struct {
	net.Conn
	in *bufio.Reader
	n  int // which connection it is, from 1 on
}

type ask struct {
	Type       string   `json:"type"`
	ID         uint64   `json:"id"`
	Key        string   `json:"key"`
	Len        *int     `json:"len"`
	IfRevision *uint64  `json:"if_revision"`
	TTLMS      *uint64  `json:"ttl_ms"`
	Snapshot   bool     `json:"snapshot"`
	Exact      bool     `json:"exact"`
	Features   []string `json:"features"`
	Seen       *string  `json:"seen"`
	line       string
	payload    string
}

// newFake serves each connection with serve, and closes it when serve returns.
func newFake(t *testing.T, serve func(p *peer)) *fake {
	t.Helper()
	f := &fake{t: t, conns: map[net.Conn]bool{}}
	f.listen("127.0.0.1:0", serve)
	t.Cleanup(f.stop)
	return f
}

func (f *fake) listen(address string, serve func(p *peer)) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		f.t.Fatal(err)
	}
	f.listener, f.address = listener, listener.Addr().String()
	f.all.Add(1)
	go func() {
		defer f.all.Done()
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.accepted++
			p := &peer{Conn: conn, in: bufio.NewReader(conn), n: f.accepted}
			f.conns[conn] = true
			f.mu.Unlock()
			f.all.Add(1)
			go func() {
				defer f.all.Done()
				defer f.forget(conn)
				serve(p)
			}()
		}
	}()
}

func (f *fake) forget(conn net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, conn)
	_ = conn.Close()
}

func (f *fake) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for conn := range f.conns {
		_ = conn.Close()
	}
}

func (f *fake) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.accepted
}

func (f *fake) stop() {
	_ = f.listener.Close()
	f.cut()
	f.all.Wait()
}

func (p *peer) read() (ask, error) {
	var a ask
	line, err := p.in.ReadString('\n')
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal([]byte(line), &a); err != nil {
		return a, err
	}
	a.line = strings.TrimSpace(line)
	if a.Len != nil {
		payload := make([]byte, *a.Len+1)
		if _, err := io.ReadFull(p.in, payload); err != nil {
			return a, err
		}
		a.payload = string(payload[:*a.Len])
	}
	return a, nil
}

func (p *peer) send(format string, args ...any) {
	_, _ = fmt.Fprintf(p, format+"\n", args...)
}

func (p *peer) ok(a ask, more string) {
	p.send(`{"Base":{"id":%d,"status":200,"message":"No Error"%s}}`, a.ID, more)
}

// value answers a Get.
func (p *peer) value(a ask, value string) {
	p.send(`{"Get":{"id":%d,"status":200,"message":"No Error","lens":[%d],"len":%d,"keys":[%q],"revisions":[1]}}`+"\n%s",
		a.ID, len(value), len(value), a.Key, value)
}

// greet answers the Connect.
func (p *peer) greet(epoch string) bool {
	a, err := p.read()
	if err != nil || a.Type != "Connect" {
		return false
	}
	p.welcome(a, epoch, "")
	return true
}

func (p *peer) welcome(a ask, epoch, more string) {
	const says = `,"server":"nkv","version":"1","protocol":1,"epoch":%q,"max_value":1048576,"features":["reset","exact"]`
	p.ok(a, fmt.Sprintf(says, epoch)+more)
}

// each greets, and serves one request after another, until serve returns false.
func each(serve func(p *peer, a ask) bool) func(p *peer) {
	return func(p *peer) {
		if !p.greet("e1") {
			return
		}
		for {
			a, err := p.read()
			if err != nil || !serve(p, a) {
				return
			}
		}
	}
}

// kind answers everything in the simplest way: a store that is empty, and takes all.
func kind(p *peer, a ask) bool {
	switch a.Type {
	case "Subscribe":
		p.send(`"Hello"`)
		p.send(`{"Synced":{"key":%q,"revision":1,"epoch":"e1"}}`, a.Key)
	case "Put":
		p.ok(a, `,"revision":7`)
	case "Get":
		p.value(a, "of "+a.Key)
	default:
		p.ok(a, "")
	}
	return true
}

func dial(t *testing.T, address string, options ...nkv.Option) *nkv.Client {
	t.Helper()
	options = append([]nkv.Option{nkv.WithBackoff(5*time.Millisecond, 50*time.Millisecond)}, options...)
	client, err := nkv.Dial(soon(t), address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// soon is a context that ends when the test has taken too long.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func in(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	context.AfterFunc(ctx, cancel)
	return ctx
}

func must[T any](t *testing.T) func(value T, err error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func isErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("the error is %v, want %v", err, want)
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > time.Minute {
			t.Fatal(what)
		}
	}
}

// noGoroutinesLeft is called first, and the function that it returns last.
func noGoroutinesLeft(t *testing.T) func() {
	base := runtime.NumGoroutine()
	return func() {
		t.Helper()
		eventually(t, "goroutines are left", func() bool { return runtime.NumGoroutine() <= base })
	}
}

// expect reads events, as text, without those of the connection.
func expect(t *testing.T, s *nkv.Subscription, want ...string) {
	t.Helper()
	for _, want := range want {
		got := ""
		for got == "" {
			event, err := s.Next(soon(t))
			if err != nil {
				t.Fatalf("%v, want %s", err, want)
			}
			got = eventOf(event)
		}
		if got != want {
			t.Fatalf("got %s, want %s", got, want)
		}
	}
}
