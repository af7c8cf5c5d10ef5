package tcpwrap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// Translated is one connection whose numbers are translated.
type Translated struct {
	Tuple       stream.FourTuple `json:"tuple"` // as on the wire
	Translation Translation      `json:"translation"`
	// ClientISN and ServerISN are those of its handshake, as the client knows
	// them: a SYN-ACK with other numbers begins another connection.
	ClientISN seqnum.Value `json:"client_isn"`
	ServerISN seqnum.Value `json:"server_isn"`
}

// Translator is a Datapath that translates some connections (Translation): what
// it hands out and what it takes, SendUp and SendOut too, has the clients'
// numbers, and the datapath under it has those of the server's TCP. Nobody above
// need know which connections these are.
//
// It also makes connections again (Rebirth): their SYN-ACK never shows above.
//
// An entry is there for as long as TCP has the connection: until another one
// begins with the same addresses, or until Sweep does not find it any more.
// While there are none a packet costs nothing but the look whether there are.
//
// Its methods are for any goroutine, but Recv, as in Datapath.
type Translator struct {
	dp  Datapath
	any atomic.Bool // there is something in here

	mu      sync.Mutex
	wire    map[stream.FourTuple]*Translated // by the addresses on the wire
	tcp     map[stream.FourTuple]*Translated // by those that TCP has
	births  map[stream.FourTuple]*birth      // not answered yet
	told    map[stream.FourTuple]*birth      // answered; for a SYN-ACK that is repeated
	hopes   map[stream.FourTuple]bool        // may be translated by the time of the verdict
	kept    map[PacketID]keptPacket
	octets  int // in kept
	spare   [][]byte
	scratch []byte
	changed func(e *Translated, there bool)
	refused uint64
}

// keptPacket is a copy of a caught packet: as the client sent it, or as the
// client is to get it.
type keptPacket struct {
	wire stream.FourTuple
	dir  Direction
	ip   []byte
}

type birth struct {
	r    Rebirth
	done func(error)
	ack  []byte // the end of the handshake, in TCP's numbers
}

const (
	// maxKept bounds the copies of packets that wait for their verdict, in octets;
	// what is beyond is dropped, and sent again.
	maxKept = 64 << 20
	// maxSpare is how many of their buffers are kept for the next ones.
	maxSpare = 64
)

var _ Datapath = (*Translator)(nil)

// NewTranslator makes a translator with no connections in it. changed, if not
// nil, hears of every entry before the first packet is translated by it and
// after it is gone, so that a successor of this process can Put it; it must not
// call back.
func NewTranslator(dp Datapath, changed func(e *Translated, there bool)) *Translator {
	if changed == nil {
		changed = func(*Translated, bool) {}
	}
	return &Translator{
		dp: dp, changed: changed,
		wire: map[stream.FourTuple]*Translated{}, tcp: map[stream.FourTuple]*Translated{},
		births: map[stream.FourTuple]*birth{}, told: map[stream.FourTuple]*birth{},
		hopes: map[stream.FourTuple]bool{}, kept: map[PacketID]keptPacket{},
	}
}

// Put has a connection translated from now on.
func (t *Translator) Put(e Translated) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.put(&e)
}

func (t *Translator) put(e *Translated) {
	t.remove(t.wire[e.Tuple])
	t.changed(e, true)
	t.wire[e.Tuple] = e
	t.tcp[e.Translation.TCPTuple(e.Tuple)] = e
	t.any.Store(true)
}

func (t *Translator) remove(e *Translated) {
	if e == nil {
		return
	}
	delete(t.wire, e.Tuple)
	delete(t.tcp, e.Translation.TCPTuple(e.Tuple))
	delete(t.told, e.Tuple)
	t.changed(e, false)
}

// Get answers how a connection is translated, which TCP has at those addresses.
func (t *Translator) Get(tcp stream.FourTuple) (Translation, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.tcp[tcp]; e != nil {
		return e.Translation, true
	}
	return Translation{}, false
}

// Len is the number of translated connections.
func (t *Translator) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.wire)
}

// Sweep lets go of the connections that TCP does not have any more: list answers
// the addresses of those that it has, as TCP has them. One that is born while it
// is being asked stays. What TCP says about one it does not know is a reset made
// of the packet that it answers, and needs no translation.
func (t *Translator) Sweep(list func() (map[stream.FourTuple]bool, error)) error {
	t.mu.Lock()
	before := maps.Clone(t.tcp)
	t.mu.Unlock()
	there, err := list()
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for tuple, e := range before {
		if !there[tuple] && t.tcp[tuple] == e {
			t.remove(e)
		}
	}
	t.any.Store(len(t.wire)+len(t.births)+len(t.hopes)+len(t.kept) > 0)
	return nil
}

// Expect says which connections may be translated by the time their clients'
// packets get a verdict, instead of those it said before: a packet that is caught
// before TCP has its connection, and let up afterwards, must be translated, too.
func (t *Translator) Expect(wire []stream.FourTuple) {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.hopes)
	for _, c := range wire {
		t.hopes[c] = true
		t.any.Store(true)
	}
}

