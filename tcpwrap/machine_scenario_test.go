package tcpwrap_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/scenario"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// The scenarios of testdata/machine are the tables of the failure-free half:
// one file for each kind of packet or event and the states it can meet. The
// flow charts of US 7,673,038 were not at hand when they were written, so none
// claims to be one of them. Where the design differs on purpose from what is
// known of FT-TCP, the file says so:
//   - an acknowledgement above what is stable is held, not rewritten: nothing in
//     a packet is changed, so there is no checksum, window or SACK edge to mend;
//   - there is no delta between the sequence numbers that a client and a
//     restored server use: a restored connection has the numbers it had.
func TestMachineScenarios(t *testing.T) {
	scenario.RunAll(t, "testdata/machine/*.txt", func(t *testing.T) func(*scenario.Directive) string {
		p := &machinePlay{names: map[netip.AddrPort]string{}, now: time.Unix(0, 0)}
		return p.do
	})
}

var vip = netip.MustParseAddrPort("198.51.100.1:80")

// tupleOf is the connection of the client with the given name.
func tupleOf(name string) stream.FourTuple {
	return stream.FourTuple{Server: vip, Client: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, name[0]}), 40000)}
}

type machinePlay struct {
	m     *tcpwrap.Machine
	id    tcpwrap.PacketID
	names map[netip.AddrPort]string
	now   time.Time
}

func (p *machinePlay) do(d *scenario.Directive) string {
	p.now = p.now.Add(time.Millisecond)
	if p.m == nil {
		l := tcpwrap.DefaultLimits()
		l.AheadPerConn = d.Number("ahead", l.AheadPerConn)
		l.Handshakes = d.Number("handshakes", l.Handshakes)
		l.Frozen = d.Number("frozen", l.Frozen)
		p.m = tcpwrap.NewMachine(1, 1, l)
	}
	head := ""
	switch d.Verb {
	case "machine":
	case "in", "out":
		s := p.segment(d)
		p.id++
		head = fmt.Sprintf("p%d: ", p.id)
		p.m.Packet(p.now, p.id, &s, d.Has("dying"))
	case "stable":
		p.m.Stable(p.now, stream.Position(d.Number("to", 0)))
	case "tick":
		p.m.Tick()
	case "freeze":
		head = fmt.Sprintf("image at %d\n", p.m.Freeze())
	case "thaw":
		p.m.Thaw(p.now)
	case "begin": // protection, with the connections of a first image
		p.m.Freeze()
		p.adopt(d)
		p.m.Thaw(p.now)
	case "adopt":
		head = p.adopt(d)
	case "dialling": // are the dials of an image, those to the names given
		var there []string
		for _, k := range p.m.Dialling(func(t stream.FourTuple) bool { return slices.Contains(d.Words, p.names[t.Client]) }) {
			there = append(there, fmt.Sprintf("%s as %d from %d", p.names[k.Tuple.Client], k.Conn, k.Open))
		}
		head = fmt.Sprintf("dialling %s\n", strings.Join(there, ", "))
	case "late":
		t := tupleOf(d.Word(0))
		p.names[t.Client] = d.Word(0)
		p.m.Linger([]tcpwrap.Late{{Tuple: t, Nxt: seqnum.Value(d.Number("nxt", 0)), Since: p.now}})
	case "doubt":
		p.m.Doubt(p.now, d.Word(0) == "on")
	case "pass":
		p.now = p.now.Add(time.Duration(d.Number("s", 0)) * time.Second)
	case "expire":
		var names []string
		for _, t := range p.m.Expire(p.now, time.Duration(d.Number("idle", 0))*time.Second) {
			names = append(names, p.names[t.Client])
		}
		slices.Sort(names)
		head = strings.TrimSpace("expired: "+strings.Join(names, " ")) + "\n"
	case "generation":
		p.m.Append(stream.Generation{ID: 1})
	case "congested":
		p.m.Congested(d.Word(0) == "on")
	case "stop":
		p.m.Stop()
	case "detach":
		p.m.Detach()
	case "wants":
		return fmt.Sprint("a generation: ", p.m.WantGeneration())
	case "stats":
		s := p.m.Stats()
		return fmt.Sprintf("connections=%d holding=%d waiting=%d held=%d passed=%d logged=%d refused=%d dying=%d violations=%d",
			s.Connections, s.Holding, s.Waiting, s.Held, s.Passed, s.LoggedBytes, s.Refused, s.DyingDropped, s.Violations)
	default:
		d.Fatalf("no such verb")
	}
	if err := p.m.Check(); err != nil {
		d.Fatalf("%v", err)
	}
	return head + p.ready()
}

