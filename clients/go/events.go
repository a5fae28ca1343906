package nkv

// Event is what a subscription delivers: [Update], [Gone], [Synced], [Reconnecting] or [Connected].
type Event interface{ isEvent() }

// Update says that a key has a new value, or had it when the subscription began.
type Update struct {
	// Entry is the key with its value.
	Entry
	// Skipped is how many changes of the key, since the last one delivered, were passed over in favour of this one.
	Skipped uint64
}

// Gone says that a key is gone.
type Gone struct {
	// Key is the key.
	Key string
	// Revision is that of its end; if the reason is [Missed], one by which it was gone.
	Revision Revision
	// Reason says why.
	Reason Reason
	// Skipped is how many changes of the key, since the last one delivered, were passed over in favour of this one.
	Skipped uint64
}

// Synced says that everything up to a revision was delivered: first after the present state, and again after each time the
// connection was lost.
type Synced struct {
	// Revision is the revision; its epoch is that of the server's data.
	Revision Revision
}

// Reconnecting says that the connection is lost and is being made again: what is known may be old.
type Reconnecting struct{}

// Connected says that the connection is there again. What was missed comes next, then [Synced].
type Connected struct {
	// Epoch is that of the server's data. If it is another than before, the server has lost some of them: every key is
	// delivered anew, and revisions begin again.
	Epoch string
}

func (Update) isEvent()       {}
func (Gone) isEvent()         {}
func (Synced) isEvent()       {}
func (Reconnecting) isEvent() {}
func (Connected) isEvent()    {}

// Reason says why a key is gone.
type Reason string

const (
	// Deleted means that it was deleted.
	Deleted Reason = "deleted"
	// Expired means that its time to live ended.
	Expired Reason = "expired"
	// Missed means that it went while the connection was lost; how is not known.
	Missed Reason = "missed"
)
