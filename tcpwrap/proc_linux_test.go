package tcpwrap

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func afterDeadline() time.Time { return time.Now().Add(deadline) }

func TestDyingStat(t *testing.T) {
	for _, c := range []struct {
		stat string
		want bool
	}{
		{"1 (sh) S 0 1 1 0 -1 4194560 1 2 3", false},
		{"1 (sh) R 0 1 1 0 -1 4194564 1 2 3", true}, // PF_EXITING
		{"1 (sh) Z 0 1 1 0 -1 4194560 1 2 3", true}, // zombie
		{"1 (sh) X 0 1 1 0 -1 4194560 1 2 3", true}, // dead
		{"1 (a) Z 0 4) S 0 1 1 0 -1 64 1 2", false}, // a name made to mislead
		{"1 (a) S 0 1 1 0 -1 0) Z 0 1 1 0 -1 64", true},
		{"1 (sh) S 0 1 1", true}, // cannot be read
		{"1 (sh) S 0 1 1 0 -1 x 1", true},
		{"1 (sh)", true},
		{"", true},
	} {
		if got := dyingStat([]byte(c.stat)); got != c.want {
			t.Errorf("%q: %v", c.stat, got)
		}
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
