package tcpwrap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

var (
	client4 = netip.MustParseAddrPort("192.0.2.7:40000")
	server4 = netip.MustParseAddrPort("198.51.100.1:6379")
	client6 = netip.MustParseAddrPort("[2001:db8::7]:40000")
	server6 = netip.MustParseAddrPort("[2001:db8:1::1]:6379")

	cmpSegment = cmp.Options{
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		cmpopts.EquateEmpty(),
	}
)

// synOptions are what Linux puts on a SYN: MSS, SACK permitted, timestamp,
// NOP, window scale.
var synOptions = []byte{2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7}

func TestParseTable(t *testing.T) {
	for _, c := range []struct {
		name string
		dir  Direction
		b    Build
		want Segment
	}{
		{"SYN", Inbound,
			Build{Src: client4, Dst: server4, Seq: 0xfffffffe, Flags: SYN, Window: 64240, Options: synOptions},
			Segment{Seq: 0xfffffffe, Flags: SYN, Window: 64240, RawOptions: synOptions,
				Options: Options{MSS: 1460, WScale: 7, SACKPermitted: true, HasTS: true, TSVal: 9}}},
		{"SYN-ACK without options", Outbound,
			Build{Src: server6, Dst: client6, Seq: 1, Ack: 2, Flags: SYN | ACK, Window: 1},
			Segment{Seq: 1, Ack: 2, Flags: SYN | ACK, Window: 1, Options: Options{WScale: -1}}},
		{"data with a timestamp", Inbound,
			Build{Src: client6, Dst: server6, Seq: 5, Ack: 6, Flags: ACK | PSH, Window: 9, TS: true, TSVal: 11, TSEcr: 12, Payload: []byte("hello")},
			Segment{Seq: 5, Ack: 6, Flags: ACK | PSH, Window: 9, Payload: []byte("hello"),
				RawOptions: []byte{1, 1, 8, 10, 0, 0, 0, 11, 0, 0, 0, 12},
				Options:    Options{WScale: -1, HasTS: true, TSVal: 11, TSEcr: 12}}},
		{"two SACK blocks", Outbound,
			Build{Src: server4, Dst: client4, Ack: 7, Flags: ACK,
				Options: []byte{1, 1, 5, 18, 0, 0, 0, 9, 0, 0, 0, 10, 255, 255, 255, 255, 0, 0, 0, 3}},
			Segment{Ack: 7, Flags: ACK,
				RawOptions: []byte{1, 1, 5, 18, 0, 0, 0, 9, 0, 0, 0, 10, 255, 255, 255, 255, 0, 0, 0, 3},
				Options:    Options{WScale: -1, NSACK: 2, SACK: [4]SACKBlock{{9, 10}, {0xffffffff, 3}}}}},
		{"FIN", Outbound,
			Build{Src: server4, Dst: client4, Seq: 3, Ack: 7, Flags: ACK | FIN},
			Segment{Seq: 3, Ack: 7, Flags: ACK | FIN, Options: Options{WScale: -1}}},
		{"RST", Inbound,
			Build{Src: client4, Dst: server4, Seq: 3, Flags: RST},
			Segment{Seq: 3, Flags: RST, Options: Options{WScale: -1}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ip := AppendSegment(nil, c.b)
			if !VerifyTCPChecksum(ip) {
				t.Error("wrong checksum")
			}
			ip = append(ip, make([]byte, 6)...) // Ethernet pads short frames
			var got Segment
			if err := ParseSegment(ip, c.dir, &got); err != nil {
				t.Fatal(err)
			}
			c.want.Dir = c.dir
			c.want.Tuple = stream.FourTuple{Server: c.b.Dst, Client: c.b.Src}
			if c.dir == Outbound {
				c.want.Tuple = stream.FourTuple{Server: c.b.Src, Client: c.b.Dst}
			}
			if d := cmp.Diff(c.want, got, cmpSegment); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	v4 := AppendSegment(nil, Build{Src: client4, Dst: server4, Flags: ACK, Payload: []byte("abc")})
	v6 := AppendSegment(nil, Build{Src: client6, Dst: server6, Flags: ACK, Payload: []byte("abc")})
	edit := func(p []byte, f func([]byte)) []byte {
		q := bytes.Clone(p)
		f(q)
		return q
	}
	set := func(p []byte, at int, v byte) []byte { return edit(p, func(q []byte) { q[at] = v }) }
	for _, c := range []struct {
		name string
		ip   []byte
		want ParseError
	}{
		{"nothing", nil, ErrTruncated},
		{"IPv4 header cut", v4[:19], ErrTruncated},
		{"IPv4 payload cut", v4[:len(v4)-1], ErrTruncated},
		{"IPv6 header cut", v6[:39], ErrTruncated},
		{"IPv6 payload cut", v6[:len(v6)-1], ErrTruncated},
		{"version 5", set(v4, 0, 0x55), ErrIPVersion},
		{"IHL 4", set(v4, 0, 0x44), ErrIPHeader},
		{"total length 0", edit(v4, func(q []byte) { q[2], q[3] = 0, 0 }), ErrIPHeader},
		{"no room for TCP", edit(v4, func(q []byte) { q[3] = 39 }), ErrTruncated},
		{"more fragments", set(v4, 6, 0x20), ErrFragment},
		{"fragment offset", set(v4, 7, 1), ErrFragment},
		{"UDP", set(v4, 9, 17), ErrNotTCP},
		{"UDP over IPv6", set(v6, 6, 17), ErrNotTCP},
		{"hop-by-hop header", set(v6, 6, 0), ErrExtHeader},
		{"destination options", set(v6, 6, 60), ErrExtHeader},
		{"fragment header", set(v6, 6, 44), ErrFragment},
		{"jumbogram", edit(v6, func(q []byte) { q[4], q[5] = 0, 0 }), ErrTruncated},
		{"data offset 4", set(v4, 32, 0x40), ErrDataOffset},
		{"data offset beyond", set(v4, 32, 0xf0), ErrDataOffset},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s Segment
			if err := ParseSegment(c.ip, Inbound, &s); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	var s Segment
	if err := ParseSegment(v4, 0, &s); !errors.Is(err, ErrDirection) {
		t.Errorf("direction 0: %v", err)
	}
}

// Linux ends the list at a malformed option and keeps what came before it.
func TestOptionsLikeLinux(t *testing.T) {
	none := Options{WScale: -1}
	for _, c := range []struct {
		name string
		raw  []byte
		syn  bool
		want Options
	}{
		{"kind without length", []byte{1, 8}, false, none},
		{"length 1", []byte{8, 1, 0, 0}, false, none},
		{"length beyond", []byte{8, 10, 0, 0}, false, none},
		{"good, then bad", []byte{3, 3, 7, 2, 9}, true, Options{WScale: 7}},
		{"after the end", []byte{0, 3, 3, 7}, true, none},
		{"unknown kind", []byte{253, 4, 1, 2, 3, 3, 5, 1}, true, Options{WScale: 5}},
		{"scale above 14", []byte{3, 3, 200, 1}, true, Options{WScale: 14}},
		{"MSS off a SYN", []byte{2, 4, 5, 180}, false, none},
		{"SACK of odd length", []byte{5, 9, 0, 0, 0, 1, 0, 0, 0}, false, none},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, ParseOptions(c.raw, c.syn)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestBuildRefuses(t *testing.T) {
	good := Build{Src: client4, Dst: server4, Flags: ACK}
	for name, f := range map[string]func(*Build){
		"no address":       func(b *Build) { b.Src = netip.AddrPort{} },
		"two families":     func(b *Build) { b.Dst = server6 },
		"41 option octets": func(b *Build) { b.Options = make([]byte, 41) },
		"options and TS":   func(b *Build) { b.Options, b.TS = make([]byte, 29), true },
		"too long":         func(b *Build) { b.Payload = make([]byte, 65536-40) },
	} {
		t.Run(name, func(t *testing.T) {
			b := good
			f(&b)
			if got := AppendSegment([]byte("x"), b); string(got) != "x" {
				t.Errorf("built %d octets", len(got)-1)
			}
		})
	}
	good.Payload = make([]byte, 65535-40)
	if got := AppendSegment(nil, good); len(got) != 65535 || !VerifyTCPChecksum(got) {
		t.Errorf("largest packet: %d octets", len(got))
	}
}

func genBuild(t *rapid.T) Build {
	b := Build{Src: client4, Dst: server4}
	if rapid.Bool().Draw(t, "v6") {
		b.Src, b.Dst = client6, server6
	}
	b.Seq = seqnum.Value(rapid.Uint32().Draw(t, "seq"))
	b.Ack = seqnum.Value(rapid.Uint32().Draw(t, "ack"))
	b.Flags = Flags(rapid.Uint8Max(0x3f).Draw(t, "flags"))
	b.Window = rapid.Uint16().Draw(t, "window")
	b.TTL = rapid.Uint8Min(1).Draw(t, "ttl")
	room := maxOptions
	if b.TS = rapid.Bool().Draw(t, "ts"); b.TS {
		b.TSVal, b.TSEcr = rapid.Uint32().Draw(t, "tsval"), rapid.Uint32().Draw(t, "tsecr")
		room -= tsLen
	}
	b.Options = rapid.SliceOfN(rapid.Byte(), 0, room).Draw(t, "options")
	b.Payload = rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "payload")
	return b
}

// Our packets against gopacket's decoder and its serialiser.
func TestAgainstGopacket(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := genBuild(t)
		ip := AppendSegment(nil, b)
		first := layers.LayerTypeIPv4
		if b.Src.Addr().Is6() {
			first = layers.LayerTypeIPv6
		}
		p := gopacket.NewPacket(ip, first, gopacket.Default)
		tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		if !ok { // gopacket refuses malformed options, TCP does not
			if len(b.Options) == 0 {
				t.Fatalf("gopacket: %v", p.ErrorLayer())
			}
			return
		}
		if tcp.Seq != uint32(b.Seq) || tcp.Ack != uint32(b.Ack) || tcp.Window != b.Window ||
			uint16(tcp.SrcPort) != b.Src.Port() || uint16(tcp.DstPort) != b.Dst.Port() ||
			!bytes.Equal(tcp.Payload, b.Payload) {
			t.Fatalf("gopacket reads another segment: %+v", tcp)
		}
		var net gopacket.SerializableLayer
		switch l := p.NetworkLayer().(type) {
		case *layers.IPv4:
			if l.TTL != b.TTL || l.SrcIP.String() != b.Src.Addr().String() {
				t.Fatalf("IPv4: %+v", l)
			}
			if err := tcp.SetNetworkLayerForChecksum(l); err != nil {
				t.Fatal(err)
			}
			net = l
		case *layers.IPv6:
			if err := tcp.SetNetworkLayerForChecksum(l); err != nil {
				t.Fatal(err)
			}
			net = l
		}
		// Over all octets, checksum field included, the right sum is zero.
		if sum, err := tcp.ComputeChecksum(); err != nil || sum != 0 {
			t.Fatalf("gopacket sums TCP to %#x (%v)", sum, err)
		}
		if len(b.Options) > 0 || b.TS { // gopacket writes options in its own way
			return
		}
		sum := tcp.Checksum
		buf := gopacket.NewSerializeBuffer()
		opts := gopacket.SerializeOptions{ComputeChecksums: true, FixLengths: true}
		if err := gopacket.SerializeLayers(buf, opts, net, tcp, gopacket.Payload(b.Payload)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buf.Bytes(), ip) || tcp.Checksum != sum {
			t.Fatalf("gopacket writes\n%x, we\n%x", buf.Bytes(), ip)
		}
	})
}

func TestRebuildParsesEqual(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		checkRebuild(t, AppendSegment(nil, genBuild(t)))
	})
}

type fataler interface{ Fatalf(string, ...any) }

// checkRebuild parses ip, builds a packet of what was found and parses that.
func checkRebuild(t fataler, ip []byte) {
	for _, dir := range []Direction{Inbound, Outbound} {
		var a, b Segment
		if err := ParseSegment(ip, dir, &a); err != nil {
			var pe ParseError
			if !errors.As(err, &pe) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		src, dst := a.Tuple.Client, a.Tuple.Server
		if dir == Outbound {
			src, dst = dst, src
		}
		again := AppendSegment(nil, Build{Src: src, Dst: dst, Seq: a.Seq, Ack: a.Ack, Flags: a.Flags,
			Window: a.Window, Options: a.RawOptions, Payload: a.Payload})
		if again == nil {
			t.Fatalf("cannot build %+v", a)
		}
		if err := ParseSegment(again, dir, &b); err != nil {
			t.Fatalf("rebuilt segment: %v", err)
		}
		if !VerifyTCPChecksum(again) {
			t.Fatalf("rebuilt segment has a wrong checksum")
		}
		if d := cmp.Diff(a, b, cmpSegment); d != "" {
			t.Fatalf("rebuilt segment differs: %s", d)
		}
		if a.End() != a.Seq.Add(a.Len()) {
			t.Fatalf("end")
		}
	}
}

func FuzzParseSegment(f *testing.F) {
	f.Add(AppendSegment(nil, Build{Src: client4, Dst: server4, Flags: SYN, Options: synOptions}))
	f.Add(AppendSegment(nil, Build{Src: client6, Dst: server6, Flags: ACK, TS: true, Payload: []byte("x")}))
	f.Add([]byte{0x4f})
	f.Fuzz(func(t *testing.T, ip []byte) {
		if len(ip) > maxPacket {
			return
		}
		before := bytes.Clone(ip)
		checkRebuild(t, ip)
		VerifyTCPChecksum(ip)
		if !bytes.Equal(before, ip) {
			t.Fatal("parsing wrote to the packet")
		}
	})
}

// Against the textbook loop, at every length and with carries everywhere.
func TestChecksumAgainstTextbook(t *testing.T) {
	slow := func(b []byte) uint16 {
		var s uint32
		for i := 0; i+1 < len(b); i += 2 {
			s += uint32(binary.BigEndian.Uint16(b[i:]))
			s = s>>16 + s&0xffff
		}
		if len(b)%2 == 1 {
			s += uint32(b[len(b)-1]) << 8
			s = s>>16 + s&0xffff
		}
		return ^uint16(s)
	}
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 0x7f, 0x80, 0xfe, 0xff}), 0, 400).Draw(t, "b")
		if got, want := Checksum(b), slow(b); got != want {
			t.Fatalf("%x: %#x, want %#x", b, got, want)
		}
	})
}

