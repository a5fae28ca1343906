package nkv_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	nkv "github.com/nkv-store/nkv/clients/go"
)

// The cases that all client libraries must pass, from ../scenarios, against the real server.

const (
	// patience is the limit of a wait that names none, and of a request.
	patience = 60 * time.Second
	// atOnce is the limit of what is to return at once.
	atOnce = 10 * time.Second
)

type scenario struct {
	Name    string                `json:"name"`
	Why     string                `json:"why"`
	Clients map[string]clientSpec `json:"clients"`
	Needs   json.RawMessage       `json:"needs"`
	Steps   []step                `json:"steps"`
}

type clientSpec struct {
	Via       string `json:"via"`
	TimeoutMS int    `json:"timeout_ms"`
}

type step struct {
	Op         string          `json:"op"`
	On         string          `json:"on"`
	Name       string          `json:"name"`
	Key        json.RawMessage `json:"key"`
	Pattern    json.RawMessage `json:"pattern"`
	Patterns   []string        `json:"patterns"`
	After      json.RawMessage `json:"after"`
	Value      json.RawMessage `json:"value"`
	Absent     bool            `json:"absent"`
	Becomes    bool            `json:"becomes"`
	Is         json.RawMessage `json:"is"`
	Above0     []string        `json:"above_0"`
	Append     string          `json:"append"`
	Keep       bool            `json:"keep"`
	Meanwhile  []step          `json:"meanwhile"`
	Always     bool            `json:"always"`
	Calls      *int            `json:"calls"`
	Clients    []string        `json:"clients"`
	Revision   string          `json:"revision"`
	Save       string          `json:"save"`
	IfRevision json.RawMessage `json:"if_revision"`
	TTLMS      *int            `json:"ttl_ms"`
	TimeoutMS  int             `json:"timeout_ms"`
	Error      json.RawMessage `json:"error"`
	Status     int             `json:"status"`
	Count      int             `json:"count"`
	Limit      int             `json:"limit"`
	Page       int             `json:"page"`
	More       bool            `json:"more"`
	Keys       json.RawMessage `json:"keys"`
	Entries    json.RawMessage `json:"entries"`
	Prefix     string          `json:"prefix"`
	Size       int             `json:"size"`
	Snapshot   *bool           `json:"snapshot"`
	Exact      bool            `json:"exact"`
	Expect     [][]any         `json:"expect"`
	Ordered    bool            `json:"ordered"`
	QuietMS    int             `json:"quiet_ms"`
	Changes    uint64          `json:"changes"`
	AtMost     *int            `json:"at_most"`
	AtLeast    *int            `json:"at_least"`
	Times      int             `json:"times"`
	EachMS     int             `json:"each_ms"`
	PutDuring  [][2]string     `json:"put_during"`
	Step       *step           `json:"step"`
	Steps      []step          `json:"steps"`
	AfterMS    int             `json:"after_ms"`
	WithinMS   int             `json:"within_ms"`
	Command    string          `json:"command"`
	Reply      *string         `json:"reply"`
	MS         int             `json:"ms"`
}

// server returns the program to test against, or skips the test.
func server(t *testing.T) string {
	t.Helper()
	program := os.Getenv("NKV_SERVER")
	for _, built := range []string{"../../target/release/nkv-server", "../../target/debug/nkv-server"} {
		if _, err := os.Stat(built); err == nil && program == "" {
			program = built
		}
	}
	switch {
	case program != "":
		program, _ = filepath.Abs(program)
		return program
	case os.Getenv("CI") == "true":
		t.Fatal("NKV_SERVER must be the path of the server")
	default:
		t.Skip("NKV_SERVER, the path of the server, is not set")
	}
	return ""
}

