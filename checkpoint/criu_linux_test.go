package checkpoint_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/checkpoint/internal/sandbox"
	"github.com/ftckpt/ftckpt/internal/seqnum"
)

func TestMain(m *testing.M) {
	sandbox.Main()
	if spec := os.Getenv(agentEnv); spec != "" {
		runAgent(spec)
	}
	os.Exit(m.Run())
}

func criu(t *testing.T) checkpoint.Criu {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests dump and restore for real: run them as root")
	}
	c, err := checkpoint.Locate(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Warm(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c
}

// imageDir is a path on tmpfs that does not exist yet.
func imageDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ftckpt-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "image")
}

func start(t *testing.T, o sandbox.Options) *sandbox.Sandbox {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := sandbox.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func dial(t *testing.T, s *sandbox.Sandbox, mode string) int {
	t.Helper()
	n, err := s.Dial(t.Context(), mode)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func exchange(t *testing.T, s *sandbox.Sandbox, conn int) {
	t.Helper()
	if err := s.Exchange(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
}

// target is the host's name for the target.
func target(t *testing.T, s *sandbox.Sandbox) int {
	t.Helper()
	pid, err := checkpoint.OuterPID(s.TargetPID, s.InitPID)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestDumpAndRestoreAgainAndAgain(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{Hold: []string{"child"}})
	conns := []int{dial(t, s, sandbox.Echo), dial(t, s, sandbox.Echo), dial(t, s, sandbox.Echo)}
	pid := target(t, s)
	for round := range 3 {
		for _, n := range conns {
			exchange(t, s, n)
		}
		dir := imageDir(t)
		held := 0
		res, err := c.Dump(t.Context(), checkpoint.DumpRequest{
			PID: pid, InitPID: s.InitPID, Dir: dir, Stop: true,
			Hold: func() error { held++; return nil },
		})
		if err != nil {
			t.Fatalf("round %d: %+v", round, err)
		}
		if held != 1 || res.Frozen <= 0 || res.Pause < res.Frozen/2 || res.Pages == 0 || res.Bytes < res.Pages*4096 {
			t.Fatalf("round %d: held %d times, result %+v", round, held, res)
		}
		tree, err := checkpoint.ReadTree(dir)
		if err != nil || len(tree) != 2 || tree[0].PID != s.TargetPID || tree[1].PPID != s.TargetPID {
			t.Fatalf("round %d: tree %+v, %v", round, tree, err)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			t.Fatalf("round %d: the target was to be ended", round)
		}
		seen := 0
		got, err := c.Restore(t.Context(), checkpoint.RestoreRequest{
			Dir: dir, InitPID: s.InitPID,
			BeforeResume: func(pid int) error { seen = pid; return nil },
		})
		if err != nil {
			t.Fatalf("round %d: %+v", round, err)
		}
		if seen != s.TargetPID || got.InnerPID != s.TargetPID || got.PID != target(t, s) {
			t.Fatalf("round %d: restored %+v (told %d), want %d outside", round, got, seen, target(t, s))
		}
		pid = got.PID
		for _, n := range conns {
			exchange(t, s, n)
		}
		t.Logf("round %d: %+v restored in %v", round, res, got.Took)
	}
}

// The target sees nothing of a dump that leaves it running.
func TestDumpLeavesRunning(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{})
	n := dial(t, s, sandbox.Echo)
	for range 2 {
		exchange(t, s, n)
		if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), Dir: imageDir(t)}); err != nil {
			t.Fatalf("%+v", err)
		}
		healthy(t, s, n)
	}
}

// healthy checks that the target runs, is traced by nobody and serves.
func healthy(t *testing.T, s *sandbox.Sandbox, conn int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", target(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		k, v, _ := strings.Cut(line, ":\t")
		if k == "TracerPid" && v != "0" || k == "State" && strings.ContainsAny(v[:1], "tTZ") {
			t.Fatalf("target: %s", line)
		}
	}
	exchange(t, s, conn)
}