// Recreate has TCP make a connection again: its SYN goes up, and when TCP has
// answered, the connection is translated and done(nil) is called, from within
// Recv. An error of done is for good. While TCP has not answered, Recreate may be
// called again, which repeats the SYN, and afterwards it repeats the ACK that
// ends the handshake.
func (t *Translator) Recreate(r Rebirth, done func(error)) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if b := t.told[r.Tuple]; b != nil && b.r.ClientISN == r.ClientISN && b.r.ServerISN == r.ServerISN {
		if err := t.dp.SendUp(b.ack); err != nil {
			return fmt.Errorf("make %v again: %w", r.Tuple, err)
		}
		return nil
	}
	t.births[r.Tuple] = &birth{r: r, done: done}
	t.any.Store(true)
	syn := r.SYN()
	p := AppendOutgoing(nil, &syn)
	if len(p) == 0 {
		delete(t.births, r.Tuple)
		return fmt.Errorf("make %v again: %w", r.Tuple, ErrUnsuitable)
	}
	if err := t.dp.SendUp(p); err != nil {
		return fmt.Errorf("make %v again: %w", r.Tuple, err)
	}
	return nil
}

// Forget gives up a Recreate that has not been answered.
func (t *Translator) Forget(wire stream.FourTuple) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.births, wire)
}

// Recv implements Datapath.
func (t *Translator) Recv(dst []Packet) ([]Packet, error) {
	start := len(dst)
	for {
		var err error
		if dst, err = t.dp.Recv(dst); !t.any.Load() {
			return dst, err
		}
		var after []func()
		dst, after = t.caught(dst, start)
		for _, f := range after {
			f()
		}
		if err != nil || len(dst) > start {
			return dst, err
		}
		if err := t.dp.Flush(); err != nil && !errors.Is(err, ErrClosed) {
			return dst, err
		}
	}
}

// caught translates the packets from start on, and takes out those that are
// nobody's affair above.
func (t *Translator) caught(packets []Packet, start int) (rest []Packet, after []func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	rest = packets[:start]
	for i := start; i < len(packets); i++ {
		p := packets[i]
		swallowed, then := t.packet(&p)
		if then != nil {
			after = append(after, then)
		}
		if swallowed {
			t.dp.Verdict(p.ID, Drop)
			continue
		}
		rest = append(rest, p)
	}
	return rest, after
}

func (t *Translator) packet(p *Packet) (swallowed bool, then func()) {
	tuple, flags, ok := peek(p.Data, p.Dir)
	if !ok || p.Corrupt { // nobody lets it go on
		return false, nil
	}
	if p.Dir == Inbound { // it is translated when it goes up
		if t.wire[tuple] == nil && !t.hopes[tuple] {
			return false, nil
		}
		_, ok := t.keep(p, tuple)
		return !ok, nil
	}
	if flags.Has(SYN | ACK) {
		if swallowed, then = t.answered(tuple, p); swallowed {
			return true, then
		}
	}
	if flags.Has(SYN) && !flags.Has(ACK) {
		t.dialled(tuple, p)
	}
	if b := t.births[tuple]; b != nil && flags.Has(RST|ACK) && b.r.refuses(p) {
		return true, nil // no such listener yet; whoever asked asks again
	}
	if e := t.tcp[tuple]; e != nil {
		b, ok := t.keep(p, e.Tuple)
		if !ok {
			return true, nil
		}
		if !e.Translation.ToClient(b) {
			return true, nil
		}
		p.Data = b // good until the next Recv at least: only that takes spare buffers
	}
	return false, nil
}

// refuses reports whether an outbound packet is the reset that answers SYN.
func (r *Rebirth) refuses(p *Packet) bool {
	var s Segment
	return ParseSegment(p.Data, Outbound, &s) == nil && s.Flags.Has(RST|ACK) && s.Seq == 0 && s.Ack == r.ClientISN.Add(1)
}

// dialled takes a SYN of TCP's: with other numbers than before it begins another
// connection, from a port that is free, and of what was there before nothing is
// translated any more.
func (t *Translator) dialled(tcp stream.FourTuple, p *Packet) {
	var s Segment
	if ParseSegment(p.Data, Outbound, &s) != nil {
		return
	}
	if e := t.tcp[tcp]; e != nil && s.Seq.Add(e.Translation.Seq) != e.ServerISN {
		t.remove(e)
	}
	if e := t.wire[tcp]; e != nil && t.tcp[tcp] != e {
		t.remove(e)
	}
}