func TestCorruptionIsSeen(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := genBuild(t)
		ip := AppendSegment(nil, b)
		hdr := ipv4MinLen
		if b.Src.Addr().Is6() {
			hdr = ipv6Len
		}
		at := rapid.IntRange(hdr, len(ip)-1).Draw(t, "at")
		bit := byte(1) << rapid.IntRange(0, 7).Draw(t, "bit")
		ip[at] ^= bit
		if VerifyTCPChecksum(ip) {
			t.Fatalf("flipped bit %#x at %d goes unseen", bit, at)
		}
		if !SetTCPChecksum(ip) || !VerifyTCPChecksum(ip) {
			t.Fatal("cannot be put right")
		}
	})
}

func TestParseAndBuildDoNotAllocate(t *testing.T) {
	ip := AppendSegment(nil, Build{Src: client6, Dst: server6, Flags: ACK, TS: true, Payload: make([]byte, 1448)})
	var s Segment
	buf := make([]byte, 0, 2048)
	if n := testing.AllocsPerRun(100, func() {
		if err := ParseSegment(ip, Inbound, &s); err != nil {
			t.Error(err)
		}
		if err := ParseSegment(ip[:50], Inbound, &s); err == nil {
			t.Error("no error")
		}
		buf = AppendSegment(buf[:0], Build{Src: client6, Dst: server6, Flags: ACK, TS: true, Payload: s.Payload})
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkParse(b *testing.B) {
	ip := AppendSegment(nil, Build{Src: client4, Dst: server4, Flags: ACK, TS: true, Payload: make([]byte, 1448)})
	var s Segment
	b.ReportAllocs()
	for b.Loop() {
		if err := ParseSegment(ip, Inbound, &s); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{100, 1448, 60000} {
		b.Run(byteSize(n), func(b *testing.B) {
			p := Build{Src: client4, Dst: server4, Flags: ACK, TS: true, Payload: make([]byte, n)}
			buf := make([]byte, 0, 65536)
			b.ReportAllocs()
			b.SetBytes(int64(n))
			for b.Loop() {
				buf = AppendSegment(buf[:0], p)
			}
		})
	}
}

func BenchmarkVerifyChecksum(b *testing.B) {
	for _, n := range []int{100, 1448, 60000} {
		b.Run(byteSize(n), func(b *testing.B) {
			ip := AppendSegment(nil, Build{Src: client4, Dst: server4, Flags: ACK, Payload: make([]byte, n)})
			b.SetBytes(int64(n))
			for b.Loop() {
				if !VerifyTCPChecksum(ip) {
					b.Fatal("wrong")
				}
			}
		})
	}
}

func byteSize(n int) string {
	if n >= 1000 {
		return strconv.Itoa(n/1000) + "kB"
	}
	return strconv.Itoa(n) + "B"
}
