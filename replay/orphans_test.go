package replay

import (
	"net/netip"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

// A connection that an earlier epoch knew by another name is no orphan.
func TestRenamedSurvivorIsNoOrphan(t *testing.T) {
	tuple := func(port uint16) stream.FourTuple {
		return stream.FourTuple{
			Server: netip.MustParseAddrPort("10.0.0.1:80"),
			Client: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), port),
		}
	}
	l := NewLedger()
	for i, r := range []stream.Record{
		stream.ConnOpen{Conn: 1, Tuple: tuple(1000)}, stream.ConnAccept{Conn: 1},
		stream.ConnOpen{Conn: 2, Tuple: tuple(2000)}, stream.ConnAccept{Conn: 2},
		stream.Goodbye{},
		stream.ConnState{Conn: 7},
	} {
		l.Apply(time.Time{}, stream.Entry{Seq: stream.StreamSeq(i + 1), Pos: stream.Position(i + 1), Rec: r})
	}
	l.Introduce(stream.Generation{ID: 2}, map[stream.ConnID]stream.FourTuple{7: tuple(1000)})
	got := l.Orphans(func(id stream.ConnID) bool { return id == 7 })
	if len(got) != 1 || got[0].Conn != 2 {
		t.Errorf("orphans %v, want connection 2 alone", got)
	}
}
