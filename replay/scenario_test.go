package replay_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/scenario"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// The scenarios of testdata/engine are the tables of the recovery: what the
// restored TCP is told, what becomes of what it says, and where each connection
// stands in the end. The flow charts of US 7,673,038 were not at hand, so none
// claims to be one of them. On purpose there is no spoofed handshake and no
// delta for what is in the image: CRIU restores the numbers. A connection that is
// younger gets its old numbers, too.
func TestEngineScenarios(t *testing.T) {
	scenario.RunAll(t, "testdata/engine/*.txt", func(t *testing.T) func(*scenario.Directive) string {
		return (&enginePlay{now: time.Unix(0, 0), conns: map[string]stream.ConnID{}}).do
	})
}

type enginePlay struct {
	e         *replay.Engine
	survivors []replay.Survivor
	redials   []replay.Redial
	machine   *tcpwrap.Machine // at go-live; it only gives records their places here
	conns     map[string]stream.ConnID
	id        tcpwrap.PacketID
	now       time.Time
}

func playTuple(name string) stream.FourTuple { return tupleOf(int(name[0] - 'A')) }

func playName(t stream.FourTuple) string {
	if n := t.Client.Port(); n >= 40100 {
		return fmt.Sprintf("%c>%d", rune(t.Server.Port()-50000), (n-40000)/100)
	}
	return clientName(t)
}

func clientName(t stream.FourTuple) string { return string(rune('A' + t.Client.Port() - 40000)) }

func num(d *scenario.Directive, key string, otherwise int) seqnum.Value {
	return seqnum.Value(d.Number(key, otherwise))
}

func (p *enginePlay) do(d *scenario.Directive) string {
	p.now = p.now.Add(time.Duration(d.Number("ms", 1)) * time.Millisecond)
	head := ""
	switch d.Verb {
	case "survivor":
		p.survivor(d)
		return "noted"
	case "redial":
		p.redial(d)
		return "noted"
	case "giveup":
		p.e.GiveUpDials()
		for _, c := range p.e.Condemned() {
			head += fmt.Sprintf("condemned %s: %s\n", playName(c.Tuple), c.Why)
		}
	case "start":
		p.e = replay.NewEngine(p.survivors)
		p.e.AddRedials(p.redials)
		p.e.Start(p.now)
	case "begin":
		p.e = replay.NewEngine(p.survivors)
	case "standin":
		p.e.StandIn(10, time.Duration(d.Number("silence", 0))*time.Second)
	case "greet":
		p.e.Greet()
	case "restored":
		p.e.Start(p.now)
	case "stable":
		n, err := strconv.Atoi(d.Word(0))
		if err != nil {
			d.Fatalf("%v", err)
		}
		p.e.Stable(p.now, stream.Position(n))
	case "succeed":
		m := tcpwrap.NewMachine(stream.Position(d.Number("next", 0)), 1, tcpwrap.DefaultLimits())
		p.e.Succeed(m)
		p.machine = m
	case "doubt":
		p.e.Doubt(d.Word(0) == "yes")
	case "congested":
		p.e.Congested(d.Word(0) == "yes")
	case "feed":
		p.e.Feed(p.now, p.record(d))
	case "fed":
		p.e.Fed(p.now)
	case "in", "out":
		p.id++
		s := p.segment(d)
		head = fmt.Sprintf("p%d: ", p.id)
		if !p.e.Packet(p.now, p.id, &s) {
			head += "for the machine\n"
		}
	case "tick":
		p.e.Tick(p.now)
	case "busy":
		p.e.Busy(d.Word(0) == "yes", p.e.Born())
	case "done":
		return fmt.Sprint("done: ", p.e.Done())
	case "condemn":
		for _, c := range p.e.Condemn() {
			head += fmt.Sprintf("condemned %s: %s\n", playName(c.Tuple), c.Why)
		}
	case "golive":
		cuts, waiting := p.e.GoLive()
		head = p.cuts(cuts)
		for _, w := range waiting {
			head += fmt.Sprintf("p%d for the machine\n", w.ID)
		}
	case "joined":
		head = p.cuts(p.e.Joined())
	default:
		d.Fatalf("no such verb")
	}
	return head + p.ready()
}

