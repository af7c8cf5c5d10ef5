package stream

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

var t0 = time.Unix(1_000_000, 0)

func testMachine() *machine {
	return newMachine(Fence{Epoch: 2, Node: "a", Seq: 10, Nonce: [16]byte{1}}, 100, 9, ackTimeout, 1<<20, t0)
}

func mark(p Position) Record { return Bytes{Conn: 1, Seq: seqnum.Value(p), Payload: []byte("x")} }

// expect runs step and holds its answer to a kind.
func expect(t *testing.T, m *machine, now time.Time, kind actionKind) action {
	t.Helper()
	a := m.step(now)
	if a.kind != kind {
		t.Fatalf("step gives action %d (%+v), want %d", a.kind, a, kind)
	}
	return a
}

func appendN(t *testing.T, m *machine, n int) {
	t.Helper()
	for range n {
		if err := m.append(m.next, mark(m.next)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMachineOneInFlightAndCoalescing(t *testing.T) {
	m := testMachine()
	expect(t, m, t0, actWait)
	appendN(t, m, 1)
	a := expect(t, m, t0, actPublish)
	if a.batch.exp != 10 || a.batch.first != 101 || a.batch.count != 1 || a.batch.num != 0 {
		t.Fatalf("first batch %+v", a.batch)
	}
	appendN(t, m, 5)
	if w := expect(t, m, t0, actWait); !w.until.Equal(t0.Add(ackTimeout)) {
		t.Fatalf("waits until %v", w.until)
	}
	m.acked(t0, 7, 11) // of another attempt
	expect(t, m, t0, actWait)
	m.acked(t0, 0, 11)
	// A small batch goes first, so that the server has work during the notice.
	a = expect(t, m, t0, actPublish)
	if a.batch.exp != 11 || a.batch.first != 102 || a.batch.count != 5 || a.batch.num != 1 {
		t.Fatalf("second batch %+v", a.batch)
	}
	if s := expect(t, m, t0, actStable); s.upTo != 101 {
		t.Fatalf("stable %d", s.upTo)
	}
	b, err := DecodeBatch(a.batch.buf)
	if err != nil || b.Epoch != 2 || b.Number != 1 || b.First != 102 || len(b.Records) != 5 {
		t.Fatalf("%+v, %v", b, err)
	}
	m.acked(t0, 1, 12)
	if s := expect(t, m, t0, actStable); s.upTo != 106 {
		t.Fatalf("stable %d", s.upTo)
	}
	if m.backlog != 0 {
		t.Fatalf("backlog %d with everything stable", m.backlog)
	}
	for p, want := range map[Position]StreamSeq{101: 11, 102: 12, 106: 12} {
		if got, ok := m.seqOf(p); !ok || got != want {
			t.Errorf("position %d is in %d, %v; want %d", p, got, ok, want)
		}
	}
	for _, p := range []Position{100, 107} {
		if got, ok := m.seqOf(p); ok {
			t.Errorf("position %d is said to be in %d", p, got)
		}
	}
}

func TestMachineLargeBatchAfterNotice(t *testing.T) {
	m := testMachine()
	appendN(t, m, 1)
	expect(t, m, t0, actPublish)
	if err := m.append(m.next, Bytes{Payload: make([]byte, 60000)}); err != nil {
		t.Fatal(err)
	}
	m.acked(t0, 0, 11)
	expect(t, m, t0, actStable)
	expect(t, m, t0, actPublish)
}

func TestMachineSplitsBatches(t *testing.T) {
	m := testMachine()
	for range 30 {
		if err := m.append(m.next, Bytes{Payload: make([]byte, MaxPayload)}); err != nil {
			if !errors.Is(err, ErrBacklog) {
				t.Fatal(err)
			}
			break
		}
	}
	if m.backlog < 1<<20 || m.backlog > 1<<20+maxRecord {
		t.Fatalf("backlog bound of %d not held: %d", 1<<20, m.backlog)
	}
	refused := m.next
	var got Position = 100
	for seq := StreamSeq(11); got+1 < refused; seq++ {
		a := m.step(t0)
		if a.kind == actStable {
			seq--
			continue
		}
		if a.kind != actPublish || len(a.batch.buf) > MaxBatch || a.batch.first != got+1 {
			t.Fatalf("%+v", a)
		}
		if _, err := DecodeBatch(a.batch.buf); err != nil {
			t.Fatal(err)
		}
		got = a.batch.last()
		m.acked(t0, a.batch.num, seq)
	}
	if err := m.append(refused, mark(refused)); err != nil {
		t.Fatalf("room again, but: %v", err)
	}
}

func TestMachineAppendErrors(t *testing.T) {
	m := testMachine()
	if err := m.append(100, mark(1)); !errors.Is(err, ErrOrder) {
		t.Fatal(err)
	}
	if err := m.append(101, Bytes{Payload: make([]byte, MaxPayload+1)}); !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
	expect(t, m, t0, actWait) // no empty batch is left behind
	appendN(t, m, 1)
	if err := m.append(102, ConnEnd{}); !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
	if a := expect(t, m, t0, actPublish); a.batch.num != 0 || a.batch.count != 1 {
		t.Fatalf("%+v", a.batch)
	}
}

// TestMachineSettling is the table of what an ambiguous append can turn out to be.
func TestMachineSettling(t *testing.T) {
	ours := Fence{Epoch: 2, Seq: 10, Nonce: [16]byte{1}}
	for _, c := range []struct {
		name   string
		fence  Fence
		what   found
		epoch  Epoch
		num    uint64
		then   actionKind
		err    error
		stable Position
	}{
		{name: "it was stored", fence: ours, what: foundBatch, epoch: 2, num: 0, then: actStable, stable: 101},
		{name: "it was not", fence: ours, what: foundNothing, then: actPublish, stable: 100},
		{name: "another batch of ours is there", fence: ours, what: foundBatch, epoch: 2, num: 5, then: actEnd, err: ErrFenced, stable: 100},
		{name: "another epoch's batch is there", fence: ours, what: foundBatch, epoch: 3, num: 0, then: actEnd, err: ErrFenced, stable: 100},
		{name: "something else is there", fence: ours, what: foundOther, then: actEnd, err: ErrFenced, stable: 100},
		{name: "fenced", fence: Fence{Epoch: 3, Seq: 11, Node: "b"}, then: actEnd, err: ErrFenced, stable: 100},
		{name: "fenced at the same place after a loss", fence: Fence{Epoch: 2, Seq: 10, Nonce: [16]byte{2}}, then: actEnd, err: ErrFenced, stable: 100},
		{name: "the log has gone back", fence: Fence{Epoch: 1, Seq: 1}, then: actWait, err: ErrRolledBack, stable: 100},
		{name: "the log is empty", fence: Fence{}, then: actWait, err: ErrRolledBack, stable: 100},
	} {
		for how, upset := range map[string]func(*machine){
			"timeout":      func(m *machine) {}, // step sees it
			"wrong ack":    func(m *machine) { m.acked(t0, 0, 12) },
			"refused":      func(m *machine) { m.rejected(t0, 0, ErrRefused) },
			"disconnected": func(m *machine) { m.lost(t0, ErrUnreachable) },
		} {
			t.Run(c.name+"/"+how, func(t *testing.T) {
				m := testMachine()
				appendN(t, m, 1)
				first := expect(t, m, t0, actPublish)
				now := t0
				if how == "timeout" {
					expect(t, m, t0.Add(ackTimeout-1), actWait)
					now = t0.Add(ackTimeout)
				}
				upset(m)
				expect(t, m, now, actConnect)
				if st := m.state(); st.Phase != WriterStalled || st.Err == nil {
					t.Fatalf("state %+v", st)
				}
				m.lost(now, ErrUnreachable) // the dial fails once
				w := expect(t, m, now, actWait)
				now = w.until
				expect(t, m, now, actConnect)
				m.connected(now)
				expect(t, m, now, actFence)
				m.fenceRead(now, c.fence)
				if c.fence == ours {
					if a := expect(t, m, now, actRead); a.seq != 11 {
						t.Fatalf("reads %d", a.seq)
					}
					m.seqRead(now, c.what, c.epoch, c.num)
				}
				a := expect(t, m, now, c.then)
				if m.stable != c.stable {
					t.Fatalf("stable %d, want %d", m.stable, c.stable)
				}
				switch c.then {
				case actPublish:
					if a.batch != first.batch || a.batch.exp != 10 {
						t.Fatalf("sends another batch: %+v", a.batch)
					}
					m.acked(now, 0, 11)
					expect(t, m, now, actStable)
				case actEnd:
					if !errors.Is(a.err, c.err) || m.state().Phase != WriterFenced {
						t.Fatal(a.err, m.state())
					}
					if err := m.append(m.next, mark(1)); !errors.Is(err, ErrFenced) {
						t.Fatal(err)
					}
				case actWait:
					if st := m.state(); st.Phase != WriterStalled || !errors.Is(st.Err, c.err) {
						t.Fatalf("state %+v", st)
					}
					expect(t, m, a.until, actConnect) // it never gives up
				}
				if c.then == actStable || c.then == actPublish {
					if st := m.state(); st.Phase != WriterOK {
						t.Fatalf("state %+v", st)
					}
				}
			})
		}
	}
}

func TestMachineFull(t *testing.T) {
	m := testMachine()
	appendN(t, m, 1)
	now := t0
	for range 20 {
		a := expect(t, m, now, actPublish)
		m.rejected(now, a.batch.num, ErrFull)
		w := expect(t, m, now, actWait)
		if d := w.until.Sub(now); d <= 0 || d > mostBackoff {
			t.Fatalf("pause of %v", d)
		}
		if st := m.state(); st.Phase != WriterStalled || !errors.Is(st.Err, ErrFull) || st.Since != t0 {
			t.Fatalf("state %+v", st)
		}
		now = w.until
		expect(t, m, now, actConnect)
		m.connected(now)
		expect(t, m, now, actFence)
		m.fenceRead(now, m.fence)
		expect(t, m, now, actRead)
		m.seqRead(now, foundNothing, 0, 0)
	}
	a := expect(t, m, now, actPublish)
	m.acked(now, a.batch.num, 11)
	expect(t, m, now, actStable)
	if st := m.state(); st.Phase != WriterOK {
		t.Fatalf("state %+v", st)
	}
}

func TestMachineIdleNoticesItsFence(t *testing.T) {
	for name, notice := range map[string]func(*machine) time.Time{
		"by itself": func(m *machine) time.Time { return t0.Add(idleCheck) },
		"by a hint": func(m *machine) time.Time { m.hint(t0); return t0 },
	} {
		m := testMachine()
		expect(t, m, t0, actWait)
		now := notice(m)
		expect(t, m, now, actFence)
		m.fenceRead(now, Fence{Epoch: 3, Seq: 11, Node: "b"})
		if a := expect(t, m, now, actEnd); !errors.Is(a.err, ErrFenced) {
			t.Errorf("%s: %v", name, a.err)
		}
	}
	m := testMachine()
	m.hint(t0)
	expect(t, m, t0, actFence)
	m.fenceRead(t0, m.fence) // a false alarm
	expect(t, m, t0, actWait)
}

// world is a JetStream of one stream as the measurements showed it, behind a
// network that loses, delays and repeats nothing but what the test tells it
// to.
type world struct {
	msgs    []stored // msgs[i] has sequence i+1
	late    []late   // publishes that are still on their way
	full    bool
	fenceAt StreamSeq
}

type stored struct {
	fence *Fence
	batch Batch
}

type late struct {
	buf   []byte
	exp   StreamSeq
	fence StreamSeq
}

func (w *world) last() StreamSeq { return StreamSeq(len(w.msgs)) }

// publish is the server's side of an append: both conditions, then storing.
func (w *world) publish(l late) (StreamSeq, error) {
	if l.exp != w.last() || l.fence != w.fenceAt {
		return 0, fmt.Errorf("%w: wrong last sequence", ErrRefused)
	}
	if w.full {
		return 0, ErrFull
	}
	b, err := DecodeBatch(l.buf)
	if err != nil {
		return 0, err
	}
	w.msgs = append(w.msgs, stored{batch: b})
	return w.last(), nil
}

func (w *world) newestFence() Fence {
	if w.fenceAt == 0 {
		return Fence{}
	}
	return *w.msgs[w.fenceAt-1].fence
}

func (w *world) tail() (Position, StreamSeq) {
	for i := len(w.msgs) - 1; i >= 0; i-- {
		if w.msgs[i].fence == nil {
			return w.msgs[i].batch.Last(), StreamSeq(i + 1)
		}
	}
	return 0, 0
}

func (w *world) takeover(node string, now time.Time) *machine {
	prev := w.newestFence()
	f := Fence{Epoch: prev.Epoch + 1, Node: node, Prev: prev.Seq, Seq: w.last() + 1, Nonce: [16]byte{byte(prev.Epoch + 1)}}
	w.msgs = append(w.msgs, stored{fence: &f})
	w.fenceAt = f.Seq
	stable, newest := w.tail()
	return newMachine(f, stable, newest, ackTimeout, 1<<20, now)
}

// check reads the whole log as a Reader does.
func (w *world) check(t *rapid.T) (Position, map[Position]seqnum.Value) {
	var f follower
	content := map[Position]seqnum.Value{}
	for i, m := range w.msgs {
		if m.fence != nil {
			if err := f.fence(*m.fence); err != nil {
				t.Fatal(err)
			}
			continue
		}
		stale, err := f.batch(&m.batch, StreamSeq(i+1))
		if err != nil {
			t.Fatal(err)
		}
		if stale {
			t.Fatalf("a stale batch of epoch %d was stored at %d, after epoch %d", m.batch.Epoch, i+1, f.epoch)
		}
		for j, r := range m.batch.Records {
			content[m.batch.First+Position(j)] = r.(Bytes).Seq
		}
	}
	return f.pos, content
}

// driver runs one machine against the world.
type driver struct {
	m        *machine
	told     Position
	appended map[Position]seqnum.Value
	ended    error
}

// once does one thing the machine wants, with a fault of the given kind, and
// returns how long the machine wants to wait.
func (d *driver) once(t *rapid.T, w *world, now time.Time, fault int) time.Time {
	a := d.m.step(now)
	switch a.kind {
	case actWait, actGather:
		return a.until
	case actConnect:
		if fault == 1 {
			d.m.lost(now, ErrUnreachable)
		} else {
			d.m.connected(now)
		}
	case actFence:
		if fault == 1 {
			d.m.lost(now, ErrUnreachable)
		} else {
			d.m.fenceRead(now, w.newestFence())
		}
	case actRead:
		switch {
		case fault == 1:
			d.m.lost(now, ErrUnreachable)
		case a.seq > w.last():
			d.m.seqRead(now, foundNothing, 0, 0)
		case w.msgs[a.seq-1].fence != nil:
			d.m.seqRead(now, foundOther, 0, 0)
		default:
			b := w.msgs[a.seq-1].batch
			d.m.seqRead(now, foundBatch, b.Epoch, b.Number)
		}
	case actPublish:
		l := late{append([]byte(nil), a.batch.buf...), a.batch.exp, d.m.fence.Seq}
		switch fault {
		case 1: // lost on the way there
			d.m.lost(now, ErrUnreachable)
		case 2: // stored, the answer lost with the connection
			_, _ = w.publish(l)
			d.m.lost(now, ErrUnreachable)
		case 3: // late, and no answer ever
			w.late = append(w.late, l)
		case 4: // stored, no answer ever
			_, _ = w.publish(l)
		case 5: // late, and the connection lost
			w.late = append(w.late, l)
			d.m.lost(now, ErrUnreachable)
		default:
			if seq, err := w.publish(l); err != nil {
				d.m.rejected(now, a.batch.num, err)
			} else {
				d.m.acked(now, a.batch.num, seq)
			}
		}
	case actStable:
		if a.upTo <= d.told {
			t.Fatalf("stable %d told after %d", a.upTo, d.told)
		}
		d.told = a.upTo
		_, content := w.check(t)
		for p, v := range d.appended {
			if got, ok := content[p]; p <= d.told && (!ok || got != v) {
				t.Fatalf("position %d was told stable with %d, the log has %d (%v)", p, v, got, ok)
			}
		}
		if seq, ok := d.m.seqOf(a.upTo); !ok || w.msgs[seq-1].batch.Last() != a.upTo {
			t.Fatalf("position %d is said to be in message %d (%v)", a.upTo, seq, ok)
		}
	case actEnd:
		d.ended = a.err
		if !errors.Is(a.err, ErrFenced) || w.newestFence().Epoch <= d.m.fence.Epoch {
			t.Fatalf("ended with %v while the newest fence is of epoch %d", a.err, w.newestFence().Epoch)
		}
	}
	return now
}

// TestMachineAgainstFaultyServer: writers take over from one another, while
// publishes get lost, late or unanswered and the log fills up. No position is
// told stable that the log does not have, nothing of an old epoch is stored
// after a fence, there is no hole, and when the network is well again all that
// the last writer appended becomes stable.
func TestMachineAgainstFaultyServer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := t0
		w := &world{}
		writers := []*driver{{m: w.takeover("n0", now), appended: map[Position]seqnum.Value{}}}
		value := seqnum.Value(0)
		steps := rapid.IntRange(1, 300).Draw(t, "steps")
		for range steps {
			d := writers[rapid.IntRange(max(0, len(writers)-2), len(writers)-1).Draw(t, "who")]
			switch k := rapid.IntRange(0, 99).Draw(t, "what"); {
			case k < 30:
				value++
				p := d.m.next
				if err := d.m.append(p, Bytes{Conn: 1, Seq: value, Payload: []byte("x")}); err == nil {
					d.appended[p] = value
				} else if !errors.Is(err, ErrFenced) {
					t.Fatal(err)
				}
			case k < 80:
				if d.ended == nil {
					d.once(t, w, now, rapid.IntRange(0, 12).Draw(t, "fault"))
				}
			case k < 85:
				if len(w.late) > 0 {
					i := rapid.IntRange(0, len(w.late)-1).Draw(t, "late")
					l := w.late[i]
					w.late = append(w.late[:i], w.late[i+1:]...)
					_, _ = w.publish(l) // stored or refused: the answer goes nowhere
				}
			case k < 95:
				now = now.Add(time.Duration(rapid.IntRange(1, 600).Draw(t, "ms")) * time.Millisecond)
			case k < 97:
				w.full = !w.full
			case k < 98:
				d.m.hint(now)
			case len(writers) < 6:
				writers = append(writers, &driver{m: w.takeover(fmt.Sprint("n", len(writers)), now), appended: map[Position]seqnum.Value{}})
			}
		}
		w.full = false
		for range 1000 { // the network is well again
			busy := false
			for _, d := range writers {
				if d.ended == nil {
					until := d.once(t, w, now, 0)
					busy = busy || !until.After(now)
				}
			}
			if !busy {
				now = now.Add(100 * time.Millisecond)
			}
		}
		for _, l := range w.late {
			_, _ = w.publish(l)
		}
		end, content := w.check(t)
		for i, d := range writers {
			if i < len(writers)-1 {
				if !errors.Is(d.ended, ErrFenced) {
					t.Fatalf("writer %d of %d does not know that it is fenced: %+v", i, len(writers), d.m.state())
				}
				continue
			}
			if d.ended != nil || d.told != d.m.next-1 && d.m.next-1 != d.m.stable || end != d.m.next-1 || d.m.backlog != 0 {
				t.Fatalf("the last writer told %d of %d, the log has %d; state %+v", d.told, d.m.next-1, end, d.m.state())
			}
			for p, v := range d.appended {
				if content[p] != v {
					t.Fatalf("position %d: the log has %d, appended was %d", p, content[p], v)
				}
			}
		}
	})
}
