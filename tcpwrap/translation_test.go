package tcpwrap

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

func sackOption(edges ...uint32) []byte {
	b := []byte{optNop, optNop, optSACK, byte(2 + 4*len(edges))}
	for _, e := range edges {
		b = binary.BigEndian.AppendUint32(b, e)
	}
	return b
}

func TestTranslation(t *testing.T) {
	tr := Translation{Seq: 1000, TS: 50, Rcv: Pair[uint8]{Wire: 9, TCP: 7}, Snd: Pair[uint8]{Wire: 3, TCP: 0}}
	wraps := Translation{Seq: 0x90000000, TS: 0xfffffff0}
	for _, c := range []struct {
		name     string
		tr       Translation
		dir      Direction
		in, want Build
	}{
		{"out: sequence, TSval and window", tr, Outbound,
			Build{Seq: 5, Ack: 77, Flags: ACK | PSH, Window: 1001, TS: true, TSVal: 7, TSEcr: 8, Payload: []byte("abc")},
			Build{Seq: 1005, Ack: 77, Flags: ACK | PSH, Window: 250, TS: true, TSVal: 57, TSEcr: 8, Payload: []byte("abc")}},
		{"out: SACK blocks stay", tr, Outbound,
			Build{Seq: 5, Ack: 77, Flags: ACK, Options: sackOption(100, 200)},
			Build{Seq: 1005, Ack: 77, Flags: ACK, Options: sackOption(100, 200)}},
		{"out: reset", tr, Outbound, Build{Seq: 5, Flags: RST}, Build{Seq: 1005, Flags: RST}},
		{"out: a SYN-ACK's window is not scaled", tr, Outbound,
			Build{Seq: 5, Ack: 77, Flags: SYN | ACK, Window: 1001}, Build{Seq: 1005, Ack: 77, Flags: SYN | ACK, Window: 1001}},
		{"in: acknowledgement, SACK edges, TSecr and window", tr, Inbound,
			Build{Seq: 77, Ack: 1005, Flags: ACK, Window: 100, TS: true, TSVal: 8, TSEcr: 57, Options: sackOption(1100, 1200, 1300, 1400)},
			Build{Seq: 77, Ack: 5, Flags: ACK, Window: 800, TS: true, TSVal: 8, TSEcr: 7, Options: sackOption(100, 200, 300, 400)}},
		{"in: a window beyond 16 bits", tr, Inbound,
			Build{Ack: 1005, Flags: ACK, Window: 60000}, Build{Ack: 5, Flags: ACK, Window: 65535}},
		{"in: without ACK the field means nothing", tr, Inbound,
			Build{Seq: 77, Ack: 9, Flags: RST, TS: true, TSVal: 8, TSEcr: 9}, Build{Seq: 77, Ack: 9, Flags: RST, Window: 0, TS: true, TSVal: 8, TSEcr: 9}},
		{"in: a fresh SYN", tr, Inbound,
			Build{Seq: 77, Flags: SYN, Window: 64240, Options: synOptions}, Build{Seq: 77, Flags: SYN, Window: 64240, Options: synOptions}},
		{"out: wraps round", wraps, Outbound,
			Build{Seq: 0x80000001, Flags: ACK, TS: true, TSVal: 0x20}, Build{Seq: 0x10000001, Flags: ACK, TS: true, TSVal: 0x10}},
		{"in: wraps round", wraps, Inbound,
			Build{Ack: 0x10000001, Flags: ACK, TS: true, TSEcr: 0x10, Options: sackOption(0xffffffff, 5)},
			Build{Ack: 0x80000001, Flags: ACK, TS: true, TSEcr: 0x20, Options: sackOption(0x6fffffff, 0x70000005)}},
		{"nothing", Translation{}, Outbound,
			Build{Seq: 5, Ack: 7, Flags: ACK, Window: 9, Options: synOptions}, Build{Seq: 5, Ack: 7, Flags: ACK, Window: 9, Options: synOptions}},
	} {
		for _, v6 := range []bool{false, true} {
			t.Run(c.name, func(t *testing.T) {
				client, server := client4, server4
				if v6 {
					client, server = client6, server6
				}
				for _, b := range []*Build{&c.in, &c.want} {
					b.Src, b.Dst = server, client
					if c.dir == Inbound {
						b.Src, b.Dst = client, server
					}
				}
				got := AppendSegment(nil, c.in)
				got[len(got)-len(c.in.Payload)-1]++ // whatever the checksum was
				got[len(got)-len(c.in.Payload)-1]--
				ok := c.tr.ToClient
				if c.dir == Inbound {
					ok = c.tr.ToServer
				}
				if !ok(got) {
					t.Fatal("refused")
				}
				if want := AppendSegment(nil, c.want); !bytes.Equal(got, want) {
					t.Errorf("got  %x\nwant %x", got, want)
				}
			})
		}
	}
}

