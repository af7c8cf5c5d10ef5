package stream

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// Bounds of a record's variable parts, in octets.
const (
	MaxPayload = 65535 // of Bytes
	MaxConfig  = 65535 // of Hello
	MaxOptions = 40    // of a SYN or SYN-ACK: all a TCP header can hold
)

// maxRecord is more than any record takes: kind, length and the largest body.
const maxRecord = 1 + 3 + MaxPayload + 64

var be = binary.BigEndian

// AppendRecord appends r's wire form to dst; ErrInvalid when r is out of
// bounds (then dst comes back as it was).
func AppendRecord(dst []byte, r Record) ([]byte, error) {
	switch r := r.(type) {
	case Bytes:
		return appendBytes(dst, &r)
	case *Bytes:
		return appendBytes(dst, r)
	case ConnState:
		return appendConnState(dst, &r), nil
	case *ConnState:
		return appendConnState(dst, r), nil
	case ClientFin:
		dst = appendHead(dst, KindClientFin, 12)
		return appendSeq(be.AppendUint64(dst, uint64(r.Conn)), r.Seq), nil
	case ClientReset:
		dst = appendHead(dst, KindClientReset, 12)
		return appendSeq(be.AppendUint64(dst, uint64(r.Conn)), r.Seq), nil
	case Urgent:
		dst = appendHead(dst, KindUrgent, 12)
		return appendSeq(be.AppendUint64(dst, uint64(r.Conn)), r.Up), nil
	case ConnOpen:
		return appendConnOpen(dst, KindConnOpen, &r)
	case ConnDial:
		return appendConnOpen(dst, KindConnDial, (*ConnOpen)(&r))
	case ConnAnswer:
		if len(r.Options) > MaxOptions {
			return dst, fmt.Errorf("%w record: %d octets of TCP options", ErrInvalid, len(r.Options))
		}
		dst = appendHead(dst, KindConnAnswer, 14+len(r.Options))
		dst = be.AppendUint16(appendSeq(be.AppendUint64(dst, uint64(r.Conn)), r.ISN), r.Window)
		return append(dst, r.Options...), nil
	case ConnAccept:
		if len(r.Options) > MaxOptions {
			return dst, fmt.Errorf("%w record: %d octets of TCP options", ErrInvalid, len(r.Options))
		}
		dst = appendHead(dst, KindConnAccept, 12+len(r.Options))
		dst = appendSeq(be.AppendUint64(dst, uint64(r.Conn)), r.ISN)
		return append(dst, r.Options...), nil
	case ConnEnd:
		if !r.Reason.valid() {
			return dst, fmt.Errorf("%w record: end reason %d", ErrInvalid, r.Reason)
		}
		dst = appendHead(dst, KindConnEnd, 9)
		return append(be.AppendUint64(dst, uint64(r.Conn)), byte(r.Reason)), nil
	case Generation:
		if r.From > r.Cut {
			return dst, fmt.Errorf("%w record: generation %d begins at %d, behind its cut %d", ErrInvalid, r.ID, r.From, r.Cut)
		}
		dst = appendHead(dst, KindGeneration, 8+HashSize+24)
		dst = append(be.AppendUint64(dst, r.ID), r.Manifest[:]...)
		dst = be.AppendUint64(dst, uint64(r.Cut))
		dst = be.AppendUint64(dst, uint64(r.From))
		return be.AppendUint64(dst, uint64(r.FromSeq)), nil
	case ServerExit:
		return be.AppendUint32(appendHead(dst, KindServerExit, 4), r.Status), nil
	case OutDigest:
		dst = be.AppendUint64(appendHead(dst, KindOutDigest, 24), uint64(r.Conn))
		return be.AppendUint64(appendSeq(appendSeq(dst, r.Base), r.Seq), r.Sum), nil
	case Order:
		return appendOrder(dst, &r)
	case Goodbye:
		return appendHead(dst, KindGoodbye, 0), nil
	case Handover:
		if r.Node != "" {
			if err := checkName("node", r.Node, maxNodeName); err != nil {
				return dst, fmt.Errorf("%w record: %w", ErrInvalid, err)
			}
		}
		return append(appendHead(dst, KindHandover, len(r.Node)), r.Node...), nil
	case Hello:
		if len(r.Config) > MaxConfig {
			return dst, fmt.Errorf("%w record: %d octets of configuration", ErrInvalid, len(r.Config))
		}
		return append(appendHead(dst, KindHello, len(r.Config)), r.Config...), nil
	}
	return dst, fmt.Errorf("%w record: no wire form for %T", ErrInvalid, r)
}

