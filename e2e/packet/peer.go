package packet

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// peer is a client's end of one connection: what it has sent and seen, in
// relative numbers, and what must hold whatever a script says.
type peer struct {
	wire   *Wire
	name   string
	local  netip.AddrPort
	remote netip.AddrPort
	begun  time.Time

	mu    sync.Mutex
	came  chan struct{} // a token for each change of seen
	seen  []event       // not yet consumed by the script
	trace []string
	wrong string // how the server's side broke TCP, if it did

	begins         int          // connections there have been
	isn            seqnum.Value // ours
	risn           seqnum.Value // the server's, when known
	known          bool
	next           int // ours: next sequence number
	most           int // highest we have sent, plus one
	rcv            int // the server's: all before is here
	edge           int // right edge of the window that we have offered
	win            int // offered last, as in the header
	wscale         int // ours
	synWScale      int // of a SYN that is not answered yet, -1: none
	synTS, ts      bool
	recent         uint32 // the server's newest timestamp
	stamped        bool   // recent is known
	octets         []byte // what the server has said, by offset
	have           []bool
	fin            int // the server's FIN is here; -1: not seen
	clientTSOffset uint32

	// What the script has consumed.
	taken              int // octets
	synTaken, finTaken bool
	acked              int // the highest acknowledgement sent
	heard              int // and seen
}

// event is what the wire has brought.
type event struct {
	s        tcpwrap.Segment
	seq, ack int
	isn      seqnum.Value // the client's
	data     []byte
	icmp     string
	news     bool // it says something that no segment before it said
	at       time.Duration
}

func newPeer(w *Wire, name string, port uint16) *peer {
	p := &peer{wire: w, name: name, local: netip.AddrPortFrom(w.addr, port), remote: w.server, begun: time.Now(), came: make(chan struct{}, 1)}
	p.reset()
	return p
}

// reset forgets the connection.
func (p *peer) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen, p.wrong = nil, ""
	if p.begins++; p.begins == 1 {
		p.isn = seqnum.Value(rand.Uint32())
		p.clientTSOffset = rand.Uint32() >> 1
	} else { // ahead of the last connection, as RFC 6528 has it, and with the same clock
		p.isn = p.isn.Add(seqnum.Size(p.most) + 1<<16)
	}
	p.known, p.ts, p.synTS, p.stamped = false, false, false, false
	p.next, p.most, p.rcv, p.edge, p.win, p.wscale, p.synWScale = 0, 0, 0, 0, 65535, 0, -1
	p.octets, p.have, p.fin = nil, nil, -1
	p.taken, p.synTaken, p.finTaken, p.acked, p.heard = 0, false, false, 0, 0
	p.recent = 0
	p.note("-- a new connection, ISN %d", uint32(p.isn))
}

func (p *peer) note(format string, args ...any) {
	p.trace = append(p.trace, fmt.Sprintf("%8.3f  %s  ", time.Since(p.begun).Seconds(), p.name)+fmt.Sprintf(format, args...))
}

// clock is the client's timestamp clock, in milliseconds.
func (p *peer) clock() uint32 { return p.clientTSOffset + uint32(time.Since(p.begun).Milliseconds()) }

// send puts a script's segment on the wire.
func (p *peer) send(s *segment) error {
	p.mu.Lock()
	seq, ack, win := p.next, max(p.acked, p.consumed()), p.win
	if s.seq != nil {
		seq = *s.seq
	}
	if s.ack != nil {
		ack = *s.ack
	}
	if s.win != nil {
		win = *s.win
		p.win = win
	}
	if s.flags.Has(tcpwrap.ACK) {
		p.acked = max(p.acked, min(ack, p.rcv+1))
	}
	data := s.text
	if s.seq != nil && !s.hasText {
		data = AppendPattern(nil, p.local.Port(), max(*s.seq-1, 0), *s.end-*s.seq)
	}
	b := tcpwrap.Build{
		Src: p.local, Dst: p.remote, Seq: p.isn.Add(seqnum.Size(seq)), Flags: s.flags, Window: uint16(win), Urgent: uint16(s.urg), Payload: data,
	}
	if s.flags.Has(tcpwrap.ACK) {
		b.Ack = p.risn.Add(seqnum.Size(ack))
	}
	syn := s.flags.Has(tcpwrap.SYN)
	opts := s.opts
	if !s.hasOpts && p.ts {
		opts = []option{{name: "ts"}}
	}
	if syn {
		p.synWScale, p.synTS = -1, false
	}
	var err error
	b.Options, err = p.options(opts, syn)
	if err != nil {
		p.mu.Unlock()
		return err
	}
	end := seq + len(data)
	if syn {
		end++
	}
	if s.flags.Has(tcpwrap.FIN) {
		end++
	}
	if !s.flags.Has(tcpwrap.RST) {
		p.next, p.most = max(p.next, end), max(p.most, end)
		if s.flags.Has(tcpwrap.ACK) || syn {
			shift := p.wscale
			if syn {
				shift, ack = 0, 1
			}
			p.edge = max(p.edge, ack+win<<shift)
		}
	}
	p.note("<  %s", describe(s.flags, seq, len(data), ack, win, optionText(b.Options, syn, p.risn), data))
	p.mu.Unlock()
	return p.wire.send(tcpwrap.AppendSegment(nil, b))
}

