package nkv

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

func entry(key, value string, revision uint64) Entry {
	return Entry{Key: key, Value: []byte(value), Revision: revisionIn("e", revision)}
}

// drain takes all that waits.
func drain(t *testing.T, q *queue) []Event {
	t.Helper()
	var events []Event
	for {
		event, _, err := q.take()
		if err != nil {
			t.Fatal(err)
		}
		if event == nil {
			return events
		}
		events = append(events, event)
	}
}

func TestASlowReaderGetsTheNewestStateOfEachKeyAndTheCountOfWhatItMissed(t *testing.T) {
	q := newQueue()
	for i := uint64(1); i <= 1000; i++ {
		q.update(entry([]string{"even", "odd"}[i%2], "", i), 0, i <= 2)
	}
	q.gone("odd", revisionIn("e", 1001), Deleted, 3)
	events := drain(t, q)
	if len(events) != 1 || events[0].(Update).Skipped != 499 || q.len != 0 {
		t.Fatal(events, q.len)
	}
	// It is known now.
	q.update(entry("even", "", 1002), 0, false)
	q.gone("even", revisionIn("e", 1003), Deleted, 3)
	if events = drain(t, q); len(events) != 1 || events[0].(Gone).Skipped != 4 {
		t.Fatal(events)
	}
}

func TestManyCutsWithoutAReaderTakeNoMemory(t *testing.T) {
	q := newQueue()
	for i := uint64(1); i <= 1000; i++ {
		q.update(entry("a", "", i), 0, i == 1)
		q.postSynced(revisionIn("e", i))
		q.connection(Reconnecting{})
		q.connection(Connected{Epoch: "e"})
	}
	if n := q.events.Len(); n > 4 {
		t.Fatalf("%d events wait", n)
	}
}

func TestAReaderThatIsSlowerThanTheWritersIsSyncedAllTheSame(t *testing.T) {
	q := newQueue()
	q.update(entry("a", "", 1), 0, true)
	q.update(entry("b", "", 2), 0, true)
	q.postSynced(revisionIn("e", 2))
	for i := uint64(3); i < 20; i += 2 {
		q.update(entry("a", "", i), 0, false)
		q.update(entry("b", "", i+1), 0, false)
		if event, _, _ := q.take(); event == (Synced{Revision: revisionIn("e", 2)}) {
			return
		}
	}
	t.Fatal("it never is")
}

// model is a server with a store, and what a reader makes of the events.
type model struct {
	random   *rand.Rand
	client   *Client
	link     *link
	wire     *wire
	queue    *queue
	store    map[string]Entry
	revision uint64
	epoch    int
	reader   map[string]Entry
	told     map[string]string // epoch and revision of the last update of a key
	isLost   bool
	present  string                        // the epoch that the reader knows of
	states   map[Revision]map[string]Entry // the store as it was at the ends of snapshots
}

// alone is the sink of the one pattern that feeds a queue.
func alone(queue *queue) *queueSink {
	sink := &queueSink{queue: queue, feed: &feed{}}
	sink.feed.sinks = []*queueSink{sink}
	return sink
}

func newModel(seed uint64) *model {
	client, err := newClient("localhost", nil)
	if err != nil {
		panic(err)
	}
	m := &model{random: rand.New(rand.NewPCG(seed, 0)), client: client, queue: newQueue(), store: map[string]Entry{},
		reader: map[string]Entry{}, told: map[string]string{},
		states: map[Revision]map[string]Entry{}}
	client.mu.Lock()
	client.hub.add(newLocal("s", false, 1<<30, alone(m.queue)))
	client.mu.Unlock()
	return m
}

func (m *model) name() string { return fmt.Sprintf("e%d", m.epoch) }

func (m *model) connect() {
	if m.present == "" {
		m.present = m.name() // the first connection is not told
	}
	m.link = &link{epoch: m.name(), features: []string{"exact"}}
	m.client.link = m.link
	m.client.hub.attach(m.link)
	m.wire = m.client.hub.wires["s"]
	m.wire.asked--
	_ = m.client.hub.begin(m.wire, false)
	for _, entry := range m.store {
		if m.random.IntN(10) == 0 {
			m.cut() // within the snapshot
			return
		}
		m.client.hub.update(entry, 0)
	}
	m.states[revisionIn(m.name(), m.revision)] = maps.Clone(m.store)
	_ = m.client.hub.end(revisionIn(m.name(), m.revision))
}

