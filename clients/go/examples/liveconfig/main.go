// Liveconfig is a program whose configuration is in nkv. It is never restarted for a change: it always holds the
// configuration as it is now.
//
//	nkv-server --listen 127.0.0.1:4222 --persist memory &
//	go run ./examples/liveconfig -addr 127.0.0.1:4222           changes the configuration by itself, and checks what it sees
//	go run ./examples/liveconfig -addr 127.0.0.1:4222 -follow   shows each change, until it is interrupted
//
// With -follow, change it from another terminal: nkv-client put config.app.level '"debug"'
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"sync/atomic"
	"time"

	nkv "github.com/nkv-store/nkv/clients/go"
)

// branch is where the configuration is: each field has a key below it, whose value is JSON.
const branch = "config.app"

// Config is the configuration. What the store does not have is as in defaults.
type Config struct {
	Level   string
	Workers int
}

var defaults = Config{Level: "info", Workers: 4}

// Live is a configuration that follows the store. Any goroutine may load it at any time.
type Live struct {
	atomic.Pointer[Config]
	keys *nkv.Branch
}

// Follow returns the configuration as it is now, which stays so until the context ends.
func Follow(ctx context.Context, client *nkv.Client) (*Live, error) {
	keys, err := client.WatchBranch(ctx, branch+".*")
	if err != nil {
		return nil, err
	}
	live := &Live{keys: keys}
	live.read()
	go func() {
		for keys.Err() == nil {
			changed := keys.Changed() // before it is read, so that nothing is missed
			live.read()
			<-changed
		}
	}()
	return live, nil
}

func (l *Live) read() {
	config := defaults
	for key, field := range map[string]any{"level": &config.Level, "workers": &config.Workers} {
		entry, ok := l.keys.Get(branch + "." + key)
		if !ok {
			continue
		}
		// A value that is no good is reported, and the last one stays.
		if err := json.Unmarshal(entry.Value, field); err != nil {
			log.Printf("%s is no good: %v", entry.Key, err)
			l.CompareAndSwap(nil, &defaults)
			return
		}
	}
	if before := l.Swap(&config); before == nil || *before != config {
		log.Printf("the configuration is %+v", config)
	}
}

func main() {
	addr := flag.String("addr", "127.0.0.1:4222", "address of the server")
	follow := flag.Bool("follow", false, "show each change until interrupted")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *addr, *follow); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, addr string, follow bool) error {
	client, err := nkv.Dial(ctx, addr, nkv.WithName("liveconfig"))
	if err != nil {
		return err
	}
	defer client.Close()
	live, err := Follow(ctx, client)
	if err != nil {
		return err
	}
	if follow {
		<-ctx.Done()
		return nil
	}
	return show(ctx, client, live)
}

// show changes the configuration, and checks that the program sees it.
func show(ctx context.Context, client *nkv.Client, live *Live) error {
	if _, err := client.Delete(ctx, branch+".*"); err != nil {
		return err
	}
	steps := []struct {
		change func() error
		want   Config
	}{
		{func() error { return nil }, defaults},
		{func() error { _, err := client.PutJSON(ctx, branch+".level", "debug"); return err }, Config{"debug", 4}},
		{func() error { _, err := client.PutJSON(ctx, branch+".workers", 16); return err }, Config{"debug", 16}},
		{func() error { _, err := client.Put(ctx, branch+".workers", []byte("many")); return err }, Config{"debug", 16}},
		{func() error { _, err := client.Delete(ctx, branch+".*"); return err }, defaults},
	}
	for i, step := range steps {
		if err := step.change(); err != nil {
			return err
		}
		if err := live.wait(ctx, step.want); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	log.Print("ok")
	return nil
}

func (l *Live) wait(ctx context.Context, want Config) error {
	for began := time.Now(); *l.Load() != want; time.Sleep(time.Millisecond) {
		if ctx.Err() != nil || time.Since(began) > 5*time.Second {
			return errors.New("the configuration is not what it was changed to")
		}
	}
	return nil
}
