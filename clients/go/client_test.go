package nkv_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	nkv "github.com/nkv-store/nkv/clients/go"
)

func TestCallsShareOneConnectionAndAnswersAreMatchedByID(t *testing.T) {
	const calls = 100
	f := newFake(t, func(p *peer) {
		p.greet("e1")
		var asks []ask
		for len(asks) < calls { // none is answered before all have come
			a, err := p.read()
			if err != nil {
				return
			}
			asks = append(asks, a)
		}
		slices.Reverse(asks)
		for _, a := range asks {
			p.value(a, "of "+a.Key)
		}
		_, _ = p.read()
	})
	client := dial(t, f.address)
	getAll(t, client, calls)
	if f.count() != 1 {
		t.Fatalf("%d connections", f.count())
	}
}

// getAll gets keys at once, each of which is to have its own value.
func getAll(t *testing.T, client *nkv.Client, calls int) {
	t.Helper()
	var all sync.WaitGroup
	for i := range calls {
		all.Add(1)
		go func() {
			defer all.Done()
			key := fmt.Sprintf("k%d", i)
			entry, ok, err := client.Get(soon(t), key)
			if err != nil || !ok || string(entry.Value) != "of "+key {
				t.Errorf("%s: %q, %v, %v", key, entry.Value, ok, err)
			}
		}()
	}
	all.Wait()
}

// Clients that matched answers by their order gave each caller the answer of another one after a cut.
func TestAnswersDoNotShiftWhenTheConnectionIsCutWithinOne(t *testing.T) {
	f := newFake(t, func(p *peer) {
		answered := 0
		each(func(p *peer, a ask) bool {
			if answered++; p.n == 1 && answered == 5 {
				_, _ = p.Write([]byte(`{"Get":{"id":`))
				return false
			}
			return kind(p, a)
		})(p)
	})
	client := dial(t, f.address)
	getAll(t, client, 10)
	getAll(t, client, 10)
}

func TestAPutThatTimedOutBeforeItWasSentIsNeverSent(t *testing.T) {
	var puts atomic.Int32
	serve := each(func(p *peer, a ask) bool {
		if a.Type == "Put" {
			puts.Add(1)
		}
		return kind(p, a)
	})
	f := newFake(t, serve)
	client := dial(t, f.address)
	f.stop()
	eventually(t, "the client does not notice", func() bool { return !client.Connected() })
	_, err := client.Put(in(50*time.Millisecond), "k", []byte("old"))
	isErr(t, err, nkv.ErrTimeout)
	isErr(t, err, context.DeadlineExceeded)
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err = client.Put(ctx, "k", []byte("old"))
	isErr(t, err, context.Canceled)
	f.listen(f.address, serve)
	must[struct{}](t)(struct{}{}, client.Health(soon(t)))
	time.Sleep(100 * time.Millisecond)
	if puts.Load() != 0 {
		t.Fatal("it was sent")
	}
	must[nkv.Revision](t)(client.Put(soon(t), "k", nil))
}

func TestAPutThatWasSentIsNotRepeatedAndAReadIs(t *testing.T) {
	var puts atomic.Int32
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type == "Put" {
			puts.Add(1)
			return false
		}
		return p.n > 2 && kind(p, a)
	}))
	client := dial(t, f.address)
	_, err := client.Put(soon(t), "k", []byte("v"))
	isErr(t, err, nkv.ErrOutcomeUnknown)
	entry, ok, err := client.Get(soon(t), "k")
	if err != nil || !ok || string(entry.Value) != "of k" || puts.Load() != 1 {
		t.Fatal(entry, ok, err, puts.Load())
	}
}

