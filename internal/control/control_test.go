package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a daemon. Checkpoint waits until release is closed, if it is set.
type fake struct {
	status  Status
	err     error
	entered chan struct{}
	release chan struct{}
}

func (f *fake) Status() Status { return f.status }

func (f *fake) Checkpoint(ctx context.Context) (CheckpointResult, error) {
	if f.entered != nil {
		f.entered <- struct{}{}
		select {
		case <-f.release:
		case <-ctx.Done():
			return CheckpointResult{}, context.Cause(ctx)
		}
	}
	return CheckpointResult{ID: 7, Bytes: 1 << 20, PauseUS: 8123}, f.err
}

func (f *fake) Failover(_ context.Context, req FailoverRequest) (FailoverResult, error) {
	return FailoverResult{DryRun: req.DryRun, To: "b" + req.To, Generation: 7, StallUS: 90_000}, f.err
}

var quiet = slog.New(slog.DiscardHandler)

// start serves h as "redis" in a new run directory until the test's end.
func start(t *testing.T, h Handler) (runDir string) {
	t.Helper()
	runDir, stop := startIn(t, t.TempDir(), h)
	t.Cleanup(stop)
	return runDir
}

func startIn(t *testing.T, runDir string, h Handler) (string, func()) {
	t.Helper()
	s, err := Listen(runDir, "redis", quiet)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, h) }()
	return runDir, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func fullStatus() Status {
	since := time.Date(2025, 11, 21, 20, 48, 0, 0, time.UTC)
	return Status{
		Service: "redis", Node: "a", PID: 42, Role: RolePrimary, Epoch: 3,
		Protected: true, ProtectedSince: &since,
		VIPs: []string{"192.0.2.10/24"}, Ports: []uint16{6379}, ClientNets: []string{"198.51.100.0/24"}, Connections: 10,
		Log:        Log{URL: "tls://192.0.2.2:4222", Durability: DurableProcess, Stable: 900, LagRecords: 1, LagBytes: 64, LagUS: 120, State: LogOK},
		Generation: Generation{ID: 7, AgeSeconds: 1.5, Bytes: 1 << 20, PauseUS: 8123},
		Held:       Held{Packets: 2, P50US: 100, P99US: 900},
		QueueDrops: 1, Divergences: 2, Recreate: "bpf", Translated: 3,
		Standbys:  []Standby{{Node: "b", Mode: "warm", Generation: 7, LagRecords: 4, SeenUS: 1000}},
		Takeovers: 2,
		Takeover:  &Takeover{DetectMS: 200, FenceMS: 1, VIPMS: 2, RestoreMS: 50, ReplayMS: 10, TotalMS: 263, Connections: 10, Resets: 1},
	}
}

func TestRoundTrip(t *testing.T) {
	want := fullStatus()
	dir := start(t, &fake{status: want})
	got, err := GetStatus(t.Context(), dir, "redis")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("status (-want +got):\n%s", d)
	}
	res, err := Checkpoint(t.Context(), dir, "redis")
	if err != nil {
		t.Fatal(err)
	}
	moved, err := Failover(t.Context(), dir, "redis", FailoverRequest{DryRun: true, To: "-c"})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(FailoverResult{DryRun: true, To: "b-c", Generation: 7, StallUS: 90_000}, moved); d != "" {
		t.Errorf("failover (-want +got):\n%s", d)
	}
	if d := cmp.Diff(CheckpointResult{ID: 7, Bytes: 1 << 20, PauseUS: 8123}, res); d != "" {
		t.Error(d)
	}
	fi, err := os.Stat(socketPath(dir, "redis"))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v, want 0600", fi.Mode().Perm())
	}
}

