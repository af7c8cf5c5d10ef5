package tcpwrap

import (
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// Flags are a TCP header's control bits (RFC 9293, 3.1).
type Flags uint8

// Control bits.
const (
	FIN Flags = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
)

// Has reports whether all bits of f are set.
func (fl Flags) Has(f Flags) bool { return fl&f == f }

// SACKBlock is one block of a SACK option (RFC 2018).
type SACKBlock struct{ Left, Right seqnum.Value }

// Options are the TCP options that matter to a wrapper.
type Options struct {
	MSS           uint16 // 0: absent
	WScale        int8   // shift count (RFC 7323), -1: absent
	SACKPermitted bool
	HasTS         bool
	TSVal, TSEcr  uint32
	SACK          [4]SACKBlock
	NSACK         int
}

// Segment is a parsed TCP segment; Payload and RawOptions alias the packet it was parsed
// from.
type Segment struct {
	Dir        Direction
	Tuple      stream.FourTuple // Server is ours whatever the direction
	Seq, Ack   seqnum.Value
	Flags      Flags
	Window     uint16 // as in the header, unscaled
	Urgent     uint16 // urgent pointer; means something with URG only
	Options    Options
	RawOptions []byte
	Payload    []byte
}

// Len is what the segment takes of sequence space: payload, SYN and FIN.
func (s *Segment) Len() seqnum.Size {
	n := seqnum.Size(len(s.Payload))
	if s.Flags.Has(SYN) {
		n++
	}
	if s.Flags.Has(FIN) {
		n++
	}
	return n
}

// Up is the urgent pointer as a sequence number: the octet after the urgent one
// (RFC 9293's RCV.UP as every stack reads it, RFC 6093). A pointer of 0 is what
// Linux takes for 1.
func (s *Segment) Up() (up seqnum.Value, urgent bool) {
	return s.Seq.Add(seqnum.Size(max(s.Urgent, 1))), s.Flags.Has(URG)
}

// End is the sequence number after the segment's last octet.
func (s *Segment) End() seqnum.Value { return s.Seq.Add(s.Len()) }
