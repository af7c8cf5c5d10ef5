package north

import (
	"context"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

func open(t *testing.T) *Recorder {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	r, err := Open("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// A server's accepts, reads, the end of a stream and its close come in the
// order in which it did them, and without being asked to wait.
func TestRecorder(t *testing.T) {
	r := open(t)
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	if err := r.Attach([]uint16{port}); err != nil {
		t.Fatal(err)
	}
	var clients, served []net.Conn
	for range 2 {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		clients, served = append(clients, c), append(served, s)
	}
	send := func(i, n int) {
		t.Helper()
		if _, err := clients[i].Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 1000)
	read := func(i, want int) {
		t.Helper()
		_ = served[i].SetReadDeadline(time.Now().Add(10 * time.Second))
		if n, _ := served[i].Read(buf[:max(want, 1)]); n != want {
			t.Fatalf("read %d octets, want %d", n, want)
		}
	}
	send(0, 10)
	send(1, 20)
	read(1, 20)
	read(0, 4)
	send(1, 5)
	read(1, 5)
	read(0, 6)
	_ = clients[1].Close()
	read(1, 0)
	_ = served[1].Close()

	type step struct {
		what What
		conn int
		n    seqnum.Size // octets since its beginning
	}
	want := []step{
		{Accept, 0, 0}, {Accept, 1, 0},
		{Read, 1, 20}, {Read, 0, 4}, {Read, 1, 25}, {Read, 0, 10}, {Read, 1, 26}, {Closed, 1, 0},
	}
	start := map[int]seqnum.Value{}
	var got []step
	deadline := time.Now().Add(10 * time.Second)
	for len(got) < len(want) && time.Now().Before(deadline) {
		r.Drain(func(e Event) {
			conn := -1
			for i, c := range clients {
				if netip.MustParseAddrPort(c.LocalAddr().String()) == e.Tuple.Client {
					conn = i
				}
			}
			if e.What == Accept {
				start[conn] = e.Seq
			}
			s := step{e.What, conn, 0}
			if e.What == Read {
				s.n = start[conn].To(e.Seq)
			}
			if len(got) > 0 && got[len(got)-1] == s {
				return // nothing new
			}
			got = append(got, s)
		})
	}
	for i := range want {
		if i >= len(got) || got[i] != want[i] {
			t.Fatalf("recorded %v, want %v", got, want)
		}
	}
	if n := r.Lost(); n != 0 {
		t.Errorf("%d events lost", n)
	}
}

// Other ports are none of its business.
func TestRecorderOtherPorts(t *testing.T) {
	r := open(t)
	if err := r.Attach([]uint16{1}); err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.Drain(func(e Event) { t.Errorf("recorded %v", e) })
}

// Wait ends at an event when asked to.
func TestRecorderWakes(t *testing.T) {
	r := open(t)
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := r.Attach([]uint16{netip.MustParseAddrPort(l.Addr().String()).Port()}); err != nil {
		t.Fatal(err)
	}
	if err := r.Wake(true); err != nil {
		t.Fatal(err)
	}
	go func() {
		if c, err := net.Dial("tcp4", l.Addr().String()); err == nil {
			_ = c.Close()
		}
	}()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	start := time.Now()
	r.Wait(20 * time.Second)
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("woken after %v", took)
	}
	n := 0
	r.Drain(func(Event) { n++ })
	if n == 0 {
		t.Error("woken for nothing")
	}
}