func TestImageAgreesWithTheClients(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{})
	modes := map[int]string{}
	for _, m := range []string{sandbox.Echo, sandbox.Deaf, sandbox.HalfClose, sandbox.Flood, sandbox.FloodClose} {
		modes[dial(t, s, m)] = m
	}
	exchange(t, s, 0)
	closed := dial(t, s, sandbox.Deaf) // and its client closes, too
	modes[closed] = "closed"
	if err := s.HalfClose(t.Context(), closed); err != nil {
		t.Fatal(err)
	}
	want := map[string]checkpoint.TCPState{
		sandbox.Echo: checkpoint.Established, sandbox.Deaf: checkpoint.Established, sandbox.HalfClose: checkpoint.FinWait2,
		sandbox.Flood: checkpoint.Established, sandbox.FloodClose: checkpoint.FinWait1, "closed": checkpoint.CloseWait,
	}
	dir := imageDir(t)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), InitPID: s.InitPID, Dir: dir}); err != nil {
		t.Fatalf("%+v", err)
	}
	socks, err := checkpoint.ReadSockets(dir)
	if err != nil {
		t.Fatal(err)
	}
	byPort := map[uint16]checkpoint.Socket{}
	listeners := 0
	for _, k := range socks {
		if k.Listening() {
			listeners++
			if k.Stream || k.Tuple.Server.String() != "127.0.0.1:7" {
				t.Errorf("listener %+v", k)
			}
			continue
		}
		byPort[k.Tuple.Client.Port()] = k
	}
	if listeners != 1 || len(byPort) != len(modes) {
		t.Fatalf("%d listeners, %d connections", listeners, len(byPort))
	}
	for conn, mode := range modes {
		cl, err := s.Client(t.Context(), conn)
		if err != nil {
			t.Fatal(err)
		}
		k := byPort[cl.Port]
		if k.State != want[mode] {
			t.Errorf("%s: state %s, want %s", mode, k.State, want[mode])
		}
		if !k.Stream || k.IPv6 || k.Tuple.Server.String() != "127.0.0.1:7" || k.MSS == 0 || k.Timestamp == 0 ||
			k.Options&checkpoint.OptTimestamps == 0 || k.Options&checkpoint.OptWScale == 0 || k.RcvWScale == 0 || k.SndWScale == 0 {
			t.Errorf("%s: %+v", mode, k)
		}
		// What the client has written is what the server has received, and what the
		// client has received is what it has acknowledged.
		if k.RcvNxt != seqnum.Value(cl.WriteSeq) {
			t.Errorf("%s: rcv_nxt %d, client wrote to %d", mode, k.RcvNxt, cl.WriteSeq)
		}
		if k.SndUna != seqnum.Value(cl.RcvNxt) {
			t.Errorf("%s: snd_una %d, client received to %d", mode, k.SndUna, cl.RcvNxt)
		}
		unread := seqnum.Size(0)
		switch mode {
		case sandbox.Deaf:
			unread = 1234
		case "closed":
			unread = 1234 + 1 // the FIN counts
		}
		// The target's bufio.Reader may have taken the deaf client's octets.
		if got := k.CopiedSeq.To(k.RcvNxt); got != unread {
			t.Errorf("%s: %d unread, want %d", mode, got, unread)
		}
		unsent := k.SndNxt.To(k.WriteSeq)
		if flood := strings.HasPrefix(mode, "flood"); flood != (unsent > 0) {
			t.Errorf("%s: %d unsent", mode, unsent)
		}
	}
}

func TestPatchedImageRestores(t *testing.T) {
	c := criu(t)
	for _, o := range []sandbox.Options{{}, {NoWScale: true}, {NoTimestamps: true}, {NoWScale: true, NoTimestamps: true}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			s := start(t, o)
			n := dial(t, s, sandbox.Echo)
			exchange(t, s, n)
			dir := imageDir(t)
			dump := func(stop bool) checkpoint.Socket {
				t.Helper()
				os.RemoveAll(dir)
				if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), InitPID: s.InitPID, Dir: dir, Stop: stop}); err != nil {
					t.Fatalf("%+v", err)
				}
				return connection(t, dir)
			}
			before := dump(true)
			if ws := before.Options&checkpoint.OptWScale != 0; ws == o.NoWScale {
				t.Fatalf("options %#x", before.Options)
			}
			const jump = 1 << 20 // about 17 minutes
			ts := before.Timestamp + jump
			if err := checkpoint.PatchSockets(dir, []checkpoint.Socket{before}, map[uint32]checkpoint.SocketPatch{before.Inode: {Timestamp: &ts}}); err != nil {
				t.Fatal(err)
			}
			patched := connection(t, dir)
			if patched.Options&checkpoint.OptWScale == 0 || patched.RcvNxt != before.RcvNxt || patched.SndUna != before.SndUna {
				t.Fatalf("patched %+v", patched)
			}
			if _, err := c.Restore(t.Context(), checkpoint.RestoreRequest{Dir: dir, InitPID: s.InitPID}); err != nil {
				t.Fatalf("%+v", err)
			}
			exchange(t, s, n)
			after := dump(false)
			if o.NoTimestamps {
				if after.Timestamp != 0 {
					t.Errorf("timestamp %d on a connection without", after.Timestamp)
				}
			} else if d := after.Timestamp - ts; d > 1<<16 {
				t.Errorf("timestamp went on at %d, want %d", after.Timestamp, ts)
			}
			if o.NoWScale && (after.RcvWScale != 0 || after.SndWScale != 0) {
				t.Errorf("window scale %d/%d, want 0/0", after.SndWScale, after.RcvWScale)
			}
		})
	}
}

