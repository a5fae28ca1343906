package nkv

import (
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	// retryMin is the pause before something is asked for again that time may cure; then it doubles up to retryMax.
	retryMin = 100 * time.Millisecond
	retryMax = 10 * time.Second
	// keyCost is what a key costs besides its own bytes and those of its value, about.
	keyCost = 200
)

// sink is where a local subscription's events go. Its methods are called with the lock of the client held, and never wait.
type sink interface {
	// update says that a key has a value. isNew: the reader does not know of the key. It returns how many bytes are kept.
	update(entry Entry, skipped uint64, isNew bool) int
	// gone says that a key is gone, of which the reader knows.
	gone(key string, revision Revision, reason Reason, skipped uint64)
	// synced says that all up to a revision was said.
	synced(revision Revision, isFirst bool)
	// lost says that the connection is lost. isReady: its reader has it already.
	lost(isReady bool)
	// beginAnew says that revisions from before say nothing any more.
	beginAnew()
	connected(epoch string)
	end(err error)
}

type standing int

const (
	waiting standing = iota // for a snapshot
	filling                 // the snapshot under way is for it
	joined                  // it gets changes
)

// knownKey is what a local subscription knows of a key.
type knownKey struct {
	revision uint64
	snapshot uint64 // the number of the snapshot in which it was seen last, or that was the last when it changed
	isDead   bool   // the client has deleted it itself, and notifications from before that may come yet
}

// group is the local subscriptions of one subscription of the program, one for each pattern. They end together.
type group struct {
	locals   []*local
	knownLen int // bytes of the keys that they know, about
}

// local is one pattern of a subscription of the program.
type local struct {
	group      *group
	pattern    string
	exact      bool
	noSnapshot bool
	lenMax     int
	sink       sink
	ready      chan error // gets nil once the server has accepted it; nil after that
	atSynced   bool       // it is ready only at the end of its first snapshot

	standing   standing
	isSynced   bool // on this connection
	wasSynced  bool // ever
	known      map[string]knownKey
	snapshot   uint64
	epoch      string
	isTooLarge bool
}

func newLocal(pattern string, exact bool, lenMax int, sink sink) *local {
	l := &local{pattern: pattern, exact: exact, lenMax: lenMax, sink: sink}
	l.ready, l.known, l.group = make(chan error, 1), map[string]knownKey{}, &group{}
	l.group.locals = []*local{l}
	return l
}

// isSilent says whether what comes now is part of a state that it did not ask for.
func (l *local) isSilent() bool { return l.noSnapshot && !l.wasSynced }

func (l *local) isReady(err error) {
	if l.ready != nil {
		l.ready <- err
		l.ready = nil
	}
}

func (l *local) begin(epoch string) {
	l.standing = filling
	l.snapshot++
	if l.epoch != epoch {
		l.forgetRevisions()
		l.epoch = epoch
	}
	if !l.atSynced {
		l.isReady(nil)
	}
}

// forgetRevisions sets every known revision to 0: those from before cannot be compared with what comes, so everything is
// reported again.
func (l *local) forgetRevisions() {
	for key, known := range l.known {
		known.revision = 0
		l.known[key] = known
	}
}

func (l *local) beginAnew() {
	l.forgetRevisions()
	l.sink.beginAnew()
}

func (l *local) update(entry Entry, skipped uint64) {
	if l.standing == waiting || !covers(l.pattern, l.exact, entry.Key) {
		return
	}
	known, isKnown := l.known[entry.Key]
	known.snapshot = l.snapshot
	isNews := !isKnown || entry.Revision.number > known.revision
	wasDead := known.isDead
	if isNews {
		known.revision, known.isDead = entry.Revision.number, false
	}
	l.known[entry.Key] = known
	if !isKnown {
		l.group.knownLen += len(entry.Key) + keyCost
	}
	if !isNews || l.isSilent() {
		return
	}
	kept := l.sink.update(entry, skipped, !isKnown || wasDead)
	if kept+l.group.knownLen > l.lenMax {
		l.isTooLarge = true
	}
}

func (l *local) gone(key string, revision Revision, reason Reason, skipped uint64) {
	known, isKnown := l.known[key]
	if l.standing == waiting || !isKnown || known.revision > revision.number {
		return
	}
	l.forget(key)
	if !known.isDead && !l.isSilent() {
		l.sink.gone(key, revision, reason, skipped)
	}
}

func (l *local) forget(key string) {
	delete(l.known, key)
	l.group.knownLen -= len(key) + keyCost
}

// end ends a snapshot: what it did not have is gone.
func (l *local) end(revision Revision) {
	if l.standing != filling {
		return
	}
	for key, known := range l.known {
		if known.snapshot == l.snapshot || known.revision > revision.number {
			continue
		}
		l.gone(key, revision, Missed, 0)
	}
	isFirst := !l.isSynced
	l.standing, l.isSynced, l.wasSynced = joined, true, true
	l.sink.synced(revision, isFirst)
	l.isReady(nil)
}

func (l *local) detach() {
	l.standing, l.isSynced = waiting, false
	l.sink.lost(l.ready == nil)
}