// The fields are a contract with scripts (cli.md): every one of them is there
// whatever its value, but for those that say "when".
func TestStatusJSON(t *testing.T) {
	local := time.Date(2025, 11, 21, 21, 48, 0, 123456789, time.FixedZone("CET", 3600))
	tests := []struct {
		name string
		in   Status
		want string
	}{
		{"empty", Status{Role: RoleStandby, Reason: "no primary yet"}, `{
			"service":"","node":"","role":"standby","epoch":0,"protected":false,"protected_since":null,"reason":"no primary yet",
			"vips":[],"ports":[],"client_nets":[],"connections":0,
			"log":{"url":"","durability":"","stable":0,"lag_records":0,"lag_bytes":0,"lag_us":0,"state":""},
			"generation":{"id":0,"age_seconds":0,"bytes":0,"pause_us":0},
			"held":{"packets":0,"p50_us":0,"p99_us":0},
			"queue_drops":0,"divergences":0,"expired":0,"translated":0,"standbys":[],"takeovers":0}`},
		{"full", func() Status { s := fullStatus(); s.ProtectedSince = &local; return s }(), `{
			"service":"redis","node":"a","pid":42,"role":"primary","epoch":3,"protected":true,"protected_since":"2025-11-21T20:48:00Z",
			"vips":["192.0.2.10/24"],"ports":[6379],"client_nets":["198.51.100.0/24"],"connections":10,
			"log":{"url":"tls://192.0.2.2:4222","durability":"process","stable":900,"lag_records":1,"lag_bytes":64,"lag_us":120,"state":"ok"},
			"generation":{"id":7,"age_seconds":1.5,"bytes":1048576,"pause_us":8123},
			"held":{"packets":2,"p50_us":100,"p99_us":900},
			"queue_drops":1,"divergences":2,"expired":0,"recreate":"bpf","translated":3,
			"standbys":[{"node":"b","mode":"warm","generation":7,"lag_records":4,"seen_us":1000}],
			"takeovers":2,
			"takeover":{"detect_ms":200,"fence_ms":1,"vip_ms":2,"restore_ms":50,"replay_ms":10,"total_ms":263,"connections":10,"resets":1}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := json.Marshal(tt.in.normal())
			if err != nil {
				t.Fatal(err)
			}
			var want bytes.Buffer
			if err := json.Compact(&want, []byte(tt.want)); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want.String(), string(got)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestExitCode(t *testing.T) {
	for _, tt := range []struct {
		s    Status
		want exitcode.Code
	}{
		{Status{Role: RolePrimary, Protected: true}, exitcode.OK},
		{Status{Role: RolePrimary}, exitcode.Unprotected},
		{Status{Role: RoleStandby, Protected: true}, exitcode.OK},
		{Status{Role: RoleTakingOver}, exitcode.Unprotected},
		{Status{Role: RoleFenced}, exitcode.Fenced},
	} {
		if got := tt.s.ExitCode(); got != tt.want {
			t.Errorf("%+v: exit status %d, want %d", tt.s, got, tt.want)
		}
	}
}

func TestHandlerError(t *testing.T) {
	dir := start(t, &fake{err: exitcode.Errorf(exitcode.Fenced, "node b is the primary since epoch %d", 4)})
	_, err := Checkpoint(t.Context(), dir, "redis")
	if got, want := fmt.Sprint(err), "redis: node b is the primary since epoch 4"; got != want {
		t.Errorf("error %q, want %q", got, want)
	}
	if got := exitcode.Of(err); got != exitcode.Fenced {
		t.Errorf("exit status %d, want %d", got, exitcode.Fenced)
	}
}

func TestNobodyThere(t *testing.T) {
	dir := t.TempDir()
	_, err := GetStatus(t.Context(), dir, "redis")
	if !errors.Is(err, ErrNotRunning) {
		t.Errorf("no socket: %v, want ErrNotRunning", err)
	}
	stale(t, dir)
	_, err = GetStatus(t.Context(), dir, "redis")
	if !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "died and left its socket") {
		t.Errorf("stale socket: %v, want ErrNotRunning and why", err)
	}
	names, err := Services(filepath.Join(dir, "none"))
	if err != nil || len(names) != 0 {
		t.Errorf("Services of no directory: %v, %v", names, err)
	}
}

// stale leaves in dir what a daemon leaves that was killed.
func stale(t *testing.T, dir string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketPath(dir, "redis"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	if err := os.WriteFile(lockPath(dir, "redis"), []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(socketPath(dir, "redis")+".new", nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := t.TempDir()
	stale(t, dir)
	_, stop := startIn(t, dir, &fake{status: Status{Service: "redis"}})
	if _, err := GetStatus(t.Context(), dir, "redis"); err != nil {
		t.Error(err)
	}
	names, err := Services(dir)
	if err != nil || !cmp.Equal(names, []string{"redis"}) {
		t.Errorf("Services: %v, %v", names, err)
	}
	stop()
	if _, err := os.Stat(socketPath(dir, "redis")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket is left after Close: %v", err)
	}
	// And a next one of the same name works.
	_, stop = startIn(t, dir, &fake{})
	stop()
}

func TestSecondDaemonIsRefused(t *testing.T) {
	dir := start(t, &fake{})
	_, err := Listen(dir, "redis", quiet)
	want := fmt.Sprintf("service \"redis\" already has a daemon in %s (pid %d): stop it, or use another --name or --run-dir", dir, os.Getpid())
	if err == nil || err.Error() != want {
		t.Fatalf("error %v, want %s", err, want)
	}
	if _, err := GetStatus(t.Context(), dir, "redis"); err != nil {
		t.Errorf("the first one was harmed: %v", err)
	}
	other, err := Listen(dir, "redis-2", quiet)
	if err != nil {
		t.Fatalf("another name: %v", err)
	}
	other.Close()
}

func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	_, err := Listen(dir, "redis", quiet)
	if exitcode.Of(err) != exitcode.Config {
		t.Errorf("error %v, want a configuration error", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a refused path was created")
	}
}

// dial connects as a client that writes its own requests.
func dial(t *testing.T, dir string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", socketPath(dir, "redis"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestHostileClient(t *testing.T) {
	dir := start(t, &fake{})
	tests := []struct{ name, send, want string }{
		{"not JSON", "status\n", "read request: not a JSON object"},
		{"array", "[1]\n", "read request: not a JSON object"},
		{"empty", "\n", "read request: not a JSON object"},
		{"no version", `{"op":"status"}` + "\n", "control protocol 1, not 0"},
		{"version of the future", `{"v":2,"op":"status"}` + "\n", "control protocol 1, not 2"},
		{"unknown", `{"v":1,"op":"` + strings.Repeat("x", 1000) + `"}` + "\n", `unknown request \"` + strings.Repeat("x", 32) + `\"`},
		{"endless line", strings.Repeat("x", maxRequest), "read request: line is too long"},
		{"types", `{"v":"1","op":7}` + "\n", "read request: not a JSON object"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dial(t, dir)
			if _, err := io.WriteString(c, tt.send); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c)
			if err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Fatal(err)
			}
			if !strings.Contains(string(got), tt.want) || !strings.Contains(string(got), `"error":`) {
				t.Errorf("answer %s, want an error with %q", got, tt.want)
			}
			if bytes.Count(got, []byte("\n")) != 1 {
				t.Errorf("answer is not one line: %q", got)
			}
		})
	}
	t.Run("a line that ends with the connection", func(t *testing.T) {
		c := dial(t, dir)
		if _, err := io.WriteString(c, `{"v":1,"op":"status"}`); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, _ := io.ReadAll(c); !strings.Contains(string(got), `"status":`) {
			t.Errorf("answer %s", got)
		}
	})
	if _, err := GetStatus(t.Context(), dir, "redis"); err != nil {
		t.Errorf("the server was harmed: %v", err)
	}
}