// connection is the one connection of an image.
func connection(t *testing.T, dir string) checkpoint.Socket {
	t.Helper()
	socks, err := checkpoint.ReadSockets(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range socks {
		if k.Stream {
			return k
		}
	}
	t.Fatalf("no connection in %+v", socks)
	return checkpoint.Socket{}
}

func TestPatchRefusesAnUnknownSocket(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{})
	dir := imageDir(t)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), Dir: dir}); err != nil {
		t.Fatalf("%+v", err)
	}
	if err := checkpoint.PatchSockets(dir, nil, map[uint32]checkpoint.SocketPatch{4711: {}}); err == nil {
		t.Error("a socket that is not in the image was patched")
	}
}

func TestFailedDumpHarmsNobody(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{Hold: []string{"io_uring"}})
	n := dial(t, s, sandbox.Echo)
	dir := imageDir(t)
	_, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), Dir: dir})
	var ce *checkpoint.CriuError
	if !errors.As(err, &ce) || len(ce.Log) == 0 {
		t.Fatalf("dump of an io_uring: %v", err)
	}
	if msg := err.Error(); strings.Contains(msg, "\n") || strings.Contains(msg, "RLIMIT") || msg == "criu dump: failed" {
		t.Errorf("error is %q", msg)
	}
	if long := fmt.Sprintf("%+v", err); !strings.Contains(long, ce.Log[len(ce.Log)-1]) {
		t.Errorf("%%+v has not the log: %s", long)
	}
	healthy(t, s, n)
}

func TestDumpOfNothing(t *testing.T) {
	c := criu(t)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: 1 << 30, Dir: imageDir(t)}); !errors.Is(err, checkpoint.ErrNoProcess) {
		t.Errorf("dump of no process: %v", err)
	}
}

// A hold that fails, or a context that ends while packets are being held, stops
// the dump before the target is touched.
func TestDumpGivenUp(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{})
	n := dial(t, s, sandbox.Echo)
	broken := errors.New("queue is broken")
	_, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), Dir: imageDir(t), Hold: func() error { return broken }})
	if !errors.Is(err, broken) {
		t.Errorf("a failed hold gives %v", err)
	}
	healthy(t, s, n)
	ctx, cancel := context.WithCancel(t.Context())
	_, err = c.Dump(ctx, checkpoint.DumpRequest{PID: target(t, s), Dir: imageDir(t), Hold: func() error { cancel(); return nil }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled dump gives %v", err)
	}
	healthy(t, s, n)
}

// Dumps are cancelled at random moments.
func TestDumpCancelledAnywhere(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{Hold: []string{"memory", "child"}})
	n := dial(t, s, sandbox.Echo)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	failed := 0
	for range 20 {
		dir := imageDir(t)
		ctx, cancel := context.WithCancel(t.Context())
		after := time.Duration(rnd.IntN(60_000)) * time.Microsecond
		_, err := c.Dump(ctx, checkpoint.DumpRequest{
			PID: target(t, s), Dir: dir,
			Hold: func() error { time.AfterFunc(after, cancel); return nil },
		})
		cancel()
		if err != nil {
			failed++
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("cancelled after %v: %+v", after, err)
			}
		}
		os.RemoveAll(filepath.Dir(dir))
		healthy(t, s, n)
	}
	if failed == 0 {
		t.Error("no dump was cancelled: the test came too late")
	}
	t.Logf("%d of 20 dumps cancelled", failed)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), Dir: imageDir(t)}); err != nil {
		t.Fatalf("dump after all that: %+v", err)
	}
	healthy(t, s, n)
}

// agentEnv makes this test binary a process that dumps and does nothing else:
// its value is "pid dir".
const agentEnv = "FTCKPT_TEST_AGENT"

