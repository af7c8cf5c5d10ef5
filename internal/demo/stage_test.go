package demo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ftckpt/ftckpt/internal/lab"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

func TestMain(m *testing.M) {
	lab.Hook()
	loadgen.Hook()
	os.Exit(m.Run())
}

func needRedis(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("needs redis-server")
	}
}

// rehearse is the demo without ftckpt: the fault is a redis that pauses or
// dies, so that everything around the takeover is tried.
func rehearse(t *testing.T) (*stage, *load, *redis.Client) {
	t.Helper()
	needRedis(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := buildStage(ctx, exe, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.startRedis(ctx); err != nil {
		t.Fatal(err)
	}
	admin := redis.NewClient(&redis.Options{
		Addr: vip + ":" + port, DisableIdentity: true, MaxRetries: -1, Dialer: s.client.Dial,
	})
	t.Cleanup(func() { admin.Close() })
	cfg := mix(8)
	cfg.Addr, cfg.Seed, cfg.PaceUS, cfg.TransferUS, cfg.GraceUS = vip+":"+port, 42, 2000, 500_000, 2_000_000
	l, err := startLoad(s.client, exe, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.kill)
	if err := l.wait(ctx, "connections", 10*time.Second, func(m loadgen.Message) bool { return m.Connected == 8 }); err != nil {
		t.Fatal(err)
	}
	return s, l, admin
}

func TestAPauseIsToldAsAWait(t *testing.T) {
	_, l, admin := rehearse(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	failed := time.Now()
	if err := admin.Do(ctx, "CLIENT", "PAUSE", "500", "ALL").Err(); err != nil {
		t.Fatal(err)
	}
	over := failed.Add(510 * time.Millisecond)
	if err := l.wait(ctx, "answers", 20*time.Second, func(m loadgen.Message) bool { return m.Oldest.After(over) }); err != nil {
		t.Fatal(err)
	}
	res, err := l.finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	tl := NewTimeline(FaultProcess, failed, []Event{{Live, over}}, res)
	tl.Takes = 1
	report := filepath.Join(t.TempDir(), "report.html")
	var out, errs bytes.Buffer
	if err := tl.tell(Options{JSON: true, Report: report}, &out, &errs); err != nil {
		t.Fatalf("%v\n%s", err, errs.String())
	}
	s := tl.Summary()
	if s.StallMS < 400 || s.StallMS > 5000 || s.Connections != 8 || s.Seed != 42 || s.Requests < 8 {
		t.Errorf("%+v", s)
	}
	if n := strings.Count(out.String(), "\n"); n != 1 || !strings.HasPrefix(out.String(), `{"requests":`) {
		t.Errorf("stdout is not one object: %q", out.String())
	}
	if fi, err := os.Stat(report); err != nil || fi.Size() < 10_000 {
		t.Errorf("report: %v %v", fi, err)
	}
}

func TestADeadHostIsToldAsLostConnections(t *testing.T) {
	s, l, _ := rehearse(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	failed, err := s.inject(ctx, FaultHost)
	if err != nil {
		t.Fatal(err)
	}
	dead := time.Now()
	if err := l.wait(ctx, "answers", time.Second, func(m loadgen.Message) bool { return m.Oldest.After(dead) }); err == nil {
		t.Error("clients of a dead host were answered")
	}
	res, err := l.finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	tl := NewTimeline(FaultHost, failed, nil, res)
	if err := tl.tell(Options{}, io.Discard, io.Discard); !errors.Is(err, ErrNoticed) {
		t.Errorf("tell: %v, want that the clients noticed", err)
	}
	// Silence is no reset until the grace is over: nobody told the clients.
	for _, c := range res.Conns {
		for _, e := range c.Errors {
			if strings.Contains(e, "connection reset") || strings.Contains(e, "EOF") {
				t.Errorf("client %d heard of the death: %s", c.ID, e)
			}
		}
	}
}

func TestProcessDeathEndsConnections(t *testing.T) {
	s, l, _ := rehearse(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := s.inject(ctx, FaultProcess); err != nil {
		t.Fatal(err)
	}
	if err := l.wait(ctx, "resets", 20*time.Second, func(m loadgen.Message) bool { return m.Resets >= 6 }); err != nil {
		t.Fatal(err)
	}
}

// An ftckpt that cannot be started fails the demo with one clear error, and
// nothing is left.
func TestRunWithoutFtckpt(t *testing.T) {
	needRedis(t)
	leftovers := ownTemp(t)
	var errs bytes.Buffer
	_, err := Run(t.Context(), Options{Binary: "/bin/false"}, io.Discard, &errs)
	if err == nil || !strings.Contains(err.Error(), "start standby") {
		t.Errorf("Run: %v\n%s", err, errs.String())
	}
	// The logs of a failed run stay, and the error says where.
	if left := leftovers(); len(left) != 1 || !strings.Contains(err.Error(), left[0]) {
		t.Errorf("left behind: %v", left)
	}
}

func TestRunInterrupted(t *testing.T) {
	needRedis(t)
	ctx, cancel := context.WithCancel(t.Context())
	leftovers := ownTemp(t)
	// Interrupt it while it waits for a standby that never says anything.
	quiet := filepath.Join(t.TempDir(), "quiet")
	if err := os.WriteFile(quiet, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(2*time.Second, cancel)
	_, err := Run(ctx, Options{Binary: quiet}, io.Discard, io.Discard)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
	if left := leftovers(); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// ownTemp makes the temporary directory this test's own and returns a function
// that lists it.
func ownTemp(t *testing.T) func() []string {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	return func() []string {
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
}

func TestMix(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 10, 50, 1000} {
		c := mix(n)
		if c.Connections() != n || c.Redis < 1 {
			t.Errorf("mix(%d) = %+v", n, c)
		}
		if n >= 10 && (c.Idle == 0 || c.Upload == 0 || c.Download == 0 || c.Half == 0 || c.Redis < n/2) {
			t.Errorf("mix(%d) = %+v", n, c)
		}
	}
}

func TestBadOptions(t *testing.T) {
	for _, o := range []Options{{Fault: "flood"}, {Connections: -1}, {Duration: -1}, {LogAt: "moon"}} {
		if _, err := Run(t.Context(), o, io.Discard, io.Discard); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

func TestParseCheckpoint(t *testing.T) {
	if id, err := parseCheckpoint("generation=7 bytes=10485760 pause_us=8123\n"); id != 7 || err != nil {
		t.Errorf("%d, %v", id, err)
	}
	if _, err := parseCheckpoint("oops"); err == nil {
		t.Error("garbage was accepted")
	}
}
