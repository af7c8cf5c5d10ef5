package tcpwrap

import (
	"encoding/binary"
	"net/netip"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// Build is what AppendSegment makes a packet of.
type Build struct {
	Src, Dst netip.AddrPort
	Seq, Ack seqnum.Value
	Flags    Flags
	Window   uint16 // unscaled, as in the header
	Urgent   uint16 // pointer, with URG in Flags

	// TS puts a timestamp option (RFC 7323) before Options.
	TS           bool
	TSVal, TSEcr uint32
	// Options are raw TCP options, filled up to a multiple of four octets.
	Options []byte

	Payload []byte
	TTL     uint8 // time to live or hop limit; 0 means 64
}

const (
	defaultTTL = 64
	tsLen      = 12 // two NOPs and the option, as every stack sends it
)

// AppendSegment appends the packet b describes, with correct checksums and
// the don't-fragment bit, to dst. It returns dst as it was when there is no
// such packet: addresses of two families (or none), more than 40 octets of
// options, or more than 65,535 octets altogether.
func AppendSegment(dst []byte, b Build) []byte {
	src, to := b.Src.Addr(), b.Dst.Addr()
	if !src.IsValid() || !to.IsValid() || src.Is4() != to.Is4() {
		return dst
	}
	opts := (len(b.Options) + 3) &^ 3
	if b.TS {
		opts += tsLen
	}
	hdr := ipv4MinLen
	if src.Is6() {
		hdr = ipv6Len
	}
	seg := tcpMinLen + opts + len(b.Payload)
	if opts > maxOptions || hdr+seg > maxPacket {
		return dst
	}
	ttl := b.TTL
	if ttl == 0 {
		ttl = defaultTTL
	}

	start := len(dst)
	var zero [ipv6Len + tcpMinLen + maxOptions]byte
	dst = append(dst, zero[:hdr+tcpMinLen+opts]...)
	dst = append(dst, b.Payload...)
	ip := dst[start:]
	if src.Is6() {
		ip[0] = 0x60
		binary.BigEndian.PutUint16(ip[4:], uint16(seg))
		ip[6], ip[7] = protoTCP, ttl
		s, d := src.As16(), to.As16()
		copy(ip[8:], s[:])
		copy(ip[24:], d[:])
	} else {
		ip[0] = 0x45
		binary.BigEndian.PutUint16(ip[2:], uint16(hdr+seg))
		ip[6] = 0x40 // don't fragment; the identification may then be 0 (RFC 6864)
		ip[8], ip[9] = ttl, protoTCP
		s, d := src.As4(), to.As4()
		copy(ip[12:], s[:])
		copy(ip[16:], d[:])
		binary.BigEndian.PutUint16(ip[10:], Checksum(ip[:ipv4MinLen]))
	}

	t := ip[hdr:]
	binary.BigEndian.PutUint16(t, b.Src.Port())
	binary.BigEndian.PutUint16(t[2:], b.Dst.Port())
	binary.BigEndian.PutUint32(t[4:], uint32(b.Seq))
	binary.BigEndian.PutUint32(t[8:], uint32(b.Ack))
	t[12] = byte((tcpMinLen + opts) / 4 << 4)
	t[13] = byte(b.Flags)
	binary.BigEndian.PutUint16(t[14:], b.Window)
	binary.BigEndian.PutUint16(t[18:], b.Urgent)
	o := t[tcpMinLen : tcpMinLen+opts]
	if b.TS {
		o[0], o[1], o[2], o[3] = optNop, optNop, optTimestamp, 10
		binary.BigEndian.PutUint32(o[4:], b.TSVal)
		binary.BigEndian.PutUint32(o[8:], b.TSEcr)
		o = o[tsLen:]
	}
	copy(o, b.Options) // what is left is zero: end of options
	w := ipView{v6: src.Is6(), hdr: hdr, end: hdr + seg}
	binary.BigEndian.PutUint16(t[16:], fold(ones(pseudo(ip, w), t)))
	return dst
}