func TestKeysThatJSONWouldChangeAreRefusedByName(t *testing.T) {
	var requests atomic.Int32
	f := newFake(t, each(func(p *peer, a ask) bool {
		requests.Add(1)
		return kind(p, a)
	}))
	client := dial(t, f.address)
	ctx := soon(t)
	bad := []string{"\xff", "a\xffb", "a.\xc3", "\xed\xa0\x80", "a\x00", "a b", "a\u0085b", "a\u2028b", "", ".", "a.", ".a", "a..b", "*",
		"a.*", "a*", "a.*.b", strings.Repeat("k", 1025)}
	for _, key := range bad {
		_, err := client.Put(ctx, key, nil)
		isErr(t, err, nkv.ErrInvalidKey)
		_, _, err = client.Get(ctx, key)
		isErr(t, err, nkv.ErrInvalidKey)
		_, err = client.DeleteIf(ctx, key, nkv.Revision{})
		isErr(t, err, nkv.ErrInvalidKey)
		_, err = client.Watch(ctx, key)
		isErr(t, err, nkv.ErrInvalidKey)
		if strings.HasSuffix(key, "*") && key != "a*" {
			continue
		}
		_, err = client.Subscribe(ctx, key)
		isErr(t, err, nkv.ErrInvalidKey)
		_, err = client.Delete(ctx, key)
		isErr(t, err, nkv.ErrInvalidKey)
		_, err = client.List(ctx, key)
		isErr(t, err, nkv.ErrInvalidKey)
	}
	for _, key := range []string{"a", "a\ufffdb", "é.-rf", "CON", `\".<&>`, strings.Repeat("k", 1024)} {
		must[nkv.Revision](t)(client.Put(ctx, key, nil))
	}
	if requests.Load() != 6 {
		t.Fatalf("%d requests", requests.Load())
	}
}

func TestZeroAndEmptyAreGivenValues(t *testing.T) {
	var lines sync.Map
	f := newFake(t, each(func(p *peer, a ask) bool {
		lines.Store(a.Key, a.line)
		return kind(p, a)
	}))
	client := dial(t, f.address)
	ctx := soon(t)
	must[nkv.Revision](t)(client.Put(ctx, "absent", nil, nkv.IfAbsent()))
	must[nkv.Revision](t)(client.Put(ctx, "zero", []byte{}, nkv.IfRevision(nkv.Revision{})))
	must[nkv.Revision](t)(client.Put(ctx, "ttl", nil, nkv.TTL(time.Microsecond)))
	must[nkv.DeleteResult](t)(client.DeleteIf(ctx, "delete", nkv.Revision{}))
	for key, part := range map[string]string{
		"absent": `"if_revision":0,"len":0}`, "zero": `"if_revision":0,"len":0}`, "ttl": `"ttl_ms":1,`, "delete": `"if_revision":0}`,
	} {
		line, _ := lines.Load(key)
		if !strings.Contains(fmt.Sprint(line), part) {
			t.Errorf("%s is not in %v", part, line)
		}
	}
	_, err := client.Put(ctx, "k", nil, nkv.TTL(0))
	isErr(t, err, nkv.ErrInvalidOption)
}

func TestARevisionOfAnotherEpochNeverMatches(t *testing.T) {
	var conditional atomic.Int32
	f := newFake(t, func(p *peer) {
		p.greet(fmt.Sprintf("e%d", p.n))
		for {
			a, err := p.read()
			if err != nil {
				return
			}
			if a.IfRevision != nil {
				conditional.Add(1)
			}
			kind(p, a)
		}
	})
	client := dial(t, f.address)
	ctx := soon(t)
	old := must[nkv.Revision](t)(client.Put(ctx, "k", nil))
	f.cut()
	eventually(t, "no second connection", func() bool { return f.count() == 2 && client.Connected() })
	_, err := client.Put(ctx, "k", nil, nkv.IfRevision(old))
	isErr(t, err, nkv.ErrOtherEpoch)
	_, err = client.DeleteIf(ctx, "k", old)
	isErr(t, err, nkv.ErrOtherEpoch)
	young := must[nkv.Revision](t)(client.Put(ctx, "k", nil))
	if conditional.Load() != 0 || young == old || young.After(old) || old.After(young) || young.Number() != old.Number() {
		t.Fatal(conditional.Load(), young, old)
	}
	must[nkv.Revision](t)(client.Put(ctx, "k", nil, nkv.IfRevision(young)))
	must[nkv.Revision](t)(client.Put(ctx, "k", nil, nkv.IfAbsent()))
}

