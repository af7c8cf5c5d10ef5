package tcpwrap

import (
	"encoding/binary"
	"math/bits"
)

// ones adds b to the ones' complement sum acc. Words are read little-endian
// whatever the machine: the sum is then byte-swapped, which RFC 1071 (section
// 2B) allows to be put right once, at the end.
func ones(acc uint64, b []byte) uint64 {
	var c uint64
	for len(b) >= 64 {
		p := (*[64]byte)(b)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[0:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[8:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[16:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[24:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[32:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[40:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[48:]), c)
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(p[56:]), c)
		b = b[64:]
	}
	for len(b) >= 8 {
		acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(b), c)
		b = b[8:]
	}
	var tail [8]byte
	copy(tail[:], b)
	acc, c = bits.Add64(acc, binary.LittleEndian.Uint64(tail[:]), c)
	acc, c = bits.Add64(acc, 0, c)
	return acc + c
}

// fold makes a checksum field's value of a sum.
func fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return bits.ReverseBytes16(^uint16(acc))
}

// Checksum is the Internet checksum (RFC 1071) of b.
func Checksum(b []byte) uint16 { return fold(ones(0, b)) }

// pseudo sums the pseudo-header (RFC 9293, 3.1) of the segment at w.
func pseudo(ip []byte, w ipView) uint64 {
	var acc uint64
	if w.v6 {
		acc = ones(0, ip[8:40])
	} else {
		acc = ones(0, ip[12:20])
	}
	var b [8]byte
	binary.BigEndian.PutUint32(b[:], uint32(w.end-w.hdr))
	b[7] = protoTCP
	return ones(acc, b[:])
}

// VerifyTCPChecksum reports whether ip is a TCP packet whose TCP checksum is
// right. A packet that has not been given its checksum yet (offload) is wrong
// to it, and so is one that ParseSegment refuses for its IP header.
func VerifyTCPChecksum(ip []byte) bool {
	w, err := locate(ip)
	if err != nil {
		return false
	}
	return fold(ones(pseudo(ip, w), ip[w.hdr:w.end])) == 0
}

// SetTCPChecksum writes the TCP checksum into a packet whose fields were
// changed. It reports false, and changes nothing, when ip is not TCP.
func SetTCPChecksum(ip []byte) bool {
	w, err := locate(ip)
	if err != nil {
		return false
	}
	setChecksum(ip, w)
	return true
}

func setChecksum(ip []byte, w ipView) {
	t := ip[w.hdr:w.end]
	t[16], t[17] = 0, 0
	binary.BigEndian.PutUint16(t[16:], fold(ones(pseudo(ip, w), t)))
}
