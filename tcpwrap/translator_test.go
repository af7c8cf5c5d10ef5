package tcpwrap

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// fakePath is a Datapath whose packets a test gives.
type fakePath struct {
	queue     []Packet
	up, out   [][]byte
	verdicts  []Decision
	rewritten map[PacketID][]byte
}

func (f *fakePath) Recv(dst []Packet) ([]Packet, error) {
	if len(f.queue) == 0 {
		return dst, ErrClosed
	}
	dst = append(dst, f.queue...)
	f.queue = nil
	return dst, nil
}
func (f *fakePath) Verdict(id PacketID, v Verdict) {
	f.verdicts = append(f.verdicts, Decision{id, v})
}
func (f *fakePath) Rewrite(id PacketID, ip []byte) {
	if f.rewritten == nil {
		f.rewritten = map[PacketID][]byte{}
	}
	f.rewritten[id] = bytes.Clone(ip)
}
func (f *fakePath) Flush() error { return nil }
func (f *fakePath) SendUp(ip []byte) error {
	f.up = append(f.up, bytes.Clone(ip))
	return nil
}
func (f *fakePath) SendOut(ip []byte) error {
	f.out = append(f.out, bytes.Clone(ip))
	return nil
}
func (f *fakePath) Drops() uint64 { return 0 }
func (f *fakePath) Close() error  { return nil }

var tuple4 = stream.FourTuple{Server: server4, Client: client4}

// caughtAs lets the translator catch one packet; nil is one that it swallows.
func caughtAs(t *testing.T, tr *Translator, f *fakePath, id PacketID, dir Direction, b Build) *Segment {
	t.Helper()
	b.Src, b.Dst = client4, server4
	if dir == Outbound {
		b.Src, b.Dst = server4, client4
	}
	f.queue = append(f.queue, Packet{ID: id, Dir: dir, Data: AppendSegment(nil, b)})
	got, err := tr.Recv(nil)
	if errors.Is(err, ErrClosed) {
		return nil
	}
	if err != nil || len(got) != 1 || got[0].ID != id {
		t.Fatalf("%v, %v", got, err)
	}
	return segmentOf(t, got[0].Data, dir)
}