func runAgent(spec string) {
	var pid int
	var dir string
	if _, err := fmt.Sscan(spec, &pid, &dir); err != nil {
		os.Exit(2)
	}
	c, err := checkpoint.Locate(context.Background(), "")
	if err != nil {
		os.Exit(2)
	}
	_, err = c.Dump(context.Background(), checkpoint.DumpRequest{PID: pid, Dir: dir, Hold: func() error {
		_, err := fmt.Println("held")
		return err
	}})
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// The process that dumps is killed at random moments; CRIU goes on alone and
// leaves the target in order.
func TestAgentKilledDuringDump(t *testing.T) {
	criu(t)
	s := start(t, sandbox.Options{Hold: []string{"memory", "child"}})
	n := dial(t, s, sandbox.Echo)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for range 10 {
		pid := target(t, s)
		dir := imageDir(t)
		agent := exec.Command(exe)
		agent.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", agentEnv, pid, dir))
		out, err := agent.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := agent.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
			t.Fatalf("agent said %q: %v", line, err)
		}
		time.Sleep(time.Duration(rnd.IntN(40_000)) * time.Microsecond)
		_ = agent.Process.Kill()
		if err := agent.Wait(); err != nil {
			killed++
		}
		waitUntil(t, "the target is let go", func() bool { return tracer(t, pid) == "0" && !tracedSoon(dir) })
		healthy(t, s, n)
		os.RemoveAll(filepath.Dir(dir))
	}
	if killed == 0 {
		t.Error("no agent was killed in time")
	}
	t.Logf("%d of 10 agents killed", killed)
}

// tracedSoon reports whether a CRIU still works on the image in dir.
func tracedSoon(dir string) bool {
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, dir) {
			return true
		}
	}
	return false
}

func waitUntil(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("timed out: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func tracer(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "TracerPid:\t")
	v, _, _ := strings.Cut(after, "\n")
	return v
}

// A CRIU that hangs is ended, its helpers too, and nothing else.
func TestHungCriuIsEnded(t *testing.T) {
	criu(t)
	dir := t.TempDir()
	fake := filepath.Join(dir, "criu")
	mark := filepath.Join(dir, "pids")
	if err := os.WriteFile(fake, []byte("#!/bin/sh\nsleep 600 &\necho $$ $! >"+mark+"\nwait\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	defer checkpoint.SetCancelGrace(50 * time.Millisecond)()
	s := start(t, sandbox.Options{})
	n := dial(t, s, sandbox.Echo)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	c := checkpoint.Criu{Path: fake, Version: checkpoint.MinVersion}
	_, err := c.Dump(ctx, checkpoint.DumpRequest{PID: target(t, s), InitPID: 0, Dir: imageDir(t)})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a hung criu gives %v", err)
	}
	b, err := os.ReadFile(mark)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range strings.Fields(string(b)) { // ids of the sandbox's PID namespace
		inner, _ := strconv.Atoi(f)
		waitUntil(t, "process "+f+" of the hung criu ends", func() bool {
			_, err := checkpoint.OuterPID(inner, s.InitPID)
			return err != nil
		})
	}
	healthy(t, s, n)
}

func TestRestoreSaysWhatIsMissing(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{})
	dir := imageDir(t)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: target(t, s), InitPID: s.InitPID, Dir: dir}); err != nil {
		t.Fatalf("%+v", err)
	}
	// The target still runs, so its process id is taken.
	_, err := c.Restore(t.Context(), checkpoint.RestoreRequest{Dir: dir, InitPID: s.InitPID})
	var ce *checkpoint.CriuError
	if !errors.As(err, &ce) || !strings.Contains(err.Error(), strconv.Itoa(s.TargetPID)) {
		t.Errorf("restore over a running target: %v", err)
	}
	_, err = c.Restore(t.Context(), checkpoint.RestoreRequest{Dir: imageDir(t), InitPID: s.InitPID})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("restore of nothing: %v", err)
	}
}

func TestFactsAndTheirCheck(t *testing.T) {
	c := criu(t)
	s := start(t, sandbox.Options{})
	dir := imageDir(t)
	pid := target(t, s)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: pid, Dir: dir}); err != nil {
		t.Fatalf("%+v", err)
	}
	var h checkpoint.Hasher
	who, facts, err := checkpoint.CollectFacts(dir, pid, c, &h)
	if err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Executable()
	if who.Exe != exe || who.Cwd != "/" || who.PID != s.TargetPID || who.Kernel == "" || who.Criu == "" {
		t.Errorf("target %+v, want exe %s", who, exe)
	}
	var self *checkpoint.FileFact
	for i := range facts {
		if facts[i].Path == exe {
			self = &facts[i]
		}
	}
	if self == nil || self.Hash == nil {
		t.Fatalf("no hash of %s in %+v", exe, facts)
	}
	if err := checkpoint.VerifyFiles(facts, "/", &h); err != nil {
		t.Errorf("the same host differs: %v", err)
	}
	// A file of the same size with one octet changed is what CRIU would believe.
	root := t.TempDir()
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.MkdirAll(filepath.Join(root, filepath.Dir(exe)), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, exe), b, 0o600); err != nil {
		t.Fatal(err)
	}
	err = checkpoint.VerifyFiles([]checkpoint.FileFact{*self}, root, &h)
	if !errors.Is(err, checkpoint.ErrFilesDiffer) || !strings.Contains(err.Error(), exe+" has another content") {
		t.Errorf("another binary of the same size: %v", err)
	}
}
