// Package tcptest is a small model of TCP for tests of the machines: endpoints
// that do nothing by themselves, and a network that is the test's own.
//
// The model is strict where a wrapper can go wrong, as Linux is: it discards a
// segment that acknowledges what was never sent, one that is outside the window
// and one whose timestamp goes back; it takes a reset at one sequence number
// only; it drops what overruns its buffer; it delays acknowledgements.
package tcptest

import (
	"encoding/binary"
	"slices"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// State is how far an endpoint has come.
type State uint8

// States of an endpoint. Whether a direction has ended is in Endpoint.Closed
// and Endpoint.PeerClosed.
const (
	SynSent State = iota + 1
	SynReceived
	Established
	Reset
)

// Config is what does not change in an endpoint's life.
type Config struct {
	Tuple  stream.FourTuple
	Server bool
	ISN    seqnum.Value
	Buffer int   // octets of its receive buffer
	Scale  uint8 // of the windows it advertises
	MSS    int
	TS     bool
	Clock  func() uint32 // of its timestamps
	Strict bool          // discards a segment that reaches beyond the window (Linux since 6.17)
	// Overrun says whether to drop data for want of memory although the window
	// has room. nil: never.
	Overrun func() bool
}

// Endpoint is one end of a connection.
type Endpoint struct {
	Config
	State State

	Una, Nxt  seqnum.Value // acknowledged; sent
	written   []byte       // all of it, from ISN+1 on
	Closed    bool         // nothing will be written any more
	peerEdge  seqnum.Value // right edge of the peer's window, as last told
	peerScale uint8

	RcvNxt     seqnum.Value
	wup        seqnum.Value // RcvNxt as last told to the peer
	edge       seqnum.Value // right edge of the window as told
	readable   []byte
	ahead      []tcpwrap.Segment
	PeerClosed bool
	tsRecent   uint32
	AckDue     bool
	boast      bool // the next window is far too large

	// Out are segments that want to leave.
	Out []tcpwrap.Segment
}

// Dial makes a client's end; its SYN is in Out.
func Dial(c Config) *Endpoint {
	e := &Endpoint{Config: c, State: SynSent, Una: c.ISN, Nxt: c.ISN.Add(1)}
	e.Handshake()
	return e
}

// Answer makes a server's end out of a SYN; its SYN-ACK is in Out.
func Answer(c Config, syn *tcpwrap.Segment) *Endpoint {
	e := &Endpoint{Config: c, State: SynReceived, Una: c.ISN, Nxt: c.ISN.Add(1)}
	e.learn(syn)
	e.Handshake()
	return e
}

// learn takes the peer's SYN.
func (e *Endpoint) learn(s *tcpwrap.Segment) {
	e.RcvNxt, e.wup = s.Seq.Add(1), s.Seq.Add(1)
	e.TS = e.TS && s.Options.HasTS
	e.tsRecent = s.Options.TSVal
	if s.Options.WScale < 0 {
		e.Scale = 0
	} else {
		e.peerScale = uint8(s.Options.WScale)
	}
}

// Handshake sends the SYN or the SYN-ACK, also again.
func (e *Endpoint) Handshake() {
	s := e.segment(e.ISN, tcpwrap.SYN, nil)
	s.Options.WScale, s.Options.MSS = int8(e.Scale), uint16(e.MSS)
	s.Window = uint16(min(e.Buffer, 65535))
	if e.State == SynReceived {
		s.Flags |= tcpwrap.ACK
		s.Ack = e.RcvNxt
		e.edge = e.RcvNxt.Add(seqnum.Size(s.Window))
	}
	s.RawOptions = []byte{2, 4, byte(e.MSS >> 8), byte(e.MSS), 1, 3, 3, e.Scale}
	if s.Options.HasTS {
		s.RawOptions = append(s.RawOptions, 1, 1, 8, 10)
		s.RawOptions = binary.BigEndian.AppendUint32(s.RawOptions, s.Options.TSVal)
		s.RawOptions = binary.BigEndian.AppendUint32(s.RawOptions, s.Options.TSEcr)
	}
	e.Out = append(e.Out, s)
}

// Reborn makes a server's end out of what the log says of its handshake, as
// bpf_sk_assign_tcp_reqsk does: connected, with the numbers it had. c.TS, c.ISN
// and c.Scale are taken from the handshake.
func Reborn(c Config, open stream.ConnOpen, accept stream.ConnAccept, edge seqnum.Value) *Endpoint {
	syn, synack := tcpwrap.ParseOptions(open.Options, true), tcpwrap.ParseOptions(accept.Options, true)
	c.ISN, c.TS, c.Scale = accept.ISN, synack.HasTS, uint8(max(synack.WScale, 0))
	e := &Endpoint{Config: c, State: Established, Una: c.ISN.Add(1), Nxt: c.ISN.Add(1), peerEdge: edge}
	e.learn(&tcpwrap.Segment{Seq: open.ISN, Options: syn})
	e.edge = e.RcvNxt.Add(seqnum.Size(min(c.Buffer, 65535)))
	return e
}

// Write gives the endpoint data to send.
func (e *Endpoint) Write(p []byte) { e.written = append(e.written, p...) }

// CloseWrite ends what it sends.
func (e *Endpoint) CloseWrite() { e.Closed = true }

// Readable is how much Read can give.
func (e *Endpoint) Readable() int { return len(e.readable) }

// Read takes up to n octets out of the receive buffer.
func (e *Endpoint) Read(n int) []byte {
	n = min(n, len(e.readable))
	p := slices.Clone(e.readable[:n])
	e.readable = e.readable[n:]
	return p
}

// Idle reports whether all that was written, and the FIN, is acknowledged.
func (e *Endpoint) Idle() bool { return e.State == Established && e.Una == e.top() }

// Over reports whether both directions have ended and are acknowledged.
func (e *Endpoint) Over() bool { return e.PeerClosed && e.Closed && e.Idle() }

// start is the sequence number of the first octet written, end that after the
// last, and top that after the FIN as well.
func (e *Endpoint) start() seqnum.Value { return e.ISN.Add(1) }
func (e *Endpoint) end() seqnum.Value   { return e.start().Add(seqnum.Size(len(e.written))) }
func (e *Endpoint) top() seqnum.Value {
	if e.Closed {
		return e.end().Add(1)
	}
	return e.end()
}

// FinSent reports whether the FIN has been sent.
func (e *Endpoint) FinSent() bool { return e.Closed && e.end().Less(e.Nxt) }

// Send sends up to n octets of news, and the FIN with the last one. It answers
// false when the window is shut or there are none.
func (e *Endpoint) Send(n int) bool {
	if e.State != Established || !e.Nxt.Less(e.top()) {
		return false
	}
	var room int
	if e.Nxt.Less(e.peerEdge) {
		room = int(e.Nxt.To(e.peerEdge))
	}
	left := 0
	if e.Nxt.Less(e.end()) {
		left = int(e.Nxt.To(e.end()))
	}
	n = min(n, left, room, e.MSS)
	if left > 0 && n == 0 {
		return false
	}
	s := e.data(e.Nxt, n)
	e.Nxt = s.End()
	e.Out = append(e.Out, s)
	return true
}

// Resend sends up to n octets from the first that is not acknowledged. It
// answers false when there is none.
func (e *Endpoint) Resend(n int) bool { return e.Repeat(e.Una, n) }

// Repeat sends up to n octets that have been sent before, from seq on.
func (e *Endpoint) Repeat(seq seqnum.Value, n int) bool {
	if e.State != Established || !seq.Less(e.Nxt) || seq.Less(e.start()) {
		return false
	}
	left := 0
	if seq.Less(e.end()) {
		left = int(seq.To(seqnum.Min(e.end(), e.Nxt)))
	}
	if seq.Less(e.peerEdge) { // a window that has shrunk is respected, a shut one probed
		left = min(left, int(seq.To(e.peerEdge)))
	}
	s := e.data(seq, min(n, left, e.MSS))
	if !e.FinSent() {
		s.Flags &^= tcpwrap.FIN
	}
	e.Out = append(e.Out, s)
	return true
}

func (e *Endpoint) data(seq seqnum.Value, n int) tcpwrap.Segment {
	at := e.start().To(seq)
	s := e.segment(seq, tcpwrap.ACK, e.written[min(int(at), len(e.written)):][:n])
	if e.Closed && s.End() == e.end() {
		s.Flags |= tcpwrap.FIN
	}
	return s
}

// Ack sends an acknowledgement.
func (e *Endpoint) Ack() {
	if e.State == Established {
		e.Out = append(e.Out, e.segment(e.Nxt, tcpwrap.ACK, nil))
	}
}

// Probe sends what asks the peer where it stands: a keep-alive, or a probe of
// a shut window.
func (e *Endpoint) Probe() {
	if e.State == Established {
		e.Out = append(e.Out, e.segment(e.Una.Sub(1), tcpwrap.ACK, nil))
	}
}

// Abort resets the connection.
func (e *Endpoint) Abort() {
	if e.State == Established || e.State == SynReceived {
		e.Out = append(e.Out, e.segment(e.Nxt, tcpwrap.RST|tcpwrap.ACK, nil))
	}
	e.State = Reset
}

func (e *Endpoint) segment(seq seqnum.Value, flags tcpwrap.Flags, data []byte) tcpwrap.Segment {
	s := tcpwrap.Segment{Dir: tcpwrap.Inbound, Tuple: e.Tuple, Seq: seq, Flags: flags, Payload: slices.Clone(data)}
	s.Options.WScale = -1
	if e.Server {
		s.Dir = tcpwrap.Outbound
	}
	if e.TS {
		s.Options.HasTS, s.Options.TSVal, s.Options.TSEcr = true, e.Clock(), e.tsRecent
	}
	if flags.Has(tcpwrap.ACK) {
		s.Ack = e.RcvNxt
		free := max(e.Buffer-len(e.readable), 0)
		edge := seqnum.Max(e.edge, e.RcvNxt.Add(seqnum.Size(free))) // it never goes back
		w := min((uint32(e.RcvNxt.To(edge))+1<<e.Scale-1)>>e.Scale, 65535)
		s.Window = uint16(w)
		e.edge = seqnum.Max(e.edge, e.RcvNxt.Add(seqnum.Size(w)<<e.Scale))
		e.wup, e.AckDue = e.RcvNxt, false
		if e.boast {
			s.Window, e.boast = 65535, false
		}
	}
	return s
}

// Refusal is what a host answers to a segment for which it has no endpoint; it
// answers false when the segment deserves none.
func Refusal(s *tcpwrap.Segment) (tcpwrap.Segment, bool) {
	if s.Flags.Has(tcpwrap.RST) {
		return tcpwrap.Segment{}, false
	}
	r := tcpwrap.Segment{Dir: tcpwrap.Inbound, Tuple: s.Tuple, Flags: tcpwrap.RST}
	if s.Dir == tcpwrap.Inbound {
		r.Dir = tcpwrap.Outbound
	}
	if s.Flags.Has(tcpwrap.ACK) {
		r.Seq = s.Ack
	} else {
		r.Flags |= tcpwrap.ACK
		r.Ack = s.End()
	}
	r.Options.WScale = -1
	return r, true
}