func TestScenarios(t *testing.T) {
	program := server(t)
	dir := os.Getenv("NKV_SCENARIOS")
	if dir == "" {
		dir = "../scenarios"
	}
	text, err := os.ReadFile(filepath.Join(dir, "cases.json"))
	if err != nil {
		t.Fatal(err)
	}
	var cases []scenario
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&cases); err != nil {
		t.Fatal(err)
	}
	for _, scenario := range cases {
		t.Run(scenario.Name, func(t *testing.T) {
			t.Parallel()
			if len(scenario.Needs) > 0 {
				t.Skipf("it needs %s", scenario.Needs)
			}
			r := &runner{scenario: scenario, stage: newStage(t, dir, program)}
			defer r.stop()
			for i, step := range scenario.Steps {
				if err := r.run(context.Background(), step); err != nil {
					text, _ := json.Marshal(step)
					t.Fatalf("%s: step %d, %.300s: %v", scenario.Why, i+1, text, err)
				}
			}
		})
	}
}

// stage is a server and the proxy before it.
type stage struct {
	mu    sync.Mutex
	stdin io.WriteCloser
	lines *bufio.Reader
	at    map[string]string
}

func newStage(t *testing.T, dir, program string) *stage {
	t.Helper()
	command := exec.Command("python3", filepath.Join(dir, "proxy.py"))
	command.Env = append(os.Environ(), "NKV_SERVER="+program)
	var complaints bytes.Buffer
	command.Stderr = &complaints
	stdin, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = command.Wait()
		if t.Failed() && complaints.Len() > 0 {
			t.Logf("the stage says:\n%s", complaints.String())
		}
	})
	s := &stage{stdin: stdin, lines: bufio.NewReader(stdout)}
	line, err := s.lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s.at)
	}
	if err != nil {
		t.Fatalf("the stage says %q: %v", line, err)
	}
	return s
}

func (s *stage) ask(command string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := io.WriteString(s.stdin, command+"\n"); err != nil {
		return "", err
	}
	line, err := s.lines.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimSuffix(line, "\n")
	if rest, ok := strings.CutPrefix(line, "ok"); ok {
		return strings.TrimSpace(rest), nil
	}
	return "", fmt.Errorf("the stage says %q", line)
}

// runner runs the steps of a case.
type runner struct {
	scenario  scenario
	stage     *stage
	mu        sync.Mutex
	clients   map[string]*nkv.Client
	revisions map[string]nkv.Revision
	subs      map[string]*nkv.Subscription
	watches   map[string]*nkv.Watch
	branches  map[string]*nkv.Branch
	begun     map[string]chan error
}

func (r *runner) stop() {
	for _, client := range r.clients {
		_ = client.Close()
	}
}

// skipped says that a step cannot be done in this language.
var skipped = errors.New("skipped")

func (r *runner) client(name string) (*nkv.Client, error) {
	if name == "" {
		name = "a"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if client := r.clients[name]; client != nil {
		return client, nil
	}
	spec, ok := r.scenario.Clients[name]
	if !ok {
		spec.Via = "proxy"
	}
	timeout := patience
	if spec.TimeoutMS > 0 {
		timeout = ms(spec.TimeoutMS)
	}
	client, err := nkv.Start(r.stage.at[spec.Via], nkv.WithRequestTimeout(timeout))
	if err != nil {
		return nil, err
	}
	put(&r.clients, name, client)
	return client, nil
}

func put[T any](m *map[string]T, name string, value T) {
	if *m == nil {
		*m = map[string]T{}
	}
	(*m)[name] = value
}

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

func limit(n int, otherwise time.Duration) time.Duration {
	if n > 0 {
		return ms(n)
	}
	return otherwise
}

// run runs a step, and compares its end with what the step says.
func (r *runner) run(ctx context.Context, s step) error {
	// A client is made when a step uses it first.
	var client *nkv.Client
	if !slices.Contains([]string{"stage", "sleep", "within", "begin", "join", "cancel"}, s.Op) {
		var err error
		if client, err = r.client(s.On); err != nil {
			return err
		}
	}
	if s.TimeoutMS > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, ms(s.TimeoutMS))
		defer cancel()
	}
	err := r.do(ctx, client, s)
	if errors.Is(err, skipped) {
		return nil
	}
	if len(s.Error) == 0 || s.Op == "get_many" {
		return err
	}
	return r.isExpected(err, s)
}