func TestTranslationOfPorts(t *testing.T) {
	tr := Translation{Seq: 1, Port: Pair[uint16]{Wire: 6379, TCP: 40001}}
	wire := stream.FourTuple{Server: server4, Client: client4}
	tcp := tr.TCPTuple(wire)
	if tcp.Server.Port() != 40001 || tr.Tuple(tcp) != wire {
		t.Fatalf("TCP has %v", tcp)
	}
	up := AppendSegment(nil, Build{Src: client4, Dst: server4, Ack: 9, Flags: ACK})
	tr.ToServer(up)
	if want := AppendSegment(nil, Build{Src: client4, Dst: tcp.Server, Ack: 8, Flags: ACK}); !bytes.Equal(up, want) {
		t.Errorf("to the server %x, want %x", up, want)
	}
	out := AppendSegment(nil, Build{Src: tcp.Server, Dst: client4, Seq: 8, Flags: ACK})
	tr.ToClient(out)
	if want := AppendSegment(nil, Build{Src: server4, Dst: client4, Seq: 9, Flags: ACK}); !bytes.Equal(out, want) {
		t.Errorf("to the client %x, want %x", out, want)
	}
}

func genTranslation(t *rapid.T) Translation {
	scales := func(name string) Pair[uint8] {
		g := rapid.Uint8Max(14)
		return Pair[uint8]{g.Draw(t, name+" on the wire"), g.Draw(t, name+" in TCP")}
	}
	return Translation{
		Seq: seqnum.Size(rapid.Uint32().Draw(t, "seq")), TS: rapid.Uint32().Draw(t, "ts"),
		Rcv: scales("rcv"), Snd: scales("snd"),
	}
}

// What a client answers to translated output means to TCP what it would have
// meant without: it acknowledges and echoes TCP's own numbers, and neither side
// is offered more than the other has.
func TestTranslationRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tr := genTranslation(t)
		b := genBuild(t)
		b.Src, b.Dst = b.Dst, b.Src
		b.Flags = (b.Flags | ACK) &^ SYN
		b.TS, b.Options = true, nil
		size := rapid.SampledFrom([]int{0, 1, 999, 1448, 64000}).Draw(t, "payload size")
		b.Payload = bytes.Repeat([]byte{7}, size)
		ip := AppendSegment(nil, b)
		var was, out Segment
		if err := ParseSegment(bytes.Clone(ip), Outbound, &was); err != nil {
			t.Fatal(err)
		}
		if rapid.Bool().Draw(t, "offloaded") { // a partial checksum, as a driver is given it
			w, _ := locate(ip)
			binary.BigEndian.PutUint16(ip[w.hdr+16:], ^fold(pseudo(ip, w)))
		}
		if !tr.ToClient(ip) || !VerifyTCPChecksum(ip) {
			t.Fatal("no good packet came of it")
		}
		if err := ParseSegment(ip, Outbound, &out); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Payload, was.Payload) || out.Ack != was.Ack || out.Options.TSEcr != was.Options.TSEcr {
			t.Fatal("what is the client's has changed")
		}
		if offered, has := uint64(out.Window)<<tr.Rcv.Wire, uint64(was.Window)<<tr.Rcv.TCP; offered > has {
			t.Fatalf("the client is offered %d octets where TCP has %d", offered, has)
		}

		left, right := uint32(out.End())+100, uint32(out.End())+rapid.Uint32Range(101, 1<<20).Draw(t, "right")
		up := AppendSegment(nil, Build{
			Src: b.Dst, Dst: b.Src, Seq: out.Ack, Ack: out.End(), Flags: ACK, Window: rapid.Uint16().Draw(t, "client window"),
			TS: true, TSVal: out.Options.TSEcr + 1, TSEcr: out.Options.TSVal, Options: sackOption(left, right),
		})
		var said, heard Segment
		if err := ParseSegment(bytes.Clone(up), Inbound, &said); err != nil {
			t.Fatal(err)
		}
		if !tr.ToServer(up) || !VerifyTCPChecksum(up) {
			t.Fatal("no good packet came of the answer")
		}
		if err := ParseSegment(up, Inbound, &heard); err != nil {
			t.Fatal(err)
		}
		if heard.Ack != was.End() || heard.Options.TSEcr != was.Options.TSVal || heard.Options.TSVal != said.Options.TSVal || heard.Seq != said.Seq {
			t.Fatalf("TCP hears ack %d of %d, TSecr %d of %d", heard.Ack, was.End(), heard.Options.TSEcr, was.Options.TSVal)
		}
		if k := heard.Options.SACK[0]; heard.Options.NSACK != 1 || uint32(was.End())+100 != uint32(k.Left) || k.Left.To(k.Right) != seqnum.Size(right-left) {
			t.Fatalf("SACK block %v", k)
		}
		if offered, has := uint64(heard.Window)<<tr.Snd.TCP, uint64(said.Window)<<tr.Snd.Wire; offered > has {
			t.Fatalf("TCP is offered %d octets where the client has %d", offered, has)
		}
	})
}

