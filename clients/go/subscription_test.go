package nkv_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	nkv "github.com/nkv-store/nkv/clients/go"
)

func (p *peer) update(key string, revision, skipped int, value string) {
	p.send(`{"Update":{"key":%q,"len":%d,"revision":%d,"skipped":%d}}`+"\n%s", key, len(value), revision, skipped, value)
}

func (p *peer) synced(key string, revision int) {
	p.send(`{"Synced":{"key":%q,"revision":%d,"epoch":"e1"}}`, key, revision)
}

// The first two keys of the snapshot have the highest revisions: what was seen says nothing of what was not.
func TestASnapshotThatBreaksOffIsMadeWhole(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		p.update("s.a", 9, 0, "a")
		p.update("s.b", 8, 0, "b")
		if p.n == 1 {
			return false
		}
		p.update("s.c", 1, 0, "c")
		p.update("s.d", 2, 0, "d")
		p.synced(a.Key, 9)
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	expect(t, s, `update "s.a" "a"`, `update "s.b" "b"`, `update "s.c" "c"`, `update "s.d" "d"`, "synced")
}

func TestTheAnswerToASubscribeIsLostAndItIsSubscribedOnce(t *testing.T) {
	var asked [4]atomic.Int32
	f := newFake(t, each(func(p *peer, a ask) bool {
		asked[p.n].Add(1)
		return p.n > 1 && kind(p, a)
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	expect(t, s, "synced")
	if asked[1].Load() != 1 || asked[2].Load() != 1 {
		t.Fatal(asked[1].Load(), asked[2].Load())
	}
}

func TestWithoutSnapshotNothingIsMissedOverACut(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		if p.n == 1 {
			p.update("s.a", 1, 0, "1")
			p.update("s.b", 2, 0, "1")
			p.synced(a.Key, 2)
			return true
		}
		p.update("s.a", 1, 0, "1")
		p.update("s.c", 4, 0, "1") // put while the link was down, and s.b deleted
		p.synced(a.Key, 4)
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s", nkv.WithoutSnapshot()))
	expect(t, s, "synced")
	f.cut()
	expect(t, s, `update "s.c" "1"`, `gone "s.b" "missed"`, "synced")
}

// What is sent for another subscription may be from before the snapshot, which has it already, or its delete.
func TestAChangeFromBeforeTheSnapshotIsNoNews(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		p.synced(a.Key, 9)
		p.update("s.a", 5, 0, "deleted since")
		p.send(`{"Close":{"key":"s.b","revision":6,"skipped":0,"reason":"deleted"}}`)
		p.update("s.b", 10, 0, "2")
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	expect(t, s, "synced", `update "s.b" "2"`)
}

func TestAResetReportsWhatWasMissed(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		p.update("s.a", 1, 0, "1")
		p.update("s.b", 2, 0, "1")
		p.synced(a.Key, 2)
		p.send(`{"Reset":{"key":"s"}}`)
		p.update("s.b", 5, 0, "2")
		p.synced(a.Key, 9)
		p.update("s.b", 5, 0, "2") // no news
		p.update("s.b", 10, 0, "3")
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	eventually(t, "too little has come", func() bool { return client.Health(soon(t)) == nil })
	// Read late: of s.a it is enough that it is gone.
	state := map[string]string{}
	for range 3 {
		event, err := s.Next(in(200 * time.Millisecond))
		if err != nil {
			break
		}
		switch event := event.(type) {
		case nkv.Update:
			state[event.Key] = string(event.Value)
		case nkv.Gone:
			delete(state, event.Key)
		}
	}
	if fmt.Sprint(state) != "map[s.b:3]" {
		t.Fatal(state)
	}
}

func TestASlowReaderCostsOneEventAKeyAndNobodyElseWaits(t *testing.T) {
	const keys, changes = 100, 20_000
	f := newFake(t, each(func(p *peer, a ask) bool {
		kind(p, a)
		if a.Type == "Subscribe" {
			var text strings.Builder
			for i := range changes {
				fmt.Fprintf(&text, `{"Update":{"key":"s.%d","len":0,"revision":%d,"skipped":1}}`+"\n\n", i%keys, i+2)
			}
			_, _ = p.Write([]byte(text.String()))
		}
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	getAll(t, client, 10) // behind all of it
	events, total := 0, uint64(0)
	for total < 2*changes {
		event := must[nkv.Event](t)(s.Next(soon(t)))
		if update, ok := event.(nkv.Update); ok {
			events++
			total += 1 + update.Skipped
		}
		getAll(t, client, 1) // from within its own loop
	}
	if events != keys || total != 2*changes {
		t.Fatal(events, total)
	}
}

func Test500SubscriptionsThatAreCancelledLeaveNothing(t *testing.T) {
	const count = 500
	var mu sync.Mutex
	live := map[*peer]map[string]bool{}
	serve := func(p *peer) {
		mu.Lock()
		live[p] = map[string]bool{}
		mu.Unlock()
		each(func(p *peer, a ask) bool {
			mu.Lock()
			switch a.Type {
			case "Subscribe":
				live[p][a.Key] = true
			case "Unsubscribe":
				delete(live[p], a.Key)
			}
			mu.Unlock()
			return kind(p, a)
		})(p)
		mu.Lock()
		delete(live, p)
		mu.Unlock()
	}
	subscribed := func() int {
		mu.Lock()
		defer mu.Unlock()
		n := 0
		for _, keys := range live {
			n += len(keys)
		}
		return n
	}
	f := newFake(t, serve)
	client := dial(t, f.address)
	must[struct{}](t)(struct{}{}, client.Health(soon(t)))
	left := noGoroutinesLeft(t)
	ctx, cancel := context.WithCancel(context.Background())
	later, cancelLater := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for i := range count {
		all.Add(1)
		go func() {
			defer all.Done()
			life := ctx
			if i%2 == 1 {
				life = later
			}
			s, err := client.Subscribe(life, fmt.Sprintf("s%d", i))
			if err != nil {
				t.Error(err)
				return
			}
			if i%3 == 0 {
				s.Events()
			}
		}()
	}
	all.Wait()
	if n := subscribed(); n != count {
		t.Fatalf("%d subscribed", n)
	}
	cancel()
	eventually(t, "not half of them", func() bool { return subscribed() == count/2 })
	f.stop()
	cancelLater()
	time.Sleep(50 * time.Millisecond)
	f.listen(f.address, serve)
	must[struct{}](t)(struct{}{}, client.Health(soon(t)))
	eventually(t, "some are subscribed", func() bool { return subscribed() == 0 })
	left()
}

func TestASubscriptionSaysWhyItEnded(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Key == "refused" {
			p.send(`{"Base":{"id":%d,"status":429,"message":"too many"}}`, a.ID)
			return true
		}
		kind(p, a)
		if a.Key == "replaced" && a.Type == "Subscribe" {
			p.send(`{"Close":{"key":"replaced","reason":"replaced"}}`)
		}
		return true
	}))
	client := dial(t, f.address)
	_, err := client.Subscribe(soon(t), "refused")
	isErr(t, err, nkv.ErrRefused)
	replaced := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "replaced"))
	for range replaced.Events() {
	}
	isErr(t, replaced.Err(), nkv.ErrReplaced)
	ctx, cancel := context.WithCancel(context.Background())
	cancelled := must[*nkv.Subscription](t)(client.Subscribe(ctx, "s"))
	closed := must[*nkv.Subscription](t)(client.Subscribe(context.Background(), "s"))
	cancel()
	for range cancelled.Events() {
	}
	isErr(t, cancelled.Err(), context.Canceled)
	expect(t, closed, "synced") // the other one of its pattern goes on
	if closed.Err() != nil {
		t.Fatal(closed.Err())
	}
	_ = closed.Close()
	_, err = closed.Next(soon(t))
	isErr(t, err, nkv.ErrClosed)
	_ = closed.Close()
	last := must[*nkv.Subscription](t)(client.Subscribe(context.Background(), "s"))
	_ = client.Close()
	for range last.Events() {
	}
	isErr(t, last.Err(), nkv.ErrClosed)
}

func TestARefusalThatTimeMayCureIsAskedAgain(t *testing.T) {
	var refused atomic.Int32
	f := newFake(t, each(func(p *peer, a ask) bool {
		if p.n == 2 && a.Type == "Subscribe" && refused.Add(1) <= 2 {
			p.send(`{"Base":{"id":%d,"status":429,"message":"too many"}}`, a.ID)
			return true
		}
		return kind(p, a)
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	expect(t, s, "synced")
	f.cut()
	expect(t, s, "synced")
	if refused.Load() != 3 {
		t.Fatal(refused.Load())
	}
}

func TestASubscriptionThatWouldHoldTooMuchEnds(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		kind(p, a)
		if a.Type == "Subscribe" {
			for i := range 1000 {
				p.update(fmt.Sprintf("s.%d", i), i+2, 0, "")
			}
		}
		return true
	}))
	client := dial(t, f.address, nkv.WithSubscriptionLenMax(100_000))
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	eventually(t, "it goes on", func() bool { return s.Err() != nil })
	isErr(t, s.Err(), nkv.ErrTooMuch)
	b := must[*nkv.Branch](t)(client.WatchBranch(soon(t), "*"))
	eventually(t, "it goes on", func() bool { return b.Err() != nil })
	isErr(t, b.Err(), nkv.ErrTooMuch)
	getAll(t, client, 1)
}

// The server may pass over the notification of a put in favour of a newer one.
func TestAWatchIsNotOlderThanTheClientsOwnWrites(t *testing.T) {
	revision := atomic.Int32{}
	revision.Store(1)
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type == "Put" || a.Type == "Delete" { // and nobody is told
			p.ok(a, fmt.Sprintf(`,"revision":%d,"count":1`, revision.Add(1)))
			return true
		}
		return kind(p, a)
	}))
	client := dial(t, f.address)
	ctx := soon(t)
	w := must[*nkv.Watch](t)(client.Watch(ctx, "b.k"))
	b := must[*nkv.Branch](t)(client.WatchBranch(ctx, "b"))
	changed := w.Changed()
	must[nkv.Revision](t)(client.Put(ctx, "b.k", []byte("mine")))
	entry, ok := w.Get()
	if !ok || string(entry.Value) != "mine" || b.Len() != 1 {
		t.Fatal(entry, ok, b.Entries())
	}
	<-changed
	must[nkv.DeleteResult](t)(client.Delete(ctx, "b.k"))
	if _, ok := w.Get(); ok || b.Len() != 0 {
		t.Fatal("it is still there")
	}
	must[nkv.Revision](t)(client.Put(ctx, "b.k", []byte("again")))
	if entry, ok := b.Get("b.k"); !ok || string(entry.Value) != "again" {
		t.Fatal(entry, ok)
	}
}