// different is the error of a step whose result is another one than it says.
type different struct{ text string }

func (d different) Error() string { return d.text }

func differs(got, want any) error {
	return different{fmt.Sprintf("got %.300q, want %.300q", fmt.Sprint(got), fmt.Sprint(want))}
}

func names(text json.RawMessage) (names []string) {
	if json.Unmarshal(text, &names) != nil {
		names = make([]string, 1)
		_ = json.Unmarshal(text, &names[0])
	}
	return names
}

func nameOf(err error) string {
	for name, kind := range map[string]error{
		"conflict": nkv.ErrConflict, "other_epoch": nkv.ErrOtherEpoch, "refused": nkv.ErrRefused,
		"outcome_unknown": nkv.ErrOutcomeUnknown, "timeout": nkv.ErrTimeout, "cannot_connect": nkv.ErrCannotConnect,
		"closed": nkv.ErrClosed, "invalid_key": nkv.ErrInvalidKey, "invalid_argument": nkv.ErrInvalidOption,
	} {
		var known *nkv.Error
		if errors.As(err, &known) && known.Kind == kind {
			return name
		}
	}
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	}
	return ""
}

func (r *runner) isExpected(err error, s step) error {
	name := nameOf(err)
	if !slices.Contains(names(s.Error), name) {
		return fmt.Errorf("ended with %q (%v), want %s", name, err, s.Error)
	}
	var known *nkv.Error
	if !errors.As(err, &known) {
		return nil
	}
	if s.Status != 0 && known.Status != s.Status {
		return differs(known.Status, s.Status)
	}
	if s.Revision != "" && name == "conflict" && known.Revision != r.revision(s.Revision) {
		return differs(known.Revision, r.revision(s.Revision))
	}
	return nil
}

func (r *runner) revision(name string) nkv.Revision {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.revisions[strings.TrimPrefix(name, "$")]
}

// keep keeps a revision.
func (r *runner) keep(name string, revision nkv.Revision) {
	if name != "" {
		r.mu.Lock()
		defer r.mu.Unlock()
		put(&r.revisions, name, revision)
	}
}

// value reads a value or a key.
func value(text json.RawMessage) ([]byte, error) {
	if len(text) == 0 {
		return nil, nil
	}
	var plain string
	if json.Unmarshal(text, &plain) == nil {
		return []byte(plain), nil
	}
	var form struct {
		Hex    *string  `json:"hex"`
		Repeat *string  `json:"repeat"`
		Times  int      `json:"times"`
		UTF16  []uint16 `json:"utf16"`
	}
	if err := json.Unmarshal(text, &form); err != nil {
		return nil, err
	}
	switch {
	case form.Hex != nil:
		return hex.DecodeString(*form.Hex)
	case form.Repeat != nil:
		return []byte(strings.Repeat(*form.Repeat, form.Times)), nil
	case form.UTF16 != nil:
		return nil, skipped // strings are bytes
	}
	return nil, fmt.Errorf("unknown value %s", text)
}

func (s *step) ifRevision(r *runner) (revision nkv.Revision, ok bool) {
	if len(s.IfRevision) == 0 {
		return nkv.Revision{}, false
	}
	var name string
	if json.Unmarshal(s.IfRevision, &name) == nil {
		return r.revision(name), true
	}
	number, _ := strconv.ParseUint(string(s.IfRevision), 10, 64)
	return nkv.NewRevision(number), true
}

