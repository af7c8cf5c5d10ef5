package reqsk

import (
	"errors"
	"fmt"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// ErrUnsuitable says that a connection cannot be re-created with its old
// numbers, whatever the kernel; another way may do.
var ErrUnsuitable = errors.New("connection cannot be re-created with its old numbers")

// Attrs are what a connection's ends agreed on in their handshake, and where
// their timestamp clocks stand.
type Attrs struct {
	ClientISN, ServerISN seqnum.Value

	// ClientTSVal is a TSval of the client: none that it sends, or that is
	// injected for it, may be older (PAWS, RFC 7323 section 5).
	ClientTSVal uint32
	// ServerTSVal is the TSval that the server's clock shows when Want is called;
	// it runs on from there, a millisecond a step, whenever the ACK comes. It must
	// be beyond every TSval that the client has seen.
	ServerTSVal uint32

	MSS       uint16 // the client's, as in its SYN
	SndWScale uint8  // shift of the windows that the client sends
	RcvWScale uint8  // shift of the windows that the server sends
	WScaleOK  bool
	SACKOK    bool
	TSOK      bool
	ECNOK     bool // has an effect only where net.ipv4.tcp_ecn is not 0
}

// What a SYN without the option stands for (RFC 9293, 3.7.1), and the least
// that the kernel takes.
const (
	minMSS4 = 536
	minMSS6 = 1220
)

const (
	optMD5   = 19
	optAO    = 29
	optMPTCP = 30

	maxOptions = 40
	maxWScale  = 14
)

// AttrsFrom derives a connection's attributes from its logged handshake. An
// option counts when both ends sent it. The timestamps are as in Attrs, and of
// no account when the connection has none. Whether ECN was negotiated is not
// in the log, and it is left off: the server then neither marks its packets
// nor reports marks. The error wraps ErrUnsuitable when the connection cannot
// be re-created, and no other error means so.
func AttrsFrom(syn stream.ConnOpen, synack stream.ConnAccept, clientTS, serverTS uint32) (Attrs, error) {
	if syn.Conn != synack.Conn {
		return Attrs{}, fmt.Errorf("derive attributes: SYN of connection %d with SYN-ACK of %d", syn.Conn, synack.Conn)
	}
	if len(syn.Options) > maxOptions || len(synack.Options) > maxOptions {
		return Attrs{}, fmt.Errorf("derive attributes of %v: more than %d octets of options", syn.Tuple, maxOptions)
	}
	for kind, name := range map[byte]string{optMD5: "TCP-MD5", optAO: "TCP-AO", optMPTCP: "MPTCP"} {
		if hasOption(synack.Options, kind) {
			return Attrs{}, fmt.Errorf("derive attributes of %v: it uses %s: %w", syn.Tuple, name, ErrUnsuitable)
		}
	}
	c, s := tcpwrap.ParseOptions(syn.Options, true), tcpwrap.ParseOptions(synack.Options, true)
	a := Attrs{ClientISN: syn.ISN, ServerISN: synack.ISN, MSS: c.MSS}
	if a.MSS == 0 {
		a.MSS = minMSS(syn.Tuple)
	}
	if c.WScale >= 0 && s.WScale >= 0 {
		a.WScaleOK, a.SndWScale, a.RcvWScale = true, uint8(c.WScale), uint8(s.WScale)
	}
	a.SACKOK = c.SACKPermitted && s.SACKPermitted
	if c.HasTS && s.HasTS {
		a.TSOK, a.ClientTSVal, a.ServerTSVal = true, clientTS, serverTS
	}
	if err := a.check(syn.Tuple); err != nil {
		return Attrs{}, fmt.Errorf("derive attributes of %v: %w", syn.Tuple, err)
	}
	return a, nil
}

func minMSS(t stream.FourTuple) uint16 {
	if t.Client.Addr().Is4() {
		return minMSS4
	}
	return minMSS6
}

func (a *Attrs) check(t stream.FourTuple) error {
	client, server := t.Client.Addr(), t.Server.Addr()
	switch {
	case !t.Client.IsValid() || !t.Server.IsValid() || t.Client.Port() == 0 || t.Server.Port() == 0 ||
		client.Is4() != server.Is4() || client.Is4In6() || server.Is4In6():
		return errors.New("not a pair of TCP addresses")
	case client.IsLinkLocalUnicast() && client.Is6() || server.IsLinkLocalUnicast() && server.Is6():
		return fmt.Errorf("link-local addresses mean nothing on lo: %w", ErrUnsuitable)
	case a.MSS < minMSS(t):
		return fmt.Errorf("the client's MSS of %d is below %d: %w", a.MSS, minMSS(t), ErrUnsuitable)
	case a.WScaleOK && (a.SndWScale > maxWScale || a.RcvWScale > maxWScale):
		return fmt.Errorf("window scales %d and %d: at most %d", a.SndWScale, a.RcvWScale, maxWScale)
	}
	return nil
}

func hasOption(b []byte, kind byte) bool {
	for len(b) > 0 && b[0] != 0 { // end of options
		if b[0] == 1 { // no operation
			b = b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return false
		}
		if b[0] == kind {
			return true
		}
		b = b[b[1]:]
	}
	return false
}

// ACK is the packet that re-creates the connection; edge is the right edge of
// the client's window. It is the send window the new socket begins with: where
// the client has acknowledged nothing, edge is ServerISN + 1 + the SYN's window.
func (a *Attrs) ACK(t stream.FourTuple, edge seqnum.Value) tcpwrap.Outgoing {
	o := tcpwrap.Outgoing{
		Up: true, Tuple: t, Seq: a.ClientISN.Add(1), Ack: a.ServerISN.Add(1), Flags: tcpwrap.ACK,
		HasTS: a.TSOK, TSVal: a.ClientTSVal, TSEcr: a.ServerTSVal,
	}
	if o.Ack.Less(edge) {
		// Rounded down: TCP must not send beyond the client's window. But not to
		// nothing: it would not send at all, and so not learn more.
		var shift uint8
		if a.WScaleOK {
			shift = a.SndWScale
		}
		o.Window = uint16(min(65535, max(1, uint64(o.Ack.To(edge))>>shift)))
	}
	return o
}
