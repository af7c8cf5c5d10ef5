package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// decode reads exactly one JSON value without unknown fields.
func decode(t *testing.T, s string, v any) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(s))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		t.Fatalf("decode %q: %v", s, err)
	}
	if dec.More() {
		t.Fatalf("more than one value in %q", s)
	}
}

// daemonStub stands behind a real control socket.
type daemonStub struct {
	status control.Status
	err    error
}

func (d daemonStub) Status() control.Status { return d.status }
func (d daemonStub) Checkpoint(context.Context) (control.CheckpointResult, error) {
	return control.CheckpointResult{ID: 7, Bytes: 10485760, PauseUS: 8123}, d.err
}

func (d daemonStub) Failover(_ context.Context, req control.FailoverRequest) (control.FailoverResult, error) {
	res := control.FailoverResult{DryRun: req.DryRun, To: "b", Generation: 7}
	if !req.DryRun {
		res.StallUS = 90123
	}
	return res, d.err
}

func serve(t *testing.T, dir string, d daemonStub) {
	t.Helper()
	s, err := control.Listen(dir, d.status.Service, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, d) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// leaveSocket is what a killed daemon leaves.
func leaveSocket(t *testing.T, dir, name string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name+".sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
}

func sound(name string) control.Status {
	since := time.Date(2025, 11, 21, 20, 48, 0, 0, time.UTC)
	return control.Status{
		Service: name, Node: "a", PID: 42, Role: control.RolePrimary, Epoch: 1,
		Protected: true, ProtectedSince: &since,
		VIPs: []string{"192.0.2.10/24", "2001:db8::10/64"}, ClientNets: []string{"198.51.100.0/24"}, Ports: []uint16{6379, 6380}, Connections: 10,
		Log:        control.Log{URL: "tls://192.0.2.2:4222", Durability: control.DurableProcess, Stable: 900, LagBytes: 2048, LagUS: 120, State: control.LogOK},
		Generation: control.Generation{ID: 7, AgeSeconds: 1.52, Bytes: 10 << 20, PauseUS: 8123},
		Held:       control.Held{Packets: 2, P50US: 100, P99US: 900},
		Standbys:   []control.Standby{{Node: "b", Mode: "warm", Generation: 7, SeenUS: 12000}},
	}
}

func TestStatus(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, daemonStub{status: sound("redis")})

	code, out, errs := invoke(t.Context(), nil, "status", "--run-dir", dir)
	want := `redis
  role        primary on a, epoch 1
  protected   yes, since 2025-11-21T20:48:00Z
  server      pid 42, 10 connections
  address     192.0.2.10/24, 2001:db8::10/64, ports 6379, 6380
  clients     198.51.100.0/24; others are not protected
  log         tls://192.0.2.2:4222, ok; survives the death of its process
  stable      position 900; behind it 0 records, 2.0 KiB, for 120µs
  generation  7, 1.5s old, 10.0 MiB, pause 8.123ms
  held        2 packets; they wait 100µs (p50), 900µs (p99)
  standby     b, warm, generation 7, 0 records behind, heard of 12ms ago
`
	if code != 0 || errs != "" || out != want {
		t.Errorf("exit status %d, stderr %q, stdout\n%s\nwant\n%s", code, errs, out, want)
	}

	for _, args := range [][]string{{"--name", "redis"}, nil} {
		code, out, _ = invoke(t.Context(), nil, append([]string{"status", "--json", "--run-dir", dir}, args...)...)
		var got control.Status
		decode(t, out, &got)
		if code != 0 || got.Service != "redis" || got.Generation.ID != 7 || !got.Protected {
			t.Errorf("%v: exit status %d, %+v", args, code, got)
		}
	}

	_, _, errs = invoke(t.Context(), map[string]string{"FTCKPT_NAME": "memcached"}, "status", "--run-dir", dir)
	if want := "ftckpt: service \"memcached\" in " + dir + ": not running\n"; errs != want {
		t.Errorf("stderr %q, want %q", errs, want)
	}
}

func TestStatusOfSeveral(t *testing.T) {
	dir := t.TempDir()
	bare := sound("b-bare")
	bare.Protected, bare.ProtectedSince, bare.Reason = false, nil, "no standby has answered yet"
	serve(t, dir, daemonStub{status: sound("a-good")})
	serve(t, dir, daemonStub{status: bare})

	code, out, _ := invoke(t.Context(), nil, "status", "--run-dir", dir)
	if code != int(exitcode.Unprotected) {
		t.Errorf("exit status %d, want %d", code, exitcode.Unprotected)
	}
	if !strings.HasPrefix(out, "a-good\n") || !strings.Contains(out, "\n\nb-bare\n") || !strings.Contains(out, "  protected   NO: no standby has answered yet\n") {
		t.Errorf("stdout\n%s", out)
	}

	leaveSocket(t, dir, "c-dead")
	code, out, _ = invoke(t.Context(), nil, "status", "--run-dir", dir, "--json")
	var got report
	decode(t, out, &got)
	if code != int(exitcode.Failed) || len(got.Services) != 2 || len(got.Unreachable) != 1 || got.Unreachable[0].Service != "c-dead" {
		t.Errorf("exit status %d, %+v", code, got)
	}
	code, out, _ = invoke(t.Context(), nil, "status", "--run-dir", dir)
	if code != int(exitcode.Failed) || !strings.Contains(out, "not running: its daemon died and left its socket") {
		t.Errorf("exit status %d, stdout\n%s", code, out)
	}
}

