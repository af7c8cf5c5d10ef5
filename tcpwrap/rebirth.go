package tcpwrap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// ErrUnsuitable says that a connection cannot be made again by a handshake.
var ErrUnsuitable = errors.New("connection cannot be made again")

// Rebirth is a connection's handshake as it was logged, to be gone through once
// more with the server's TCP, which chooses numbers of its own: what those are
// of the old ones is the Translation that Answer finds. It is a plain value.
type Rebirth struct {
	Tuple                stream.FourTuple // as on the wire
	ClientISN, ServerISN seqnum.Value     // as the client knows them
	Window               uint16           // of the SYN
	Edge                 seqnum.Value     // right edge of the client's window

	// What both ends agreed on. A client that is offered less now would have its
	// options ignored, so nothing more is offered either.
	MSS                  uint16 // the client's; 0: it gave none
	WScale, SACK, TS     bool
	SndWScale, RcvWScale uint8 // of the client's windows and of the server's

	ClientTS uint32 // a TSval of the client: none that follows may be older
	// ServerTS is what the server's clock shows at At, as the client knows it: it
	// runs on from there, a millisecond a tick. It must be beyond all that the
	// client has seen.
	ServerTS uint32
	At       time.Time
}

// TCP options whose connections cannot be made again: the peers' secrets and
// tokens are not in the log.
const (
	optMD5   = 19
	optAO    = 29
	optMPTCP = 30
)

// RebirthFrom reads a logged handshake. The timestamps are as in Rebirth, and of
// no account when the connection has none. The error wraps ErrUnsuitable.
func RebirthFrom(syn stream.ConnOpen, synack stream.ConnAccept, clientTS, serverTS uint32, at time.Time, edge seqnum.Value) (Rebirth, error) {
	var secret error
	eachOption(synack.Options, func(kind byte, _ []byte) {
		switch kind {
		case optMD5, optAO, optMPTCP:
			secret = fmt.Errorf("read the handshake of %v: TCP option %d: %w", syn.Tuple, kind, ErrUnsuitable)
		}
	})
	if secret != nil {
		return Rebirth{}, secret
	}
	c, s := ParseOptions(syn.Options, true), ParseOptions(synack.Options, true)
	r := Rebirth{
		Tuple: syn.Tuple, ClientISN: syn.ISN, ServerISN: synack.ISN, Window: syn.Window, Edge: edge, MSS: c.MSS,
		SACK: c.SACKPermitted && s.SACKPermitted, TS: c.HasTS && s.HasTS, At: at,
	}
	if c.WScale >= 0 && s.WScale >= 0 {
		r.WScale, r.SndWScale, r.RcvWScale = true, uint8(c.WScale), uint8(s.WScale)
	}
	if r.TS {
		r.ClientTS, r.ServerTS = clientTS, serverTS
	}
	return r, nil
}

// SYN is the segment that begins the handshake anew.
func (r *Rebirth) SYN() Outgoing {
	var o []byte
	if r.MSS != 0 {
		o = append(o, optMSS, 4, byte(r.MSS>>8), byte(r.MSS))
	}
	if r.SACK {
		o = append(o, optNop, optNop, optSACKPerm, 2)
	}
	if r.WScale {
		o = append(o, optNop, optWScale, 3, r.SndWScale)
	}
	if r.TS {
		o = append(o, optNop, optNop, optTimestamp, 10)
		o = binary.BigEndian.AppendUint32(o, r.ClientTS)
		o = append(o, 0, 0, 0, 0)
	}
	return Outgoing{Up: true, Tuple: r.Tuple, Seq: r.ClientISN, Flags: SYN, Window: r.Window, Options: o}
}

// Answers reports whether an outbound segment, as TCP made it, is the answer to
// SYN.
func (r *Rebirth) Answers(s *Segment) bool {
	return s.Dir == Outbound && s.Flags&(SYN|ACK|RST) == SYN|ACK && s.Ack == r.ClientISN.Add(1)
}

// Answer takes TCP's SYN-ACK, seen at now. The ACK ends the handshake and has
// TCP's numbers already.
func (r *Rebirth) Answer(s *Segment, now time.Time) (t Translation, ack Outgoing, err error) {
	if !r.Answers(s) {
		return t, ack, fmt.Errorf("make %v again: not the answer to its SYN", r.Tuple)
	}
	if r.TS && !s.Options.HasTS {
		return t, ack, fmt.Errorf("make %v again: TCP gives it no timestamps (net.ipv4.tcp_timestamps): %w", r.Tuple, ErrUnsuitable)
	}
	t.Seq = s.Seq.To(r.ServerISN)
	t.Rcv.Wire, t.Snd.Wire = r.RcvWScale, r.SndWScale
	if r.WScale && s.Options.WScale >= 0 {
		t.Rcv.TCP, t.Snd.TCP = uint8(s.Options.WScale), r.SndWScale
	}
	ack = Outgoing{Up: true, Tuple: r.Tuple, Seq: r.ClientISN.Add(1), Ack: s.Seq.Add(1), Flags: ACK, HasTS: r.TS}
	if r.TS {
		t.TS = r.ServerTS + uint32(now.Sub(r.At).Milliseconds()) - s.Options.TSVal
		ack.TSVal, ack.TSEcr = r.ClientTS, s.Options.TSVal
	}
	if first := r.ServerISN.Add(1); first.Less(r.Edge) {
		// Rounded up: a window that shrank by the rounding would look like one
		// taken back.
		shift := t.Snd.TCP
		ack.Window = uint16(min(65535, (uint64(first.To(r.Edge))+1<<shift-1)>>shift))
	}
	return t, ack, nil
}