func (p *enginePlay) survivor(d *scenario.Directive) {
	name := d.Word(0)
	id := stream.ConnID(len(p.survivors) + 1)
	p.conns[name] = id
	s := replay.Survivor{Cut: tcpwrap.Cut{
		Conn: id, Tuple: playTuple(name), RcvNxt: num(d, "rcv", 0),
		SndUna: num(d, "una", 0), SndNxt: num(d, "nxt", d.Number("una", 0)), SndWnd: seqnum.Size(d.Number("wnd", 1000)),
		SndWScale: uint8(d.Number("scale", 0)), HasTS: d.Has("ts"), ClientTS: 5,
	}, TS: uint32(d.Number("ts", 0)), Ended: d.Has("ended")}
	s.Cut.RcvWnd = s.Cut.RcvNxt.To(num(d, "offered", d.Number("rcv", 0)))
	if d.Has("logged") { // by way of a ledger, as in life
		l := replay.NewLedger()
		l.Apply(p.now, stream.Entry{Pos: 1, Rec: stream.Bytes{Conn: id, Seq: num(d, "from", d.Number("rcv", 0)), Payload: make([]byte, d.Number("logged", 0)-d.Number("from", d.Number("rcv", 0)))}})
		s.Logged = l.Line(id).Logged
	}
	if d.Has("serverup") {
		s.Cut.ServerUp, s.Cut.Urgent = num(d, "serverup", 0), true
	}
	if d.Has("acked") {
		s.Known = true
		s.State = stream.ConnState{Conn: id, ClientAck: num(d, "acked", 0), ClientEdge: num(d, "edge", d.Number("acked", 0)+1000), ClientTS: uint32(d.Number("clientts", 0))}
	}
	p.survivors = append(p.survivors, s)
}

// redial notes a dial of the old server's: one name for each connection, and the
// peers are named by port.
func (p *enginePlay) redial(d *scenario.Directive) {
	name := d.Word(0)
	id := stream.ConnID(100 + len(p.redials))
	p.conns[name] = id
	t := dialTuple(name, d.Number("peer", 1))
	r := replay.Redial{
		Dial:    stream.ConnDial{Conn: id, Tuple: t, ISN: num(d, "isn", 0), Options: []byte{8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 3, 3, 7}},
		DialPos: stream.Position(1 + len(p.redials)), Ended: d.Has("ended"), Refused: d.Has("refused"),
		TS: uint32(d.Number("ts", 5000)), At: p.now,
	}
	if d.Has("answer") {
		r.Answered = true
		r.Answer = stream.ConnAnswer{Conn: id, ISN: num(d, "answer", 0), Window: 2000, Options: []byte{2, 4, 5, 180, 8, 10, 0, 0, 0, 77, 0, 0, 0, 1, 3, 3, 2}}
	}
	if d.Has("acked") {
		r.Known = true
		r.State = stream.ConnState{Conn: id, ClientAck: num(d, "acked", 0), ClientEdge: num(d, "acked", 0).Add(1000), ClientTS: 80}
	}
	p.redials = append(p.redials, r)
}

// dialTuple is a connection of the server's own, by the name of its local port.
func dialTuple(name string, peer int) stream.FourTuple {
	t := playTuple("A")
	return stream.FourTuple{
		Server: netip.AddrPortFrom(t.Server.Addr(), 50000+uint16(name[0])),
		Client: netip.AddrPortFrom(t.Client.Addr(), 40000+100*uint16(peer)),
	}
}

func (p *enginePlay) record(d *scenario.Directive) stream.Record {
	id, seq := p.conns[d.Word(1)], num(d, "seq", 0)
	switch d.Word(0) {
	case "bytes":
		b := []byte(d.Text("data", ""))
		if d.Has("len") {
			b = []byte(strings.Repeat("x", d.Number("len", 0)))
		}
		return stream.Bytes{Conn: id, Seq: seq, Payload: b}
	case "fin":
		return stream.ClientFin{Conn: id, Seq: seq}
	case "urgent":
		return stream.Urgent{Conn: id, Up: num(d, "up", 0)}
	case "reset":
		return stream.ClientReset{Conn: id, Seq: seq}
	case "answer":
		return stream.ConnAnswer{Conn: id, ISN: seq}
	case "heard":
		return stream.ConnState{Conn: id, ClientAck: seq}
	}
	d.Fatalf("no such record")
	return nil
}

func (p *enginePlay) segment(d *scenario.Directive) tcpwrap.Segment {
	s := tcpwrap.Segment{
		Dir: tcpwrap.Inbound, Tuple: playTuple(d.Word(0)), Window: uint16(d.Number("win", 1000)),
		Urgent: uint16(d.Number("up", 0)),
		Seq:    num(d, "seq", 0), Ack: num(d, "ack", 0), Payload: []byte(d.Text("data", "")),
	}
	if d.Verb == "out" {
		s.Dir = tcpwrap.Outbound
	}
	if d.Has("peer") {
		s.Tuple = dialTuple(d.Word(0), d.Number("peer", 0))
	}
	s.Options.WScale = int8(d.Number("ws", -1))
	for _, f := range d.Word(1) {
		s.Flags |= map[rune]tcpwrap.Flags{'S': tcpwrap.SYN, 'A': tcpwrap.ACK, 'F': tcpwrap.FIN, 'R': tcpwrap.RST, 'U': tcpwrap.URG}[f]
	}
	if d.Has("ts") {
		s.Options.HasTS, s.Options.TSVal = true, uint32(d.Number("ts", 0))
	}
	return s
}

