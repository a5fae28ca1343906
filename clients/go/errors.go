package nkv

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// What can go wrong, to be told apart with [errors.Is]. The doc of each says whether anything was changed.
var (
	// ErrInvalidAddress means that the address cannot be understood. Nothing was sent.
	ErrInvalidAddress = errors.New("nkv: invalid address")
	// ErrInvalidKey means that the key or pattern cannot be understood. Nothing was sent.
	ErrInvalidKey = errors.New("nkv: invalid key")
	// ErrInvalidOption means that an option has a value that it cannot have. Nothing was sent.
	ErrInvalidOption = errors.New("nkv: invalid option")
	// ErrCannotConnect means that no nkv server answers at the address, or that it refuses the client. Nothing was changed.
	ErrCannotConnect = errors.New("nkv: cannot connect")
	// ErrTimeout means that there was no answer in time. Nothing was changed, and a write that failed so is never sent
	// later: one that had been sent is ErrOutcomeUnknown instead.
	ErrTimeout = errors.New("nkv: timeout")
	// ErrConflict means that the key is at another revision than the condition says; [Error.Revision] is the present one.
	// Nothing was changed.
	ErrConflict = errors.New("nkv: conflict")
	// ErrOtherEpoch means that the condition names a revision of another epoch than that of the server's data, about which
	// it says nothing. Nothing was changed; read the key anew.
	ErrOtherEpoch = errors.New("nkv: revision of another epoch")
	// ErrRefused means that the server refused the request or failed to serve it; [Error.Status] says why. Nothing was
	// changed, unless the status is 500.
	ErrRefused = errors.New("nkv: refused")
	// ErrOutcomeUnknown means that a write was sent, and no answer says what became of it: it may or may not have been
	// done, or may be yet.
	ErrOutcomeUnknown = errors.New("nkv: outcome unknown")
	// ErrClosed means that the client, or the subscription, was closed. Nothing was changed.
	ErrClosed = errors.New("nkv: closed")
	// ErrProtocol means that the peer does not speak the protocol, or exceeds a limit.
	ErrProtocol = errors.New("nkv: protocol error")
	// ErrReplaced means that another subscriber with the name of this client subscribed to the same pattern.
	ErrReplaced = errors.New("nkv: subscription replaced")
	// ErrUnsubscribed means that another request with the name of this client ended the subscription.
	ErrUnsubscribed = errors.New("nkv: subscription ended")
	// ErrTooMuch means that a subscription would hold more than its limit; see [WithSubscriptionLenMax].
	ErrTooMuch = errors.New("nkv: subscription holds too much")
)

// ErrKeep is what the function given to [Client.Update] returns to leave the key as it is.
var ErrKeep = errors.New("nkv: keep the value")

// Error is the error of every call. [errors.Is] finds its kind and its cause; [errors.As] finds the fields.
type Error struct {
	// Kind is one of the errors that this package declares, such as [ErrConflict].
	Kind error
	// Op is what was asked for: "put", "get", "list", and so on.
	Op string
	// Key is the key or pattern that it was asked for.
	Key string
	// Revision is the present revision of the key, if the kind is [ErrConflict]; zero if there is no such key.
	Revision Revision
	// Status is what the server answered, as in HTTP: 400, 401, 403, 409, 413, 429, 500, 503, 507. It is 0 where the error
	// is no answer.
	Status int
	// Message says more, in words.
	Message string
	// Err is the cause, if there is one.
	Err error
}

// Error returns the message, with the kind, the operation and the cause.
func (e *Error) Error() string {
	text := "nkv"
	if e.Kind != nil {
		text = e.Kind.Error()
	}
	if e.Op != "" {
		text += ": " + e.Op
		if e.Key != "" {
			text += fmt.Sprintf(" %q", e.Key)
		}
	}
	if e.Message != "" {
		text += ": " + e.Message
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns the kind and the cause.
func (e *Error) Unwrap() []error {
	var errs []error
	for _, err := range []error{e.Kind, e.Err} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// Timeout reports whether time ran out.
func (e *Error) Timeout() bool {
	return errors.Is(e, ErrTimeout) || errors.Is(e, context.DeadlineExceeded)
}

// Retryable reports whether the same request may succeed later, and asking again does no harm: nothing was changed.
func (e *Error) Retryable() bool {
	switch e.Kind {
	case ErrTimeout, ErrCannotConnect:
		return true
	case ErrRefused:
		return e.Status == http.StatusTooManyRequests || e.Status == http.StatusServiceUnavailable
	}
	return false
}

func protocolError(format string, args ...any) error {
	return &Error{Kind: ErrProtocol, Message: fmt.Sprintf(format, args...)}
}

// within adds what was asked for to an error of this package.
func within(op, key string, err error) error {
	var known *Error
	if !errors.As(err, &known) || known.Op != "" {
		return err
	}
	copied := *known
	copied.Op = op
	if copied.Kind != ErrInvalidKey { // it names the key already
		copied.Key = key
	}
	return &copied
}

// answerError is the error that an answer stands for.
func answerError(body *body, epoch string, isWrite bool) error {
	err := &Error{Kind: ErrRefused, Status: body.Status}
	err.Message = fmt.Sprintf("the server says %d: %s", body.Status, body.Message)
	switch {
	case body.Status == http.StatusConflict:
		err.Kind = ErrConflict
		if body.Revision != nil {
			err.Revision = revisionIn(epoch, *body.Revision)
		}
	case body.Status == http.StatusServiceUnavailable && isWrite:
		err.Kind = ErrOutcomeUnknown // a write in flight, as the server stops, may have been done
	}
	return err
}
