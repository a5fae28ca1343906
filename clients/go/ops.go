package nkv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"
)

const (
	// getPage is how many keys with their values are asked for at a time, to begin with.
	getPage = 1000
	// listPage is how many keys are asked for at a time: the most that a server gives.
	listPage = 10_000
)

func (c *Client) newCall(kind callKind, request, key string, build func(*requestLine) []byte) *call {
	ask := &call{id: c.lastID.Add(1), kind: kind, request: request, key: key, done: make(chan result, 1)}
	r := newRequest(request, ask.id)
	if key != "" {
		r.text("key", key)
	}
	if build == nil {
		ask.frame = r.end()
	} else {
		ask.frame = build(r)
	}
	return ask
}

// ask sends a request and returns its answer. A 404 is no error.
func (c *Client) ask(ctx context.Context, ask *call) (*body, string, error) {
	answer, epoch, err := c.exchange(ctx, ask)
	if err == nil && answer.Status != http.StatusOK && answer.Status != http.StatusNotFound {
		err = answerError(answer, epoch, ask.kind == callWrite)
	}
	return answer, epoch, err
}

// Put writes a value and returns its revision.
//
// The error is [ErrOutcomeUnknown] when the connection was lost or time ran out after the put was sent: it is never sent
// twice, because that might bring an old value back over a newer one. Others say that nothing was written; among them are
// [ErrConflict] and [ErrOtherEpoch], if there is a condition.
func (c *Client) Put(ctx context.Context, key string, value []byte, opts ...PutOption) (Revision, error) {
	const op = "put"
	if err := checkKey(key); err != nil {
		return Revision{}, within(op, key, err)
	}
	var o putOptions
	for _, option := range opts {
		option(&o)
	}
	if o.ttl != nil && *o.ttl <= 0 {
		return Revision{}, within(op, key, &Error{Kind: ErrInvalidOption, Message: "the TTL must be above 0"})
	}
	if lenMax := c.valueMax.Load(); uint64(len(value)) > lenMax {
		message := fmt.Sprintf("the value has %d bytes, and the server takes %d at most", len(value), lenMax)
		err := &Error{Kind: ErrRefused, Status: http.StatusRequestEntityTooLarge, Message: message}
		return Revision{}, within(op, key, err)
	}
	ask := c.newCall(callWrite, "Put", key, func(r *requestLine) []byte {
		if o.ifRevision != nil {
			r.number("if_revision", o.ifRevision.number)
		}
		if o.ttl != nil {
			r.number("ttl_ms", milliseconds(*o.ttl))
		}
		return r.endWith(value)
	})
	end := len(ask.frame) - 1 // a newline
	ask.value = ask.frame[end-len(value) : end : end]
	if o.ifRevision != nil {
		ask.epoch = o.ifRevision.epoch
	}
	answer, epoch, err := c.ask(ctx, ask)
	switch {
	case err != nil:
		return Revision{}, within(op, key, err)
	case answer.Revision == nil:
		return Revision{}, within(op, key, protocolError("the server gave no revision"))
	}
	return revisionIn(epoch, *answer.Revision), nil
}

// milliseconds rounds up.
func milliseconds(d time.Duration) uint64 {
	return uint64((d-1)/time.Millisecond) + 1
}

// PutJSON writes a value as JSON, as [Client.Put] writes bytes.
func (c *Client) PutJSON(ctx context.Context, key string, v any, opts ...PutOption) (Revision, error) {
	value, err := json.Marshal(v)
	if err != nil {
		return Revision{}, fmt.Errorf("the value of %q: %w", key, err)
	}
	return c.Put(ctx, key, value, opts...)
}

// Get reads a value; false if there is no such key. It is asked again when the connection is lost meanwhile.
func (c *Client) Get(ctx context.Context, key string) (Entry, bool, error) {
	const op = "get"
	if err := checkKey(key); err != nil {
		return Entry{}, false, within(op, key, err)
	}
	entries, _, err := c.entries(ctx, key, nil)
	if err == nil && len(entries) > 1 {
		err = protocolError("the server's answer has %d keys", len(entries))
	}
	if err != nil || len(entries) == 0 {
		return Entry{}, false, within(op, key, err)
	}
	return entries[0], true, nil
}

