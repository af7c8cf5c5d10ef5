package tcpwrap

import (
	"encoding/binary"
	"net/netip"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// Pair is one quantity as the two ends of a translation have it: on the wire,
// which is how the client knows it, and in the server's TCP.
type Pair[T comparable] struct {
	Wire T `json:"wire"`
	TCP  T `json:"tcp"`
}

func (p Pair[T]) differ() bool { return p.Wire != p.TCP }

// Translation is how one connection's numbers differ between its client and the
// TCP that the server has now: the connection was made again there with an
// initial sequence number, a timestamp clock and a window scale of that TCP's
// own choice (US 7,673,038 translates the sequence numbers; timestamps and
// windows came later). It is a plain value; the zero value changes nothing.
//
// The client's own sequence numbers and timestamps are the same on both sides,
// and so are the SACK blocks that the server sends.
type Translation struct {
	// Seq and TS are what the client knows minus what TCP has, modulo 2^32: of the
	// server's sequence numbers in octets, and of its timestamp clock in ticks.
	Seq seqnum.Size `json:"seq,omitzero"`
	TS  uint32      `json:"ts,omitzero"`
	// Rcv is the shift count of the windows that the server sends, Snd of those
	// that the client does (RFC 7323, 2).
	Rcv Pair[uint8] `json:"rcv_wscale,omitzero"`
	Snd Pair[uint8] `json:"snd_wscale,omitzero"`
	// Port is the server's; two zeros: the same on both sides.
	Port Pair[uint16] `json:"port,omitzero"`
}

// Identity reports whether t changes nothing.
func (t Translation) Identity() bool {
	return t.Seq == 0 && t.TS == 0 && !t.Rcv.differ() && !t.Snd.differ() && !t.Port.differ()
}

// ToClient rewrites an IP packet of the server's TCP, in place and with a new
// checksum, into what its client expects. A GSO super-segment is as good as any
// other; its checksum is then that of the whole. It answers false for what is no
// TCP segment (ParseSegment says why), which is left as it was.
func (t Translation) ToClient(ip []byte) bool {
	h, w, ok := header(ip)
	if !ok {
		return false
	}
	if t.Port.differ() {
		binary.BigEndian.PutUint16(h, t.Port.Wire)
	}
	add32(h[4:], uint32(t.Seq))
	t.window(h, t.Rcv.TCP, t.Rcv.Wire)
	eachOption(h[tcpMinLen:], func(kind byte, d []byte) {
		if kind == optTimestamp && len(d) == 8 {
			add32(d, t.TS)
		}
	})
	setChecksum(ip, w)
	return true
}

// ToServer rewrites an IP packet of the client's into what the server's TCP
// expects, as ToClient does for the other direction.
func (t Translation) ToServer(ip []byte) bool {
	h, w, ok := header(ip)
	if !ok {
		return false
	}
	if t.Port.differ() {
		binary.BigEndian.PutUint16(h[2:], t.Port.TCP)
	}
	t.window(h, t.Snd.Wire, t.Snd.TCP)
	acks := Flags(h[13]).Has(ACK) // else acknowledgement and TSecr mean nothing
	if acks {
		add32(h[8:], -uint32(t.Seq))
	}
	eachOption(h[tcpMinLen:], func(kind byte, d []byte) {
		switch {
		case kind == optTimestamp && len(d) == 8 && acks:
			add32(d[4:], -t.TS)
		case kind == optSACK && len(d) >= 8 && len(d)%8 == 0:
			for ; len(d) > 0; d = d[4:] {
				add32(d, -uint32(t.Seq))
			}
		}
	})
	setChecksum(ip, w)
	return true
}

// Cut answers c, which is as TCP has it (an image's), as the client knows it.
func (t Translation) Cut(c Cut) Cut {
	c.Tuple = t.Tuple(c.Tuple)
	c.SndUna, c.SndNxt = c.SndUna.Add(t.Seq), c.SndNxt.Add(t.Seq)
	if c.HasTS {
		c.ServerTS += t.TS
	}
	if t.Rcv.differ() {
		c.RcvWScale = t.Rcv.Wire
	}
	if t.Snd.differ() {
		c.SndWScale = t.Snd.Wire
	}
	return c
}

// Tuple answers the addresses on the wire of those that TCP has.
func (t Translation) Tuple(tcp stream.FourTuple) stream.FourTuple {
	return withPort(tcp, t.Port, t.Port.Wire)
}

// TCPTuple answers the addresses that TCP has of those on the wire.
func (t Translation) TCPTuple(wire stream.FourTuple) stream.FourTuple {
	return withPort(wire, t.Port, t.Port.TCP)
}

// window changes the scale of a header's window, rounding down: more than was
// offered must not be sent. A SYN's is never scaled.
func (t Translation) window(h []byte, from, to uint8) {
	if from == to || Flags(h[13]).Has(SYN) {
		return
	}
	octets := uint64(binary.BigEndian.Uint16(h[14:])) << min(from, maxWScale)
	binary.BigEndian.PutUint16(h[14:], uint16(min(65535, octets>>min(to, maxWScale))))
}

// header is the TCP header with its options.
func header(ip []byte) (h []byte, w ipView, ok bool) {
	w, err := locate(ip)
	if err != nil {
		return nil, w, false
	}
	t := ip[w.hdr:w.end]
	off := int(t[12]>>4) * 4
	if off < tcpMinLen || off > len(t) {
		return nil, w, false
	}
	return t[:off], w, true
}

// eachOption calls f with the kind and the data of the options, as ParseOptions
// reads them.
func eachOption(b []byte, f func(kind byte, d []byte)) {
	for len(b) > 0 && b[0] != optEnd {
		if b[0] == optNop {
			b = b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return
		}
		f(b[0], b[2:b[1]])
		b = b[b[1]:]
	}
}

func add32(b []byte, n uint32) {
	binary.BigEndian.PutUint32(b, binary.BigEndian.Uint32(b)+n)
}

func withPort(t stream.FourTuple, p Pair[uint16], port uint16) stream.FourTuple {
	if p.differ() {
		t.Server = netip.AddrPortFrom(t.Server.Addr(), port)
	}
	return t
}
