package tcpwrap

import (
	"net/netip"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// Numbered is a record with the position the machine gave it.
type Numbered struct {
	Pos    stream.Position
	Record stream.Record
}

// Decision is a verdict on a caught packet.
type Decision struct {
	ID      PacketID
	Verdict Verdict
}

// Outgoing is a segment that a machine makes by itself.
type Outgoing struct {
	Up       bool // to the local TCP as if from the client; else out to the client
	Tuple    stream.FourTuple
	Seq, Ack seqnum.Value
	Flags    Flags
	Window   uint16
	Urgent   uint16 // pointer, with URG in Flags
	HasTS    bool
	TSVal    uint32
	TSEcr    uint32
	Options  []byte // raw, beside the timestamps
	Payload  []byte
	// Unreachable makes it an ICMP destination unreachable instead, about the
	// client's segment at Seq: a TCP that has backed off its retransmission timer
	// takes one doubling back for each (RFC 6069), and nothing else happens.
	Unreachable bool
}

// Source and destination of the segment.
func (o *Outgoing) addrs() (src, dst netip.AddrPort) {
	if o.Up {
		return o.Tuple.Client, o.Tuple.Server
	}
	return o.Tuple.Server, o.Tuple.Client
}

// Ready is what a machine wants done. It is plain data (after etcd-io/raft's
// Ready). Each event adds to it; the caller may carry it out once after several
// Packet events, as long as their packets' memory stays good, and must before
// any other event. The order of the caller's duties is part of the contract:
//
//  1. append Records to the log, in order; their payloads alias the packets
//     of the events, so they must be encoded before that memory is used again;
//  2. send Segments, in order;
//  3. give the Verdicts, in order.
//
// A verdict that lets an inbound packet up comes with its record in the same
// Ready or an earlier one; a verdict that lets an outbound packet go is given
// only after Machine.Stable has covered all that the packet depends on.
type Ready struct {
	Records  []Numbered
	Segments []Outgoing
	Verdicts []Decision
}

// Reset empties r and keeps its memory.
func (r *Ready) Reset() {
	clear(r.Records)
	clear(r.Segments)
	r.Records = r.Records[:0]
	r.Segments = r.Segments[:0]
	r.Verdicts = r.Verdicts[:0]
}

// Decide adds a verdict.
func (r *Ready) Decide(id PacketID, v Verdict) {
	r.Verdicts = append(r.Verdicts, Decision{id, v})
}

// Send adds a segment.
func (r *Ready) Send(o Outgoing) { r.Segments = append(r.Segments, o) }

// AppendOutgoing appends the IP packet of a machine's segment to dst.
func AppendOutgoing(dst []byte, o *Outgoing) []byte {
	src, to := o.addrs()
	if o.Unreachable {
		return AppendUnreachable(dst, o.Tuple, o.Seq)
	}
	return AppendSegment(dst, Build{
		Src: src, Dst: to, Seq: o.Seq, Ack: o.Ack, Flags: o.Flags, Window: o.Window, Urgent: o.Urgent,
		TS: o.HasTS, TSVal: o.TSVal, TSEcr: o.TSEcr, Options: o.Options, Payload: o.Payload,
	})
}
