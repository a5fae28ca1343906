package nkv

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"
)

// requestLine is a line to the server, as it is built. Strings in it are UTF-8: that was checked.
type requestLine struct {
	buf []byte
}

func newRequest(kind string, id uint64) *requestLine {
	r := &requestLine{buf: make([]byte, 0, 128)}
	r.buf = append(r.buf, `{"type":"`...)
	r.buf = append(r.buf, kind...)
	r.buf = append(r.buf, `","id":`...)
	r.buf = strconv.AppendUint(r.buf, id, 10)
	return r
}

func (r *requestLine) name(name string) {
	r.buf = append(r.buf, ',', '"')
	r.buf = append(r.buf, name...)
	r.buf = append(r.buf, '"', ':')
}

func (r *requestLine) text(name, value string) *requestLine {
	r.name(name)
	r.buf = appendString(r.buf, value)
	return r
}

func (r *requestLine) number(name string, value uint64) *requestLine {
	r.name(name)
	r.buf = strconv.AppendUint(r.buf, value, 10)
	return r
}

func (r *requestLine) yes(name string) *requestLine {
	r.name(name)
	r.buf = append(r.buf, "true"...)
	return r
}

func (r *requestLine) texts(name string, values []string) *requestLine {
	r.name(name)
	r.buf = append(r.buf, '[')
	for i, value := range values {
		if i > 0 {
			r.buf = append(r.buf, ',')
		}
		r.buf = appendString(r.buf, value)
	}
	r.buf = append(r.buf, ']')
	return r
}

func (r *requestLine) end() []byte {
	return append(r.buf, '}', '\n')
}

// endWith ends the line and puts a payload behind it.
func (r *requestLine) endWith(payload []byte) []byte {
	r.number("len", uint64(len(payload)))
	frame := make([]byte, 0, len(r.buf)+len(payload)+3)
	frame = append(frame, r.buf...)
	frame = append(frame, '}', '\n')
	frame = append(frame, payload...)
	return append(frame, '\n')
}

// appendString writes a JSON string. No byte is replaced by another.
func appendString(buf []byte, text string) []byte {
	buf = append(buf, '"')
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"' || c == '\\':
			buf = append(buf, '\\', c)
		case c < 0x20:
			buf = append(buf, fmt.Sprintf(`\u%04x`, c)...)
		default:
			buf = append(buf, c)
		}
	}
	return append(buf, '"')
}

// head is what any answer may have.
type head struct {
	ID       json.RawMessage `json:"id"`
	Status   int             `json:"status"`
	Message  string          `json:"message"`
	Revision *uint64         `json:"revision"`
}

// body is what is within a message of the server.
type body struct {
	head
	Count       uint64            `json:"count"`
	Keys        []string          `json:"keys"`
	Revisions   []uint64          `json:"revisions"`
	Lens        []uint64          `json:"lens"`
	Data        []json.RawMessage `json:"data"`
	Len         *uint64           `json:"len"`
	More        bool              `json:"more"`
	Epoch       string            `json:"epoch"`
	BeginsAnew  bool              `json:"begins_anew"`
	MaxValue    *uint64           `json:"max_value"`
	Features    []string          `json:"features"`
	PatienceMS  *uint64           `json:"patience_ms"`
	SinceMS     *uint64           `json:"since_ms"`
	Server      string            `json:"server"`
	Version     string            `json:"version"`
	Protocol    uint64            `json:"protocol"`
	Subscribers []Subscriber      `json:"subscribers"`
	Key         string            `json:"key"`
	Value       json.RawMessage   `json:"value"`
	Skipped     uint64            `json:"skipped"`
	Reason      string            `json:"reason"`

	// values are those of a Get, or the one of an Update.
	values [][]byte
	// whole is the text of an answer to Stats.
	whole []byte
}

// message is one message of the server. Its kind is the name of its one field, or the string that it is.
type message struct {
	kind string
	body *body
}

// kinds are the messages with a body that the protocol names.
var kinds = map[string]bool{
	"Base": true, "Get": true, "List": true, "Trace": true, "Version": true, "Stats": true,
	"Update": true, "Close": true, "Synced": true, "Reset": true, "Stale": true,
}

// decoder reads messages, none of which takes more than lenMax bytes, nor its payload.
type decoder struct {
	in     *bufio.Reader
	lenMax uint64
	long   []byte
}

func newDecoder(in io.Reader, lenMax uint64) *decoder {
	const bufferLen = 64 << 10
	return &decoder{in: bufio.NewReaderSize(in, bufferLen), lenMax: lenMax}
}

// next reads a message. One that is not known has no body.
func (d *decoder) next() (message, error) {
	line, err := d.line()
	if err != nil {
		return message{}, err
	}
	if !utf8.Valid(line) {
		return message{}, protocolError("the server sent what is not UTF-8")
	}
	if len(line) > 0 && line[0] == '"' {
		var text string
		if err := json.Unmarshal(line, &text); err != nil {
			return message{}, protocolError("the server sent what is not JSON: %v", err)
		}
		return message{kind: text}, nil
	}
	kind, inner, err := splitMessage(line)
	if err != nil {
		return message{}, err
	}
	if !kinds[kind] {
		return message{}, d.passOver(inner)
	}
	body := &body{}
	if kind == "Stats" {
		// Its number of keys has the name that keys have elsewhere, and is read with the rest of the figures.
		err = json.Unmarshal(inner, &body.head)
		body.whole = bytes.Clone(inner)
	} else {
		err = json.Unmarshal(inner, body)
	}
	if err != nil {
		return message{}, protocolError("the server sent a bad %q: %v", kind, err)
	}
	if err := d.values(kind, body); err != nil {
		return message{}, err
	}
	return message{kind: kind, body: body}, nil
}

