package nkv

import (
	"container/list"
	"context"
	"sync"
)

// keepKeys is for how many keys a queue keeps room once it is empty.
const keepKeys = 1024

// queue holds events between the connection and one reader. There is one place for each key: a newer event of a key takes
// the place of one that waits, and moves to the end, but not past Synced. A key that comes and goes unread takes no place.
// So memory is bounded by the keys that there are, or that the reader knows of.
//
// What is of a new connection stands behind its Connected, which names the epoch.
type queue struct {
	mu          sync.Mutex
	events      *list.List               // of waitingEvent
	keys        map[string]*list.Element // where the event of a key waits
	synced      *list.Element
	connections int           // how many events of the connection wait
	connected   uint64        // the place of the newest of them, also if it was read
	place       uint64        // that was given last
	most        int           // how many keys waited at a time since the map was made
	len         int           // bytes, about
	waiter      chan struct{} // closed when there is something
	err         error         // why nothing follows
}

type waitingEvent struct {
	event Event
	key   string
	len   int
	place uint64 // grows along the queue
	isNew bool   // the reader does not know of the key
}

func newQueue() *queue {
	return &queue{events: list.New(), keys: map[string]*list.Element{}}
}

func at(element *list.Element) *waitingEvent { return element.Value.(*waitingEvent) }

func (q *queue) push(event waitingEvent) *list.Element {
	q.place++
	event.place = q.place
	q.len += event.len
	return q.events.PushBack(&event)
}

func (q *queue) wake() {
	if q.waiter != nil {
		close(q.waiter)
		q.waiter = nil
	}
}

func isConnection(event Event) bool {
	switch event.(type) {
	case Reconnecting, Connected:
		return true
	}
	return false
}

func (q *queue) update(entry Entry, skipped uint64, isNew bool) int {
	event := waitingEvent{key: entry.Key, len: len(entry.Key) + len(entry.Value) + keyCost, isNew: isNew}
	return q.change(event, func(passed uint64) Event { return Update{Entry: entry, Skipped: skipped + passed} })
}

func (q *queue) gone(key string, revision Revision, reason Reason, skipped uint64) {
	event := waitingEvent{key: key, len: len(key) + keyCost}
	q.change(event, func(passed uint64) Event {
		return Gone{Key: key, Revision: revision, Reason: reason, Skipped: skipped + passed}
	})
}

// change takes in a change of a key; made gets how many others it stands for.
func (q *queue) change(change waitingEvent, made func(passed uint64) Event) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return q.len
	}
	old := q.keys[change.key]
	if old == nil {
		change.event = made(0)
		q.keys[change.key] = q.push(change)
		q.most = max(q.most, len(q.keys))
		q.wake()
		return q.len
	}
	before := at(old)
	change.isNew = before.isNew
	switch event := before.event.(type) {
	case Update:
		change.event = made(event.Skipped + 1)
	case Gone:
		change.event = made(event.Skipped + 1)
	}
	_, isGone := change.event.(Gone)
	isBeforeSynced := q.synced != nil && before.place < at(q.synced).place
	switch {
	case isGone && change.isNew:
		q.drop(old) // the reader has never heard of it
		delete(q.keys, change.key)
	case isBeforeSynced && q.connected < before.place:
		// Its reader is to know some state of every key when it is synced.
		q.len += change.len - before.len
		change.place = before.place
		*before = change
	default:
		q.drop(old)
		q.keys[change.key] = q.push(change)
		if isBeforeSynced {
			synced := *at(q.synced)
			q.drop(q.synced)
			q.synced = q.push(synced)
		}
	}
	q.wake()
	return q.len
}

func (q *queue) drop(element *list.Element) {
	q.len -= at(element).len
	q.events.Remove(element)
}

func (q *queue) postSynced(revision Revision) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return
	}
	if q.synced != nil {
		q.drop(q.synced)
	}
	q.synced = q.push(waitingEvent{event: Synced{Revision: revision}})
	q.wake()
}

func (q *queue) connection(event Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return
	}
	if _, isLost := event.(Reconnecting); isLost && q.synced != nil {
		q.drop(q.synced) // another will come
		q.synced = nil
	}
	// Of events of the connection that nothing stands between, the newest is enough.
	for element := q.events.Front(); q.connections > 0 && element != nil; {
		next := element.Next()
		if isConnection(at(element).event) && (next == nil || isConnection(at(next).event)) {
			q.drop(element)
			q.connections--
		}
		element = next
	}
	q.push(waitingEvent{event: event})
	q.connections++
	q.connected = q.place
	q.wake()
}

// end says that nothing follows. What waits can still be read, unless it is to be dropped.
func (q *queue) end(err error, isDropped bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if isDropped {
		q.events.Init()
		q.keys, q.synced, q.len, q.connections = map[string]*list.Element{}, nil, 0, 0
	}
	if q.err == nil {
		q.err = err
	}
	q.wake()
}

// reason returns why nothing follows, or nil.
func (q *queue) reason() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// next waits for an event. A wait that is given up loses none.
func (q *queue) next(ctx context.Context) (Event, error) {
	for {
		event, waiter, err := q.take()
		if event != nil || err != nil {
			return event, err
		}
		select {
		case <-waiter:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// take takes the next event. If there is none, it returns what is closed when there is, or why nothing follows.
func (q *queue) take() (Event, <-chan struct{}, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	front := q.events.Front()
	if front == nil {
		if q.err != nil {
			return nil, nil, q.err
		}
		if q.waiter == nil {
			q.waiter = make(chan struct{})
		}
		return nil, q.waiter, nil
	}
	taken := at(front)
	q.drop(front)
	switch {
	case front == q.synced:
		q.synced = nil
	case isConnection(taken.event):
		q.connections--
	default:
		delete(q.keys, taken.key)
		if len(q.keys) == 0 && q.most > keepKeys {
			q.keys, q.most = map[string]*list.Element{}, 0
		}
	}
	return taken.event, nil, nil
}
