package tcpwrap

import (
	"encoding/binary"
	"net/netip"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// ParseError says why a packet is not a segment a wrapper may look at. Its
// values are comparable: switch on them or use errors.Is.
type ParseError uint8

// Why ParseSegment refuses a packet.
const (
	ErrTruncated  ParseError = iota + 1 // shorter than its headers or its length field say
	ErrIPVersion                        // neither IPv4 nor IPv6
	ErrIPHeader                         // a header or length field that contradicts itself
	ErrFragment                         // a fragment: the stack reassembles before we look
	ErrExtHeader                        // an IPv6 extension header (a jumbogram has one too)
	ErrNotTCP                           // another protocol
	ErrDataOffset                       // TCP data offset below 5 or beyond the segment
	ErrDirection                        // neither Inbound nor Outbound
)

var parseErrors = [...]string{
	ErrTruncated:  "packet is truncated",
	ErrIPVersion:  "packet is neither IPv4 nor IPv6",
	ErrIPHeader:   "IP header contradicts itself",
	ErrFragment:   "packet is an IP fragment",
	ErrExtHeader:  "packet has an IPv6 extension header",
	ErrNotTCP:     "packet is not TCP",
	ErrDataOffset: "TCP data offset is out of bounds",
	ErrDirection:  "direction is neither inbound nor outbound",
}

func (e ParseError) Error() string {
	if int(e) < len(parseErrors) && parseErrors[e] != "" {
		return "parse segment: " + parseErrors[e]
	}
	return "parse segment: unknown error"
}

const (
	protoTCP   = 6
	tcpMinLen  = 20
	ipv4MinLen = 20
	ipv6Len    = 40
	maxOptions = 40 // octets of TCP options
	maxPacket  = 65535
)

// TCP option kinds (IANA).
const (
	optEnd       = 0
	optNop       = 1
	optMSS       = 2
	optWScale    = 3
	optSACKPerm  = 4
	optSACK      = 5
	optTimestamp = 8
)

// maxWScale is the largest shift RFC 7323 (2.3) allows; stacks clamp to it.
const maxWScale = 14

// ipView is where things are in an IP packet that holds a TCP segment.
type ipView struct {
	v6  bool
	hdr int // octets before the TCP header
	end int // octet after the segment: link-layer padding lies behind it
}

// locate checks an IP packet as far as its TCP header's first 20 octets.
func locate(ip []byte) (ipView, error) {
	if len(ip) < 1 {
		return ipView{}, ErrTruncated
	}
	var w ipView
	switch ip[0] >> 4 {
	case 4:
		if len(ip) < ipv4MinLen {
			return w, ErrTruncated
		}
		w.hdr = int(ip[0]&15) * 4
		w.end = int(binary.BigEndian.Uint16(ip[2:]))
		if w.hdr < ipv4MinLen || w.end < w.hdr {
			return w, ErrIPHeader
		}
		if w.end > len(ip) {
			return w, ErrTruncated
		}
		if binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 { // MF or an offset
			return w, ErrFragment
		}
		if ip[9] != protoTCP {
			return w, ErrNotTCP
		}
	case 6:
		if len(ip) < ipv6Len {
			return w, ErrTruncated
		}
		w.v6 = true
		w.hdr = ipv6Len
		w.end = ipv6Len + int(binary.BigEndian.Uint16(ip[4:]))
		switch ip[6] {
		case protoTCP:
		case 44:
			return w, ErrFragment
		case 0, 43, 50, 51, 60, 135, 139, 140, 253, 254:
			return w, ErrExtHeader
		default:
			return w, ErrNotTCP
		}
		if w.end > len(ip) {
			return w, ErrTruncated
		}
	default:
		return w, ErrIPVersion
	}
	if w.end-w.hdr < tcpMinLen {
		return w, ErrTruncated
	}
	return w, nil
}

// ParseSegment reads an IPv4 or IPv6 packet that was caught going in direction
// dir into s, overwriting all of it. The packet may be a GSO super-segment;
// octets after its own length (padding) are left out. s.Payload and
// s.RawOptions alias ip. Nothing is allocated, and checksums are not looked at
// (VerifyTCPChecksum). The error is always a ParseError; s is then undefined.
//
// Options are read as Linux reads them (tcp_parse_options): a malformed option
// ends the list without making the segment bad, and MSS, window scale and
// SACK-permitted count on a SYN only. A wrapper must see what TCP sees.
func ParseSegment(ip []byte, dir Direction, s *Segment) error {
	w, err := locate(ip)
	if err != nil {
		return err
	}
	t := ip[w.hdr:w.end]
	off := int(t[12]>>4) * 4
	if off < tcpMinLen || off > len(t) {
		return ErrDataOffset
	}
	var src, dst netip.Addr
	if w.v6 {
		src, dst = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
	} else {
		src, dst = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
	}
	from := netip.AddrPortFrom(src, binary.BigEndian.Uint16(t))
	to := netip.AddrPortFrom(dst, binary.BigEndian.Uint16(t[2:]))
	switch dir {
	case Inbound:
		s.Tuple = stream.FourTuple{Server: to, Client: from}
	case Outbound:
		s.Tuple = stream.FourTuple{Server: from, Client: to}
	default:
		return ErrDirection
	}
	s.Dir = dir
	s.Seq = seqnum.Value(binary.BigEndian.Uint32(t[4:]))
	s.Ack = seqnum.Value(binary.BigEndian.Uint32(t[8:]))
	s.Flags = Flags(t[13] & 0x3f)
	s.Window = binary.BigEndian.Uint16(t[14:])
	s.Urgent = binary.BigEndian.Uint16(t[18:])
	s.RawOptions = t[tcpMinLen:off:off]
	s.Payload = t[off:len(t):len(t)]
	s.Options = ParseOptions(s.RawOptions, s.Flags.Has(SYN))
	return nil
}

// ParseOptions reads raw TCP options; syn says whether they are a SYN's.
func ParseOptions(b []byte, syn bool) Options {
	o := Options{WScale: -1}
	for len(b) > 0 {
		switch b[0] {
		case optEnd:
			return o
		case optNop:
			b = b[1:]
			continue
		}
		if len(b) < 2 {
			return o
		}
		n := int(b[1])
		if n < 2 || n > len(b) {
			return o
		}
		d := b[2:n]
		switch kind := b[0]; {
		case kind == optMSS && len(d) == 2 && syn:
			o.MSS = binary.BigEndian.Uint16(d)
		case kind == optWScale && len(d) == 1 && syn:
			o.WScale = int8(min(d[0], maxWScale))
		case kind == optSACKPerm && len(d) == 0 && syn:
			o.SACKPermitted = true
		case kind == optTimestamp && len(d) == 8:
			o.HasTS = true
			o.TSVal = binary.BigEndian.Uint32(d)
			o.TSEcr = binary.BigEndian.Uint32(d[4:])
		case kind == optSACK && len(d) >= 8 && len(d)%8 == 0:
			o.NSACK = min(len(d)/8, len(o.SACK))
			for i := range o.NSACK {
				o.SACK[i] = SACKBlock{
					Left:  seqnum.Value(binary.BigEndian.Uint32(d[8*i:])),
					Right: seqnum.Value(binary.BigEndian.Uint32(d[8*i+4:])),
				}
			}
		}
		b = b[n:]
	}
	return o
}
