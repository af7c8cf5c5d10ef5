package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/stream"
)

// startLogserver runs the command until stop, which returns its exit status
// and standard error, and returns the join string that it printed.
func startLogserver(t *testing.T, state string) (join string, stop func() (exitcode.Code, string)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out := make(lines, 10)
	var errs bytes.Buffer
	a := &app{stdout: out, stderr: &errs, env: func(string) (string, bool) { return "", false }}
	done := make(chan exitcode.Code, 1)
	go func() { done <- a.run(ctx, []string{"logserver", "--listen", "127.0.0.1:0", "--state-dir", state}) }()
	stop = func() (exitcode.Code, string) {
		cancel()
		code := <-done
		return code, errs.String()
	}
	select {
	case line := <-out:
		join, ok := strings.CutPrefix(line, "join: ")
		if !ok || strings.Count(line, "\n") != 1 {
			t.Errorf("first line %q, want \"join: STRING\"", line)
		}
		return strings.TrimSpace(join), stop
	case code := <-done:
		t.Fatalf("logserver ended with %d: %s", code, errs.String())
	case <-time.After(30 * time.Second):
		t.Fatal("no join string for 30 seconds")
	}
	return "", nil
}

func TestLogserver(t *testing.T) {
	state := t.TempDir()
	join, stop := startLogserver(t, state)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	lg, err := stream.Open(ctx, stream.Config{Service: "redis", Join: join})
	if err != nil {
		t.Fatalf("open the log with the join string: %v", err)
	}
	if err := lg.Close(); err != nil {
		t.Error(err)
	}
	code, errs := stop()
	if code != exitcode.OK {
		t.Errorf("stopped: exit status %d, want 0; stderr %s", code, errs)
	}
	if parsed, err := stream.ParseJoin(join); err != nil || strings.Contains(errs, parsed.Secret) {
		t.Errorf("the secret is in the log, or unreadable (%v): %s", err, errs)
	}

	// The secret is kept, so hosts that know the string can come back.
	again, stop := startLogserver(t, state)
	a, errA := stream.ParseJoin(join)
	b, errB := stream.ParseJoin(again)
	if errA != nil || errB != nil || a.Secret != b.Secret || a.Fingerprint != b.Fingerprint {
		t.Errorf("restart changed the join string from %+v to %+v (%v, %v)", a, b, errA, errB)
	}
	if code, errs := stop(); code != exitcode.OK {
		t.Errorf("stopped: exit status %d; stderr %s", code, errs)
	}

	code2, _, errs2 := invoke(t.Context(), nil, "logserver", "--listen", "192.0.2.1:4222", "--state-dir", t.TempDir())
	if code2 != 1 || !strings.HasPrefix(errs2, "ftckpt: start log server on 192.0.2.1:4222: ") {
		t.Errorf("an address of another host: exit status %d, stderr %q", code2, errs2)
	}
}