// A cut of an image and the packets of the same TCP are translated alike.
func TestTranslationOfCut(t *testing.T) {
	tr := Translation{Seq: 1000, TS: 50, Rcv: Pair[uint8]{Wire: 9, TCP: 7}}
	tuple := stream.FourTuple{Server: server4, Client: client4}
	c := Cut{Tuple: tuple, RcvNxt: 77, SndUna: 5, SndNxt: 9, SndWnd: 3, HasTS: true, ServerTS: 7, ClientTS: 8, RcvWScale: 7, SndWScale: 4}
	want := Cut{Tuple: tuple, RcvNxt: 77, SndUna: 1005, SndNxt: 1009, SndWnd: 3, HasTS: true, ServerTS: 57, ClientTS: 8, RcvWScale: 9, SndWScale: 4}
	if d := cmp.Diff(want, tr.Cut(c), cmpSegment); d != "" {
		t.Error(d)
	}
}

// Nothing that a network delivers makes the translation panic, or change a
// packet that is no segment, or leave a wrong checksum.
func FuzzTranslation(f *testing.F) {
	f.Add(AppendSegment(nil, Build{Src: client4, Dst: server4, Flags: ACK, TS: true, Options: sackOption(1, 2), Payload: []byte("x")}), uint32(9), uint8(3))
	f.Add(AppendSegment(nil, Build{Src: client6, Dst: server6, Flags: SYN, Options: synOptions}), uint32(1<<31), uint8(14))
	f.Fuzz(func(t *testing.T, ip []byte, delta uint32, scale uint8) {
		tr := Translation{Seq: seqnum.Size(delta), TS: ^delta, Rcv: Pair[uint8]{Wire: scale, TCP: scale >> 4}, Snd: Pair[uint8]{Wire: scale >> 4, TCP: scale}}
		for _, x := range []struct {
			dir Direction
			f   func([]byte) bool
		}{{Outbound, tr.ToClient}, {Inbound, tr.ToServer}} {
			b := bytes.Clone(ip)
			var before, after Segment
			err := ParseSegment(ip, x.dir, &before)
			if ok := x.f(b); ok != (err == nil) {
				t.Fatalf("translated: %v; %v", ok, err)
			}
			if err != nil {
				if !bytes.Equal(b, ip) {
					t.Fatal("changed what is no segment")
				}
				continue
			}
			if !VerifyTCPChecksum(b) {
				t.Fatal("wrong checksum")
			}
			if err := ParseSegment(b, x.dir, &after); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(before.Payload, after.Payload) || before.Flags != after.Flags || before.Tuple != after.Tuple ||
				x.dir == Inbound && before.Seq != after.Seq || x.dir == Outbound && before.Seq.Add(tr.Seq) != after.Seq {
				t.Fatal("changed what must not be")
			}
		}
	})
}