// splitMessage returns the name and the value of the one field of a message.
func splitMessage(line []byte) (kind string, inner []byte, err error) {
	// As servers write it, {"Kind":...}, the value need not be copied. Of two fields the rest is no JSON.
	if rest, ok := bytes.CutPrefix(line, []byte(`{"`)); ok && line[len(line)-1] == '}' {
		if name, value, ok := bytes.Cut(rest, []byte(`":`)); ok && kinds[string(name)] {
			return string(name), value[:len(value)-1], nil
		}
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(line, &fields); err != nil {
		return "", nil, protocolError("the server sent what is not a message: %v", err)
	}
	if len(fields) != 1 {
		return "", nil, protocolError("the server sent an object with %d fields", len(fields))
	}
	for kind, inner = range fields {
	}
	return kind, inner, nil
}

// passOver reads past the payload of a message that is not known.
func (d *decoder) passOver(inner []byte) error {
	var fields map[string]json.RawMessage
	if json.Unmarshal(inner, &fields) != nil {
		return nil
	}
	length, err := strconv.ParseUint(string(fields["len"]), 10, 64)
	if err != nil {
		return nil
	}
	_, err = d.payload(length)
	return err
}

// values reads the values of a message, in whatever form they came.
func (d *decoder) values(kind string, body *body) error {
	if body.Len != nil {
		payload, err := d.payload(*body.Len)
		if err != nil {
			return err
		}
		if kind != "Get" {
			body.values = [][]byte{payload}
			return nil
		}
		return body.cut(payload)
	}
	forms := body.Data
	if kind == "Update" {
		forms = []json.RawMessage{body.Value}
	}
	for _, form := range forms {
		value, err := valueOf(form)
		if err != nil {
			return err
		}
		body.values = append(body.values, value)
	}
	return nil
}

// cut makes values of a payload that has one behind another.
func (b *body) cut(payload []byte) error {
	for _, length := range b.Lens {
		if length > uint64(len(payload)) {
			return protocolError("the values are longer than their payload")
		}
		value := payload[:length:length]
		if len(b.Lens) > 1 {
			value = bytes.Clone(value) // so that one value does not keep the others
		}
		b.values = append(b.values, value)
		payload = payload[length:]
	}
	if len(payload) > 0 {
		return protocolError("the values are shorter than their payload")
	}
	return nil
}

func valueOf(form json.RawMessage) ([]byte, error) {
	if len(form) > 0 && form[0] == '"' {
		var text string
		err := json.Unmarshal(form, &text)
		return []byte(text), err
	}
	var numbers []uint16
	if err := json.Unmarshal(form, &numbers); err != nil || numbers == nil {
		return nil, protocolError("the server sent no value")
	}
	value := make([]byte, len(numbers))
	for i, number := range numbers {
		if number > 0xff {
			return nil, protocolError("the server sent a value with the byte %d", number)
		}
		value[i] = byte(number)
	}
	return value, nil
}

// line reads a line that is not empty, without white space at its ends. It is good until the next read.
func (d *decoder) line() ([]byte, error) {
	for {
		line, err := d.wholeLine()
		if err != nil {
			return nil, err
		}
		if line = bytes.Trim(line, " \t\r\n\v\f"); len(line) > 0 {
			return line, nil
		}
	}
}

func (d *decoder) wholeLine() ([]byte, error) {
	const keepMax = 1 << 20
	if cap(d.long) > keepMax {
		d.long = nil
	}
	d.long = d.long[:0]
	for {
		part, err := d.in.ReadSlice('\n')
		if uint64(len(d.long)+len(part)) > d.lenMax {
			return nil, protocolError("the server sent a message of more than %d bytes", d.lenMax)
		}
		switch {
		case err == nil && len(d.long) == 0:
			return part, nil
		case err == nil:
			d.long = append(d.long, part...)
			return d.long, nil
		case errors.Is(err, bufio.ErrBufferFull):
			d.long = append(d.long, part...)
		default:
			return nil, err
		}
	}
}

// payload reads a payload and the newline behind it. Memory is taken as the bytes come.
func (d *decoder) payload(length uint64) ([]byte, error) {
	const atOnce = 1 << 20
	if length > d.lenMax {
		return nil, protocolError("the server announced %d bytes, and %d are allowed", length, d.lenMax)
	}
	var value []byte
	if length <= atOnce {
		value = make([]byte, length)
		if _, err := io.ReadFull(d.in, value); err != nil {
			return nil, err
		}
	} else {
		var buffer bytes.Buffer
		if _, err := io.CopyN(&buffer, d.in, int64(length)); err != nil {
			return nil, err
		}
		value = buffer.Bytes()
	}
	end, err := d.in.ReadByte()
	if err == nil && end != '\n' {
		err = protocolError("no newline behind a payload")
	}
	return value, err
}
