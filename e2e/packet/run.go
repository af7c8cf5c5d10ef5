package packet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/tcpwrap"
)

// patience is how long a segment is waited for: a takeover may be under way, and
// a retransmission timer may have backed off.
const patience = 15 * time.Second

// ScriptError is how a script failed.
type ScriptError struct {
	Script string
	Line   int
	Step   string
	Why    string
	Trace  []string // of the script's connections, in the order of time
}

func (f *ScriptError) Error() string {
	return fmt.Sprintf("%s.txt:%d: %s\n  %s\n  trace:\n    %s", f.Script, f.Line, f.Step, f.Why, strings.Join(f.Trace, "\n    "))
}

// runner is one script under way.
type runner struct {
	wire  *Wire
	base  uint16
	begun time.Time
	conns map[byte]*peer
	p     *peer // the connection that steps are about
	await func(Phase) error
	list  []Phase
}

// Run runs a script whose connections have the ports from base on. await is
// called where the script wants to go through a phase, and returns when all have.
func Run(ctx context.Context, w *Wire, s *Script, base uint16, await func(Phase) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &runner{wire: w, base: base, begun: time.Now(), conns: map[byte]*peer{}, await: await}
	r.list, _ = s.phases() // Parse has looked
	r.use('A')
	for i := range s.steps {
		st := &s.steps[i]
		if err := r.step(ctx, st); err != nil {
			return r.failure(s, st, err)
		}
	}
	last := &s.steps[len(s.steps)-1]
	for name, p := range r.conns {
		if err := p.rest(); err != nil {
			return r.failure(s, last, fmt.Errorf("connection %c: %w", name, err))
		}
	}
	return nil
}

func (r *runner) failure(s *Script, st *step, err error) *ScriptError {
	f := &ScriptError{Script: s.Name, Line: st.line, Step: st.text, Why: err.Error()}
	for name := byte('A'); name < 'A'+MaxConns; name++ {
		if p := r.conns[name]; p != nil {
			p.mu.Lock()
			f.Trace = append(f.Trace, p.trace...)
			p.mu.Unlock()
		}
	}
	return f
}

func (r *runner) use(name byte) {
	if r.conns[name] == nil {
		p := newPeer(r.wire, string(name), r.base+uint16(name-'A'))
		p.begun = r.begun
		r.conns[name] = p
		r.wire.add(p)
	}
	r.p = r.conns[name]
}

func (r *runner) step(ctx context.Context, s *step) error {
	switch s.verb {
	case "<":
		return r.p.send(&s.seg)
	case "<<":
		return r.p.insist(ctx, &s.seg)
	case ">":
		return r.p.expect(ctx, &s.seg)
	case "open":
		return r.open(ctx, s)
	case "recv":
		return r.p.recv(ctx, s.n, s.data, true)
	case "gather":
		return r.p.recv(ctx, s.n, nil, false)
	case "icmp":
		return r.p.expectICMP(ctx, s.word)
	case "conn":
		r.use(s.word[0])
		return nil
	case "renew":
		if err := r.p.rest(); err != nil {
			return err
		}
		r.p.reset()
		return nil
	case "silence":
		return r.p.silence(ctx, s.wait)
	case "sleep":
		return sleep(ctx, s.wait)
	default: // a phase
		at := r.list[0]
		r.list = r.list[1:]
		for _, p := range r.conns {
			p.mu.Lock()
			p.note("-- %s", at)
			p.mu.Unlock()
		}
		err := r.await(at)
		for _, p := range r.conns {
			p.mu.Lock()
			p.note("-- %s: done", at)
			p.mu.Unlock()
		}
		return err
	}
}

// rto is how often a segment is repeated, as the least timeout of Linux is.
const rto = 200 * time.Millisecond