func (m *model) cut() {
	m.client.link, m.link = nil, nil
	m.client.hub.detach()
}

func (m *model) change() {
	m.revision++
	key := fmt.Sprintf("s.%d", m.random.IntN(6))
	_, isThere := m.store[key]
	if isThere && m.random.IntN(2) == 0 {
		delete(m.store, key)
		if m.link != nil {
			m.client.hub.gone(key, revisionIn(m.name(), m.revision), Deleted, 0)
		}
		return
	}
	entry := Entry{Key: key, Value: []byte{byte(m.revision)}, Revision: revisionIn(m.name(), m.revision)}
	m.store[key] = entry
	if m.link != nil {
		m.client.hub.update(entry, 0)
	}
}

// read takes events, and says what is wrong with them.
func (m *model) read(count int) string {
	for range count {
		event, _, _ := m.queue.take()
		switch event := event.(type) {
		case nil:
			return ""
		case Update:
			at := event.Revision.epoch + " " + event.Revision.String()
			if m.told[event.Key] == at {
				return fmt.Sprintf("%v came twice", event)
			}
			if event.Revision.epoch != m.present {
				return fmt.Sprintf("%v came in the epoch %s", event, m.present)
			}
			before, ok := m.reader[event.Key]
			if ok && before.Revision.epoch == event.Revision.epoch && !event.Revision.After(before.Revision) {
				return fmt.Sprintf("%v came behind %v", event, before)
			}
			m.told[event.Key] = at
			m.reader[event.Key] = event.Entry
		case Gone:
			if _, ok := m.reader[event.Key]; !ok {
				return fmt.Sprintf("%v is not news", event)
			}
			delete(m.reader, event.Key)
		case Reconnecting:
			m.isLost = true
		case Connected:
			m.isLost, m.present = false, event.Epoch
		case Synced:
			if m.isLost {
				return "synced while the connection is lost"
			}
			if wrong := m.knows(event.Revision); wrong != "" {
				return wrong
			}
		}
	}
	return ""
}

// knows says of which key the reader, who is synced, does not know the state then or a later one.
func (m *model) knows(synced Revision) string {
	state := m.states[synced]
	for key, entry := range state {
		at, now := m.reader[key].Revision, m.store[key].Revision
		// A key that has gone since need not be heard of.
		if at != entry.Revision && !at.After(entry.Revision) && now == entry.Revision {
			return fmt.Sprintf("synced at %s, and %v is not known", synced, entry)
		}
	}
	for key, entry := range m.reader {
		if _, ok := state[key]; !ok && !entry.Revision.After(synced) {
			return fmt.Sprintf("synced at %s, and %v is not gone", synced, entry)
		}
	}
	return ""
}

func (m *model) step() {
	switch dice := m.random.IntN(20); {
	case dice == 0 && m.link != nil:
		m.cut()
	case dice == 1 && m.link == nil:
		m.epoch++ // the server has lost its data
		m.store, m.revision = map[string]Entry{}, uint64(m.random.IntN(5))
	case dice < 6 && m.link == nil:
		m.connect()
	default:
		m.change()
	}
}

func TestWhatAReaderMakesOfTheEventsIsTheStore(t *testing.T) {
	for seed := range uint64(2000) {
		m := newModel(seed)
		for range 100 {
			m.step()
			if wrong := m.read(m.random.IntN(3)); wrong != "" {
				t.Fatalf("seed %d: %s", seed, wrong)
			}
			if n := m.queue.events.Len(); n > 40 {
				t.Fatalf("seed %d: %d events wait", seed, n)
			}
		}
		for m.link == nil {
			m.connect()
		}
		if wrong := m.read(1000); wrong != "" {
			t.Fatalf("seed %d: %s", seed, wrong)
		}
		if !maps.EqualFunc(m.store, m.reader, func(a, b Entry) bool { return a.Revision == b.Revision && bytes.Equal(a.Value, b.Value) }) {
			t.Fatalf("seed %d: the reader has %v, the store %v", seed, m.reader, m.store)
		}
		if m.queue.len != 0 || len(m.queue.keys) != 0 {
			t.Fatalf("seed %d: %d bytes, %d keys are left", seed, m.queue.len, len(m.queue.keys))
		}
	}
}