// wire is a subscription as the server knows it. All local subscriptions of one pattern share it, because the server tells
// subscriptions of a client apart by their patterns.
type wire struct {
	pattern    string
	asked      int  // how many Subscribes are under way that have no answer
	exactAsked bool // the last of them was for the key alone
	exact      bool // what is served is the key alone
	isLive     bool // a snapshot has begun on this connection
	has        uint64
	pause      time.Duration
	retry      *time.Timer
	locals     []*local
}

func newWire(pattern string) *wire { return &wire{pattern: pattern} }

func (w *wire) allExact() bool {
	return !slices.ContainsFunc(w.locals, func(l *local) bool { return !l.exact })
}

func (w *wire) stopRetry() {
	if w.retry != nil {
		w.retry.Stop()
		w.retry = nil
	}
}

// hub knows all subscriptions of a client. The lock of the client guards it.
type hub struct {
	client  *Client
	wires   map[string]*wire
	filling *wire // whose snapshot is under way
	watches int   // how many local subscriptions are to know the client's own writes at once
}

// add adds a local subscription.
func (h *hub) add(l *local) {
	w := h.wires[l.pattern]
	if w == nil {
		w = newWire(l.pattern)
		h.wires[l.pattern] = w
	}
	isNew := len(w.locals) == 0
	w.locals = append(w.locals, l)
	if _, ok := l.sink.(watcher); ok {
		h.watches++
	}
	// A snapshot that has not begun is for it too. One that has is not: another is asked for, of which those that know all
	// of it already hear nothing.
	if link := h.client.link; link != nil && (isNew || w.asked == 0 || (w.exactAsked && !l.exact)) {
		h.subscribe(link, w)
	}
}

// subscribe asks the server for a wire subscription.
func (h *hub) subscribe(link *link, w *wire) {
	w.stopRetry()
	w.asked++
	w.exactAsked = w.allExact()
	exact := w.exactAsked && link.offers("exact")
	ask := h.client.newControl(callSubscribe, func(id uint64) []byte {
		r := newRequest("Subscribe", id).text("key", w.pattern).yes("snapshot")
		if exact {
			r.yes("exact")
		}
		return r.end()
	})
	ask.wire, ask.exact = w, exact
	h.client.control(link, ask)
}

// remove removes a local subscription, if it is still there.
func (h *hub) remove(l *local) {
	w := h.wires[l.pattern]
	if w == nil || !h.cut(w, l) || len(w.locals) > 0 {
		return
	}
	h.unsubscribe(w)
}

// cut takes a local subscription from its wire.
func (h *hub) cut(w *wire, l *local) bool {
	at := slices.Index(w.locals, l)
	if at < 0 {
		return false
	}
	w.locals = slices.Delete(w.locals, at, at+1)
	h.left(l)
	return true
}

func (h *hub) left(l *local) {
	if _, ok := l.sink.(watcher); ok {
		h.watches--
	}
}

// unsubscribe ends a wire that no local subscription needs.
func (h *hub) unsubscribe(w *wire) {
	w.stopRetry()
	delete(h.wires, w.pattern)
	if link := h.client.link; link != nil && link.err == nil {
		h.client.control(link, h.client.newControl(callOther, func(id uint64) []byte {
			return newRequest("Unsubscribe", id).text("key", w.pattern).end()
		}))
	}
}

// attach subscribes everything on a new link.
func (h *hub) attach(link *link) {
	for _, w := range h.wires {
		h.subscribe(link, w)
		for _, l := range w.locals {
			if link.beginsAnew {
				l.beginAnew()
			}
			if l.ready == nil {
				l.sink.connected(link.epoch)
			}
		}
	}
}

func (h *hub) detach() {
	h.filling = nil
	for _, w := range h.wires {
		w.stopRetry()
		w.asked, w.isLive, w.has, w.pause = 0, false, 0, 0
		for _, l := range w.locals {
			l.detach()
		}
	}
}

// begin begins a snapshot.
func (h *hub) begin(w *wire, exact bool) error {
	if h.filling != nil {
		return protocolError("a snapshot begins within another")
	}
	h.filling = w
	w.exact, w.isLive, w.has, w.pause = exact, true, 0, 0
	for _, l := range w.locals {
		if l.exact || !exact {
			l.begin(h.client.link.epoch)
		}
	}
	return nil
}

// end ends the snapshot under way.
func (h *hub) end(revision Revision) error {
	w := h.filling
	if w == nil {
		return protocolError("the end of a snapshot that has not begun")
	}
	h.filling = nil
	w.has = revision.number
	for _, l := range w.locals {
		l.end(revision)
	}
	return nil
}

func (h *hub) update(entry Entry, skipped uint64) {
	tell := func(w *wire) {
		for _, l := range w.locals {
			l.update(entry, skipped)
		}
		h.endTooLarge(w)
	}
	if h.filling != nil {
		tell(h.filling)
		return
	}
	h.eachCovering(entry.Key, entry.Revision, tell)
}

func (h *hub) gone(key string, revision Revision, reason Reason, skipped uint64) {
	h.eachCovering(key, revision, func(w *wire) {
		for _, l := range w.locals {
			l.gone(key, revision, reason, skipped)
		}
	})
}

