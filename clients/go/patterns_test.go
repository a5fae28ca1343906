package nkv_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	nkv "github.com/nkv-store/nkv/clients/go"
)

// asked is what clients asked for, in order.
type asked struct {
	mu  sync.Mutex
	all []string
}

func (a *asked) note(ask ask) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, ask.Type+" "+ask.Key)
}

func (a *asked) has(what string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Contains(a.all, what)
}

// all reads events, those of the connection too, until Synced has come.
func all(t *testing.T, s *nkv.Subscription) (texts []string) {
	t.Helper()
	for {
		event, err := s.Next(soon(t))
		if err != nil {
			t.Fatal(texts, err)
		}
		switch event := event.(type) {
		case nkv.Synced:
			return append(texts, fmt.Sprintf("synced %s", event.Revision))
		case nkv.Reconnecting, nkv.Connected:
			texts = append(texts, fmt.Sprintf("%T", event))
		default:
			texts = append(texts, eventOf(event))
		}
	}
}

func TestSeveralPatternsAreSyncedOnceAllAreAndUpToTheLowestRevision(t *testing.T) {
	at := map[string]int{"a": 7, "b.*": 5, "c": 8}
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		p.update(a.Key[:1]+".x", at[a.Key], 0, "1")
		p.synced(a.Key, at[a.Key])
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "a.x", nkv.Also("b.*", "a", "b.y"), nkv.Also("c", "a")))
	if got := s.Patterns(); !slices.Equal(got, []string{"b.*", "a", "c"}) {
		t.Fatal(got)
	}
	got := all(t, s)
	slices.Sort(got)
	want := []string{"synced 5", `update "a.x" "1"`, `update "b.x" "1"`, `update "c.x" "1"`}
	if !slices.Equal(got, want) {
		t.Fatal(got)
	}
	f.cut()
	if got := all(t, s); !slices.Equal(got, []string{"nkv.Reconnecting", "nkv.Connected", "synced 5"}) {
		t.Fatal(got)
	}
}

// The first connection ends before the last of the patterns has its snapshot.
func TestAPatternThatIsNotSyncedKeepsTheOthersFromIt(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		p.update(a.Key+".x", p.n, 0, fmt.Sprint(p.n))
		if p.n == 1 && a.Key == "b" {
			return false
		}
		p.synced(a.Key, 10*p.n)
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "a", nkv.Also("b")))
	got := all(t, s)
	if last := got[len(got)-1]; last != "synced 20" {
		t.Fatal(got)
	}
}

// The engine behind the second server has lost the newest changes. A put has it drop a backlog.
func TestSeveralPatternsBeginAnew(t *testing.T) {
	f := newFake(t, func(p *peer) {
		a, err := p.read()
		if err != nil {
			return
		}
		p.welcome(a, "e1", map[bool]string{true: `,"begins_anew":true`}[p.n == 2])
		for {
			if a, err = p.read(); err != nil {
				return
			}
			if a.Type != "Subscribe" {
				for _, key := range []string{"a", "b"} {
					p.send(`{"Reset":{"key":%q}}`, key)
					p.synced(key, 9)
				}
				kind(p, a)
				continue
			}
			p.send(`"Hello"`)
			p.update(a.Key+".x", 9/p.n, 0, fmt.Sprint(p.n))
			if p.n == 1 {
				p.update(a.Key+".y", 8, 0, "1")
			}
			p.synced(a.Key, 9)
		}
	})
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "a", nkv.Also("b")))
	state := map[string]string{}
	becomes := func(want string) {
		t.Helper()
		for fmt.Sprint(state) != want {
			event, err := s.Next(soon(t))
			if err != nil {
				t.Fatal(state, err)
			}
			switch event := event.(type) {
			case nkv.Update:
				state[event.Key] = string(event.Value)
			case nkv.Gone:
				delete(state, event.Key)
			}
		}
	}
	becomes("map[a.x:1 a.y:1 b.x:1 b.y:1]")
	f.cut()
	becomes("map[a.x:2 b.x:2]")
	must[nkv.Revision](t)(client.Put(soon(t), "k", nil))
	becomes("map[]")
}

func TestWithOneOfSeveralPatternsTheSubscriptionEnds(t *testing.T) {
	var heard asked
	f := newFake(t, each(func(p *peer, a ask) bool {
		heard.note(a)
		kind(p, a)
		if a.Key == "c" && a.Type == "Subscribe" { // the last of them
			p.send(`{"Close":{"key":"a","reason":"replaced"}}`)
		}
		return true
	}))
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "a", nkv.Also("b", "c")))
	for {
		if _, err := s.Next(soon(t)); err != nil {
			isErr(t, err, nkv.ErrReplaced)
			break
		}
	}
	eventually(t, "the others go on", func() bool { return heard.has("Unsubscribe b") && heard.has("Unsubscribe c") })
	if heard.has("Unsubscribe a") {
		t.Fatal("it is another's now")
	}
}

func TestARefusalOfOneOfSeveralPatternsEndsTheCall(t *testing.T) {
	var heard asked
	f := newFake(t, each(func(p *peer, a ask) bool {
		heard.note(a)
		if a.Key == "b" && a.Type == "Subscribe" {
			p.send(`{"Base":{"id":%d,"status":429,"message":"too many"}}`, a.ID)
			return true
		}
		return kind(p, a)
	}))
	client := dial(t, f.address)
	_, err := client.Subscribe(soon(t), "a", nkv.Also("b", "c"))
	var known *nkv.Error
	if !errors.As(err, &known) || known.Status != 429 || known.Key != "b" {
		t.Fatal(err)
	}
	eventually(t, "the others go on", func() bool { return heard.has("Unsubscribe a") && heard.has("Unsubscribe c") })
}

func TestSeveralPatternsShareOneLimit(t *testing.T) {
	f := newFake(t, each(func(p *peer, a ask) bool {
		if a.Type != "Subscribe" {
			return kind(p, a)
		}
		p.send(`"Hello"`)
		for n := range 6 {
			p.update(fmt.Sprintf("%s.%d", a.Key, n), n+1, 0, "")
		}
		p.synced(a.Key, 9)
		return true
	}))
	// Six keys of some 200 bytes each, known and waiting, are not too much. Eighteen are, also when all were read.
	client := dial(t, f.address, nkv.WithSubscriptionLenMax(3_000))
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "a"))
	expect(t, s, `update "a.0" ""`)
	several, err := client.Subscribe(soon(t), "b", nkv.Also("c", "d"))
	for err == nil {
		_, err = several.Next(soon(t))
	}
	isErr(t, err, nkv.ErrTooMuch)
}
