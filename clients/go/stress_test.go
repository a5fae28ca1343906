package nkv_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	nkv "github.com/nkv-store/nkv/clients/go"
)

// follower makes a map of what a subscription says.
type follower struct {
	sub   *nkv.Subscription
	state map[string]string
	last  map[string]nkv.Revision
}

// read reads what there is, and says what is wrong with it.
func (f *follower) read(wait time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	for {
		event, err := f.sub.Next(ctx)
		if err != nil {
			return f.sub.Err()
		}
		switch event := event.(type) {
		case nkv.Update:
			if last := f.last[event.Key]; !event.Revision.After(last) {
				return fmt.Errorf("%s: %v behind %v", event.Key, event.Revision, last)
			}
			f.last[event.Key], f.state[event.Key] = event.Revision, string(event.Value)
		case nkv.Gone:
			if _, ok := f.state[event.Key]; !ok {
				return fmt.Errorf("%s has gone twice", event.Key)
			}
			delete(f.state, event.Key)
		}
	}
}

// Overlapping subscriptions and watches of one client, over cuts, while another one writes.
func TestOverlappingSubscriptionsAllEndAtTheStore(t *testing.T) {
	dir := os.Getenv("NKV_SCENARIOS")
	if dir == "" {
		dir = "../scenarios"
	}
	stage := newStage(t, dir, server(t))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	reader := dial(t, stage.at["proxy"])
	writer := dial(t, stage.at["direct"])
	random := rand.New(rand.NewPCG(1, 2))
	patterns := []string{"*", "s", "s.*", "s.a", "s.a", "s.b.*", "t", "none"}
	var followers []*follower
	for i, pattern := range patterns {
		var options []nkv.SubscribeOption
		if i == 4 {
			options = append(options, nkv.Exact())
		}
		sub := must[*nkv.Subscription](t)(reader.Subscribe(ctx, pattern, options...))
		followers = append(followers, &follower{sub: sub, state: map[string]string{}, last: map[string]nkv.Revision{}})
	}
	branch := must[*nkv.Branch](t)(reader.WatchBranch(ctx, "s"))
	watch := must[*nkv.Watch](t)(reader.Watch(ctx, "s.a"))
	keys := strings.Fields("s s.a s.a.x s.a.y s.b.z s.b.z.w t t.u ab")
	for i := range 1500 {
		var err error
		key := keys[random.IntN(len(keys))]
		switch dice := random.IntN(40); {
		case dice == 0:
			_, err = writer.Delete(ctx, "s.*")
		case dice < 12:
			_, err = writer.Delete(ctx, key)
		case dice == 12:
			_, err = stage.ask("cut")
		case dice == 13:
			_, err = stage.ask(fmt.Sprintf("cut-after-bytes %d", 500+random.IntN(3000)))
		case dice == 14: // own writes
			_, err = reader.Put(ctx, key, []byte(fmt.Sprint(i)))
			if nameOf(err) == "outcome_unknown" {
				err = nil
			}
		case dice == 15: // one more of a pattern that there is already, for a while
			var more *nkv.Subscription
			if more, err = reader.Subscribe(ctx, patterns[random.IntN(len(patterns))]); err == nil {
				time.AfterFunc(time.Duration(random.IntN(20))*time.Millisecond, func() { _ = more.Close() })
			}
		case dice < 20:
			err = followers[random.IntN(len(followers))].read(time.Millisecond)
		default:
			_, err = writer.Put(ctx, key, []byte(fmt.Sprint(i)))
		}
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	store := map[string]string{}
	for _, entry := range must[[]nkv.Entry](t)(writer.GetAll(ctx, "*")) {
		store[entry.Key] = string(entry.Value)
	}
	for i, f := range followers {
		want := maps.Clone(store)
		maps.DeleteFunc(want, func(key, _ string) bool { return !isBelow(patterns[i], i == 4, key) })
		for began := time.Now(); !maps.Equal(f.state, want); {
			if err := f.read(20 * time.Millisecond); err != nil {
				t.Fatalf("%s: %v", patterns[i], err)
			}
			if time.Since(began) > patience {
				t.Fatalf("%s: %v, want %v", patterns[i], f.state, want)
			}
		}
	}
	eventually(t, "the branch is another one", func() bool {
		got := map[string]string{}
		for key, entry := range branch.Entries() {
			got[key] = string(entry.Value)
		}
		want := maps.Clone(store)
		maps.DeleteFunc(want, func(key, _ string) bool { return !isBelow("s", false, key) })
		entry, ok := watch.Get()
		value, isThere := store["s.a"]
		return maps.Equal(got, want) && ok == isThere && string(entry.Value) == value
	})
	// Each pattern is subscribed once, however often it was asked for.
	subscribers := must[[]nkv.Subscriber](t)(writer.Trace(ctx, "s.a"))
	got := []string{}
	for _, subscriber := range subscribers {
		got = append(got, subscriber.Pattern)
	}
	slices.Sort(got)
	if !slices.Equal(got, []string{"*", "s", "s.*", "s.a"}) {
		t.Fatal(got)
	}
}

func isBelow(pattern string, exact bool, key string) bool {
	branch, isWildcard := strings.CutSuffix(pattern, ".*")
	return pattern == "*" || (key == branch && !isWildcard) || (!exact && strings.HasPrefix(key, branch+"."))
}