func (p *machinePlay) segment(d *scenario.Directive) tcpwrap.Segment {
	name := d.Word(0)
	t := tupleOf(name)
	p.names[t.Client] = name
	s := tcpwrap.Segment{
		Dir: tcpwrap.Inbound, Tuple: t, Window: uint16(d.Number("win", 1000)),
		Seq: seqnum.Value(d.Number("seq", 0)), Ack: seqnum.Value(d.Number("ack", 0)),
		Urgent:  uint16(d.Number("up", 0)),
		Payload: []byte(strings.Repeat("x", d.Number("len", 0))),
	}
	if d.Has("data") {
		s.Payload = []byte(d.Text("data", ""))
	}
	if d.Verb == "out" {
		s.Dir = tcpwrap.Outbound
	}
	for _, f := range d.Word(1) {
		s.Flags |= map[rune]tcpwrap.Flags{'S': tcpwrap.SYN, 'A': tcpwrap.ACK, 'F': tcpwrap.FIN, 'R': tcpwrap.RST, 'U': tcpwrap.URG}[f]
	}
	s.Options.WScale = int8(d.Number("ws", -1))
	if d.Has("ts") {
		s.Options.HasTS, s.Options.TSVal = true, uint32(d.Number("ts", 0))
	}
	return s
}

func (p *machinePlay) adopt(d *scenario.Directive) string {
	var cuts []tcpwrap.Cut
	for _, name := range d.Words {
		t := tupleOf(name)
		p.names[t.Client] = name
		cuts = append(cuts, tcpwrap.Cut{
			Conn: stream.ConnID(d.Number("conn", 0)), Tuple: t, RcvNxt: seqnum.Value(d.Number("rcv", 0)),
			SndUna: seqnum.Value(d.Number("una", 0)), SndNxt: seqnum.Value(d.Number("nxt", 0)), SndWnd: seqnum.Size(d.Number("wnd", 0)),
			Dialled: d.Has("dialled"),
		})
	}
	adopted, from := p.m.Adopt(cuts)
	var b strings.Builder
	for _, c := range adopted {
		fmt.Fprintf(&b, "%s is %d: rcv %d una %d nxt %d wnd %d\n", p.names[c.Tuple.Client], c.Conn, c.RcvNxt, c.SndUna, c.SndNxt, c.SndWnd)
		if c.Urgent {
			fmt.Fprintf(&b, "and its client is to have urgent data up to %d\n", c.ServerUp)
		}
	}
	fmt.Fprintf(&b, "needs the log from %d\n", from)
	return b.String()
}

// ready is what the machine wants done, as text.
func (p *machinePlay) ready() string {
	var out []string
	for _, n := range p.m.Ready.Records {
		out = append(out, fmt.Sprintf("log %d %s", n.Pos, p.record(n.Record)))
	}
	for _, o := range p.m.Ready.Segments {
		to := "client"
		if o.Up {
			to = "server"
		}
		out = append(out, fmt.Sprintf("to %s %s flags %#x seq %d ack %d ts %d %d%s", to, p.names[o.Tuple.Client], uint8(o.Flags), o.Seq, o.Ack, o.TSVal, o.TSEcr, strings.TrimRight(": "+string(o.Payload), ": ")))
	}
	for _, v := range p.m.Ready.Verdicts {
		what := "accept"
		if v.Verdict == tcpwrap.Drop {
			what = "drop"
		}
		out = append(out, fmt.Sprintf("%s p%d", what, v.ID))
	}
	p.m.Ready.Reset()
	if len(out) == 0 {
		return "wait"
	}
	return strings.Join(out, "\n")
}

func (p *machinePlay) record(r stream.Record) string {
	switch r := r.(type) {
	case stream.ConnOpen:
		return fmt.Sprintf("open %s as %d at %d", p.names[r.Tuple.Client], r.Conn, r.ISN)
	case stream.ConnDial:
		return fmt.Sprintf("dial %s as %d at %d", p.names[r.Tuple.Client], r.Conn, r.ISN)
	case stream.ConnAnswer:
		return fmt.Sprintf("answer %d at %d, window %d", r.Conn, r.ISN, r.Window)
	case stream.ConnAccept:
		return fmt.Sprintf("accept %d at %d", r.Conn, r.ISN)
	case stream.Bytes:
		if len(r.Payload) > 20 {
			return fmt.Sprintf("bytes %d at %d: %d octets", r.Conn, r.Seq, len(r.Payload))
		}
		return fmt.Sprintf("bytes %d at %d: %s", r.Conn, r.Seq, r.Payload)
	case stream.ClientFin:
		return fmt.Sprintf("fin %d at %d", r.Conn, r.Seq)
	case stream.Urgent:
		return fmt.Sprintf("urgent %d up to %d", r.Conn, r.Up)
	case stream.ClientReset:
		return fmt.Sprintf("reset %d at %d", r.Conn, r.Seq)
	case stream.ConnState:
		return fmt.Sprintf("state %d: client acknowledged %d, edge %d, released %d, clocks %d %d", r.Conn, r.ClientAck, r.ClientEdge, r.ServerNxt, r.ClientTS, r.ServerTS)
	case stream.ConnEnd:
		return fmt.Sprintf("end %d: %s", r.Conn, map[stream.EndReason]string{1: "closed", 2: "reset", 3: "quarantine", 4: "closed, the server first", 5: "expired"}[r.Reason])
	case stream.Generation:
		return "generation"
	}
	if d, ok := r.(stream.OutDigest); ok {
		return fmt.Sprintf("digest %d: %d to %d", d.Conn, d.Base, d.Seq)
	}
	return fmt.Sprintf("%T", r)
}