func (e EndReason) valid() bool { return e >= EndClosed && e <= EndExpired }

func appendHead(dst []byte, k Kind, body int) []byte {
	return binary.AppendUvarint(append(dst, byte(k)), uint64(body))
}

func appendSeq(dst []byte, v seqnum.Value) []byte { return be.AppendUint32(dst, uint32(v)) }

func appendBytes(dst []byte, r *Bytes) ([]byte, error) {
	if len(r.Payload) > MaxPayload {
		return dst, fmt.Errorf("%w record: %d octets of payload", ErrInvalid, len(r.Payload))
	}
	dst = appendHead(dst, KindBytes, 12+len(r.Payload))
	dst = appendSeq(be.AppendUint64(dst, uint64(r.Conn)), r.Seq)
	return append(dst, r.Payload...), nil
}

func appendConnState(dst []byte, r *ConnState) []byte {
	dst = be.AppendUint64(appendHead(dst, KindConnState, 32), uint64(r.Conn))
	dst = appendSeq(dst, r.ClientAck)
	dst = appendSeq(dst, r.ClientEdge)
	dst = appendSeq(dst, r.ServerNxt)
	return appendSeq(be.AppendUint32(be.AppendUint32(dst, r.ClientTS), r.ServerTS), r.ServerEdge)
}

// appendConnOpen appends a SYN of either side: the two have one form.
func appendConnOpen(dst []byte, k Kind, r *ConnOpen) ([]byte, error) {
	s, c := r.Tuple.Server, r.Tuple.Client
	switch {
	case !s.IsValid() || !c.IsValid() || s.Addr().Is4() != c.Addr().Is4():
		return dst, fmt.Errorf("%w record: tuple %s", ErrInvalid, r.Tuple)
	case s.Addr().Zone() != "" || c.Addr().Zone() != "":
		return dst, fmt.Errorf("%w record: tuple %s has a zone", ErrInvalid, r.Tuple)
	case len(r.Options) > MaxOptions:
		return dst, fmt.Errorf("%w record: %d octets of TCP options", ErrInvalid, len(r.Options))
	}
	addr := s.Addr().BitLen() / 8
	dst = appendHead(dst, k, 8+1+2*(addr+2)+6+len(r.Options))
	dst = be.AppendUint64(dst, uint64(r.Conn))
	dst = append(dst, byte(addr))
	for _, a := range [2]netip.AddrPort{s, c} {
		dst = append(dst, a.Addr().AsSlice()...)
		dst = be.AppendUint16(dst, a.Port())
	}
	dst = be.AppendUint16(appendSeq(dst, r.ISN), r.Window)
	return append(dst, r.Options...), nil
}

// decodeRecord reads one record at the front of b and returns what follows
// it. The record's slices alias b.
func decodeRecord(b []byte) (Record, []byte, error) {
	if len(b) == 0 {
		return nil, nil, fmt.Errorf("%w record: nothing there", ErrCorrupt)
	}
	kind := Kind(b[0])
	n, w := binary.Uvarint(b[1:])
	if w <= 0 || w > 3 || n > uint64(len(b)-1-w) {
		return nil, nil, fmt.Errorf("%w record of kind %d: length", ErrCorrupt, kind)
	}
	body, rest := b[1+w:1+w+int(n):1+w+int(n)], b[1+w+int(n):]
	r, err := decodeBody(kind, body)
	return r, rest, err
}