func segmentOf(t *testing.T, ip []byte, dir Direction) *Segment {
	t.Helper()
	if !VerifyTCPChecksum(ip) {
		t.Error("wrong checksum")
	}
	var s Segment
	if err := ParseSegment(ip, dir, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

func rebirth(t *testing.T) Rebirth {
	t.Helper()
	r, err := RebirthFrom(
		stream.ConnOpen{Conn: 1, Tuple: tuple4, ISN: 100, Window: 64240, Options: synOptions},
		stream.ConnAccept{Conn: 1, ISN: 5000, Options: []byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 9, 1, 3, 3, 10}},
		11, 2000, time.Now(), 5001+64240)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// born makes a connection again whose TCP begins at 300, with the clock at 70 and
// a scale of 7.
func born(t *testing.T, tr *Translator, f *fakePath) {
	t.Helper()
	done := 0
	if err := tr.Recreate(rebirth(t), func(err error) {
		if done++; err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	syn := segmentOf(t, f.up[0], Inbound)
	if syn.Seq != 100 || syn.Flags != SYN || syn.Window != 64240 || syn.Options.MSS != 1460 || syn.Options.WScale != 7 ||
		!syn.Options.SACKPermitted || syn.Options.TSVal != 11 {
		t.Fatalf("SYN %+v", syn)
	}
	if s := caughtAs(t, tr, f, 1, Outbound, Build{Seq: 300, Ack: 101, Flags: SYN | ACK, Window: 65160, Options: []byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 70, 0, 0, 0, 11, 1, 3, 3, 7}}); s != nil {
		t.Fatalf("the SYN-ACK shows: %+v", s)
	}
	if !slices.Contains(f.verdicts, Decision{1, Drop}) || done != 1 {
		t.Fatalf("the SYN-ACK is not swallowed: %v, done %d times", f.verdicts, done)
	}
	ack := segmentOf(t, f.up[1], Inbound)
	if ack.Seq != 101 || ack.Ack != 301 || ack.Flags != ACK || ack.Options.TSEcr != 70 || ack.Options.TSVal != 11 || ack.Window != 502 {
		t.Fatalf("ACK %+v", ack)
	}
}

func TestTranslatorRebirth(t *testing.T) {
	f := &fakePath{}
	type change struct {
		tuple stream.FourTuple
		there bool
	}
	var changes []change
	tr := NewTranslator(f, func(e *Translated, there bool) { changes = append(changes, change{e.Tuple, there}) })
	born(t, tr, f)
	if !slices.Equal(changes, []change{{tuple4, true}}) {
		t.Errorf("changes %v", changes)
	}

	// What the server says.
	s := caughtAs(t, tr, f, 2, Outbound, Build{Seq: 301, Ack: 101, Flags: ACK | PSH, Window: 500, TS: true, TSVal: 75, TSEcr: 11, Payload: []byte("hi")})
	if s.Seq != 5001 || s.Window != 62 || s.Options.TSVal < 2005 || s.Options.TSVal > 2005+10000 || string(s.Payload) != "hi" {
		t.Errorf("output %+v", s)
	}
	tr.Verdict(2, Accept)
	if out := segmentOf(t, f.rewritten[2], Outbound); out.Seq != 5001 || string(out.Payload) != "hi" {
		t.Errorf("on the wire %+v", out)
	}
	// What its client says is shown as it is, and goes up translated.
	if s = caughtAs(t, tr, f, 3, Inbound, Build{Seq: 101, Ack: 5003, Flags: ACK, Window: 9, Payload: []byte("yo")}); s.Ack != 5003 {
		t.Errorf("input %+v", s)
	}
	tr.Verdict(3, Accept)
	if up := segmentOf(t, f.rewritten[3], Inbound); up.Ack != 303 || string(up.Payload) != "yo" {
		t.Errorf("to TCP %+v", up)
	}
	// And what is sent in its name.
	if err := tr.SendUp(AppendSegment(nil, Build{Src: client4, Dst: server4, Seq: 103, Ack: 5003, Flags: ACK})); err != nil {
		t.Fatal(err)
	}
	if up := segmentOf(t, f.up[2], Inbound); up.Ack != 303 || up.Seq != 103 {
		t.Errorf("sent up %+v", up)
	}
	// Dropped is dropped, and leaves nothing behind.
	caughtAs(t, tr, f, 4, Inbound, Build{Seq: 103, Ack: 5003, Flags: ACK})
	tr.Verdict(4, Drop)
	if f.verdicts[len(f.verdicts)-1] != (Decision{4, Drop}) || len(tr.kept) != 0 || tr.octets != 0 {
		t.Errorf("%v, kept %d packets of %d octets", f.verdicts, len(tr.kept), tr.octets)
	}
	// TCP has not got the end of the handshake and repeats its SYN-ACK.
	if s = caughtAs(t, tr, f, 5, Outbound, Build{Seq: 300, Ack: 101, Flags: SYN | ACK, Options: synOptions}); s != nil || len(f.up) != 4 || !bytes.Equal(f.up[3], f.up[1]) {
		t.Errorf("a repeated SYN-ACK: %+v, %d packets sent up", s, len(f.up))
	}
	// A successor begins with the same addresses.
	caughtAs(t, tr, f, 6, Inbound, Build{Seq: 90000, Flags: SYN, Options: synOptions})
	tr.Verdict(6, Accept)
	if s = caughtAs(t, tr, f, 7, Outbound, Build{Seq: 777, Ack: 90001, Flags: SYN | ACK, Options: synOptions}); s == nil || s.Seq != 777 {
		t.Fatalf("the successor's SYN-ACK: %+v", s)
	}
	tr.Verdict(7, Accept)
	if f.verdicts[len(f.verdicts)-1] != (Decision{7, Accept}) || f.rewritten[7] != nil || tr.Len() != 0 {
		t.Errorf("the successor is translated")
	}
	if !slices.Equal(changes, []change{{tuple4, true}, {tuple4, false}}) {
		t.Errorf("changes %v", changes)
	}
}

// A packet that was caught before its connection was made again goes up
// translated.
func TestTranslatorExpects(t *testing.T) {
	f := &fakePath{}
	tr := NewTranslator(f, nil)
	tr.Expect([]stream.FourTuple{tuple4})
	caughtAs(t, tr, f, 9, Inbound, Build{Seq: 101, Ack: 5003, Flags: ACK, Payload: []byte("early")})
	caughtAs(t, tr, f, 10, Inbound, Build{Seq: 106, Ack: 5003, Flags: ACK, Payload: []byte("dropped")})
	tr.Verdict(10, Drop)
	born(t, tr, f)
	tr.Expect(nil)
	tr.Verdict(9, Accept)
	if up := segmentOf(t, f.rewritten[9], Inbound); up.Ack != 303 || string(up.Payload) != "early" {
		t.Errorf("to TCP %+v", up)
	}
}

func TestTranslatorKeepsLittle(t *testing.T) {
	f := &fakePath{}
	tr := NewTranslator(f, nil)
	tr.Put(Translated{Tuple: tuple4, Translation: Translation{Seq: 1}})
	big := Build{Src: client4, Dst: server4, Flags: ACK, Payload: make([]byte, 60000)}
	n := 0
	for ; n < 2000; n++ {
		if caughtAs(t, tr, f, PacketID(n), Inbound, big) == nil {
			break
		}
	}
	if n < maxKept/70000 || n > maxKept/60000 || tr.Drops() != 1 {
		t.Errorf("%d packets of 60,000 octets were kept, %d drops", n, tr.Drops())
	}
	for i := range n {
		tr.Verdict(PacketID(i), Drop)
	}
	if err := tr.Sweep(func() (map[stream.FourTuple]bool, error) { return nil, nil }); err != nil {
		t.Error(err)
	}
	if tr.Len() != 0 || tr.octets != 0 || tr.any.Load() || len(tr.spare) > maxSpare {
		t.Errorf("%d connections, %d octets, %d spare", tr.Len(), tr.octets, len(tr.spare))
	}
}

// What is damaged is not given a right checksum.
func TestTranslatorLeavesCorrupt(t *testing.T) {
	f := &fakePath{}
	tr := NewTranslator(f, nil)
	tr.Put(Translated{Tuple: tuple4, Translation: Translation{Seq: 1}})
	ip := AppendSegment(nil, Build{Src: client4, Dst: server4, Flags: ACK, Payload: []byte("x")})
	ip[len(ip)-1]++
	f.queue = []Packet{{ID: 1, Dir: Inbound, Data: ip, Corrupt: true}}
	if got, err := tr.Recv(nil); err != nil || len(got) != 1 || VerifyTCPChecksum(got[0].Data) || len(tr.kept) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestRebirthRefuses(t *testing.T) {
	synack := func(options ...byte) stream.ConnAccept { return stream.ConnAccept{ISN: 5, Options: options} }
	open := stream.ConnOpen{Tuple: tuple4, Options: synOptions}
	for _, o := range [][]byte{{optMPTCP, 4, 0, 0}, {optNop, optAO, 4, 0, 0}, append([]byte{optMD5, 18}, make([]byte, 16)...)} {
		if _, err := RebirthFrom(open, synack(o...), 0, 0, time.Now(), 0); !errors.Is(err, ErrUnsuitable) {
			t.Errorf("option %d: %v", o[0], err)
		}
	}
	r, err := RebirthFrom(open, synack(synOptions...), 1, 2, time.Now(), seqnum.Value(9))
	if err != nil {
		t.Fatal(err)
	}
	s := Segment{Dir: Outbound, Flags: SYN | ACK, Ack: 1, Options: Options{WScale: -1}}
	if _, _, err := r.Answer(&s, time.Now()); !errors.Is(err, ErrUnsuitable) {
		t.Errorf("a TCP without timestamps: %v", err)
	}
	s.Options.HasTS = true
	if tr, _, err := r.Answer(&s, time.Now()); err != nil || tr.Rcv != (Pair[uint8]{7, 0}) || tr.Snd != (Pair[uint8]{7, 0}) {
		t.Errorf("a TCP without window scaling: %+v, %v", tr, err)
	}
	s.Ack = 2
	if _, _, err := r.Answer(&s, time.Now()); err == nil {
		t.Error("took another connection's SYN-ACK")
	}
}

// A server that dials from a port again begins another connection: neither what
// was there before is translated any more, nor what a peer knew by that port.
func TestTranslatorDialsAnew(t *testing.T) {
	moved := Translated{Tuple: tuple4, ServerISN: 5000, Translation: Translation{Seq: 1000, Port: Pair[uint16]{Wire: server4.Port(), TCP: 50999}}}
	same := Translated{Tuple: tuple4, ServerISN: 5000, Translation: Translation{Seq: 1000}}
	for _, c := range []struct {
		name string
		e    Translated
		seq  seqnum.Value // of the SYN, as TCP sends it
		want seqnum.Value
		left int
	}{
		{"its own SYN once more", same, 4000, 5000, 1},
		{"another one", same, 4001, 4001, 0},
		{"from a port that a peer knew", moved, 7, 7, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &fakePath{}
			tr := NewTranslator(f, nil)
			tr.Put(c.e)
			if s := caughtAs(t, tr, f, 1, Outbound, Build{Seq: c.seq, Flags: SYN}); s == nil || s.Seq != c.want || s.Tuple != tuple4 {
				t.Errorf("SYN %+v, want number %d", s, c.want)
			}
			if n := tr.Len(); n != c.left {
				t.Errorf("%d connections are translated, want %d", n, c.left)
			}
		})
	}
}

// A connection that is born while TCP is asked what it has is not swept away.
func TestTranslatorSweepsNoNewborn(t *testing.T) {
	f := &fakePath{}
	tr := NewTranslator(f, nil)
	other := stream.FourTuple{Server: server6, Client: client6}
	tr.Put(Translated{Tuple: other, Translation: Translation{Seq: 1}})
	err := tr.Sweep(func() (map[stream.FourTuple]bool, error) {
		born(t, tr, f)
		return nil, nil
	})
	if _, there := tr.Get(tuple4); err != nil || !there || tr.Len() != 1 {
		t.Errorf("%d connections left, the newborn %v, %v", tr.Len(), there, err)
	}
}