func TestErrorsSayWhatTheServerSaid(t *testing.T) {
	status := map[string]string{
		"conflict": `409,"message":"Conflict","revision":5`, "large": `413,"message":"too large"`, "full": `507,"message":"disk full"`,
		"stopping": `503,"message":"stopping"`, "absent": `404,"message":"Not Found"`,
	}
	f := newFake(t, each(func(p *peer, a ask) bool {
		p.send(`{"Base":{"id":%d,"status":%s}}`, a.ID, status[a.Key])
		return true
	}))
	client := dial(t, f.address)
	ctx := soon(t)
	_, err := client.Put(ctx, "conflict", nil)
	isErr(t, err, nkv.ErrConflict)
	var known *nkv.Error
	if !errors.As(err, &known) || known.Revision.Number() != 5 || known.Op != "put" || known.Key != "conflict" {
		t.Fatal(err)
	}
	for key, kind := range map[string]error{"large": nkv.ErrRefused, "full": nkv.ErrRefused, "stopping": nkv.ErrOutcomeUnknown} {
		_, err := client.Put(ctx, key, nil)
		isErr(t, err, kind)
		if !errors.As(err, &known) || !strings.HasPrefix(status[key], fmt.Sprint(known.Status)) || known.Retryable() {
			t.Fatal(err)
		}
	}
	_, _, err = client.Get(ctx, "stopping")
	if !errors.As(err, &known) || !known.Retryable() {
		t.Fatal(err)
	}
	deleted, err := client.Delete(ctx, "absent")
	_, ok, errGet := client.Get(ctx, "absent")
	exists, errExists := client.Exists(ctx, "absent")
	if deleted.Count != 0 || ok || exists || errors.Join(err, errGet, errExists) != nil {
		t.Fatal(deleted, ok, exists, err, errGet, errExists)
	}
	_, err = client.Put(ctx, "k", make([]byte, 1<<20+1))
	isErr(t, err, nkv.ErrRefused)
}

func TestNoServerIsSaidAtOnce(t *testing.T) {
	f := newFake(t, func(*peer) {})
	f.stop()
	_, err := nkv.Dial(soon(t), f.address)
	isErr(t, err, nkv.ErrCannotConnect)
	refusing := newFake(t, func(p *peer) {
		a, _ := p.read()
		p.send(`{"Base":{"id":%d,"status":401,"message":"no"}}`, a.ID)
	})
	_, err = nkv.Dial(soon(t), refusing.address)
	isErr(t, err, nkv.ErrCannotConnect)
	var known *nkv.Error
	if !errors.As(err, &known) || known.Status != 401 {
		t.Fatal(err)
	}
	silent := newFake(t, func(p *peer) { _, _ = p.read(); _, _ = p.read() })
	_, err = nkv.Dial(soon(t), silent.address, nkv.WithConnectTimeout(50*time.Millisecond))
	isErr(t, err, nkv.ErrCannotConnect)
	isErr(t, err, nkv.ErrTimeout)
	web := newFake(t, func(p *peer) { p.send("HTTP/1.1 400 Bad Request\r\n\r") })
	_, err = nkv.Dial(soon(t), web.address)
	isErr(t, err, nkv.ErrCannotConnect)
	isErr(t, err, nkv.ErrProtocol)
}

