package tcpwrap

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func afterDeadline() time.Time { return time.Now().Add(deadline) }

func TestLifeIn(t *testing.T) {
	fill := strings.Repeat(" 0", 42) // fields 10 to 51
	for _, c := range []struct {
		stat string
		want Life
	}{
		{"1 (sh) S 0 1 1 0 -1 4194560" + fill + " 0\n", Alive},
		{"1 (sh) S 0 1 1 0 -1 4194560 1 2 3", Alive},            // of an older kernel
		{"1 (sh) R 0 1 1 0 -1 4194564" + fill + " 0\n", Ended},  // PF_EXITING
		{"1 (sh) R 0 1 1 0 -1 4194564" + fill + " 9\n", Died},   // kill -9
		{"1 (sh) R 0 1 1 0 -1 4194564" + fill + " 256\n", Died}, // exit(1)
		{"1 (sh) R 0 1 1 0 -1 4194564" + fill + " 10\n", Died},  // ends in 0, and is not
		{"1 (sh) Z 0 1 1 0 -1 4194560" + fill + " 0\n", Ended},  // zombie
		{"1 (sh) X 0 1 1 0 -1 4194560" + fill + " 0\n", Ended},  // dead
		{"1 (sh) Z 0 1 1 0 -1 4194560 1 2 0", Died},             // no exit code there
		{"1 (a) Z 0 4) S 0 1 1 0 -1 64" + fill + " 0", Alive},   // a name made to mislead
		{"1 (a) S 0 1 1 0 -1 0) Z 0 1 1 0 -1 64" + fill + " 0", Ended},
		{"1 (sh) S 0 1 1", Died}, // cannot be read
		{"1 (sh) S 0 1 1 0 -1 x 1", Died},
		{"1 (sh)", Died},
		{"", Died},
	} {
		if got := lifeIn([]byte(c.stat)); got != c.want {
			t.Errorf("%q: %v", c.stat, got)
		}
	}
}

// The end of a process, seen before and after its parent has waited for it.
func TestLife(t *testing.T) {
	for script, want := range map[string]Life{"exit 0": Ended, "exit 1": Died, "kill -9 $$": Died, "kill -15 $$": Died, "exec sleep 0": Ended} {
		t.Run(script, func(t *testing.T) {
			cmd := exec.Command("sh", "-c", "read x; "+script)
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			w, err := WatchProc(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			if w.Life() != Alive {
				t.Error("a living process is not alive")
			}
			if _, err := io.WriteString(in, "\n"); err != nil {
				t.Fatal(err)
			}
			select {
			case <-w.Exited():
			case <-time.After(deadline):
				t.Fatal("the exit goes unseen")
			}
			if got := w.Life(); got != want {
				t.Errorf("a zombie's life: %v, want %v", got, want)
			}
			_ = cmd.Wait()
			if got := w.Life(); got != want {
				t.Errorf("after its parent's wait: %v, want %v", got, want)
			}
		})
	}
}

func TestProcWatch(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pid := cmd.Process.Pid
	w, err := WatchProc(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if w.Dying() || Dying(pid) {
		t.Error("a living process is said to be dying")
	}
	select {
	case <-w.Exited():
		t.Error("a living process is said to have exited")
	default:
	}
	if n := testing.AllocsPerRun(100, func() { w.Dying() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	cmd.Process.Kill()
	select {
	case <-w.Exited():
	case <-time.After(deadline):
		t.Fatal("the exit goes unseen")
	}
	if !w.Dying() || !Dying(pid) { // a zombie: nobody has waited for it
		t.Error("a zombie is said to live")
	}
	cmd.Wait()
	if !w.Dying() || !Dying(pid) {
		t.Error("a process that is gone is said to live")
	}
	if _, err := WatchProc(pid); !errors.Is(err, unix.ESRCH) {
		t.Errorf("watch what is gone: %v", err)
	}
}

func TestCloseEndsTheWatch(t *testing.T) {
	w, err := WatchProc(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if !w.Dying() {
		t.Error("after Close: want dying, the side of caution")
	}
	select {
	case <-w.Exited():
		t.Error("Close is no exit")
	default:
	}
}

// The server of TestFinOfADyingServer.
func TestChildServer(t *testing.T) {
	ns := os.Getenv("FTCKPT_TEST_SERVER_NS")
	if ns == "" {
		t.Skip("only as a child of TestFinOfADyingServer")
	}
	l := &lab{server: ns}
	l.serve(t, labServer4, func(c *net.TCPConn) {
		var b [1]byte
		for {
			if _, err := io.ReadFull(c, b[:]); err != nil || b[0] == 'q' {
				return
			}
			_, _ = c.Write(b[:])
		}
	})
	fmt.Println("ready")
	select {}
}

// A FIN of a server that closes and one of a server that is killed: the flag
// tells them apart at the moment the FIN is caught, before the pidfd does.
func TestFinOfADyingServer(t *testing.T) {
	l := newLab(t)
	server := child(t, "TestChildServer", "FTCKPT_TEST_SERVER_NS="+l.server)
	w, err := WatchProc(server.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	fins := make(map[netip.AddrPort]bool) // client: was the server dying?
	tp := newTap(t, l.open(t), func(p caught) Verdict {
		if p.Dir == Inbound || p.Seg.Flags&(FIN|RST) == 0 {
			return Accept
		}
		d := w.Dying()
		if _, again := fins[p.Seg.Tuple.Client]; !again {
			fins[p.Seg.Tuple.Client] = d
		}
		if d {
			return Drop
		}
		return Accept
	})
	l.install(t, labServer4)
	closed, killed := l.dial(t, labServer4), l.dial(t, labServer4)
	ask(t, killed, "x")
	send(t, closed, "q")
	closed.SetReadDeadline(afterDeadline())
	if n, err := closed.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("closed by the server: read %d, %v", n, err)
	}
	if err := server.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	tp.until(t, "the FIN of the killed server", func() bool { return len(fins) == 2 })
	<-w.Exited()
	silent(t, killed)
	tp.mu.Lock()
	defer tp.mu.Unlock()
	for _, c := range []struct {
		conn *net.TCPConn
		want bool
	}{{closed, false}, {killed, true}} {
		if got := fins[netip.MustParseAddrPort(c.conn.LocalAddr().String())]; got != c.want {
			t.Errorf("dying at the FIN: %v, want %v", got, c.want)
		}
	}
}

func BenchmarkDying(b *testing.B) {
	w, err := WatchProc(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	b.ReportAllocs()
	for b.Loop() {
		w.Dying()
	}
}