func (r *runner) do(ctx context.Context, client *nkv.Client, s step) error {
	key, err := value(s.Key)
	if err != nil {
		return err
	}
	pattern, err := value(s.Pattern)
	if err != nil {
		return err
	}
	switch s.Op {
	case "put":
		return r.put(ctx, client, string(key), s)
	case "get":
		began := time.Now()
		err := r.get(ctx, client, string(key), s)
		for s.Becomes && errors.As(err, &different{}) && time.Since(began) < patience {
			time.Sleep(20 * time.Millisecond)
			err = r.get(ctx, client, string(key), s)
		}
		return err
	case "delete":
		return r.delete(ctx, client, string(key), s)
	case "exists":
		is, err := client.Exists(ctx, string(key))
		if err == nil && strconv.FormatBool(is) != string(s.Is) {
			return differs(is, string(s.Is))
		}
		return err
	case "update":
		return r.update(ctx, client, string(key), s)
	case "update_many":
		return r.updateMany(ctx, string(key), s)
	case "stats":
		return r.stats(ctx, client, s)
	case "list":
		return r.list(ctx, client, string(pattern), s)
	case "get_all":
		return r.getAll(ctx, client, string(pattern), s)
	case "put_many", "get_many", "mix_many":
		return r.many(ctx, client, s)
	case "subscribe":
		return r.subscribe(ctx, client, string(pattern), s)
	case "watch":
		watch, err := client.Watch(context.Background(), string(key))
		put(&r.watches, s.Name, watch)
		return err
	case "watch_branch":
		branch, err := client.WatchBranch(context.Background(), string(pattern))
		put(&r.branches, s.Name, branch)
		return err
	case "unwatch":
		return r.watches[s.Name].Close()
	case "watch_is", "branch_is", "branch_is_now":
		return r.isNow(ctx, s)
	case "unsubscribe":
		return r.subs[s.Name].Close()
	case "events":
		return r.events(s)
	case "state":
		return r.state(s)
	case "lost":
		return r.lost(ctx, s)
	case "ended":
		return r.ended(s)
	case "conflated":
		return r.conflated(s)
	case "poll_cancel":
		return r.pollCancel(s)
	default:
		return r.control(ctx, client, s)
	}
}

// control does the steps that are about other steps, or about the stage.
func (r *runner) control(ctx context.Context, client *nkv.Client, s step) error {
	switch s.Op {
	case "cancel":
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- r.run(ctx, *s.Step) }()
		time.Sleep(ms(s.AfterMS))
		cancel()
		return within(ended, atOnce)
	case "begin":
		ended := make(chan error, 1)
		put(&r.begun, s.Name, ended)
		go func() { ended <- r.run(context.Background(), *s.Step) }()
		return nil
	case "join":
		return within(r.begun[s.Name], limit(s.WithinMS, patience))
	case "stage":
		return r.onStage(s)
	case "sleep":
		time.Sleep(ms(s.MS))
		return nil
	case "close":
		ended := make(chan error, 1)
		go func() { ended <- client.Close() }()
		return within(ended, limit(s.WithinMS, atOnce))
	case "within":
		began := time.Now()
		for _, step := range s.Steps {
			if err := r.run(ctx, step); err != nil {
				return err
			}
		}
		if took := time.Since(began); took > ms(s.MS) {
			return differs(took, ms(s.MS))
		}
		return nil
	}
	return fmt.Errorf("unknown op %q", s.Op)
}

func within(ended <-chan error, limit time.Duration) error {
	select {
	case err := <-ended:
		return err
	case <-time.After(limit):
		return fmt.Errorf("not ended within %v", limit)
	}
}

func (r *runner) onStage(s step) error {
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		answer, err := r.stage.ask(s.Command)
		if err != nil {
			return err
		}
		if s.Reply != nil && answer != *s.Reply {
			if time.Since(began) < patience {
				continue
			}
			return differs(answer, *s.Reply)
		}
		number, _ := strconv.Atoi(answer)
		if (s.AtLeast != nil && number < *s.AtLeast) || (s.AtMost != nil && number > *s.AtMost) {
			return different{fmt.Sprintf("%s: %q is not within the limits", s.Command, answer)}
		}
		return nil
	}
}