func TestAttemptsGrowRarerAndAreJittered(t *testing.T) {
	for name, serve := range map[string]func(p *peer){
		"closed at once":      func(*peer) {},
		"503 and closed":      func(p *peer) { p.send(`{"Base":{"id":"","status":503,"message":"too many"}}`) },
		"greeted, and closed": func(p *peer) { p.greet("e1") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, serve)
			client, err := nkv.Start(f.address, nkv.WithBackoff(5*time.Millisecond, 500*time.Millisecond))
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			if n := f.count(); n < 3 || n > 15 {
				t.Fatalf("%d attempts", n)
			}
			_ = client.Close()
		})
	}
}

func TestCloseReturnsAtOnceInEveryState(t *testing.T) {
	release := make(chan struct{})
	// The goroutines are counted before the first dialer is stuck.
	left := noGoroutinesLeft(t)
	stuck := func(context.Context, string, string) (net.Conn, error) { // as a resolver that knows no context
		<-release
		return nil, errors.New("released")
	}
	silent := newFake(t, func(p *peer) { _, _ = p.read(); _, _ = p.read() })
	gone := newFake(t, func(*peer) {})
	gone.stop()
	began := time.Now()
	_, err := nkv.Dial(in(50*time.Millisecond), "db1", nkv.WithDialer(stuck))
	isErr(t, err, context.DeadlineExceeded)
	if took := time.Since(began); took > 10*time.Second {
		t.Fatalf("it took %v", took)
	}
	for name, start := range map[string]func() (*nkv.Client, error){
		"name":     func() (*nkv.Client, error) { return nkv.Start("db1", nkv.WithDialer(stuck)) },
		"greeting": func() (*nkv.Client, error) { return nkv.Start(silent.address) },
		"backoff":  func() (*nkv.Client, error) { return nkv.Start(gone.address, nkv.WithBackoff(time.Hour, time.Hour)) },
		"connect":  func() (*nkv.Client, error) { return nkv.Start("192.0.2.1:4222") },
	} {
		client := must[*nkv.Client](t)(start())
		time.Sleep(50 * time.Millisecond)
		ended := make(chan error, 3)
		go func() { _, err := client.Put(context.Background(), "k", nil); ended <- err }()
		go func() { _, _, err := client.Get(context.Background(), "k"); ended <- err }()
		go func() { _, err := client.Subscribe(context.Background(), "k"); ended <- err }()
		time.Sleep(20 * time.Millisecond)
		began := time.Now()
		_ = client.Close()
		for range 3 {
			isErr(t, <-ended, nkv.ErrClosed)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("%s: it took %v", name, took)
		}
		_, err := client.Put(soon(t), "k", nil)
		isErr(t, err, nkv.ErrClosed)
	}
	close(release)
	silent.stop()
	left()
}

func TestCallsThatWereSentEndWhenTheClientIsClosed(t *testing.T) {
	var asked atomic.Int64
	f := newFake(t, each(func(*peer, ask) bool { asked.Add(1); return true }))
	client := dial(t, f.address)
	put, get := make(chan error, 1), make(chan error, 1)
	go func() { _, err := client.Put(context.Background(), "k", nil); put <- err }()
	go func() { _, _, err := client.Get(context.Background(), "k"); get <- err }()
	eventually(t, "they are not sent", func() bool { return asked.Load() == 2 })
	_ = client.Close()
	isErr(t, <-put, nkv.ErrOutcomeUnknown)
	isErr(t, <-get, nkv.ErrClosed)
}

func TestASilentServerCountsAsLostAndOneThatIsAliveDoesNot(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		switch {
		case p.n > 1:
			return kind(p, a)
		case a.Key == "alive": // busy for longer than the client bears silence
			for range 15 {
				time.Sleep(100 * time.Millisecond)
				p.send(`"Alive"`)
			}
			return kind(p, a)
		}
		return true
	}))
	client := dial(t, f.address, nkv.WithHeartbeat(500*time.Millisecond), nkv.WithRequestTimeout(time.Minute))
	must[nkv.Revision](t)(client.Put(context.Background(), "alive", nil))
	if f.count() != 1 {
		t.Fatal("it was given up")
	}
	// Nothing is asked, and the server does not answer when it is asked for a sign of life.
	eventually(t, "it is not given up", func() bool { return f.count() == 2 })
	must[nkv.Revision](t)(client.Put(context.Background(), "k", nil))
}