func TestKeysThatABranchMissedGoInOneStepWithItsBecomingLive(t *testing.T) {
	p := newPresent()
	for _, key := range []string{"a", "b", "c"} {
		p.update(entry(key, "1", 1), 0, true)
	}
	p.synced(revisionIn("e", 1), true)
	p.lost(true)
	p.gone("a", revisionIn("e", 5), Missed, 0)
	p.gone("b", revisionIn("e", 5), Missed, 0)
	if p.isLive || len(p.entries) != 3 {
		t.Fatal(p.isLive, p.entries)
	}
	p.synced(revisionIn("e", 5), true)
	if !p.isLive || len(p.entries) != 1 || p.len != 1 {
		t.Fatal(p.isLive, p.entries, p.len)
	}
}

func TestAWaitThatIsGivenUpLosesNoEvent(t *testing.T) {
	q := newQueue()
	var posted sync.WaitGroup
	for i := uint64(1); i <= 50; i++ {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Millisecond)
		posted.Add(1)
		go func() {
			defer posted.Done()
			time.Sleep(2 * time.Millisecond)
			q.update(entry(fmt.Sprint(i), "", i), 0, true)
		}()
		_, _ = q.next(ctx)
		cancel()
	}
	posted.Wait()
	q.update(entry("last", "", 51), 0, true)
	events := drain(t, q)
	if last := events[len(events)-1].(Update); last.Key != "last" {
		t.Fatal(last)
	}
}

func TestKeyOrderIsBySegments(t *testing.T) {
	keys := strings.Fields("a a.b a.b.c a.c a! a-b b")
	for i, a := range keys {
		for j, b := range keys {
			if keyLess(a, b) != (i < j) {
				t.Errorf("%s, %s", a, b)
			}
		}
	}
}

func TestWhatAPatternCovers(t *testing.T) {
	for _, c := range []struct {
		pattern   string
		exact     bool
		yes, none string
	}{
		{"a", false, "a a.b a.b.c", "b ab a-b b.a"},
		{"a", true, "a", "a.b b ab"},
		{"a.*", false, "a.b a.b.c", "a ab b"},
		{"*", false, "a b.c", ""},
	} {
		for _, key := range strings.Fields(c.yes) {
			if !covers(c.pattern, c.exact, key) {
				t.Errorf("%s does not cover %s", c.pattern, key)
			}
		}
		for _, key := range strings.Fields(c.none) {
			if covers(c.pattern, c.exact, key) {
				t.Errorf("%s covers %s", c.pattern, key)
			}
		}
	}
}

func TestPausesGrowAndAreJittered(t *testing.T) {
	client, _ := newClient("localhost", nil)
	total := time.Duration(0)
	for failures := range 15 {
		pause := client.pause(failures)
		if least := min(50*time.Millisecond<<failures, 5*time.Second) / 2; pause < least || pause > 2*least {
			t.Fatalf("%v after %d failures", pause, failures)
		}
		total += pause
	}
	if total < 10*time.Second || client.pause(1_000_000) > 5*time.Second {
		t.Fatalf("15 attempts within %v", total)
	}
}

// Whatever a server sends, it must not end the program that reads it.
func FuzzDecoder(f *testing.F) {
	f.Add([]byte(`{"Get":{"id":1,"status":200,"message":"","lens":[1,1],"len":2,"keys":["a","b"],"revisions":[1,2]}}` + "\nab\n"))
	f.Add([]byte(`{"Update":{"key":"a","value":[1,2],"revision":1}}` + "\n\"Hello\"\n\r\n{\"Later\":{\"len\":1}}\nx\n"))
	f.Add([]byte("\"Get\"\n")) // a string with the name of an answer ended the program
	f.Fuzz(func(t *testing.T, text []byte) {
		client, _ := newClient("localhost", nil)
		client.link = &link{epoch: "e", pending: map[uint64]*call{}}
		client.hub.add(newLocal("*", false, 1000, alone(newQueue())))
		client.hub.add(newLocal("a", true, 1000, newPresent()))
		in := newDecoder(bytes.NewReader(text), 1<<16)
		for {
			message, err := in.next()
			if err == nil {
				err = client.receive(client.link, message)
			}
			if err != nil {
				return
			}
		}
	})
}