func (r *runner) put(ctx context.Context, client *nkv.Client, key string, s step) error {
	content, err := value(s.Value)
	if err != nil {
		return err
	}
	var options []nkv.PutOption
	if revision, ok := s.ifRevision(r); ok {
		options = append(options, nkv.IfRevision(revision))
	}
	if s.TTLMS != nil {
		options = append(options, nkv.TTL(ms(*s.TTLMS)))
	}
	revision, err := client.Put(ctx, key, content, options...)
	if err == nil {
		r.keep(s.Save, revision)
	}
	return err
}

func (r *runner) get(ctx context.Context, client *nkv.Client, key string, s step) error {
	entry, ok, err := client.Get(ctx, key)
	if err != nil {
		return err
	}
	r.keep(s.Save, entry.Revision)
	want, err := value(s.Value)
	switch {
	case err != nil:
		return err
	case ok == s.Absent:
		return differs(ok, !s.Absent)
	case s.Absent:
		return nil
	case !bytes.Equal(entry.Value, want) || entry.Value == nil || entry.Key != key:
		return differs(entry.Value, want)
	case s.Revision != "" && entry.Revision != r.revision(s.Revision):
		return differs(entry.Revision, r.revision(s.Revision))
	}
	return nil
}

func (r *runner) delete(ctx context.Context, client *nkv.Client, key string, s step) error {
	var deleted nkv.DeleteResult
	var err error
	if revision, ok := s.ifRevision(r); ok {
		deleted, err = client.DeleteIf(ctx, key, revision)
	} else {
		deleted, err = client.Delete(ctx, key)
	}
	if err == nil && deleted.Count != uint64(s.Count) {
		return differs(deleted.Count, s.Count)
	}
	return err
}

func (r *runner) update(ctx context.Context, client *nkv.Client, key string, s step) error {
	calls := 0
	revision, err := client.Update(ctx, key, func(old *nkv.Entry) ([]byte, error) {
		calls++
		if calls == 1 || s.Always {
			for _, step := range s.Meanwhile {
				if err := r.run(context.Background(), step); err != nil {
					return nil, err
				}
			}
		}
		if s.Keep {
			return nil, nkv.ErrKeep
		}
		var value []byte
		if old != nil {
			value = old.Value
		}
		return append(value, s.Append...), nil
	})
	if s.Calls != nil && calls != *s.Calls {
		return fmt.Errorf("%d calls, want %d: %w", calls, *s.Calls, err)
	}
	if err != nil {
		return err
	}
	r.keep(s.Save, revision)
	if s.Revision != "" && revision != r.revision(s.Revision) {
		return differs(revision, r.revision(s.Revision))
	}
	if revision.IsZero() != s.Absent {
		return differs(revision, s.Absent)
	}
	return nil
}

func (r *runner) updateMany(ctx context.Context, key string, s step) error {
	ended := make(chan error, len(s.Clients)*s.Count)
	for _, name := range s.Clients {
		client, err := r.client(name)
		if err != nil {
			return err
		}
		for range s.Count {
			go func() {
				_, err := client.Update(ctx, key, func(old *nkv.Entry) ([]byte, error) {
					if old == nil {
						return []byte("1"), nil
					}
					number, err := strconv.Atoi(string(old.Value))
					return []byte(strconv.Itoa(number + 1)), err
				})
				ended <- err
			}()
		}
	}
	for range cap(ended) {
		if err := <-ended; err != nil {
			return err
		}
	}
	return nil
}

func (r *runner) stats(ctx context.Context, client *nkv.Client, s step) error {
	stats, err := client.Stats(ctx)
	if err != nil {
		return err
	}
	text, err := json.Marshal(stats)
	if err != nil {
		return err
	}
	var got, want map[string]any
	if err := errors.Join(json.Unmarshal(text, &got), json.Unmarshal(s.Is, &want)); err != nil {
		return err
	}
	for name, value := range want {
		if got[name] != value {
			return differs(fmt.Sprint(name, " ", got[name]), value)
		}
	}
	for _, name := range s.Above0 {
		if number, _ := got[name].(float64); number <= 0 {
			return differs(fmt.Sprint(name, " ", got[name]), "above 0")
		}
	}
	return nil
}