// Clients that connect and say nothing take all places; the rest is told so,
// and the end of the daemon waits for none of them.
func TestSilentClients(t *testing.T) {
	dir, stop := startIn(t, t.TempDir(), &fake{})
	for range maxConns {
		dial(t, dir)
	}
	_, err := GetStatus(t.Context(), dir, "redis")
	if err == nil || !strings.Contains(err.Error(), "too many requests at once") {
		t.Errorf("error %v, want too many requests", err)
	}
	begin := time.Now()
	stop()
	if d := time.Since(begin); d > ioTimeout/2 {
		t.Errorf("stopping waited %v for silent clients", d)
	}
}

func TestOneCheckpointAtATime(t *testing.T) {
	f := &fake{entered: make(chan struct{}), release: make(chan struct{})}
	dir := start(t, f)
	first := make(chan error, 1)
	go func() {
		_, err := Checkpoint(t.Context(), dir, "redis")
		first <- err
	}()
	<-f.entered
	_, err := Checkpoint(t.Context(), dir, "redis")
	if err == nil || !strings.Contains(err.Error(), "already under way") {
		t.Errorf("second: %v, want that one is under way", err)
	}
	if _, err := GetStatus(t.Context(), dir, "redis"); err != nil {
		t.Errorf("status meanwhile: %v", err)
	}
	close(f.release)
	if err := <-first; err != nil {
		t.Errorf("first: %v", err)
	}
}

// A client that gives up must not abort the generation it asked for.
func TestClientLeaves(t *testing.T) {
	f := &fake{entered: make(chan struct{}), release: make(chan struct{})}
	dir := start(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := Checkpoint(ctx, dir, "redis")
		first <- err
	}()
	<-f.entered
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("client: %v, want context.Canceled", err)
	}
	// The handler still waits: it takes its token back only when it is released.
	if _, err := Checkpoint(t.Context(), dir, "redis"); err == nil || !strings.Contains(err.Error(), "already under way") {
		t.Errorf("meanwhile: %v, want that one is under way", err)
	}
	close(f.release)
}

// peer answers each client with text, as a daemon gone wrong might.
func peer(t *testing.T, text string) (runDir string) {
	t.Helper()
	dir := t.TempDir()
	ln, err := net.Listen("unix", socketPath(dir, "redis"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, text)
			_ = c.(*net.UnixConn).CloseWrite()
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return dir
}

func TestHostileDaemon(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"nothing", "", "unexpected EOF"},
		{"not JSON", "hello\n", "not a JSON object"},
		{"another version", `{"v":9}` + "\n", "speaks control protocol 9, not 1"},
		{"no status", `{"v":1}` + "\n", "the answer has none"},
		{"endless", strings.Repeat("x", maxAnswer+1), "line is too long"},
		{"an error that says success", `{"v":1,"error":{"code":0,"message":"m"}}` + "\n", "redis: m"},
		{"an error of no known status", `{"v":1,"error":{"code":77,"message":"m"}}` + "\n", "redis: m"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := GetStatus(t.Context(), peer(t, tt.text), "redis")
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if c := exitcode.Of(err); c != exitcode.Failed {
				t.Errorf("exit status %d, want %d", c, exitcode.Failed)
			}
		})
	}
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"v":1,"op":"status"}` + "\n"))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &Server{log: quiet, busy: make(chan struct{}, 1)}
		var req request
		if err := readLine(bytes.NewReader(b), maxRequest, &req); err != nil {
			return
		}
		a := s.do(t.Context(), req, &fake{})
		if req.V != Version && a.Error == nil {
			t.Errorf("version %d was served", req.V)
		}
		if n := len(fmt.Sprint(a.Error)); a.Error != nil && n > 1000 {
			t.Errorf("error of %d bytes for %q", n, b)
		}
	})
}