func TestTheClientKnowsSinceWhenItsServerIsStale(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		switch a.Key {
		case "stale":
			p.send(`{"Stale":{"since_ms":60000}}`)
		case "seen":
			p.send(`{"Stale":{}}`)
		}
		return kind(p, a)
	}))
	client := dial(t, f.address)
	put := func(key string) (time.Duration, bool) {
		must[nkv.Revision](t)(client.Put(context.Background(), key, nil))
		since, isStale := client.StaleSince()
		return time.Since(since), isStale
	}
	if _, isStale := put("k"); isStale {
		t.Fatal("it was not said")
	}
	if since, isStale := put("stale"); !isStale || since < time.Minute || since > 2*time.Minute {
		t.Fatal("it is not known:", since, isStale)
	}
	if _, isStale := put("seen"); isStale {
		t.Fatal("it is over")
	}
	put("stale")
	_ = client.Close()
	if _, isStale := client.StaleSince(); isStale {
		t.Fatal("there is no connection")
	}
}

func TestTheClientReadsWhileItsWriteIsBlocked(t *testing.T) {
	release := make(chan struct{})
	var once sync.Once
	f := newFake(t, each(func(p *peer, a ask) bool {
		kind(p, a)
		if a.Type == "Subscribe" {
			p.send(`{"Update":{"key":"s","len":1,"revision":2,"skipped":0}}` + "\n1")
			time.Sleep(100 * time.Millisecond) // what follows is not read meanwhile
			p.send(`{"Update":{"key":"s","len":1,"revision":3,"skipped":0}}` + "\n2")
			<-release
		}
		return true
	}))
	t.Cleanup(func() { once.Do(func() { close(release) }) })
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	expect(t, s, "synced", `update "s" "1"`)
	ended := make(chan error, 30)
	for range cap(ended) {
		go func() { _, err := client.Put(soon(t), "k", make([]byte, 1<<20)); ended <- err }()
	}
	expect(t, s, `update "s" "2"`)
	once.Do(func() { close(release) })
	for range cap(ended) {
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatALaterVersionSaysIsPassedOver(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		p.send(`"Later"`)
		p.send(`"Get"`)
		p.send(`{"Later":{"len":3,"key":5}}` + "\n{\"x")
		p.send(`{"Later":[1,2]}`)
		p.send(`{"Close":{"key":"k","reason":"tired"}}`)
		p.send("  \r")
		return kind(p, a)
	}))
	client := dial(t, f.address)
	getAll(t, client, 3)
	if f.count() != 1 {
		t.Fatal("the connection was ended")
	}
}

func TestAServerThatLiesIsLeft(t *testing.T) {
	lies := []string{
		`nonsense`, `[]`, `{}`, `{"Base":{"id":1},"Get":{}}`, `"Hello"`, `{"Base":{"id":999,"status":200,"message":""}}`,
		`{"Update":{"key":"k","len":99999999999}}`, `{"Update":{"key":"k"}}`, `{"Synced":{"key":"k"}}`, `{"Synced":{"key":"k","revision":1}}`,
		`{"Update":{"key":"k","len":1,"revision":1}}` + "\nab", `{"Update":{"key":"` + "\xff" + `","len":0,"revision":1}}` + "\n",
		`{"Get":{"id":%d,"status":200,"message":"","lens":[5],"len":1,"keys":["k"],"revisions":[1]}}` + "\na",
		`{"Base":{"id":"","status":503,"message":"too many"}}`, `{"Reset":{"key":"k"}}` + "\n" + `{"Reset":{"key":"k"}}`,
		`{"Update":{"key":"k","value":[256],"revision":1}}`, `{"Close":{"key":"k","reason":"deleted"}}`, strings.Repeat("x", 1<<21),
	}
	f := newFake(t, each(func(p *peer, a ask) bool {
		if p.n > len(lies) {
			return kind(p, a)
		}
		p.send("%s", strings.Replace(lies[p.n-1], "%d", fmt.Sprint(a.ID), 1))
		_, _ = p.read() // the client is to end it
		return false
	}))
	client := dial(t, f.address, nkv.WithMessageLenMax(1<<20))
	entry, ok, err := client.Get(soon(t), "k")
	if err != nil || !ok || string(entry.Value) != "of k" || f.count() != len(lies)+1 {
		t.Fatal(entry, ok, err, f.count())
	}
}