func decodeBody(kind Kind, b []byte) (Record, error) {
	c := cursor{b: b}
	var r Record
	switch kind {
	case KindBytes:
		r = Bytes{Conn: ConnID(c.u64()), Seq: c.seq(), Payload: c.rest(MaxPayload)}
	case KindConnState:
		r = ConnState{Conn: ConnID(c.u64()), ClientAck: c.seq(), ClientEdge: c.seq(),
			ServerNxt: c.seq(), ClientTS: c.u32(), ServerTS: c.u32(), ServerEdge: c.seq()}
	case KindConnOpen:
		r = c.connOpen()
	case KindConnDial:
		r = ConnDial(c.connOpen())
	case KindConnAnswer:
		r = ConnAnswer{Conn: ConnID(c.u64()), ISN: c.seq(), Window: c.u16(), Options: c.rest(MaxOptions)}
	case KindConnAccept:
		r = ConnAccept{Conn: ConnID(c.u64()), ISN: c.seq(), Options: c.rest(MaxOptions)}
	case KindClientFin:
		r = ClientFin{Conn: ConnID(c.u64()), Seq: c.seq()}
	case KindClientReset:
		r = ClientReset{Conn: ConnID(c.u64()), Seq: c.seq()}
	case KindUrgent:
		r = Urgent{Conn: ConnID(c.u64()), Up: c.seq()}
	case KindConnEnd:
		e := ConnEnd{Conn: ConnID(c.u64()), Reason: EndReason(c.u8())}
		c.bad = c.bad || !e.Reason.valid()
		r = e
	case KindGeneration:
		g := Generation{ID: c.u64(), Manifest: Hash(c.take(HashSize)), Cut: Position(c.u64()),
			From: Position(c.u64()), FromSeq: StreamSeq(c.u64())}
		c.bad = c.bad || g.From > g.Cut
		r = g
	case KindServerExit:
		r = ServerExit{Status: c.u32()}
	case KindOutDigest:
		r = OutDigest{Conn: ConnID(c.u64()), Base: c.seq(), Seq: c.seq(), Sum: c.u64()}
	case KindOrder:
		r = c.order()
	case KindGoodbye:
		r = Goodbye{}
	case KindHandover:
		h := Handover{Node: string(c.rest(maxNodeName))}
		c.bad = c.bad || h.Node != "" && checkName("node", h.Node, maxNodeName) != nil
		r = h
	case KindHello:
		r = Hello{Config: c.rest(MaxConfig)}
	default:
		return nil, fmt.Errorf("%w: record kind %d; was it written by a newer ftckpt?", ErrVersion, kind)
	}
	if c.bad || len(c.b) != 0 {
		return nil, fmt.Errorf("%w record of kind %d: %d octets of body", ErrCorrupt, kind, len(b))
	}
	return r, nil
}

// cursor reads fields from the front of b. What is not there reads as zero
// and sets bad.
type cursor struct {
	b   []byte
	bad bool
}

var zeros [HashSize]byte

func (c *cursor) take(n int) []byte {
	if len(c.b) < n {
		c.b, c.bad = nil, true
		return zeros[:n]
	}
	f := c.b[:n]
	c.b = c.b[n:]
	return f
}

func (c *cursor) u8() byte          { return c.take(1)[0] }
func (c *cursor) u16() uint16       { return be.Uint16(c.take(2)) }
func (c *cursor) u32() uint32       { return be.Uint32(c.take(4)) }
func (c *cursor) u64() uint64       { return be.Uint64(c.take(8)) }
func (c *cursor) seq() seqnum.Value { return seqnum.Value(c.u32()) }

// rest takes all that is left; nil for nothing.
func (c *cursor) rest(max int) []byte {
	f := c.b
	c.b = nil
	if len(f) > max {
		c.bad = true
	}
	if len(f) == 0 || c.bad {
		return nil
	}
	return f
}

func (c *cursor) connOpen() ConnOpen {
	r := ConnOpen{Conn: ConnID(c.u64())}
	n := int(c.u8())
	if n != 4 && n != 16 {
		c.bad = true
		return r
	}
	for _, a := range [2]*netip.AddrPort{&r.Tuple.Server, &r.Tuple.Client} {
		addr, _ := netip.AddrFromSlice(c.take(n))
		*a = netip.AddrPortFrom(addr, c.u16())
	}
	r.ISN, r.Window, r.Options = c.seq(), c.u16(), c.rest(MaxOptions)
	return r
}
