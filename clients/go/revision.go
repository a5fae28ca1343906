package nkv

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// Revision is the number of a change, and the epoch of the data within which it says something.
//
// A server that lost its data begins another epoch. Revisions of two epochs are never equal and not ordered. The zero
// Revision means that there is no such key, in every epoch.
type Revision struct {
	number uint64
	epoch  string
}

// NewRevision returns a revision whose epoch is not known, such as one that a person typed. As a condition it is compared
// by its number alone.
func NewRevision(number uint64) Revision {
	return Revision{number: number}
}

func revisionIn(epoch string, number uint64) Revision {
	if number == 0 {
		return Revision{}
	}
	return Revision{number: number, epoch: epoch}
}

// Number returns the number; 0 says that there is no such key.
func (r Revision) Number() uint64 { return r.number }

// Epoch returns the epoch; "" if it is not known.
func (r Revision) Epoch() string { return r.epoch }

// IsZero reports whether it stands for the absence of a key.
func (r Revision) IsZero() bool { return r.number == 0 }

// After reports whether it is a later revision than other. It is false if they are of two epochs.
func (r Revision) After(other Revision) bool {
	return (r.epoch == other.epoch || r.number == 0 || other.number == 0) && r.number > other.number
}

// String returns the number in decimal digits.
func (r Revision) String() string { return strconv.FormatUint(r.number, 10) }

// Entry is a key with its value.
type Entry struct {
	// Key is the key.
	Key string
	// Value is the value. It may be shared with other readers: copy it before changing it.
	Value []byte
	// Revision is the revision of the put that wrote the value.
	Revision Revision
}

// JSON decodes the value, which is JSON, into what v points to.
func (e Entry) JSON(v any) error {
	if err := json.Unmarshal(e.Value, v); err != nil {
		return fmt.Errorf("the value of %q: %w", e.Key, err)
	}
	return nil
}