func (r *runner) list(ctx context.Context, client *nkv.Client, pattern string, s step) error {
	after, err := value(s.After)
	if err != nil {
		return err
	}
	page, more, err := client.ListPage(ctx, pattern, nkv.PageOptions{Limit: s.Limit, After: string(after)})
	if err != nil {
		return err
	}
	var want []string
	if err := json.Unmarshal(s.Keys, &want); err != nil {
		return err
	}
	got := []string{}
	for _, key := range page {
		got = append(got, key.Key)
	}
	if !slices.Equal(got, want) || more != s.More {
		return differs(fmt.Sprint(got, more), fmt.Sprint(want, s.More))
	}
	if s.Limit != 0 || len(after) != 0 {
		return nil
	}
	if all, err := client.List(ctx, pattern); err != nil || len(all) != len(want) {
		return fmt.Errorf("the whole list has %d keys: %w", len(all), err)
	}
	return nil
}

func (r *runner) getAll(ctx context.Context, client *nkv.Client, pattern string, s step) error {
	var want [][2]json.RawMessage
	if err := json.Unmarshal(s.Entries, &want); err != nil {
		return err
	}
	wanted := make([][2]string, len(want))
	for i, pair := range want {
		for j := range pair {
			text, err := value(pair[j])
			if err != nil {
				return err
			}
			wanted[i][j] = string(text)
		}
	}
	got := [][2]string{}
	for o := (nkv.PageOptions{Limit: s.Page}); ; {
		page, more, err := client.GetPage(ctx, pattern, o)
		if err != nil {
			return err
		}
		for _, entry := range page {
			got = append(got, [2]string{entry.Key, string(entry.Value)})
			o.After = entry.Key
		}
		if !more {
			break
		}
	}
	if !slices.Equal(got, wanted) {
		return differs(got, wanted)
	}
	all, err := client.GetAll(ctx, pattern)
	if err == nil && len(all) != len(wanted) {
		return differs(len(all), len(wanted))
	}
	return err
}

// manyValue is what put_many writes.
func manyValue(i, size int) []byte {
	text := strconv.Itoa(i)
	return []byte(text + strings.Repeat("x", max(0, size-len(text))))
}

// many makes many calls at once. Puts of one key are made one after another: goroutines have no order.
func (r *runner) many(ctx context.Context, client *nkv.Client, s step) error {
	keys := s.Count
	if len(s.Keys) > 0 {
		if err := json.Unmarshal(s.Keys, &keys); err != nil {
			return err
		}
	}
	var all sync.WaitGroup
	failures := make(chan error, 2*s.Count+1)
	at := func(i int) string { return fmt.Sprintf("%s.%d", s.Prefix, i) }
	begin := func(call func() error) {
		all.Add(1)
		go func() {
			defer all.Done()
			if err := call(); err != nil {
				failures <- err
			}
		}()
	}
	putAll := func(first int) error {
		for i := first; i < s.Count; i += keys {
			if _, err := client.Put(ctx, at(first), manyValue(i, s.Size)); err != nil {
				return err
			}
		}
		return nil
	}
	get := func(i int, mayBeAbsent bool) error {
		entry, ok, err := client.Get(ctx, at(i))
		switch {
		case err != nil && len(s.Error) > 0:
			return r.isExpected(err, s)
		case err != nil || (!ok && mayBeAbsent):
			return err
		case !ok || !bytes.Equal(entry.Value, manyValue(i, s.Size)):
			return differs(string(entry.Value), at(i))
		}
		return nil
	}
	count := s.Count
	if s.Op == "put_many" {
		count = keys
	}
	for i := range count {
		switch s.Op {
		case "put_many":
			begin(func() error { return putAll(i) })
		case "get_many":
			begin(func() error { return get(i, false) })
		case "mix_many":
			begin(func() error {
				_, err := client.Put(ctx, at(i), manyValue(i, s.Size))
				return err
			})
			if i > 0 {
				begin(func() error { return get(i-1, true) })
			}
		}
	}
	all.Wait()
	close(failures)
	return <-failures
}

