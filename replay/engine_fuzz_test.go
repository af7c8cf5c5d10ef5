package replay_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// No log, no restored server and no clients, however hostile, make the engine
// fall over, judge a packet twice or forget one.
func FuzzEngine(f *testing.F) {
	f.Add([]byte("\x00\x00\x02\x10\x10\x10\x10\x20\x30\x40\x50\x60\x70"))
	f.Add([]byte{2, 0, 4, 0, 1, 8, 0, 2, 4, 3, 0, 1, 4, 4, 5, 6, 1, 1, 0, 16, 9, 5, 5, 9, 9, 10, 11, 0, 1, 0, 16, 9, 5, 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		octet := func() byte {
			if len(b) == 0 {
				return 0
			}
			v := b[0]
			b = b[1:]
			return v
		}
		number := func() seqnum.Value {
			switch v := octet(); v & 7 {
			case 0:
				return seqnum.Value(binary.BigEndian.Uint32([]byte{octet(), octet(), octet(), octet()}))
			case 1:
				return -seqnum.Value(v)
			default:
				return 1000 + seqnum.Value(v)
			}
		}
		var survivors []replay.Survivor
		for i := range octet() % 3 {
			una := number()
			survivors = append(survivors, replay.Survivor{
				Cut:   tcpwrap.Cut{Conn: stream.ConnID(i + 1), Tuple: tupleOf(int(i)), RcvNxt: number(), SndUna: una, SndNxt: una.Add(seqnum.Size(octet())), SndWScale: octet() % 15, RcvWScale: octet() % 15, HasTS: octet()&1 == 1},
				State: stream.ConnState{ClientAck: number(), ClientEdge: number()}, Known: octet()&1 == 1, Ended: octet()&7 == 7,
			})
		}
		e := replay.NewEngine(survivors)
		e.AddNewborns([]replay.Newborn{{
			Open: stream.ConnOpen{Conn: 9, Tuple: tupleOf(2), ISN: number()}, Accept: stream.ConnAccept{Conn: 9, ISN: number()}, Answered: octet()&1 == 1, Ended: octet()&7 == 7,
		}, { // has the addresses of another, which may have ended
			Open: stream.ConnOpen{Conn: 10, Tuple: tupleOf(int(octet() % 3)), ISN: number()}, Accept: stream.ConnAccept{Conn: 10, ISN: number()}, Answered: octet()&1 == 1,
		}})
		now := time.Unix(0, 0)
		waits := map[tcpwrap.PacketID]bool{}
		carryOut := func() {
			births := e.Births
			e.Births = nil
			for _, b := range births {
				switch octet() & 3 {
				case 0:
				case 1:
					e.Stillborn(b.Open.Conn)
				default:
					e.Delivered(now, b.Open.Conn)
				}
			}
			for i := range e.Ready.Segments {
				if ip := tcpwrap.AppendOutgoing(nil, &e.Ready.Segments[i]); len(ip) == 0 {
					t.Fatalf("a segment that cannot be sent: %+v", e.Ready.Segments[i])
				}
			}
			for _, v := range e.Ready.Verdicts {
				if !waits[v.ID] {
					t.Fatalf("packet %d is judged and does not wait", v.ID)
				}
				delete(waits, v.ID)
			}
			e.Ready.Reset()
		}
		var id tcpwrap.PacketID
		live := false
		e.Start(now)
		for i := 0; len(b) > 0 && i < 1000; i++ {
			now = now.Add(time.Duration(octet()) * time.Millisecond)
			conn := []stream.ConnID{1, 2, 9, 10}[octet()%4]
			switch octet() % 12 {
			case 0, 1, 2:
				s := tcpwrap.Segment{
					Dir: tcpwrap.Direction(1 + octet()&1), Tuple: tupleOf(int(octet() % 4)), Flags: tcpwrap.Flags(octet() & 0x3f),
					Seq: number(), Ack: number(), Window: uint16(number()), Urgent: uint16(number()), Payload: make([]byte, octet()),
				}
				id++
				if !live || e.Owns(s.Tuple) {
					waits[id] = true
					if !e.Packet(now, id, &s) {
						if !live {
							t.Fatal("a packet for a machine that there is not yet")
						}
						delete(waits, id)
					}
				}
			case 3:
				e.Feed(now, stream.Bytes{Conn: conn, Seq: number(), Payload: make([]byte, octet())})
			case 4:
				if octet()&1 == 0 {
					e.Feed(now, stream.ClientFin{Conn: conn, Seq: number()})
				} else {
					e.Feed(now, stream.Urgent{Conn: conn, Up: number()})
				}
			case 5:
				e.Feed(now, stream.ClientReset{Conn: conn, Seq: number()})
			case 6:
				e.Feed(now, stream.ConnOpen{Conn: conn})
			case 7:
				e.Fed(now)
			case 8, 9:
				e.Busy(octet()&7 == 1, e.Born())
				e.Tick(now)
			case 10:
				e.Condemn()
				e.Joined()
				e.Greet()
			case 11:
				if octet() < 200 || live {
					break
				}
				live = true
				_, waiting := e.GoLive()
				for _, w := range waiting {
					delete(waits, w.ID)
				}
			}
			carryOut()
		}
		if !live {
			_, waiting := e.GoLive()
			for _, w := range waiting {
				delete(waits, w.ID)
			}
			carryOut()
		}
		for id := range waits {
			t.Fatalf("packet %d waits for ever", id)
		}
	})
}