func (p *enginePlay) cuts(cuts []tcpwrap.Cut) string {
	var b strings.Builder
	for _, c := range cuts {
		fmt.Fprintf(&b, "%s joins: rcv %d una %d nxt %d wnd %d", playName(c.Tuple), c.RcvNxt, c.SndUna, c.SndNxt, c.SndWnd)
		if c.Urgent {
			fmt.Fprintf(&b, " urgent data up to %d", c.ServerUp)
		}
		if c.ClientFin || c.ServerFin {
			fmt.Fprintf(&b, " client fin %v server fin %v", c.ClientFin, c.ServerFin)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// told is what a scenario shows of a record.
func told(r stream.Record) string {
	switch r := r.(type) {
	case stream.Bytes:
		if len(r.Payload) > 20 {
			return fmt.Sprintf("bytes %d: %d octets", r.Seq, len(r.Payload))
		}
		return fmt.Sprintf("bytes %d: %s", r.Seq, r.Payload)
	case stream.Urgent:
		return fmt.Sprintf("urgent up to %d", r.Up)
	case stream.ClientFin:
		return fmt.Sprintf("fin %d", r.Seq)
	case stream.ClientReset:
		return fmt.Sprintf("reset %d", r.Seq)
	case stream.ConnState:
		return fmt.Sprintf("state: client acknowledged %d, edge %d; clocks %d %d; offered %d", r.ClientAck, r.ClientEdge, r.ClientTS, r.ServerTS, r.ServerEdge)
	}
	return fmt.Sprintf("%T", r)
}

func (p *enginePlay) ready() string {
	var out []string
	for _, t := range p.e.Dialled {
		tr := t.Translation
		out = append(out, fmt.Sprintf("translate %s: numbers +%d, clock +%d, port %d is %d, scales %d/%d are %d/%d",
			playName(t.Tuple), int32(tr.Seq), int32(tr.TS), tr.Port.Wire, tr.Port.TCP, tr.Snd.Wire, tr.Rcv.Wire, tr.Snd.TCP, tr.Rcv.TCP))
	}
	p.e.Dialled = p.e.Dialled[:0]
	records := p.e.Ready.Records
	if p.machine != nil {
		records = append(records, p.machine.Ready.Records...)
		defer p.machine.Ready.Reset()
	}
	for _, r := range records {
		out = append(out, fmt.Sprintf("log %d %s", r.Pos, told(r.Record)))
	}
	for _, s := range p.e.Ready.Segments {
		if s.Unreachable {
			line := fmt.Sprintf("to client %s unreachable seq %d", playName(s.Tuple), s.Seq)
			if n := len(out); n > 0 && strings.HasPrefix(out[n-1], line) {
				line = out[n-1]
				out = out[:n-1]
				times := 1
				if i := strings.LastIndex(line, " x"); i > 0 {
					times, _ = strconv.Atoi(line[i+2:])
					line = line[:i]
				}
				line = fmt.Sprintf("%s x%d", line, times+1)
			}
			out = append(out, line)
			continue
		}
		to := "to client"
		if s.Up {
			to = "to server"
		}
		var flags []string
		for i, f := range []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG"} {
			if s.Flags.Has(1 << i) {
				flags = append(flags, f)
			}
		}
		slices.Sort(flags)
		line := fmt.Sprintf("%s %s %s seq %d ack %d win %d", to, playName(s.Tuple), strings.Join(flags, "+"), s.Seq, s.Ack, s.Window)
		if s.HasTS {
			line += fmt.Sprintf(" clock %d echo %d", s.TSVal, s.TSEcr)
		}
		if s.Flags.Has(tcpwrap.URG) {
			line += fmt.Sprintf(" urgent %d", s.Urgent)
		}
		if n := len(s.Payload); n > 20 {
			line += fmt.Sprintf(": %d octets", n)
		} else if n > 0 {
			line += ": " + string(s.Payload)
		}
		out = append(out, line)
	}
	for _, v := range p.e.Ready.Verdicts {
		what := "accept"
		if v.Verdict == tcpwrap.Drop {
			what = "drop"
		}
		out = append(out, fmt.Sprintf("%s p%d", what, v.ID))
	}
	p.e.Ready.Reset()
	if len(out) == 0 {
		return "wait"
	}
	return strings.Join(out, "\n")
}
