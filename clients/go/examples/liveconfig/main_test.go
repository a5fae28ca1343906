package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestTheExampleSeesItsChanges(t *testing.T) {
	program := os.Getenv("NKV_SERVER")
	if program == "" {
		t.Skip("NKV_SERVER, the path of the server, is not set")
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	_ = free.Close()
	server := exec.Command(program, "--listen", addr, "--persist", "memory")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			_ = conn.Close()
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := run(ctx, addr, false); err != nil {
		t.Fatal(err)
	}
}