func TestAnswersThatWereNotAskedForAreRefused(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		p.send(`{"%s":{"id":%d,"status":200,"message":"","keys":["other"],"revisions":[1],"lens":[0],"len":0,"more":true}}`+"\n", a.Type, a.ID)
		return true
	}))
	client := dial(t, f.address)
	_, _, err := client.Get(soon(t), "k")
	isErr(t, err, nkv.ErrProtocol)
	_, err = client.GetAll(soon(t), "*") // the same page for ever
	isErr(t, err, nkv.ErrProtocol)
}

func TestAnAnswerOfAnotherKindIsNoAnswer(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		p.ok(a, "") // also to a Get, which would seem to find nothing
		return true
	}))
	client := dial(t, f.address)
	_, ok, err := client.Get(soon(t), "k")
	if isErr(t, err, nkv.ErrProtocol); ok {
		t.Fatal("found")
	}
}

func TestAddresses(t *testing.T) {
	seen := make(chan string, 1)
	look := func(_ context.Context, network, address string) (net.Conn, error) {
		seen <- network + " " + address
		return nil, errors.New("no")
	}
	for text, want := range map[string]string{
		"127.0.0.1:5000": "tcp 127.0.0.1:5000", "nkv://db1:5000": "tcp db1:5000", "nkv://db1/": "tcp db1:4222",
		"localhost": "tcp localhost:4222", "[::1]:5000": "tcp [::1]:5000", "nkv://[::1]": "tcp [::1]:4222",
		"unix:nkv.sock": "unix nkv.sock", "unix:///run/nkv.sock": "unix /run/nkv.sock", "/run/nkv.sock": "unix /run/nkv.sock",
		"./nkv.sock": "unix ./nkv.sock",
	} {
		_, err := nkv.Dial(soon(t), text, nkv.WithDialer(look))
		isErr(t, err, nkv.ErrCannotConnect)
		if got := <-seen; got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	for _, text := range []string{"", ":4222", "4222", "db1:", "db1:70000", "::1", "[::1", "http://db1", "nkv://me@db1", "unix:",
		"unix://nkv.sock", "db1:1 2"} {
		_, err := nkv.Dial(soon(t), text, nkv.WithDialer(look))
		isErr(t, err, nkv.ErrInvalidAddress)
	}
	for _, option := range []nkv.Option{nkv.WithName("a\nb"), nkv.WithName("\xff"), nkv.WithToken("\xff"), nkv.WithClientUUID(strings.Repeat("x", 1025))} {
		_, err := nkv.Start("db1", option)
		isErr(t, err, nkv.ErrInvalidOption)
	}
}

// The number of keys has the name that the keys of other answers have. So it was taken for a broken message, and the
// connection was lost with every call.
func TestFiguresAreReadAsAServerSendsThem(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		p.send(`{"Stats":{"id":%d,"status":200,"message":"No Error","keys":2,"value_bytes":3,"revision":4,"epoch":"e1","durability":"os"}}`, a.ID)
		return true
	}))
	got := must[nkv.Stats](t)(dial(t, f.address).Stats(soon(t)))
	if want := (nkv.Stats{Keys: 2, ValueBytes: 3, Revision: 4, Epoch: "e1", Durability: "os"}); got != want || f.count() != 1 {
		t.Fatal(got)
	}
}