// eachCovering visits the wires that cover a key and have no change of this revision yet.
func (h *hub) eachCovering(key string, revision Revision, tell func(*wire)) {
	link := h.client.link
	link.lastRev = max(link.lastRev, revision.number)
	h.eachPattern(key, func(w *wire) {
		if w != h.filling && w.isLive && w.has < revision.number {
			tell(w)
		}
	})
}

// eachPattern visits the wires whose pattern covers a key: of everything, of the key, and of each that it is below.
func (h *hub) eachPattern(key string, visit func(*wire)) {
	try := func(pattern string) {
		if w := h.wires[pattern]; w != nil {
			visit(w)
		}
	}
	if len(h.wires) == 0 {
		return
	}
	try("*")
	for at := 0; ; {
		dot := strings.IndexByte(key[at:], '.')
		if dot < 0 {
			break
		}
		at += dot
		try(key[:at])
		try(key[:at] + ".*")
		at++
	}
	try(key)
}

// wrote lets watches know a put or delete of one key before its caller does. The server usually told it before its
// answer, but it may have passed over the notification in favour of a newer one, which comes later.
func (h *hub) wrote(ask *call, revision Revision) {
	link := h.client.link
	if h.watches == 0 || link == nil || revision.number <= link.lastRev {
		return // it was reported, or something newer was
	}
	entry := Entry{Key: ask.key, Value: ask.value, Revision: revision}
	h.eachPattern(ask.key, func(w *wire) {
		if w == h.filling || !w.isLive || w.has >= revision.number {
			return
		}
		for _, l := range w.locals {
			if _, ok := l.sink.(watcher); !ok || l.standing != joined {
				continue
			}
			if ask.request == "Put" {
				if ask.value != nil {
					l.update(entry, 0)
				}
			} else if known, ok := l.known[ask.key]; ok && !known.isDead && known.revision < revision.number {
				l.known[ask.key] = knownKey{revision: revision.number, snapshot: l.snapshot, isDead: true}
				l.sink.gone(ask.key, revision, Deleted, 0)
			}
		}
		h.endTooLarge(w)
	})
}

// refused handles that the server refused a Subscribe. Callers that wait get the error. Those that were accepted before go
// on: if the server has dropped them, because the connection is new, it is asked again where time may cure the refusal.
func (h *hub) refused(w *wire, err error, status int) {
	if w.asked > 0 || h.wires[w.pattern] != w {
		return // another is under way, which may be accepted
	}
	canWait := status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable
	isAgain := false
	for _, l := range slices.Clone(w.locals) {
		isServed := w.isLive && l.standing == joined
		if l.ready != nil || !(canWait || isServed) {
			h.cut(w, l)
			h.endOne(l, err)
		} else if !isServed {
			isAgain = true
		}
	}
	if len(w.locals) == 0 {
		h.unsubscribe(w)
	} else if isAgain {
		h.subscribeLater(w)
	}
}

func (h *hub) subscribeLater(w *wire) {
	w.pause = min(max(2*w.pause, retryMin), retryMax)
	link := h.client.link
	w.retry = time.AfterFunc(w.pause, func() {
		h.client.mu.Lock()
		defer h.client.mu.Unlock()
		if h.client.link == link && link.err == nil && h.wires[w.pattern] == w && w.asked == 0 {
			h.subscribe(link, w)
		}
	})
}

// ended handles that the server has ended a subscription. What the client's own requests replaced or ended is expected: the
// server says so before it answers them.
func (h *hub) ended(pattern string, err error) {
	w := h.wires[pattern]
	if w == nil || w.asked > 0 {
		return
	}
	delete(h.wires, pattern)
	w.stopRetry()
	h.endWire(w, &Error{Kind: err, Op: "subscribe", Key: pattern})
}

func (h *hub) endAll(err error) {
	for _, w := range h.wires {
		w.stopRetry()
		h.endWire(w, err)
	}
	h.wires = map[string]*wire{}
}

func (h *hub) endWire(w *wire, err error) {
	locals := w.locals
	w.locals = nil
	for _, l := range locals {
		h.left(l)
		h.endOne(l, err)
	}
}

// endOne ends a local subscription that was cut from its wire, and the others of its group with it.
func (h *hub) endOne(l *local, err error) {
	if len(l.group.locals) > 1 {
		err = within("subscribe", l.pattern, err) // which of them it was
	}
	for _, one := range l.group.locals {
		h.remove(one)
		one.isReady(err)
	}
	l.sink.end(err)
}

// endTooLarge ends what holds more than its limit.
func (h *hub) endTooLarge(w *wire) {
	if !slices.ContainsFunc(w.locals, func(l *local) bool { return l.isTooLarge }) {
		return
	}
	for _, l := range slices.Clone(w.locals) {
		if l.isTooLarge {
			h.cut(w, l)
			h.endOne(l, &Error{Kind: ErrTooMuch, Op: "subscribe", Key: l.pattern})
		}
	}
	if len(w.locals) == 0 {
		h.unsubscribe(w)
	}
}