// answered takes a SYN-ACK of TCP's.
func (t *Translator) answered(tcp stream.FourTuple, p *Packet) (swallowed bool, then func()) {
	var s Segment
	if ParseSegment(p.Data, Outbound, &s) != nil {
		return false, nil
	}
	if b := t.births[tcp]; b != nil && b.r.Answers(&s) {
		tr, ack, err := b.r.Answer(&s, time.Now())
		if err != nil {
			delete(t.births, tcp)
			return true, func() { b.done(err) }
		}
		delete(t.births, tcp)
		b.ack = AppendOutgoing(nil, &ack)
		t.put(&Translated{Tuple: b.r.Tuple, Translation: tr, ClientISN: b.r.ClientISN, ServerISN: b.r.ServerISN})
		t.told[b.r.Tuple] = b
		return true, func() {
			_ = t.dp.SendUp(b.ack) // a lost one is made good by the first data, or by TCP's repeating itself
			b.done(nil)
		}
	}
	e := t.tcp[tcp]
	if e == nil {
		return false, nil
	}
	if s.Seq.Add(e.Translation.Seq) == e.ServerISN && s.Ack == e.ClientISN.Add(1) {
		if b := t.told[e.Tuple]; b != nil { // TCP has not got the ACK
			return true, func() { _ = t.dp.SendUp(b.ack) } // it asks again
		}
		return true, nil
	}
	t.remove(e) // another connection begins here
	return false, nil
}

// keep copies a packet for the time of its verdict.
func (t *Translator) keep(p *Packet, wire stream.FourTuple) ([]byte, bool) {
	if t.octets+len(p.Data) > maxKept {
		t.refused++
		return nil, false
	}
	var b []byte
	if n := len(t.spare); n > 0 {
		b, t.spare = t.spare[n-1], t.spare[:n-1]
	}
	b = append(b[:0], p.Data...)
	t.kept[p.ID] = keptPacket{wire, p.Dir, b}
	t.octets += len(b)
	return b, true
}

// Verdict implements Datapath.
func (t *Translator) Verdict(id PacketID, v Verdict) { t.decide(id, v, nil) }

// Rewrite implements Datapath; ip has the client's numbers.
func (t *Translator) Rewrite(id PacketID, ip []byte) { t.decide(id, Accept, ip) }

// decide gives a verdict; instead, if not nil, goes on in place of the packet.
func (t *Translator) decide(id PacketID, v Verdict, instead []byte) {
	if !t.any.Load() {
		t.pass(id, v, instead)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	k, ok := t.kept[id]
	if !ok {
		t.pass(id, v, instead)
		return
	}
	delete(t.kept, id)
	t.octets -= len(k.ip)
	if len(t.spare) < maxSpare {
		t.spare = append(t.spare, k.ip)
	}
	e := t.wire[k.wire]
	if v != Accept || k.dir == Inbound && e == nil {
		t.pass(id, v, instead)
		return
	}
	ip := k.ip
	if instead != nil {
		t.scratch = append(t.scratch[:0], instead...)
		ip = t.scratch
	}
	if k.dir == Inbound && !e.Translation.ToServer(ip) {
		t.pass(id, Drop, nil)
		return
	}
	t.dp.Rewrite(id, ip)
}

// pass gives a verdict on a packet that needs no translation.
func (t *Translator) pass(id PacketID, v Verdict, instead []byte) {
	if v == Accept && instead != nil {
		t.dp.Rewrite(id, instead)
		return
	}
	t.dp.Verdict(id, v)
}

// Flush implements Datapath.
func (t *Translator) Flush() error { return t.dp.Flush() }

// SendUp implements Datapath.
func (t *Translator) SendUp(ip []byte) error {
	if !t.any.Load() {
		return t.dp.SendUp(ip)
	}
	t.mu.Lock()
	tuple, _, ok := peek(ip, Inbound)
	e := t.wire[tuple]
	if !ok || e == nil {
		t.mu.Unlock()
		return t.dp.SendUp(ip)
	}
	defer t.mu.Unlock()
	t.scratch = append(t.scratch[:0], ip...)
	e.Translation.ToServer(t.scratch)
	return t.dp.SendUp(t.scratch)
}

// SendOut implements Datapath. The packet goes to the client, whose numbers it
// has.
func (t *Translator) SendOut(ip []byte) error { return t.dp.SendOut(ip) }

// Drops implements Datapath; what there was no room for to translate is among
// them.
func (t *Translator) Drops() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dp.Drops() + t.refused
}

// Close implements Datapath.
func (t *Translator) Close() error { return t.dp.Close() }

// peek reads who a packet is of, and its flags; ok is false for what is no TCP
// segment.
func peek(ip []byte, dir Direction) (t stream.FourTuple, fl Flags, ok bool) {
	w, err := locate(ip)
	if err != nil {
		return t, 0, false
	}
	h := ip[w.hdr:w.end]
	var src, dst netip.Addr
	if w.v6 {
		src, dst = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
	} else {
		src, dst = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
	}
	from := netip.AddrPortFrom(src, binary.BigEndian.Uint16(h))
	to := netip.AddrPortFrom(dst, binary.BigEndian.Uint16(h[2:]))
	if dir == Inbound {
		return stream.FourTuple{Server: to, Client: from}, Flags(h[13] & 0x3f), true
	}
	return stream.FourTuple{Server: from, Client: to}, Flags(h[13] & 0x3f), true
}