// GetAll reads all values that a pattern selects, in key order, in as many pages as it takes: "a" selects itself, "a.*" all
// below it, "*" everything. What changes meanwhile may be found as it was or as it is.
func (c *Client) GetAll(ctx context.Context, pattern string) ([]Entry, error) {
	var all []Entry
	o := PageOptions{Limit: getPage}
	for {
		page, more, err := c.GetPage(ctx, pattern, o)
		var known *Error
		if errors.As(err, &known) && known.Status == http.StatusRequestEntityTooLarge && o.Limit > 1 {
			o.Limit = max(o.Limit/4, 1) // the values are larger than expected
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if !more || len(page) == 0 {
			return all, nil
		}
		o.After = all[len(all)-1].Key
		o.Limit = min(2*o.Limit, getPage)
	}
}

// GetPage reads some of the values that a pattern selects, in key order, and reports whether there are more. The error is
// [ErrRefused] with status 413 when the page would be too large.
func (c *Client) GetPage(ctx context.Context, pattern string, o PageOptions) (page []Entry, more bool, err error) {
	const op = "get"
	if err := o.check(pattern); err != nil {
		return nil, false, within(op, pattern, err)
	}
	page, more, err = c.entries(ctx, pattern, &o)
	if err != nil {
		return nil, false, within(op, pattern, err)
	}
	return page, more, nil
}

func (o *PageOptions) check(pattern string) error {
	if o.Limit < 0 {
		return &Error{Kind: ErrInvalidOption, Message: "the limit is negative"}
	}
	if o.After != "" {
		if err := checkKey(o.After); err != nil {
			return err
		}
	}
	return checkPattern(pattern)
}

// entries asks for a page, or for one key.
func (c *Client) entries(ctx context.Context, pattern string, o *PageOptions) ([]Entry, bool, error) {
	answer, epoch, err := c.page(ctx, "Get", pattern, o)
	if err != nil {
		return nil, false, err
	}
	if len(answer.values) != len(answer.Keys) {
		return nil, false, protocolError("the server's answer has %d keys and %d values", len(answer.Keys), len(answer.values))
	}
	entries := make([]Entry, len(answer.Keys))
	for i, key := range answer.Keys {
		entries[i] = Entry{Key: key, Value: answer.values[i], Revision: revisionIn(epoch, answer.Revisions[i])}
	}
	return entries, answer.More, nil
}

func (c *Client) page(ctx context.Context, request, pattern string, o *PageOptions) (*body, string, error) {
	var build func(r *requestLine) []byte
	if o != nil {
		build = func(r *requestLine) []byte {
			if o.Limit > 0 {
				r.number("limit", uint64(o.Limit))
			}
			if o.After != "" {
				r.text("after", o.After)
			}
			return r.end()
		}
	}
	answer, epoch, err := c.ask(ctx, c.newCall(callRead, request, pattern, build))
	if err != nil {
		return nil, "", err
	}
	if len(answer.Revisions) != len(answer.Keys) {
		return nil, "", protocolError("the server's answer has %d keys and %d revisions", len(answer.Keys), len(answer.Revisions))
	}
	last := ""
	if o != nil {
		last = o.After
	}
	for _, key := range answer.Keys {
		// A server that gives what was not asked for, or gives it twice, would have us ask for ever.
		if !selects(pattern, key) || (last != "" && !keyLess(last, key)) {
			return nil, "", protocolError("the server's answer has a key that was not asked for")
		}
		last = key
	}
	return answer, epoch, nil
}

// KeyRevision is a key with its revision.
type KeyRevision struct {
	// Key is the key.
	Key string
	// Revision is the revision of the put that wrote its value.
	Revision Revision
}

// List reads all keys that a pattern selects, with their revisions, in key order, in as many pages as it takes.
func (c *Client) List(ctx context.Context, pattern string) ([]KeyRevision, error) {
	var all []KeyRevision
	o := PageOptions{Limit: listPage}
	for {
		page, more, err := c.ListPage(ctx, pattern, o)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if !more || len(page) == 0 {
			return all, nil
		}
		o.After = all[len(all)-1].Key
	}
}

// ListPage reads some of the keys that a pattern selects, with their revisions, in key order, and reports whether there are
// more.
func (c *Client) ListPage(ctx context.Context, pattern string, o PageOptions) (page []KeyRevision, more bool, err error) {
	const op = "list"
	if err := o.check(pattern); err != nil {
		return nil, false, within(op, pattern, err)
	}
	answer, epoch, err := c.page(ctx, "List", pattern, &o)
	if err != nil {
		return nil, false, within(op, pattern, err)
	}
	page = make([]KeyRevision, len(answer.Keys))
	for i, key := range answer.Keys {
		page[i] = KeyRevision{Key: key, Revision: revisionIn(epoch, answer.Revisions[i])}
	}
	return page, answer.More, nil
}

// DeleteResult is what a delete did.
type DeleteResult struct {
	// Count is how many keys were removed; 0 if there was none.
	Count uint64
	// Revision is the highest revision that the delete gave; zero if there was no such key.
	Revision Revision
}

// Delete removes a key, or all keys that a pattern selects. That there is none is no error. Errors are those of [Client.Put].
func (c *Client) Delete(ctx context.Context, pattern string) (DeleteResult, error) {
	if err := checkPattern(pattern); err != nil {
		return DeleteResult{}, within("delete", pattern, err)
	}
	return c.delete(ctx, pattern, nil)
}

// DeleteIf removes a key if it is at this revision; otherwise the error is [ErrConflict]. That there is no such key is no
// error.
func (c *Client) DeleteIf(ctx context.Context, key string, revision Revision) (DeleteResult, error) {
	if err := checkKey(key); err != nil {
		return DeleteResult{}, within("delete", key, err)
	}
	return c.delete(ctx, key, &revision)
}

func (c *Client) delete(ctx context.Context, pattern string, ifRevision *Revision) (DeleteResult, error) {
	ask := c.newCall(callWrite, "Delete", pattern, func(r *requestLine) []byte {
		if ifRevision != nil {
			r.number("if_revision", ifRevision.number)
		}
		return r.end()
	})
	if ifRevision != nil {
		ask.epoch = ifRevision.epoch
	}
	answer, epoch, err := c.ask(ctx, ask)
	if err != nil {
		return DeleteResult{}, within("delete", pattern, err)
	}
	deleted := DeleteResult{Count: answer.Count}
	if answer.Revision != nil {
		deleted.Revision = revisionIn(epoch, *answer.Revision)
	}
	return deleted, nil
}

// Exists reports whether a pattern selects any key.
func (c *Client) Exists(ctx context.Context, pattern string) (bool, error) {
	const op = "exists"
	if err := checkPattern(pattern); err != nil {
		return false, within(op, pattern, err)
	}
	answer, _, err := c.ask(ctx, c.newCall(callRead, "Exists", pattern, nil))
	if err != nil {
		return false, within(op, pattern, err)
	}
	return answer.Status == http.StatusOK, nil
}

// Health returns an error if the server does not work.
func (c *Client) Health(ctx context.Context) error {
	_, _, err := c.ask(ctx, c.newCall(callRead, "Health", "", nil))
	return within("health", "", err)
}

// ServerVersion is what a server says of itself.
type ServerVersion struct {
	// Server is the name of the program.
	Server string
	// Version is its version.
	Version string
	// Protocol is the version of the protocol.
	Protocol uint64
}

// Version returns what the server is.
func (c *Client) Version(ctx context.Context) (ServerVersion, error) {
	answer, _, err := c.ask(ctx, c.newCall(callRead, "Version", "", nil))
	if err != nil {
		return ServerVersion{}, within("version", "", err)
	}
	return ServerVersion{Server: answer.Server, Version: answer.Version, Protocol: answer.Protocol}, nil
}

// Subscriber is who would be notified of a change of a key.
type Subscriber struct {
	// ClientUUID identifies its client.
	ClientUUID string `json:"client_uuid"`
	// Name is the name of its client for people, if it has one.
	Name string `json:"name"`
	// Peer is the address of its client; "unix" for a Unix socket.
	Peer string `json:"peer"`
	// Pattern is what it subscribed to.
	Pattern string `json:"pattern"`
	// Exact says that it subscribed to the key alone.
	Exact bool `json:"exact"`
	// SinceMS is for how many milliseconds it has been subscribed.
	SinceMS uint64 `json:"since_ms"`
	// Queued is the backlog of its connection.
	Queued uint64 `json:"queued"`
	// Skipped is how many changes were conflated on its connection so far.
	Skipped uint64 `json:"skipped"`
}

// Trace returns the subscribers that would be notified of a change of a key.
func (c *Client) Trace(ctx context.Context, key string) ([]Subscriber, error) {
	const op = "trace"
	if err := checkKey(key); err != nil {
		return nil, within(op, key, err)
	}
	answer, _, err := c.ask(ctx, c.newCall(callRead, "Trace", key, nil))
	if err != nil {
		return nil, within(op, key, err)
	}
	return answer.Subscribers, nil
}

// Stats are the figures of a server. Those from Puts on are counted since its start.
type Stats struct {
	// Epoch is that of the data.
	Epoch string `json:"epoch"`
	// Durability is what an answer to a write promises: "sync", "interval:50ms", "os" or "memory".
	Durability string `json:"durability"`
	// Keys is the number of keys.
	Keys uint64 `json:"keys"`
	// ValueBytes is what all values take.
	ValueBytes uint64 `json:"value_bytes"`
	// Subscriptions is the number of subscriptions.
	Subscriptions uint64 `json:"subscriptions"`
	// Connections is the number of connections.
	Connections uint64 `json:"connections"`
	// Revision is the last revision that was given.
	Revision uint64 `json:"revision"`
	// UptimeMS is for how many milliseconds the server has run.
	UptimeMS uint64 `json:"uptime_ms"`
	// Puts counts puts.
	Puts uint64 `json:"puts"`
	// Deletes counts keys that were deleted.
	Deletes uint64 `json:"deletes"`
	// Expired counts keys whose time to live ended.
	Expired uint64 `json:"expired"`
	// Batches counts writes to storage.
	Batches uint64 `json:"batches"`
	// FailedBatches counts those that failed.
	FailedBatches uint64 `json:"failed_batches"`
	// Notified counts notifications.
	Notified uint64 `json:"notified"`
	// Conflated counts changes that were passed over in favour of newer ones.
	Conflated uint64 `json:"conflated"`
}

// Stats returns the server's figures.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var stats Stats
	answer, _, err := c.ask(ctx, c.newCall(callRead, "Stats", "", nil))
	if err == nil {
		if err = json.Unmarshal(answer.whole, &stats); err != nil {
			err = protocolError("the server sent bad figures: %v", err)
		}
	}
	return stats, within("stats", "", err)
}
