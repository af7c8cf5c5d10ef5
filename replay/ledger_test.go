package replay_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
)

func ledgerOf(records ...stream.Record) *replay.Ledger {
	l := replay.NewLedger()
	for i, r := range records {
		l.Apply(time.Unix(int64(i), 0), stream.Entry{Epoch: 1, Seq: stream.StreamSeq(i + 1), Pos: stream.Position(i + 1), Rec: r})
	}
	return l
}

func TestOrphansOfTheLedger(t *testing.T) {
	opened := []stream.Record{
		stream.ConnOpen{Conn: 1, Tuple: tupleOf(1), ISN: 100},
		stream.ConnAccept{Conn: 1, ISN: 500},
	}
	with := func(more ...stream.Record) []stream.Record { return append(slices.Clone(opened), more...) }
	for _, c := range []struct {
		name     string
		log      []stream.Record
		survives bool
		at       []seqnum.Value // nil: no orphan
	}{
		{"only a SYN, which nobody answered", opened[:1], false, nil},
		{"a handshake: the client may have the SYN-ACK", opened, false, []seqnum.Value{500, 501}},
		{"brought back", opened, true, nil},
		{"where its client is known to stand", with(stream.ConnState{Conn: 1, ClientAck: 510, ServerNxt: 530}), false, []seqnum.Value{510, 530}},
		{"all that was sent is acknowledged", with(stream.ConnState{Conn: 1, ClientAck: 530, ServerNxt: 530}), false, []seqnum.Value{530}},
		{"the newest state counts", with(stream.ConnState{Conn: 1, ClientAck: 1, ServerNxt: 2}, stream.ConnState{Conn: 1, ClientAck: 530, ServerNxt: 530}), false, []seqnum.Value{530}},
		{"closed", with(stream.ConnEnd{Conn: 1, Reason: stream.EndClosed}), false, nil},
		{"reset by the server", with(stream.ConnEnd{Conn: 1, Reason: stream.EndReset}), false, nil},
		{"reset by the client", with(stream.ClientReset{Conn: 1, Seq: 101}), false, nil},
		{"in quarantine, though the image has it", with(stream.ConnEnd{Conn: 1, Reason: stream.EndQuarantine}), true, []seqnum.Value{500, 501}},
		{"of which nothing but octets is known", []stream.Record{stream.Bytes{Conn: 1, Seq: 101, Payload: []byte("x")}}, false, nil},
	} {
		got := ledgerOf(c.log...).Orphans(func(stream.ConnID) bool { return c.survives })
		switch {
		case c.at == nil && len(got) > 0:
			t.Errorf("%s: orphan %+v", c.name, got)
		case c.at != nil && (len(got) != 1 || got[0].Conn != 1 || got[0].Tuple != tupleOf(1) || !slices.Equal(got[0].At, c.at)):
			t.Errorf("%s: orphans %+v, want one at %v", c.name, got, c.at)
		}
	}
}

// A connection of an image has no open record: the manifest introduces it.
func TestLedgerIntroduces(t *testing.T) {
	l := ledgerOf(
		stream.ConnEnd{Conn: 1, Reason: stream.EndClosed},            // 1: before the cut, not in the image
		stream.ConnEnd{Conn: 2, Reason: stream.EndClosed},            // 2: ended, and in the image all the same
		stream.ConnState{Conn: 3, ClientAck: 7, ServerNxt: 7},        // 3: lives
		stream.Generation{ID: 9, Cut: 3, From: 1},                    // 4
		stream.ConnEnd{Conn: 4, Reason: stream.EndReset},             // 5: after the cut: a recovery meets it
		stream.ConnState{Conn: 3, ClientAck: 8, ServerNxt: 9},        // 6
		stream.OutDigest{Conn: 3, Base: 1, Seq: 9, Sum: 0xfeedfacef}, // 7
	)
	l.Introduce(l.Gen, map[stream.ConnID]stream.FourTuple{2: tupleOf(2), 3: tupleOf(3)})
	var ids []stream.ConnID
	l.Lines(func(ln *replay.Line) { ids = append(ids, ln.Conn) })
	slices.Sort(ids)
	if want := []stream.ConnID{2, 3, 4}; !slices.Equal(ids, want) {
		t.Errorf("remembers %v, want %v", ids, want)
	}
	if l.Live() != 1 || l.Gen.ID != 9 || l.Last != 7 || l.LastSeq != 7 || !l.GenAt.Equal(time.Unix(3, 0)) {
		t.Errorf("live %d, generation %d at %v, last %d in %d", l.Live(), l.Gen.ID, l.GenAt, l.Last, l.LastSeq)
	}
	ln := l.Line(3)
	if ln == nil || ln.Tuple != tupleOf(3) || !ln.Known || ln.State.ClientAck != 8 || !ln.StateAt.Equal(time.Unix(5, 0)) || len(ln.Digests) != 1 {
		t.Errorf("line %+v", ln)
	}
	got := l.Orphans(func(stream.ConnID) bool { return false })
	if d := cmp.Diff([]replay.Orphan{{Conn: 3, Tuple: tupleOf(3), At: []seqnum.Value{8, 9}}}, got, cmp.Comparer(func(a, b stream.FourTuple) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

// What an epoch said of itself ends with it; what it said of connections does
// not.
func TestLedgerAcrossEpochs(t *testing.T) {
	for _, last := range []stream.Record{stream.ServerExit{}, stream.Goodbye{}, stream.Handover{Node: "b"}} {
		l := ledgerOf(stream.Hello{Config: []byte("a")}, stream.ConnState{Conn: 1}, last)
		_, exit := last.(stream.ServerExit)
		_, bye := last.(stream.Goodbye)
		if l.Exited != exit || l.Released != bye || (l.Heir == "b") == (exit || bye) {
			t.Errorf("%T: exited %v, released %v, heir %q", last, l.Exited, l.Released, l.Heir)
		}
		l.Apply(time.Unix(9, 0), stream.Entry{Epoch: 2, Seq: 4, Pos: 3, Fence: &stream.Fence{Epoch: 2}})
		if l.Exited || l.Released || l.Heir != "" || l.Fence.Epoch != 2 || l.LastSeq != 4 || l.Last != 3 || l.Line(1) == nil || string(l.Config) != "a" {
			t.Errorf("after a fence: %+v", l)
		}
	}
}

// A long transfer does not fill a standby's memory with digests.
func TestLedgerBoundsDigests(t *testing.T) {
	l := replay.NewLedger()
	for i := range 1000 {
		l.Apply(time.Time{}, stream.Entry{Pos: stream.Position(i + 1), Rec: stream.OutDigest{Conn: 1, Seq: seqnum.Value(i)}})
	}
	d := l.Line(1).Digests
	if len(d) > 16 || d[len(d)-1].Seq != 999 || !slices.IsSortedFunc(d, func(a, b stream.OutDigest) int { return int(a.Seq) - int(b.Seq) }) {
		t.Errorf("keeps %d digests, the last of %d", len(d), d[len(d)-1].Seq)
	}
}
