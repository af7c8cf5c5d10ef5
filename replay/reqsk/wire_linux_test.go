package reqsk

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// wire sees every packet at the client, as a capture would.
type wire struct {
	mu    sync.Mutex
	conns map[stream.FourTuple]*seen
}

// seen is what the log would know of a connection, and what must not happen.
type seen struct {
	syn    stream.ConnOpen
	synack stream.ConnAccept

	ack, edge, clientNxt, serverNxt seqnum.Value
	clientTS, serverTS              uint32
	serverTSAt                      time.Time

	resets   int
	backward int            // server TSvals older than one before
	fromNew  []seqnum.Value // first octets of server data since mark
	tsNew    []serverClock  // and their clocks
	marked   bool
}

type serverClock struct {
	val uint32
	at  time.Time
}

func newWire(t testing.TB, ns string) *wire {
	t.Helper()
	fd := -1
	err := nsthread.InNamed(ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(unix.ETH_P_ALL>>8|unix.ETH_P_ALL&0xff<<8))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// Not to miss a packet is a matter of room; to end, one of looking up.
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
	); err != nil {
		t.Fatal(err)
	}
	w := &wire{conns: map[stream.FourTuple]*seen{}}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 128<<10)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if n, _, err := unix.Recvfrom(fd, buf, 0); err == nil {
				w.take(bytes.Clone(buf[:n]))
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	return w
}

func (w *wire) take(ip []byte) {
	var s tcpwrap.Segment
	dir := tcpwrap.Inbound
	if tcpwrap.ParseSegment(ip, dir, &s) != nil {
		return
	}
	if s.Tuple.Server.Port() != labPort {
		dir = tcpwrap.Outbound
		if tcpwrap.ParseSegment(ip, dir, &s) != nil {
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.conns[s.Tuple]
	if c == nil {
		c = &seen{}
		w.conns[s.Tuple] = c
	}
	if dir == tcpwrap.Inbound {
		c.fromClient(&s)
	} else {
		c.fromServer(&s)
	}
}

func (c *seen) fromClient(s *tcpwrap.Segment) {
	if s.Options.HasTS {
		c.clientTS = s.Options.TSVal
	}
	if s.Flags.Has(tcpwrap.SYN) {
		c.syn = stream.ConnOpen{Conn: 1, Tuple: s.Tuple, ISN: s.Seq, Window: s.Window, Options: bytes.Clone(s.RawOptions)}
		c.clientNxt = s.End()
		return
	}
	c.clientNxt = seqnum.Max(c.clientNxt, s.End())
	shift := max(0, tcpwrap.ParseOptions(c.syn.Options, true).WScale)
	if tcpwrap.ParseOptions(c.synack.Options, true).WScale < 0 {
		shift = 0
	}
	c.ack = s.Ack
	c.edge = s.Ack.Add(seqnum.Size(s.Window) << shift)
}

func (c *seen) fromServer(s *tcpwrap.Segment) {
	switch {
	case s.Flags.Has(tcpwrap.RST):
		c.resets++
		return
	case s.Flags.Has(tcpwrap.SYN):
		c.synack = stream.ConnAccept{Conn: 1, ISN: s.Seq, Options: bytes.Clone(s.RawOptions)}
		c.ack, c.serverNxt = s.End(), s.End()
		c.edge = c.ack.Add(seqnum.Size(c.syn.Window))
	}
	c.serverNxt = seqnum.Max(c.serverNxt, s.End())
	now := time.Now()
	if s.Options.HasTS {
		if seqnum.Value(s.Options.TSVal).Less(seqnum.Value(c.serverTS)) && c.serverTSAt != (time.Time{}) {
			c.backward++
		}
		c.serverTS, c.serverTSAt = s.Options.TSVal, now
	}
	if c.marked {
		c.tsNew = append(c.tsNew, serverClock{s.Options.TSVal, now})
		if len(s.Payload) > 0 {
			c.fromNew = append(c.fromNew, s.Seq)
		}
	}
}

// of returns a copy of what was seen of a connection.
func (w *wire) of(t stream.FourTuple) seen {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c := w.conns[t]; c != nil {
		return *c
	}
	return seen{}
}

func (w *wire) mark(t stream.FourTuple) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[t].marked = true
}

// settled waits until the client has acknowledged what the server sent and the
// other way round, and what it was is known.
func (w *wire) settled(t testing.TB, k *talker) seen {
	t.Helper()
	var c seen
	eventually(t, "the conversation to settle", func() bool {
		c = w.of(k.tuple)
		return c.clientNxt == c.syn.ISN.Add(seqnum.Size(len(k.sent)+1)) && c.ack == c.synack.ISN.Add(seqnum.Size(k.got+1))
	})
	return c
}

func (c *seen) attrs(t testing.TB) Attrs {
	t.Helper()
	elapsed := uint32(time.Since(c.serverTSAt).Milliseconds())
	a, err := AttrsFrom(c.syn, c.synack, c.clientTS, c.serverTS+elapsed+1)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
