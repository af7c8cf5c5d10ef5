package replay

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// A restored server that says something else than the old one loses the
// connection on which it did, at both ends, and no other; what it says in other
// segments than the old one is the same.
func TestDivergenceIsFound(t *testing.T) {
	now := time.Unix(1000, 0)
	const first, rcv = seqnum.Value(0xfffffffa), seqnum.Value(70) // the outstream wraps
	old := "answer one, answer two"
	digest := func(conn stream.ConnID, n int) stream.OutDigest {
		return stream.OutDigest{Conn: conn, Base: first, Seq: first.Add(seqnum.Size(n)), Sum: xxhash.Sum64String(old[:n])}
	}
	for _, c := range []struct {
		name    string
		says    []string
		resets  bool
		digests []stream.OutDigest
	}{
		{"the same in other segments", []string{"answ", "er one, answer", " two"}, false, []stream.OutDigest{digest(1, 10), digest(1, 22)}},
		{"more than is known", []string{old + ", answer three"}, false, []stream.OutDigest{digest(1, 22)}},
		{"something else", []string{"answer one, answer TWO"}, true, []stream.OutDigest{digest(1, 10), digest(1, 22)}},
		{"something else early", []string{"Answer one", ", answer two"}, true, []stream.OutDigest{digest(1, 10), digest(1, 22)}},
		{"something else behind the newest digest", []string{"answer one, answer TWO"}, false, []stream.OutDigest{digest(1, 10)}},
		{"digests of another generation", []string{"answer one, answer TWO"}, false,
			[]stream.OutDigest{{Conn: 1, Base: first.Add(3), Seq: first.Add(22), Sum: 1}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := NewEngine([]Survivor{{Cut: cutAt(1, rcv, first), Digests: c.digests}, {Cut: cutAt(2, rcv, first)}})
			e.Start(now)
			e.Fed(now)
			seq := first
			for i, says := range c.says {
				e.Packet(now, tcpwrap.PacketID(i), &tcpwrap.Segment{
					Dir: tcpwrap.Outbound, Tuple: cutAt(1, rcv, first).Tuple, Seq: seq, Ack: rcv,
					Flags: tcpwrap.ACK, Window: 1000, Payload: []byte(says),
				})
				seq = seq.Add(seqnum.Size(len(says)))
			}
			e.Ready.Reset()
			e.Tick(now)
			gone := e.Condemned()
			if (len(gone) == 1) != c.resets || e.Stats().Divergences != uint64(len(gone)) {
				t.Fatalf("condemned %v, divergences %d", gone, e.Stats().Divergences)
			}
			if !c.resets {
				return
			}
			if gone[0].Conn != 1 || !strings.Contains(gone[0].Why, "does not say what the old one said") {
				t.Errorf("condemned %v", gone[0])
			}
			up, out := 0, 0
			for _, s := range e.Ready.Segments {
				if s.Flags.Has(tcpwrap.RST) && s.Up {
					up++
				} else if s.Flags.Has(tcpwrap.RST) {
					out++
				}
			}
			if up == 0 || out == 0 || e.Remaining() != 1 {
				t.Errorf("%d resets to the server, %d to the client, %d connections left", up, out, e.Remaining())
			}
		})
	}
}

func cutAt(conn stream.ConnID, rcv, snd seqnum.Value) tcpwrap.Cut {
	tuple := testTuple
	tuple.Client = netip.AddrPortFrom(tuple.Client.Addr(), uint16(conn))
	return tcpwrap.Cut{Conn: conn, Tuple: tuple, RcvNxt: rcv, SndUna: snd, SndNxt: snd, SndWnd: 60000}
}

var testTuple = stream.FourTuple{
	Server: netip.MustParseAddrPort("10.0.0.1:80"),
	Client: netip.MustParseAddrPort("10.0.0.2:1"),
}
