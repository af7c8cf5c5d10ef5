package tcpwrap

import (
	"encoding/binary"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

const (
	protoICMP, protoICMPv6 = 1, 58
	icmpLen                = 8
	icmpQuote              = 8 // octets of the TCP header: ports and sequence number (RFC 792)
)

// AppendUnreachable appends an ICMP packet from the server's address to the client
// that says the server could not be reached with the client's segment at seq: host
// unreachable (RFC 792), or no route (RFC 4443). For a TCP that is a soft error,
// which ends no connection (RFC 1122, 4.2.3.9).
func AppendUnreachable(dst []byte, t stream.FourTuple, seq seqnum.Value) []byte {
	quoted := AppendSegment(nil, Build{Src: t.Client, Dst: t.Server, Seq: seq, Flags: ACK})
	w, err := locate(quoted)
	if err != nil { // a tuple of no or of two families
		return dst
	}
	if !w.v6 {
		quoted = quoted[:w.hdr+icmpQuote]
	}
	n := icmpLen + len(quoted)
	var ip []byte
	src, to := t.Server.Addr(), t.Client.Addr()
	if w.v6 {
		ip = make([]byte, ipv6Len+n)
		ip[0] = 0x60
		binary.BigEndian.PutUint16(ip[4:], uint16(n))
		ip[6], ip[7] = protoICMPv6, defaultTTL
		s, d := src.As16(), to.As16()
		copy(ip[8:], s[:])
		copy(ip[24:], d[:])
		m := ip[ipv6Len:]
		m[0], m[1] = 1, 0 // destination unreachable, no route
		copy(m[icmpLen:], quoted)
		var pseudo [40]byte // RFC 8200, 8.1
		copy(pseudo[:], ip[8:40])
		binary.BigEndian.PutUint32(pseudo[32:], uint32(n))
		pseudo[39] = protoICMPv6
		binary.BigEndian.PutUint16(m[2:], Checksum(append(pseudo[:], m...)))
		return append(dst, ip...)
	}
	ip = make([]byte, ipv4MinLen+n)
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	ip[8], ip[9] = defaultTTL, protoICMP
	s, d := src.As4(), to.As4()
	copy(ip[12:], s[:])
	copy(ip[16:], d[:])
	binary.BigEndian.PutUint16(ip[10:], Checksum(ip[:ipv4MinLen]))
	m := ip[ipv4MinLen:]
	m[0], m[1] = 3, 1 // destination unreachable, host
	copy(m[icmpLen:], quoted)
	binary.BigEndian.PutUint16(m[2:], Checksum(m))
	return append(dst, ip...)
}