func TestABranchIsWholeBeforeItIsLiveAgain(t *testing.T) {
	release := make(chan struct{})
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		if p.n == 1 {
			p.update("b.x", 1, 0, "1")
			p.update("b.y", 2, 0, "1")
			p.synced(a.Key, 2)
			return true
		}
		p.update("b.z", 3, 0, "1")
		<-release
		p.synced(a.Key, 5)
		return true
	}))
	client := dial(t, f.address)
	b := must[*nkv.Branch](t)(client.WatchBranch(soon(t), "b"))
	if !b.Live() || b.Len() != 2 || b.Revision().Number() != 2 {
		t.Fatal(b.Live(), b.Entries())
	}
	f.cut()
	must[struct{}](t)(struct{}{}, b.Wait(soon(t), func(b *nkv.Branch) bool { return b.Len() == 3 }))
	if b.Live() {
		t.Fatal("it is live, and not whole")
	}
	close(release)
	must[struct{}](t)(struct{}{}, b.Wait(soon(t), func(b *nkv.Branch) bool { return b.Live() }))
	if _, ok := b.Get("b.z"); !ok || b.Len() != 1 || b.Revision().Number() != 5 {
		t.Fatal(b.Entries())
	}
	_ = b.Close()
	isErr(t, b.Err(), nkv.ErrClosed)
}
