package nkv_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	nkv "github.com/nkv-store/nkv/clients/go"
)

// connects are the fields `seen` of what clients greeted with; "none" stands for its absence.
type connects struct {
	mu   sync.Mutex
	seen []string
}

func (c *connects) note(a ask) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.Seen == nil {
		c.seen = append(c.seen, "none")
	} else {
		c.seen = append(c.seen, *a.Seen)
	}
}

func (c *connects) all() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.seen)
}

func TestTheHighestRevisionOfAnyMessageIsSeen(t *testing.T) {
	for name, answer := range map[string]func(p *peer, a ask){
		"the answer to a put":  func(p *peer, a ask) { p.ok(a, `,"revision":9`) },
		"a conflict":           func(p *peer, a ask) { p.send(`{"Base":{"id":%d,"status":409,"message":"","revision":9}}`, a.ID) },
		"the answers to lists": func(p *peer, a ask) { p.send(`{"Base":{"id":%d,"status":200,"revision":3,"revisions":[9,2]}}`, a.ID) },
		"an update":            func(p *peer, a ask) { p.update("k", 9, 0, "v"); p.ok(a, `,"revision":7`) },
		"the end of a key": func(p *peer, a ask) {
			p.send(`{"Close":{"key":"k","revision":9,"skipped":0,"reason":"expired"}}`)
			p.ok(a, `,"revision":7`)
		},
		"the end of a snapshot": func(p *peer, a ask) {
			p.send(`{"Reset":{"key":"s"}}`)
			p.synced("s", 9)
			p.ok(a, `,"revision":7`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var heard connects
			f := newFake(t, func(p *peer) {
				a, err := p.read()
				if err != nil {
					return
				}
				heard.note(a)
				p.welcome(a, "e1", "")
				for {
					if a, err = p.read(); err != nil {
						return
					}
					answer(p, a)
				}
			})
			client := dial(t, f.address)
			_, _ = client.Put(soon(t), "k", []byte("v"))
			f.cut()
			eventually(t, "it does not come back", func() bool { return len(heard.all()) == 2 })
			if got := heard.all(); got[0] != "none" || got[1] != "e1-9" {
				t.Fatal(got)
			}
		})
	}
}

// The second and third server lag. The engine behind the fifth has lost the newest changes.
func TestAClientThatMovesToAnotherServerSeesNothingOlderOrBeginsAnew(t *testing.T) {
	var heard connects
	f := newFake(t, func(p *peer) {
		a, err := p.read()
		if err != nil {
			return
		}
		heard.note(a)
		switch p.n {
		case 2, 3:
			p.send(`{"Base":{"id":%d,"status":503,"message":"it is not as far yet"}}`, a.ID)
			return
		case 5:
			p.welcome(a, "e1", `,"begins_anew":true`)
		default:
			p.welcome(a, "e1", "")
		}
		for {
			if a, err = p.read(); err != nil {
				return
			}
			if a.Type != "Subscribe" {
				kind(p, a)
				continue
			}
			p.send(`"Hello"`)
			if p.n < 5 {
				p.update("s.a", 5, 0, "new")
				p.update("s.b", 9, 0, "new")
				p.synced(a.Key, 9)
			} else {
				p.update("s.a", 2, 0, "old")
				p.synced(a.Key, 3)
			}
		}
	})
	client := dial(t, f.address)
	s := must[*nkv.Subscription](t)(client.Subscribe(soon(t), "s"))
	b := must[*nkv.Branch](t)(client.WatchBranch(soon(t), "s"))
	expect(t, s, `update "s.a" "new"`, `update "s.b" "new"`, "synced")
	f.cut()
	expect(t, s, "synced")
	if b.Len() != 2 {
		t.Fatal(b.Entries())
	}
	f.cut()
	expect(t, s, `update "s.a" "old"`, `gone "s.b" "missed"`, "synced")
	must[struct{}](t)(struct{}{}, b.Wait(soon(t), func(b *nkv.Branch) bool { return b.Live() && b.Len() == 1 }))
	if entry, ok := b.Get("s.a"); !ok || string(entry.Value) != "old" || b.Revision().Number() != 3 {
		t.Fatal(entry, b.Revision())
	}
	f.cut()
	expect(t, s, "synced")
	if got, want := fmt.Sprint(heard.all()), "[none e1-9 e1-9 e1-9 e1-9 e1-3]"; got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
}
