package tcpwrap_test

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// supply hands out a fuzzer's octets.
type supply struct{ b []byte }

func (s *supply) octet() byte {
	if len(s.b) == 0 {
		return 0
	}
	v := s.b[0]
	s.b = s.b[1:]
	return v
}

func (s *supply) number() uint32 {
	v := uint32(s.octet())
	switch v & 7 {
	case 0:
		return binary.BigEndian.Uint32([]byte{s.octet(), s.octet(), s.octet(), s.octet()})
	case 1:
		return -v
	}
	return v
}

func (s *supply) segment() tcpwrap.Segment {
	t := tcpwrap.Segment{
		Dir: tcpwrap.Direction(1 + s.octet()&1), Tuple: tupleOf(string(rune('A' + s.octet()%4))),
		Flags: tcpwrap.Flags(s.octet() & 0x3f), Window: uint16(s.number()),
		Seq: 1000 + seqnum.Value(s.number()), Ack: 1000 + seqnum.Value(s.number()),
	}
	t.Options.WScale = int8(s.octet()%16) - 1
	t.Options.HasTS, t.Options.TSVal = s.octet()&1 == 1, s.number()
	t.Payload = bytes.Repeat([]byte{s.octet()}, int(s.number()%70000)) // overlaps disagree
	t.RawOptions = make([]byte, s.octet()%41)
	if t.Flags.Has(tcpwrap.URG) {
		t.Urgent = uint16(s.number())
	}
	return t
}

// No segments, dumps and notices, however hostile, break a bound or a promise
// that does not depend on TCP's good behaviour.
func FuzzMachine(f *testing.F) {
	f.Add([]byte("\x00\x00\x02\x10\x10\x10\x10"))
	f.Add([]byte{10, 3, 0, 0, 0, 2, 64, 2, 2, 3, 1, 2, 0, 0, 0, 0, 1, 0, 18, 64, 2, 3, 3, 1, 2, 0, 0, 0, 0, 0, 16, 64, 3, 3, 1, 1, 2, 5, 0, 11, 9, 12, 1, 11})
	f.Add([]byte{9, 10, 10, 12, 0, 0, 0, 16, 64, 10, 10, 1, 1, 2, 60, 0, 0, 0, 0, 17, 64, 70, 10, 1, 1, 2, 60, 0, 0, 0, 0, 20, 64, 70, 10, 1, 1, 2, 60, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		in := &supply{b}
		limits := tcpwrap.Limits{AheadPerConn: 4000, Ahead: 6000, Frozen: 70000, Handshakes: 2}
		m := tcpwrap.NewMachine(1, 1, limits)
		var id tcpwrap.PacketID
		waits := map[tcpwrap.PacketID]stream.Position{} // to what was unstable when it was caught
		outbound := map[tcpwrap.PacketID]bool{}
		next, dep, stable := stream.Position(1), stream.Position(0), stream.Position(0)
		ended := false
		carryOut := func() {
			if err := m.Check(); err != nil {
				t.Fatal(err)
			}
			for _, r := range m.Ready.Records {
				if r.Pos != next {
					t.Fatalf("record at %d, want %d", r.Pos, next)
				}
				next++
				switch r := r.Record.(type) {
				case stream.Bytes:
					if len(r.Payload) == 0 || len(r.Payload) > stream.MaxPayload {
						t.Fatalf("a record of %d octets", len(r.Payload))
					}
					dep = next - 1
				case stream.ConnOpen, stream.ConnAccept, stream.ClientFin, stream.ClientReset, stream.Urgent:
					dep = next - 1
				}
			}
			for i := range m.Ready.Segments { // to a client only for what ended before this machine began
				if o := &m.Ready.Segments[i]; !o.Up && (o.Flags != tcpwrap.ACK || len(o.Payload) > 0) {
					t.Fatalf("the machine says %+v by itself", o)
				}
			}
			for _, v := range m.Ready.Verdicts {
				at, yes := waits[v.ID]
				if !yes {
					t.Fatalf("packet %d got a verdict and was not waiting", v.ID)
				}
				if outbound[v.ID] && v.Verdict == tcpwrap.Accept && at > stable && !ended {
					t.Fatalf("packet %d left at %d and depends on %d", v.ID, stable, at)
				}
				delete(waits, v.ID)
			}
			m.Ready.Reset()
		}
		for i := 0; len(in.b) > 0 && i < 500; i++ {
			now := time.Unix(int64(i), 0)
			switch in.octet() % 16 {
			case 9:
				m.Freeze()
			case 10:
				tp := tupleOf(string(rune('A' + in.octet()%4)))
				una := 1000 + seqnum.Value(in.number())
				m.Adopt([]tcpwrap.Cut{{
					Tuple: tp, RcvNxt: 1000 + seqnum.Value(in.number()), SndUna: una, SndNxt: una.Add(seqnum.Size(in.octet())),
					SndWScale: in.octet() % 15, RcvWScale: in.octet() % 15, HasTS: in.octet()&1 == 1,
					ClientFin: in.octet()&1 == 1, ServerFin: in.octet()&1 == 1,
				}})
			case 11:
				stable = min(stable+stream.Position(in.octet()%8), next-1)
				m.Stable(now, stable)
			case 12:
				m.Thaw(now)
			case 13:
				m.Tick()
				m.Congested(in.octet()&3 == 0)
			case 14:
				switch what := in.octet() % 5; what {
				case 1:
					m.Expire(now, time.Duration(in.octet())*time.Second)
				case 2:
					m.Linger([]tcpwrap.Late{{Tuple: tupleOf(string(rune('A' + in.octet()%4))), Nxt: 1000 + seqnum.Value(in.number()), Since: now}})
				case 3:
					for _, gone := range m.Missing(nil) {
						if in.octet()&1 == 1 {
							m.Gone(gone.Tuple)
						}
					}
				case 4:
					m.Doubt(now, in.octet()&1 == 1)
				default:
					m.Append(stream.Generation{ID: 1})
				}
			case 15:
				if in.octet() == 255 {
					ended = true
					m.Detach()
				}
			default:
				s := in.segment()
				if in.octet()&1 == 1 { // what a packet says, not what we say it says
					ip := tcpwrap.AppendSegment(nil, tcpwrap.Build{Src: s.Tuple.Client, Dst: s.Tuple.Server, Seq: s.Seq, Ack: s.Ack, Flags: s.Flags, Window: s.Window, Urgent: s.Urgent, Payload: s.Payload})
					if err := tcpwrap.ParseSegment(ip, tcpwrap.Inbound, &s); err != nil {
						continue
					}
				}
				id++
				waits[id], outbound[id] = dep, s.Dir == tcpwrap.Outbound
				m.Packet(now, id, &s, in.octet() == 1)
			}
			carryOut()
		}
		ended = true
		m.Stop()
		carryOut()
		if len(waits) > 0 {
			t.Fatalf("%d packets wait for a machine that has stopped", len(waits))
		}
	})
}