func TestStatusOfFenced(t *testing.T) {
	dir := t.TempDir()
	s := sound("redis")
	s.Role, s.Protected, s.ProtectedSince = control.RoleFenced, false, nil
	serve(t, dir, daemonStub{status: s})
	if code, _, _ := invoke(t.Context(), nil, "status", "--run-dir", dir); code != int(exitcode.Fenced) {
		t.Errorf("exit status %d, want %d", code, exitcode.Fenced)
	}
}

// lines hands over what is written to it, a line at a time.
type lines chan string

func (l lines) Write(b []byte) (int, error) { l <- string(b); return len(b), nil }

func TestWatch(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, daemonStub{status: sound("redis")})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := make(lines, 10)
	a := &app{stdout: out, stderr: out, env: func(string) (string, bool) { return "", false }}
	done := make(chan exitcode.Code, 1)
	go func() { done <- a.run(ctx, []string{"status", "--watch", "--run-dir", dir}) }()
	for range 2 {
		select {
		case got := <-out:
			if !strings.Contains(got, " redis primary epoch 1 protected yes, since ") || strings.Count(got, "\n") != 1 {
				t.Errorf("line %q", got)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("no line for 10 seconds")
		}
	}
	cancel()
	if code := <-done; code != exitcode.OK {
		t.Errorf("interrupted: exit status %d, want 0", code)
	}
}

func TestCheckpoint(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, daemonStub{status: sound("redis")})
	code, out, errs := invoke(t.Context(), nil, "checkpoint", "--run-dir", dir)
	if want := "generation=7 bytes=10485760 pause_us=8123\n"; code != 0 || out != want || errs != "" {
		t.Errorf("exit status %d, stdout %q, stderr %q", code, out, errs)
	}

	serve(t, dir, daemonStub{status: sound("fenced"), err: exitcode.Errorf(exitcode.Fenced, "node b is the primary")})
	code, out, errs = invoke(t.Context(), nil, "checkpoint", "--run-dir", dir)
	if want := "ftckpt: there are several services in " + dir + ": say which with --name (fenced, redis)\n"; code != 2 || out != "" || errs != want {
		t.Errorf("exit status %d, stdout %q, stderr %q", code, out, errs)
	}
	code, out, errs = invoke(t.Context(), nil, "checkpoint", "--run-dir", dir, "--name", "fenced")
	if want := "ftckpt: fenced: node b is the primary\n"; code != 6 || out != "" || errs != want {
		t.Errorf("exit status %d, stdout %q, stderr %q", code, out, errs)
	}
}

func TestFailover(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, daemonStub{status: sound("redis")})
	for _, c := range []struct{ flag, want string }{
		{"", "to=b generation=7 stall_us=90123\n"},
		{"--dry-run", "would move to=b generation=7\n"},
	} {
		args := []string{"failover", "--run-dir", dir}
		if c.flag != "" {
			args = append(args, c.flag)
		}
		if code, out, errs := invoke(t.Context(), nil, args...); code != 0 || out != c.want || errs != "" {
			t.Errorf("%q: exit status %d, stdout %q, stderr %q", args, code, out, errs)
		}
	}
	code, out, _ := invoke(t.Context(), nil, "failover", "--run-dir", dir, "--json")
	var res control.FailoverResult
	decode(t, out, &res)
	if want := (control.FailoverResult{To: "b", Generation: 7, StallUS: 90123}); code != 0 || res != want {
		t.Errorf("exit status %d, result %+v", code, res)
	}

	other := t.TempDir()
	serve(t, other, daemonStub{status: sound("alone"), err: errors.New("cannot move the service: no standby is there")})
	code, out, errs := invoke(t.Context(), nil, "failover", "--run-dir", other)
	if want := "ftckpt: alone: cannot move the service: no standby is there\n"; code != 1 || out != "" || errs != want {
		t.Errorf("exit status %d, stdout %q, stderr %q", code, out, errs)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 10 << 20: "10.0 MiB", 1<<64 - 1: "16.0 EiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
}
