package tcptest

import (
	"slices"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// Receive takes a segment from the network.
func (e *Endpoint) Receive(s *tcpwrap.Segment) {
	switch e.State {
	case Reset:
		if r, ok := Refusal(s); ok {
			e.Out = append(e.Out, r)
		}
		return
	case SynSent:
		e.receiveSynSent(s)
		return
	case SynReceived:
		if s.Flags.Has(tcpwrap.SYN) {
			if !s.Flags.Has(tcpwrap.ACK) && s.Seq.Add(1) == e.RcvNxt {
				e.Handshake()
			}
			return
		}
	}
	if e.stale(s) && !s.Flags.Has(tcpwrap.RST) {
		e.Ack()
		return
	}
	beyond := e.Strict && s.Len() > 0 && e.edge.Less(s.Seq.Add(seqnum.Size(len(s.Payload))))
	if s.End().Less(e.wup) || e.edge.Less(s.Seq) || beyond { // RFC 9293, 3.10.7.4, as Linux has it
		if !s.Flags.Has(tcpwrap.RST) {
			e.Ack()
		}
		return
	}
	if s.Flags.Has(tcpwrap.RST) {
		if s.Seq == e.RcvNxt {
			e.State = Reset
		} else {
			e.Ack() // RFC 5961, 3.2: a challenge
		}
		return
	}
	if s.Flags.Has(tcpwrap.SYN) {
		e.Ack()
		return
	}
	if !e.acknowledged(s) {
		return
	}
	if e.TS && s.Options.HasTS && s.Seq.LessEq(e.wup) {
		e.tsRecent = s.Options.TSVal
	}
	if s.Len() > 0 {
		e.take(s)
	}
}

// stale is PAWS (RFC 7323, 5.3).
func (e *Endpoint) stale(s *tcpwrap.Segment) bool {
	return e.TS && s.Options.HasTS && e.tsRecent != 0 && seqnum.Value(s.Options.TSVal).Less(seqnum.Value(e.tsRecent))
}

func (e *Endpoint) receiveSynSent(s *tcpwrap.Segment) {
	if !s.Flags.Has(tcpwrap.ACK) || s.Ack != e.Nxt {
		return
	}
	if s.Flags.Has(tcpwrap.RST) {
		e.State = Reset
		return
	}
	if s.Flags.Has(tcpwrap.SYN) {
		e.learn(s)
		e.edge = e.RcvNxt.Add(seqnum.Size(min(e.Buffer, 65535)))
		e.State, e.Una = Established, s.Ack
		e.peerEdge = s.Ack.Add(seqnum.Size(s.Window))
		e.Ack()
	}
}

// acknowledged takes the acknowledgement; it answers false when the segment is
// to be discarded for it.
func (e *Endpoint) acknowledged(s *tcpwrap.Segment) bool {
	if !s.Flags.Has(tcpwrap.ACK) {
		return false
	}
	if e.State == SynReceived {
		if s.Ack != e.Nxt { // RFC 9293, 3.10.7.4
			if r, ok := Refusal(s); ok {
				e.Out = append(e.Out, r)
			}
			return false
		}
		e.State = Established
	}
	if e.Nxt.Less(s.Ack) {
		return false
	}
	if e.Una.LessEq(s.Ack) {
		e.Una = s.Ack
		e.peerEdge = s.Ack.Add(seqnum.Size(s.Window) << e.peerScale)
	}
	return true
}

// take receives data and FIN.
func (e *Endpoint) take(s *tcpwrap.Segment) {
	if s.End().LessEq(e.RcvNxt) {
		e.Ack() // a duplicate is answered at once
		return
	}
	if len(s.Payload) > 0 && (len(e.readable) >= e.Buffer || e.Overrun != nil && e.Overrun()) {
		e.Ack()
		return
	}
	if e.RcvNxt.Less(s.Seq) {
		if len(e.ahead) < 64 {
			e.ahead = append(e.ahead, *s)
		}
		e.Ack()
		return
	}
	e.inOrder(s)
	for again := true; again; {
		again = false
		for i := range e.ahead {
			if a := e.ahead[i]; a.Seq.LessEq(e.RcvNxt) {
				e.ahead = slices.Delete(e.ahead, i, i+1)
				e.inOrder(&a)
				again = true
				break
			}
		}
	}
	e.AckDue = true
}

func (e *Endpoint) inOrder(s *tcpwrap.Segment) {
	if e.PeerClosed || s.End().LessEq(e.RcvNxt) {
		return
	}
	e.readable = append(e.readable, s.Payload[min(int(s.Seq.To(e.RcvNxt)), len(s.Payload)):]...)
	e.RcvNxt = s.End()
	e.PeerClosed = s.Flags.Has(tcpwrap.FIN)
}

// Cut is where the endpoint stands, as a checkpoint's image tells it.
func (e *Endpoint) Cut() tcpwrap.Cut {
	c := tcpwrap.Cut{
		Tuple: e.Tuple, RcvNxt: e.RcvNxt, SndUna: e.Una, SndNxt: e.Nxt,
		SndWScale: e.peerScale, RcvWScale: e.Scale, HasTS: e.TS, ClientTS: e.tsRecent,
		ClientFin: e.PeerClosed, ServerFin: e.FinSent(),
	}
	if e.RcvNxt.Less(e.edge) {
		c.RcvWnd = e.RcvNxt.To(e.edge)
	}
	if e.Una.Less(e.peerEdge) {
		c.SndWnd = e.Una.To(e.peerEdge)
	}
	if e.TS {
		c.ServerTS = e.Clock()
	}
	return c
}

// Image is a copy as a dump makes one: what came ahead of its turn is not in
// it, and what waits to leave has left.
func (e *Endpoint) Image() *Endpoint {
	c := *e
	c.written = slices.Clone(e.written)
	c.readable = slices.Clone(e.readable)
	c.ahead, c.Out = nil, nil
	return &c
}

// Restored makes an endpoint out of an image, which stays as it is. rewound
// says that the kernel takes what was sent for not sent yet; boast, that its
// first window is far too large.
func (e *Endpoint) Restored(clock func() uint32, rewound, boast bool) *Endpoint {
	c := e.Image()
	c.Clock, c.boast, c.tsRecent = clock, boast, 0
	if rewound {
		c.Nxt = c.Una
	}
	return c
}