// consumed is what a client acknowledges that has all that the script has seen.
func (p *peer) consumed() int {
	n := p.taken
	if p.synTaken {
		n++
	}
	if p.finTaken {
		n++
	}
	return n
}

// options encodes what a script names; nothing fills in for the script but the
// values of a timestamp.
func (p *peer) options(opts []option, syn bool) (b []byte, err error) {
	for _, o := range opts {
		switch o.name {
		case "mss":
			b = append(b, 2, 4, byte(o.args[0]>>8), byte(o.args[0]))
		case "wscale":
			b = append(b, 1, 3, 3, byte(o.args[0]))
			if syn {
				p.synWScale = o.args[0]
			}
		case "sackOK":
			b = append(b, 4, 2)
		case "nop":
			b = append(b, 1)
		case "ts":
			val, ecr := p.clock(), p.recent
			if len(o.args) > 0 {
				val = uint32(o.args[0])
			}
			if len(o.args) > 1 {
				ecr = uint32(o.args[1])
			}
			for len(b)%4 != 2 {
				b = append(b, 1)
			}
			b = append(b, 8, 10, byte(val>>24), byte(val>>16), byte(val>>8), byte(val), byte(ecr>>24), byte(ecr>>16), byte(ecr>>8), byte(ecr))
			if syn {
				p.synTS = true
			}
		case "sack":
			for len(b)%4 != 2 {
				b = append(b, 1)
			}
			b = append(b, 5, byte(2+4*len(o.args)))
			for _, a := range o.args {
				v := uint32(p.risn.Add(seqnum.Size(a)))
				b = append(b, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
			}
		}
	}
	for len(b)%4 != 0 {
		b = append(b, 1)
	}
	if len(b) > 40 {
		return nil, fmt.Errorf("%d octets of options are more than 40", len(b))
	}
	return b, nil
}

// receive takes a packet that the wire has brought.
func (p *peer) receive(packet []byte) {
	var s tcpwrap.Segment
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := tcpwrap.ParseSegment(packet, tcpwrap.Outbound, &s); err != nil {
		p.fail("a segment that cannot be read: %v", err)
		return
	}
	if s.Flags.Has(tcpwrap.SYN) && s.Ack == p.isn.Add(1) && !p.known {
		p.risn, p.known, p.fin = s.Seq, true, -1
		if p.synWScale >= 0 && s.Options.WScale >= 0 {
			p.wscale = p.synWScale
		}
		p.ts = p.synTS && s.Options.HasTS
	}
	e := event{s: s, isn: p.isn, data: append([]byte(nil), s.Payload...), at: time.Since(p.begun)}
	e.s.Payload, e.s.RawOptions = e.data, append([]byte(nil), s.RawOptions...)
	e.seq, e.ack = int(int32(s.Seq-p.risn)), int(int32(s.Ack-p.isn))
	if !p.known {
		e.seq = 0
	}
	p.note(" > %s", describe(s.Flags, e.seq, len(e.data), e.ack, int(s.Window), optionText(s.RawOptions, s.Flags.Has(tcpwrap.SYN), p.isn), e.data))
	p.judge(&e)
	p.seen = append(p.seen, e)
	p.signal()
}

// judge finds what is new in a segment, and what must never be.
func (p *peer) judge(e *event) {
	s := &e.s
	if s.Flags.Has(tcpwrap.RST) {
		e.news = true
		p.heard = p.most // nothing is repeated after it
		return
	}
	if s.Flags.Has(tcpwrap.ACK) && e.ack > p.most {
		p.fail("an acknowledgement of %d, though no more than %d was sent", e.ack, p.most)
	}
	if s.Flags.Has(tcpwrap.ACK) {
		p.heard = max(p.heard, e.ack)
	}
	if s.Flags.Has(tcpwrap.SYN) {
		e.news = e.seq != 0 || p.rcv == 0
		if e.seq == 0 {
			p.rcv = max(p.rcv, 1)
		}
	}
	if s.Options.HasTS && p.ts {
		if old := seqnum.Value(s.Options.TSVal).Less(seqnum.Value(p.recent)); old && p.stamped && (len(e.data) > 0 || s.Flags.Has(tcpwrap.FIN)) {
			p.fail("timestamp %d after %d: the client would discard it (PAWS)", s.Options.TSVal, p.recent)
		} else if (!old || !p.stamped) && e.seq <= p.acked { // RFC 7323, 4.3
			p.recent, p.stamped = s.Options.TSVal, true
		}
	}
	for i, b := range e.data {
		at := e.seq - 1 + i
		if at < 0 {
			p.fail("data at %d, before the first octet", e.seq)
			return
		}
		for at >= len(p.octets) {
			p.octets, p.have = append(p.octets, 0), append(p.have, false)
		}
		switch {
		case !p.have[at]:
			p.octets[at], p.have[at] = b, true
			e.news = true
		case p.octets[at] != b:
			p.fail("octet %d is %q now and was %q", at+1, b, p.octets[at])
			return
		}
	}
	end := e.seq + len(e.data)
	if len(e.data) > 0 && end > p.edge {
		p.fail("data up to %d beyond the window's edge %d", end, p.edge)
	}
	if s.Flags.Has(tcpwrap.FIN) {
		if p.fin >= 0 && p.fin != end {
			p.fail("a FIN at %d, though there was one at %d", end, p.fin)
		}
		e.news = e.news || p.fin < 0
		p.fin = end
	}
	if p.fin >= 0 && len(e.data) > 0 && end > p.fin {
		p.fail("data up to %d beyond the FIN at %d", end, p.fin)
	}
	for p.rcv >= 1 && p.rcv-1 < len(p.have) && p.have[p.rcv-1] {
		p.rcv++
	}
}

// told takes an ICMP message about this connection.
func (p *peer) told(kind string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(" > icmp %s", kind)
	p.seen = append(p.seen, event{icmp: kind, news: true, at: time.Since(p.begun)})
	p.signal()
}

// remark notes what is none of a script's affair.
func (p *peer) remark(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(" > %s (passed over)", what)
}

func (p *peer) fail(format string, args ...any) {
	if p.wrong == "" {
		p.wrong = fmt.Sprintf(format, args...)
		p.note("!! %s", p.wrong)
	}
}

func (p *peer) signal() {
	select {
	case p.came <- struct{}{}:
	default:
	}
}

// trim takes from an event what the script has consumed already, and answers
// whether anything is left that is news.
func (p *peer) trim(e *event) bool {
	if !e.news || e.icmp != "" || e.s.Flags.Has(tcpwrap.RST) {
		return e.news
	}
	if n := min(1+p.taken-e.seq, len(e.data)); n > 0 {
		e.seq, e.data = e.seq+n, e.data[n:]
	}
	return len(e.data) > 0 || e.s.Flags.Has(tcpwrap.FIN) && !p.finTaken || e.s.Flags.Has(tcpwrap.SYN) && !p.synTaken
}

// take notes that the script has seen an event.
func (p *peer) take(e *event) {
	if e.icmp != "" || e.s.Flags.Has(tcpwrap.RST) {
		return
	}
	if end := e.seq + len(e.data); len(e.data) > 0 && e.seq <= 1+p.taken {
		p.taken = max(p.taken, end-1)
	}
	p.synTaken = p.synTaken || e.s.Flags.Has(tcpwrap.SYN)
	p.finTaken = p.finTaken || e.s.Flags.Has(tcpwrap.FIN)
}

func (e *event) String() string {
	if e.icmp != "" {
		return "icmp " + e.icmp
	}
	return describe(e.s.Flags, e.seq, len(e.data), e.ack, int(e.s.Window), optionText(e.s.RawOptions, e.s.Flags.Has(tcpwrap.SYN), e.isn), e.data)
}

func flagText(f tcpwrap.Flags) string {
	var b strings.Builder
	for _, c := range []struct {
		f tcpwrap.Flags
		c byte
	}{{tcpwrap.SYN, 'S'}, {tcpwrap.FIN, 'F'}, {tcpwrap.RST, 'R'}, {tcpwrap.PSH, 'P'}, {tcpwrap.URG, 'U'}, {tcpwrap.ACK, '.'}} {
		if f.Has(c.f) {
			b.WriteByte(c.c)
		}
	}
	return b.String()
}

func describe(f tcpwrap.Flags, seq, n, ack, win int, opts string, data []byte) string {
	s := fmt.Sprintf("%s %d:%d(%d)", flagText(f), seq, seq+n, n)
	if f.Has(tcpwrap.ACK) {
		s += fmt.Sprintf(" ack %d", ack)
	}
	s += fmt.Sprintf(" win %d", win)
	if opts != "" {
		s += " <" + opts + ">"
	}
	if n > 0 {
		s += fmt.Sprintf(" %.24q", data)
	}
	return s
}

func optionText(raw []byte, syn bool, base seqnum.Value) string {
	o := tcpwrap.ParseOptions(raw, syn)
	var l []string
	if o.MSS > 0 {
		l = append(l, fmt.Sprint("mss ", o.MSS))
	}
	if o.SACKPermitted {
		l = append(l, "sackOK")
	}
	if o.WScale >= 0 {
		l = append(l, fmt.Sprint("wscale ", o.WScale))
	}
	if o.HasTS {
		l = append(l, fmt.Sprintf("ts %d %d", o.TSVal, o.TSEcr))
	}
	for i := range o.NSACK {
		l = append(l, fmt.Sprintf("sack %d:%d", int32(o.SACK[i].Left-base), int32(o.SACK[i].Right-base)))
	}
	return strings.Join(l, ",")
}