// insist sends a segment until it is acknowledged, in the background.
func (p *peer) insist(ctx context.Context, s *segment) error {
	p.mu.Lock()
	again, isn := *s, p.isn
	if again.seq == nil {
		from, to := p.next, p.next+len(s.text)
		again.seq, again.end, again.hasText = &from, &to, true
	}
	p.mu.Unlock()
	if err := p.send(&again); err != nil {
		return err
	}
	p.mu.Lock()
	end := p.next
	p.mu.Unlock()
	go func() {
		for sleep(ctx, rto) == nil {
			p.mu.Lock()
			over := p.heard >= end || p.isn != isn
			p.mu.Unlock()
			if over || p.send(&again) != nil {
				return
			}
		}
	}()
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// usual are the options of a client that says nothing else.
var usual, _ = parseOptions("<mss 1460,sackOK,ts,wscale 7>")

func (r *runner) open(ctx context.Context, s *step) error {
	opts := usual
	if s.own {
		opts = s.opts
	}
	if err := r.p.send(&segment{flags: tcpwrap.SYN, opts: opts, hasOpts: true}); err != nil {
		return err
	}
	one := 1
	if err := r.p.expect(ctx, &segment{flags: tcpwrap.SYN | tcpwrap.ACK, ack: &one}); err != nil {
		return err
	}
	return r.p.send(&segment{flags: tcpwrap.ACK})
}

// awaitEvent waits for the next event that is not passed over; match says whether it
// is wanted although it is no news. It consumes it.
func (p *peer) awaitEvent(ctx context.Context, limit time.Duration, match func(*event) bool) (e event, err error) {
	if limit == 0 {
		limit = patience
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	passed := 0
	for {
		p.mu.Lock()
		wrong := p.wrong
		for len(p.seen) > 0 && wrong == "" {
			e = p.seen[0]
			p.seen = p.seen[1:]
			if p.trim(&e) || match(&e) {
				p.mu.Unlock()
				return e, nil
			}
			passed++
		}
		p.mu.Unlock()
		if wrong != "" {
			return e, fmt.Errorf("the server's side breaks TCP: %s", wrong)
		}
		select {
		case <-p.came:
		case <-t.C:
			return e, fmt.Errorf("not seen within %v (%d segments without news passed over)", limit, passed)
		case <-ctx.Done():
			return e, ctx.Err()
		}
	}
}

func (p *peer) expect(ctx context.Context, want *segment) error {
	e, err := p.awaitEvent(ctx, want.within, func(e *event) bool { return p.differs(e, want) == "" })
	if err != nil {
		return err
	}
	if d := p.differs(&e, want); d != "" {
		return fmt.Errorf("%s: saw %s", d, &e)
	}
	p.mu.Lock()
	p.take(&e)
	p.mu.Unlock()
	return nil
}

// differs says how an event is not what a script wants.
func (p *peer) differs(e *event, w *segment) string {
	const compared = tcpwrap.SYN | tcpwrap.FIN | tcpwrap.RST | tcpwrap.ACK | tcpwrap.URG
	o := &e.s.Options
	switch {
	case e.icmp != "":
		return "wanted a segment"
	case e.s.Flags&compared != w.flags&compared:
		return fmt.Sprintf("wanted flags %s", flagText(w.flags))
	case w.seq != nil && (e.seq != *w.seq || e.seq+len(e.data) != *w.end):
		return fmt.Sprintf("wanted %d:%d", *w.seq, *w.end)
	case w.seq == nil && !w.hasText && len(e.data) > 0:
		return "wanted no data"
	case w.ack != nil && e.ack != *w.ack:
		return fmt.Sprintf("wanted ack %d", *w.ack)
	case w.win != nil && int(e.s.Window) != *w.win:
		return fmt.Sprintf("wanted win %d", *w.win)
	case w.hasText && !bytes.Equal(e.data, w.text):
		return fmt.Sprintf("wanted %.40q", w.text)
	case w.hasOpts && len(w.opts) == 0 && len(e.s.RawOptions) > 0:
		return "wanted no options"
	}
	if !w.hasText && len(e.data) > 0 {
		if want := AppendPattern(nil, p.local.Port(), e.seq-1, len(e.data)); !bytes.Equal(e.data, want) {
			return fmt.Sprintf("wanted the pattern, %.24q", want)
		}
	}
	for _, x := range w.opts {
		var there, equal bool
		switch x.name {
		case "mss":
			there, equal = o.MSS > 0, len(x.args) == 0 || int(o.MSS) == x.args[0]
		case "wscale":
			there, equal = o.WScale >= 0, len(x.args) == 0 || int(o.WScale) == x.args[0]
		case "sackOK":
			there, equal = o.SACKPermitted, true
		case "ts":
			there, equal = o.HasTS, len(x.args) == 0 || o.TSVal == uint32(x.args[0])
		case "sack":
			there, equal = o.NSACK > 0, 2*o.NSACK == len(x.args)
			for i := 0; equal && i < o.NSACK; i++ {
				equal = int(int32(o.SACK[i].Left-p.isn)) == x.args[2*i] && int(int32(o.SACK[i].Right-p.isn)) == x.args[2*i+1]
			}
		}
		switch {
		case x.no && there:
			return "wanted no " + x.name
		case !x.no && (!there || !equal):
			return fmt.Sprintf("wanted %s %v", x.name, x.args)
		}
	}
	return ""
}

func (p *peer) expectICMP(ctx context.Context, kind string) error {
	e, err := p.awaitEvent(ctx, 0, func(*event) bool { return false })
	if err != nil {
		return err
	}
	if e.icmp != kind {
		return fmt.Errorf("saw %s", &e)
	}
	return nil
}

// recv sees n octets more in order: the text, or when that is nil the pattern.
func (p *peer) recv(ctx context.Context, n int, text []byte, acknowledge bool) error {
	for {
		p.mu.Lock()
		from, here := p.taken, min(p.rcv-1, p.taken+n)
		due := acknowledge && p.acked < here+1
		done := here == from+n
		if done {
			p.taken = here
		}
		p.mu.Unlock()
		if due {
			upTo := here + 1
			if err := p.send(&segment{flags: tcpwrap.ACK, ack: &upTo}); err != nil {
				return err
			}
		}
		if done {
			return p.compare(from, n, text)
		}
		e, err := p.awaitEvent(ctx, 0, func(e *event) bool { return len(e.data) > 0 })
		if err != nil {
			return fmt.Errorf("after %d of %d octets: %w", here-from, n, err)
		}
		if e.icmp != "" || len(e.data) == 0 || e.s.Flags&(tcpwrap.RST|tcpwrap.SYN) != 0 {
			return fmt.Errorf("after %d of %d octets: saw %s", here-from, n, &e)
		}
		if e.s.Flags.Has(tcpwrap.FIN) { // another step's, and so may be the last octets
			f := e
			f.seq, f.data = e.seq+len(e.data), nil
			p.mu.Lock()
			p.seen = append([]event{f}, p.seen...)
			p.mu.Unlock()
		}
	}
}

// compare compares octets that were received.
func (p *peer) compare(from, n int, want []byte) error {
	if want == nil {
		want = AppendPattern(nil, p.local.Port(), from, n)
	}
	p.mu.Lock()
	got := bytes.Clone(p.octets[from : from+n])
	p.mu.Unlock()
	for i := range want {
		if got[i] != want[i] {
			return fmt.Errorf("octet %d is wrong: wanted %.24q, saw %.24q", from+1+i, want[i:], got[i:])
		}
	}
	return nil
}

func (p *peer) silence(ctx context.Context, d time.Duration) error {
	p.mu.Lock()
	p.seen = slices.DeleteFunc(p.seen, func(e event) bool { return !p.trim(&e) }) // it came before
	p.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		p.mu.Lock()
		var e *event
		if len(p.seen) > 0 {
			e = &p.seen[0]
		}
		wrong := p.wrong
		p.mu.Unlock()
		switch {
		case wrong != "":
			return fmt.Errorf("the server's side breaks TCP: %s", wrong)
		case e != nil:
			return fmt.Errorf("saw %s", e)
		}
		select {
		case <-p.came:
		case <-t.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// rest looks for what no step has seen.
func (p *peer) rest() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wrong != "" {
		return errors.New("the server's side breaks TCP: " + p.wrong)
	}
	for i := range p.seen {
		if e := &p.seen[i]; p.trim(e) {
			return fmt.Errorf("left over: %s", e)
		}
	}
	return nil
}
