package tcpwrap

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// changeling is a node that takes a connection over in the simplest way there
// is: the client's handshake was with a server that never was, whose SYN-ACK it
// made up itself; then the connection is made again with the server that is
// there.
type changeling struct {
	t       testing.TB
	tr      *Translator
	synack  []byte // options of the server that never was
	isn     seqnum.Value
	open    stream.ConnOpen
	born    chan error
	asked   bool
	loss    bool // one packet in fifty
	mu      sync.Mutex
	strange []string // segments that do not have the client's numbers
	big     int
	end     chan error
}

func (c *changeling) loop() error {
	var pkts []Packet
	for {
		var err error
		if pkts, err = c.tr.Recv(pkts[:0]); err != nil {
			if errors.Is(err, ErrClosed) {
				return nil
			}
			return err
		}
		for _, p := range pkts {
			var s Segment
			if err := ParseSegment(p.Data, p.Dir, &s); err != nil {
				return err
			}
			c.tr.Verdict(p.ID, c.decide(&s, len(p.Data)))
		}
		if err := c.tr.Flush(); err != nil && !errors.Is(err, ErrClosed) {
			return err
		}
	}
}

func (c *changeling) decide(s *Segment, n int) Verdict {
	const far = 1 << 30 // more than is sent
	switch {
	case c.asked: // the connection is there
		c.mu.Lock()
		defer c.mu.Unlock()
		c.big = max(c.big, n)
		if s.Dir == Outbound && c.isn.To(s.Seq) > far || s.Dir == Inbound && c.isn.To(s.Ack) > far {
			c.strange = append(c.strange, fmt.Sprintf("%+v", s))
		}
		if c.loss && rand.IntN(50) == 0 {
			return Drop
		}
		return Accept
	case s.Dir == Inbound && s.Flags == SYN:
		c.open = stream.ConnOpen{Tuple: s.Tuple, ISN: s.Seq, Window: s.Window, Options: append([]byte(nil), s.RawOptions...)}
		o := Outgoing{Tuple: s.Tuple, Seq: c.isn, Ack: s.Seq.Add(1), Flags: SYN | ACK, Window: 60000, Options: c.synack}
		if err := c.tr.SendOut(AppendOutgoing(nil, &o)); err != nil {
			c.t.Error(err)
		}
	case s.Dir == Inbound && s.Flags&(SYN|ACK|RST) == ACK:
		c.asked = true
		clock := ParseOptions(c.synack, true).TSVal
		r, err := RebirthFrom(c.open, stream.ConnAccept{ISN: c.isn, Options: c.synack}, s.Options.TSVal, clock+10, time.Now(), s.Ack.Add(seqnum.Size(s.Window)))
		if err == nil {
			err = c.tr.Recreate(r, func(err error) { c.born <- err })
		}
		if err != nil {
			c.born <- err
		}
	}
	return Drop
}

// Real TCPs on both sides of a translation: bulk both ways at once, with and
// without each option, whatever the window scale that the client was told.
func TestTranslatedConnection(t *testing.T) {
	mss := []byte{2, 4, 0x05, 0xb4}
	ts := []byte{1, 1, 8, 10, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 0} // about to wrap
	sack := []byte{1, 1, 4, 2}
	scale := func(n byte) []byte { return []byte{1, 3, 3, n} }
	join := func(parts ...[]byte) (b []byte) {
		for _, p := range parts {
			b = append(b, p...)
		}
		return b
	}
	for _, c := range []struct {
		name    string
		vip     netip.Addr
		options []byte
		loss    bool
	}{
		{"all options", labServer4, join(mss, sack, ts, scale(10)), false},
		{"all options, loss", labServer4, join(mss, sack, ts, scale(10)), true},
		{"IPv6", labServer6, join(mss, sack, ts, scale(10)), false},
		{"small scale", labServer4, join(mss, sack, ts, scale(1)), false},
		{"no scale", labServer4, join(mss, sack, ts), false},
		{"no timestamps, loss", labServer4, join(mss, sack, scale(14)), true},
		{"no SACK", labServer4, join(mss, ts, scale(7)), false},
		{"no options", labServer4, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) { testTranslatedConnection(t, c.vip, c.options, c.loss) })
	}
}

func testTranslatedConnection(t *testing.T, vip netip.Addr, options []byte, loss bool) {
	l := newLab(t)
	size := int64(4 << 20)
	if loss {
		size = 2 << 20
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	content := func(n uint64) io.Reader {
		var key [32]byte
		binary.BigEndian.PutUint64(key[:], seed+n)
		return io.LimitReader(rand.NewChaCha8(key), size)
	}
	sum := func(r io.Reader) string {
		h := sha256.New()
		n, err := io.Copy(h, r)
		return fmt.Sprintf("%d octets %x, %v", n, h.Sum(nil)[:8], err)
	}
	heard := make(chan string, 1)
	l.serve(t, vip, func(k *net.TCPConn) {
		var out sync.WaitGroup
		out.Go(func() {
			_, _ = io.Copy(struct{ io.Writer }{k}, content(2))
			_ = k.CloseWrite()
		})
		heard <- sum(k)
		out.Wait()
	})
	q := l.open(t)
	n := &changeling{t: t, tr: NewTranslator(q, nil), synack: options, isn: 0xffff0000, loss: loss, born: make(chan error, 1), end: make(chan error, 1)}
	go func() { n.end <- n.loop() }()
	t.Cleanup(func() {
		q.Close()
		if err := <-n.end; err != nil {
			t.Error(err)
		}
	})
	l.install(t, vip)
	k := l.dial(t, vip)
	k.SetDeadline(time.Now().Add(deadline))
	select {
	case err := <-n.born:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(deadline):
		t.Fatal("the connection was not made again")
	}
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(struct{ io.Writer }{k}, content(1))
		sent <- errors.Join(err, k.CloseWrite())
	}()
	if got, want := sum(k), sum(content(2)); got != want {
		t.Errorf("the client heard %s, want %s", got, want)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if got, want := <-heard, sum(content(1)); got != want {
		t.Errorf("the server heard %s, want %s", got, want)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.strange) > 0 {
		t.Errorf("%d segments do not have the client's numbers, the first %s", len(n.strange), n.strange[0])
	}
	if !loss && len(options) > 8 && n.big < 8<<10 {
		t.Errorf("largest packet %d octets: no super-segments", n.big)
	}
	if f := q.FailedVerdicts(); f != 0 {
		t.Errorf("the kernel refused %d verdicts", f)
	}
	// What is closed is swept away.
	eventually(t, "no translated connection is left", func() bool {
		err := n.tr.Sweep(func() (map[stream.FourTuple]bool, error) {
			socks, err := Sockets(l.server, []netip.Addr{vip}, []uint16{labPort})
			there := map[stream.FourTuple]bool{}
			for _, s := range socks {
				there[stream.FourTuple{Server: s.Local, Client: s.Remote}] = s.State != TCPTimeWait
			}
			return there, err
		})
		if err != nil {
			t.Fatal(err)
		}
		return n.tr.Len() == 0
	})
}