func (r *runner) subscribe(ctx context.Context, client *nkv.Client, pattern string, s step) error {
	var options []nkv.SubscribeOption
	if s.Exact {
		options = append(options, nkv.Exact())
	}
	if s.Snapshot != nil && !*s.Snapshot {
		options = append(options, nkv.WithoutSnapshot())
	}
	if len(s.Patterns) > 0 {
		pattern = s.Patterns[0]
		options = append(options, nkv.Also(s.Patterns[1:]...))
	}
	sub, err := client.Subscribe(ctx, pattern, options...)
	if err == nil {
		put(&r.subs, s.Name, sub)
	}
	return err
}

// eventOf is an event as the cases write it; "" for those that they pass over.
func eventOf(event nkv.Event) string {
	switch event := event.(type) {
	case nkv.Update:
		return fmt.Sprintf("update %q %q", event.Key, event.Value)
	case nkv.Gone:
		return fmt.Sprintf("gone %q %q", event.Key, event.Reason)
	case nkv.Synced:
		return "synced"
	}
	return ""
}

func expected(lists [][]any) ([]string, error) {
	texts := []string{}
	for _, list := range lists {
		text := fmt.Sprint(list[0])
		for _, part := range list[1:] {
			raw, err := json.Marshal(part)
			if err != nil {
				return nil, err
			}
			content, err := value(raw)
			if err != nil {
				return nil, err
			}
			text += fmt.Sprintf(" %q", content)
		}
		texts = append(texts, text)
	}
	return texts, nil
}

// nextOf reads the next event that counts.
func (r *runner) nextOf(ctx context.Context, name string, withSynced bool) (string, error) {
	for {
		event, err := r.subs[name].Next(ctx)
		if err != nil {
			return "", err
		}
		if text := eventOf(event); text != "" && (text != "synced" || withSynced) {
			return text, nil
		}
	}
}

func (r *runner) events(s step) error {
	want, err := expected(s.Expect)
	if err != nil {
		return err
	}
	withSynced := slices.Contains(want, "synced")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	got := []string{}
	for len(got) < len(want) {
		text, err := r.nextOf(ctx, s.Name, withSynced)
		if err != nil {
			return fmt.Errorf("%q have come, want %q: %w", got, want, err)
		}
		got = append(got, text)
	}
	all := fmt.Sprintf("%q", got)
	if !s.Ordered {
		slices.Sort(got)
		slices.Sort(want)
	}
	for i := range got {
		anyReason, ok := strings.CutSuffix(want[i], ` "any"`)
		if got[i] != want[i] && (!ok || !strings.HasPrefix(got[i], anyReason)) {
			return differs(all, want)
		}
	}
	if s.QuietMS == 0 {
		return nil
	}
	ctx, cancel = context.WithTimeout(context.Background(), ms(s.QuietMS))
	defer cancel()
	if text, err := r.nextOf(ctx, s.Name, withSynced); err == nil {
		return different{fmt.Sprintf("%s came, and nothing was to come", text)}
	}
	return nil
}

func (r *runner) state(s step) error {
	want, err := entriesOf(s.Entries)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	got := map[string]string{}
	for {
		event, err := r.subs[s.Name].Next(ctx)
		if err != nil {
			return fmt.Errorf("%q, want %q: %w", got, want, err)
		}
		switch event := event.(type) {
		case nkv.Update:
			got[event.Key] = string(event.Value)
		case nkv.Gone:
			delete(got, event.Key)
		}
		if reflect.DeepEqual(got, want) {
			return nil
		}
	}
}

// lost waits until the watch says that the connection is lost.
func (r *runner) lost(ctx context.Context, s step) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for watch := r.watches[s.Name]; watch.Live(); time.Sleep(10 * time.Millisecond) {
		if ctx.Err() != nil {
			return fmt.Errorf("%s is live: %w", s.Name, ctx.Err())
		}
	}
	return nil
}

func (r *runner) ended(s step) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		_, err := r.subs[s.Name].Next(ctx)
		if err != nil && ctx.Err() == nil && r.subs[s.Name].Err() != nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

func (r *runner) conflated(s step) error {
	var keys int
	if err := json.Unmarshal(s.Keys, &keys); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	last, changes, read := map[string]string{}, uint64(0), 0
	for {
		isDone := len(last) == keys
		for i := range keys {
			final := s.Count - keys + i
			isDone = isDone && last[fmt.Sprintf("%s.%d", s.Prefix, final%keys)] == string(manyValue(final, s.Size))
		}
		if isDone {
			break
		}
		event, err := r.subs[s.Name].Next(ctx)
		if err != nil {
			return fmt.Errorf("after %d events, %d changes: %w", read, changes, err)
		}
		if update, ok := event.(nkv.Update); ok {
			last[update.Key] = string(update.Value)
			changes += 1 + update.Skipped
			read++
		}
	}
	if changes != s.Changes || (s.AtMost != nil && read > *s.AtMost) {
		return different{fmt.Sprintf("%d changes in %d events", changes, read)}
	}
	return nil
}

func (r *runner) pollCancel(s step) error {
	writer, err := r.client("b")
	if err != nil {
		return err
	}
	putting := make(chan error, 1)
	go func() {
		for _, pair := range s.PutDuring {
			if _, err := writer.Put(context.Background(), pair[0], []byte(pair[1])); err != nil {
				putting <- err
				return
			}
			time.Sleep(40 * time.Millisecond)
		}
		putting <- nil
	}()
	got := []string{}
	began := time.Now()
	for times := 0; times < s.Times || (len(got) < len(s.Expect) && time.Since(began) < patience); times++ {
		ctx, cancel := context.WithTimeout(context.Background(), ms(s.EachMS))
		text, err := r.nextOf(ctx, s.Name, false)
		cancel()
		if err == nil {
			got = append(got, text)
		} else if !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
	if err := <-putting; err != nil {
		return err
	}
	want, err := expected(s.Expect)
	if err == nil && !slices.Equal(got, want) {
		return differs(got, want)
	}
	return err
}

func entriesOf(text json.RawMessage) (map[string]string, error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(text, &raw); err != nil {
		return nil, err
	}
	entries := map[string]string{}
	for key, form := range raw {
		content, err := value(form)
		if err != nil {
			return nil, err
		}
		entries[key] = string(content)
	}
	return entries, nil
}

func (r *runner) isNow(ctx context.Context, s step) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if s.Op == "watch_is" {
		want, err := value(s.Value)
		if err != nil {
			return err
		}
		watch := r.watches[s.Name]
		err = watch.Wait(ctx, func(entry nkv.Entry, ok bool) bool {
			return ok != s.Absent && bytes.Equal(entry.Value, want)
		})
		if err != nil {
			entry, ok := watch.Get()
			return fmt.Errorf("it is %q, %v: %w", entry.Value, ok, err)
		}
		return nil
	}
	want, err := entriesOf(s.Entries)
	if err != nil {
		return err
	}
	branch := r.branches[s.Name]
	is := func(b *nkv.Branch) bool {
		got := map[string]string{}
		for key, entry := range b.Entries() {
			got[key] = string(entry.Value)
		}
		return reflect.DeepEqual(got, want)
	}
	if s.Op == "branch_is_now" {
		if !is(branch) || !branch.Live() {
			return differs(branch.Entries(), want)
		}
		return nil
	}
	if err := branch.Wait(ctx, is); err != nil {
		return fmt.Errorf("%v, want %v: %w", branch.Entries(), want, err)
	}
	return nil
}
