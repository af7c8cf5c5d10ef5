package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"
)

func TestConformance(t *testing.T) {
	for name, start := range map[string]func(*testing.T) *target{
		"embedded": embedded, "process": separate, "cluster": cluster,
	} {
		t.Run(name, func(t *testing.T) {
			tg := start(t)
			tg.open(t, "warmup", nil, nil).Close()
			for _, c := range []struct {
				name string
				f    func(*testing.T, *target)
			}{
				{"order", testOrder},
				{"takeovers", testTakeovers},
				{"one wins", testOneWins},
				{"ambiguous", testAmbiguous},
				{"unreachable", testUnreachable},
				{"full", testFull},
				{"purge", testPurge},
				{"stale", testStale},
				{"tail", testTail},
				{"crash", testCrash},
				{"store", testStore},
				{"beats", testBeats},
			} {
				t.Run(c.name, func(t *testing.T) {
					before := goleak.IgnoreCurrent()
					ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
					defer cancel()
					t.Cleanup(func() {
						// Runs last: everything the test opened is closed by now.
						if tg.name != "embedded" { // a server's goroutines come and go as they like
							goleak.VerifyNone(t, before)
						}
						if ctx.Err() == context.DeadlineExceeded {
							t.Error("took more than a minute")
						}
					})
					c.f(t, tg)
				})
			}
		})
	}
}

// load appends records whose content says their epoch and position, as fast as
// the bound on the backlog allows.
type load struct {
	t     *testing.T
	w     *Writer
	first Position
	told  atomic.Uint64 // Position
	ended chan error
	stop  chan struct{}
	wg    sync.WaitGroup
}

const payloadSize = 200

func payload(dst []byte, e Epoch, p Position) []byte {
	dst = be.AppendUint64(be.AppendUint64(dst[:0], uint64(e)), uint64(p))
	return append(dst, make([]byte, payloadSize-16)...)
}

func startLoad(t *testing.T, w *Writer) *load {
	ld := &load{t: t, w: w, first: w.Next(), ended: make(chan error, 1), stop: make(chan struct{})}
	ld.told.Store(uint64(w.Stable()))
	w.OnStable(func(p Position) {
		if was := Position(ld.told.Swap(uint64(p))); p <= was {
			t.Errorf("stable %d told after %d", p, was)
		}
	})
	w.OnEnd(func(err error) { ld.ended <- err })
	ld.wg.Add(1)
	go ld.run()
	t.Cleanup(func() { ld.halt(); w.Close() })
	return ld
}

func (ld *load) run() {
	defer ld.wg.Done()
	var buf []byte
	for {
		select {
		case <-ld.stop:
			return
		default:
		}
		// Bursts with pauses, so that batches of all sizes come about.
		for range 1 + rand.IntN(40) {
			p := ld.w.Next()
			buf = payload(buf, ld.w.Epoch(), p)
			err := ld.w.Append(p, &Bytes{Conn: 1, Payload: buf})
			if errors.Is(err, ErrFenced) || errors.Is(err, ErrClosed) {
				return
			}
			if err != nil {
				ld.t.Errorf("append: %v", err)
				return
			}
		}
		for n, _ := ld.w.Backlog(); n > 2000; n, _ = ld.w.Backlog() {
			select {
			case <-ld.stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
		time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
	}
}

func (ld *load) halt() {
	select {
	case <-ld.stop:
	default:
		close(ld.stop)
	}
	ld.wg.Wait()
}

// waitTold waits until n more positions are stable.
func (ld *load) waitTold(within time.Duration, n int) {
	ld.t.Helper()
	goal := ld.told.Load() + uint64(n)
	eventually(ld.t, within, fmt.Sprintf("%d more positions stable", n), func() error {
		if got := ld.told.Load(); got < goal {
			return fmt.Errorf("at %d of %d, state %+v", got, goal, ld.w.State())
		}
		return nil
	})
}

// audit reads the whole log and returns what positions each epoch wrote. The
// Reader itself refuses holes; here it is the contents that are compared.
func audit(t *testing.T, l *Log, from, to StreamSeq) map[Epoch][2]Position {
	t.Helper()
	spans := map[Epoch][2]Position{}
	err := l.ReadTo(t.Context(), from, to, func(e Entry) error {
		b, ok := e.Rec.(Bytes)
		if !ok {
			return nil
		}
		if len(b.Payload) != payloadSize || Epoch(binary.BigEndian.Uint64(b.Payload)) != e.Epoch || Position(binary.BigEndian.Uint64(b.Payload[8:])) != e.Pos {
			return fmt.Errorf("position %d of epoch %d holds %x", e.Pos, e.Epoch, b.Payload[:16])
		}
		s, ok := spans[e.Epoch]
		if !ok {
			s[0] = e.Pos
		}
		s[1] = e.Pos
		spans[e.Epoch] = s
		return nil
	})
	if err != nil {
		t.Fatalf("audit: %v", err)
	}
	return spans
}

// checkSpan holds a finished load to what the log has of it.
func (ld *load) checkSpan(spans map[Epoch][2]Position) {
	ld.t.Helper()
	s, ok := spans[ld.w.Epoch()]
	told := Position(ld.told.Load())
	if !ok && told >= ld.first {
		ld.t.Errorf("epoch %d: told stable to %d, nothing of it is in the log", ld.w.Epoch(), told)
	} else if ok && (s[0] != ld.first || s[1] < told || s[1] >= ld.w.Next()) {
		ld.t.Errorf("epoch %d: appended %d to %d, told %d, the log has %v", ld.w.Epoch(), ld.first, ld.w.Next()-1, told, s)
	}
}

func acquire(t *testing.T, l *Log, node string) *Writer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	w, err := l.Acquire(ctx, node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func drain(t *testing.T, w *Writer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := w.Drain(ctx); err != nil {
		t.Fatal(err)
	}
}

func testOrder(t *testing.T, tg *target) {
	l := tg.open(t, "order", nil, nil)
	w := acquire(t, l, "a")
	if w.Epoch() != 1 || w.Next() != 1 || w.Stable() != 0 || w.Fence().Seq != 1 {
		t.Fatalf("a new log begins at epoch %d, position %d, fence %+v", w.Epoch(), w.Next(), w.Fence())
	}
	var mu sync.Mutex
	var told []Position
	w.OnStable(func(p Position) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, p)
	})
	const n = 20000
	var buf []byte
	for p := Position(1); p <= n; p++ {
		buf = payload(buf, 1, p)
		if err := w.Append(p, &Bytes{Conn: 1, Payload: buf}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Append(n, &Bytes{}); !errors.Is(err, ErrOrder) {
		t.Fatalf("a position twice: %v", err)
	}
	drain(t, w)
	if recs, octets := w.Backlog(); recs != 0 || octets != 0 || w.Stable() != n || w.Next() != n+1 {
		t.Fatalf("after drain: %d records, %d octets, stable %d", recs, octets, w.Stable())
	}
	// Each position is in the message that SeqOf names.
	seqs := map[Position]StreamSeq{}
	st, err := l.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = l.ReadTo(t.Context(), 0, st.Last, func(e Entry) error {
		if e.Rec != nil {
			seqs[e.Pos] = e.Seq
		}
		return nil
	})
	if err != nil || len(seqs) != n {
		t.Fatalf("%d records, %v", len(seqs), err)
	}
	for p, want := range seqs {
		if got, ok := w.SeqOf(p); !ok || got != want {
			t.Fatalf("position %d is in message %d, SeqOf says %d, %v", p, want, got, ok)
		}
	}
	if st.Messages > n/4 {
		t.Errorf("%d records took %d messages: nothing was coalesced", n, st.Messages)
	}
	if st.Replicas != tg.replicas {
		t.Errorf("%d replicas", st.Replicas)
	}
	if !slices.IsSorted(told) || len(slices.Compact(slices.Clone(told))) != len(told) {
		t.Errorf("stable notices out of order")
	}
	if got := audit(t, l, 0, st.Last); got[1] != [2]Position{1, n} {
		t.Errorf("the log has %v", got)
	}
	// From the middle, and every kind of record.
	var kinds []Record
	next := w.Next()
	for i, r := range oneOfEach() {
		if err := w.Append(next+Position(i), r); err != nil {
			t.Fatal(err)
		}
	}
	drain(t, w)
	from, _ := w.SeqOf(next)
	last, _ := w.SeqOf(w.Stable())
	if err := l.ReadTo(t.Context(), from, last, func(e Entry) error { kinds = append(kinds, e.Rec); return nil }); err != nil {
		t.Fatal(err)
	}
	equal(t, oneOfEach(), kinds)
}

// testTakeovers: writers take the log from one another under load.
func testTakeovers(t *testing.T, tg *target) {
	rounds := 12
	if tg.name == "cluster" {
		rounds = 6
	}
	var logs []*Log
	for range 2 {
		logs = append(logs, tg.open(t, "takeovers", nil, nil))
	}
	var loads []*load
	for i := range rounds {
		ld := startLoad(t, acquire(t, logs[i%2], fmt.Sprint("n", i%2)))
		loads = append(loads, ld)
		if i > 0 {
			old := loads[i-1]
			select {
			case err := <-old.ended:
				if !errors.Is(err, ErrFenced) || old.w.State().Phase != WriterFenced {
					t.Fatalf("the old writer ended with %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("the old writer does not know that it is fenced: %+v", old.w.State())
			}
			if err := old.w.Append(old.w.Next(), ServerExit{}); !errors.Is(err, ErrFenced) {
				t.Fatalf("a fenced writer takes records: %v", err)
			}
		}
		ld.waitTold(20*time.Second, 500)
	}
	last := loads[len(loads)-1]
	last.halt()
	drain(t, last.w)
	st, err := logs[0].Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if stale := countStale(t, logs[0], st.Last); stale != 0 {
		t.Errorf("%d stale batches in the log", stale)
	}
	spans := audit(t, logs[1], 0, st.Last)
	for i, ld := range loads {
		ld.halt()
		if ld.w.Epoch() != Epoch(i+1) {
			t.Errorf("takeover %d has epoch %d", i, ld.w.Epoch())
		}
		ld.checkSpan(spans)
	}
}

// countStale looks at the messages themselves, past the Reader's rules.
func countStale(t *testing.T, l *Log, to StreamSeq) (stale int) {
	t.Helper()
	c, err := l.control(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var epoch Epoch
	for seq := StreamSeq(1); seq <= to; seq++ {
		m, err := c.getMsg(t.Context(), l.names.logStream, map[string]any{"seq": seq})
		if err != nil {
			t.Fatal(err)
		}
		if m.Subject == l.names.fence {
			f, err := decodeFence(m.Data, seq)
			if err != nil {
				t.Fatal(err)
			}
			epoch = f.Epoch
		} else if h, err := decodeHeader(m.Data); err != nil {
			t.Fatal(err)
		} else if h.epoch != epoch {
			stale++
		}
	}
	return stale
}

func testOneWins(t *testing.T, tg *target) {
	l := tg.open(t, "onewins", nil, nil)
	primary := startLoad(t, acquire(t, l, "primary"))
	primary.waitTold(10*time.Second, 100)
	f, err := l.LastFence(t.Context())
	if err != nil || f.Seq != primary.w.Fence().Seq || f.Node != "primary" {
		t.Fatalf("%+v, %v", f, err)
	}
	const n = 4
	var wins, lost atomic.Int32
	var won atomic.Pointer[Writer]
	var wg sync.WaitGroup
	for i := range n {
		s := tg.open(t, "onewins", nil, nil)
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			w, err := s.AcquireIf(ctx, fmt.Sprint("standby", i), f.Seq)
			switch {
			case err == nil:
				wins.Add(1)
				won.Store(w)
			case errors.Is(err, ErrFenced):
				lost.Add(1)
			default:
				t.Errorf("standby %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if wins.Load() != 1 || lost.Load() != n-1 {
		t.Fatalf("%d won, %d lost", wins.Load(), lost.Load())
	}
	w := won.Load()
	defer w.Close()
	if w.Epoch() != 2 {
		t.Fatalf("the winner has epoch %d", w.Epoch())
	}
	if _, err := l.AcquireIf(t.Context(), "late", f.Seq); !errors.Is(err, ErrFenced) {
		t.Fatalf("a latecomer: %v", err)
	}
	if err := <-primary.ended; !errors.Is(err, ErrFenced) {
		t.Fatal(err)
	}
	primary.halt()
	primary.checkSpan(audit(t, l, 0, w.Fence().Seq))
	if e := w.Next(); e != Position(audit(t, l, 0, w.Fence().Seq)[1][1])+1 {
		t.Fatalf("the winner goes on at %d", e)
	}
}

// testAmbiguous: answers get lost and connections cut while appends are in flight.
func testAmbiguous(t *testing.T, tg *target) {
	via := newProxy(t, tg.addr())
	l := tg.open(t, "ambiguous", nil, via)
	direct := tg.open(t, "ambiguous", nil, nil)
	ld := startLoad(t, acquire(t, l, "a"))
	ld.waitTold(10*time.Second, 200)
	for round := range 12 {
		switch round % 3 {
		case 0: // the answers stop, then the connection breaks
			was := ld.w.Stats().Reconnects
			via.set(true, false)
			eventually(t, 10*time.Second, "a batch waits for its answer", func() error {
				if n, _ := ld.w.Backlog(); n < 500 {
					return fmt.Errorf("%d records wait", n)
				}
				return nil
			})
			via.set(false, false)
			via.cut()
			eventually(t, 10*time.Second, "the writer connects again", func() error {
				if ld.w.Stats().Reconnects == was {
					return fmt.Errorf("%+v", ld.w.State())
				}
				return nil
			})
		case 1: // it breaks out of the blue
			via.cut()
		case 2: // the answers stop and nothing breaks: only time tells
			via.set(true, false)
			eventually(t, 10*time.Second, "the writer stalls", func() error {
				if ld.w.State().Phase != WriterStalled {
					return fmt.Errorf("%+v", ld.w.State())
				}
				return nil
			})
			via.set(false, false)
			via.cut()
		}
		ld.waitTold(15*time.Second, 200)
	}
	ld.halt()
	drain(t, ld.w)
	stats := ld.w.Stats()
	t.Logf("%+v", stats)
	if stats.Settled == 0 {
		t.Error("not one batch was stored without its answer: the test tests nothing")
	}
	st, err := direct.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	spans := audit(t, direct, 0, st.Last)
	ld.checkSpan(spans)
	if spans[1][1] != ld.w.Next()-1 {
		t.Errorf("drained to %d, the log ends at %d", ld.w.Next()-1, spans[1][1])
	}
}

func testUnreachable(t *testing.T, tg *target) {
	via := newProxy(t, tg.addr())
	l := tg.open(t, "unreachable", nil, via)
	ld := startLoad(t, acquire(t, l, "a"))
	ld.waitTold(10*time.Second, 100)
	via.set(false, true)
	via.cut()
	eventually(t, 10*time.Second, "the writer stalls", func() error {
		st := ld.w.State()
		if st.Phase != WriterStalled || !errors.Is(st.Err, ErrUnreachable) || st.Since.IsZero() {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	ld.halt()
	p := ld.w.Next()
	if err := ld.w.Append(p, &Bytes{Conn: 1, Payload: payload(nil, 1, p)}); err != nil {
		t.Fatalf("a stalled writer takes nothing: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := ld.w.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("drained while unreachable: %v", err)
	}
	octx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := Open(octx, tg.config("unreachable", via)); !errors.Is(err, ErrUnreachable) {
		t.Fatalf("open: %v", err)
	}
	via.set(false, false)
	drain(t, ld.w)
	if st := ld.w.State(); st.Phase != WriterOK {
		t.Fatalf("%+v", st)
	}
	direct := tg.open(t, "unreachable", nil, nil)
	last, _ := ld.w.SeqOf(p)
	spans := audit(t, direct, 0, last)
	ld.checkSpan(spans)
	if spans[1][1] != p {
		t.Fatalf("the log has %v, not %d", spans, p)
	}
}

func testFull(t *testing.T, tg *target) {
	l := tg.open(t, "full", func(c *Config) { c.LogBytes = 2 << 20 }, nil)
	w := acquire(t, l, "a")
	big := make([]byte, 30000)
	held := func(w *Writer) {
		t.Helper()
		eventually(t, 20*time.Second, "the log is full", func() error {
			if st := w.State(); st.Phase == WriterStalled && errors.Is(st.Err, ErrFull) {
				return nil
			}
			if n, _ := w.Backlog(); n < 20 {
				if err := w.Append(w.Next(), &Bytes{Conn: 1, Payload: big}); err != nil {
					return err
				}
			}
			return fmt.Errorf("%+v", w.State())
		})
	}
	held(w)
	recs, _ := w.Backlog()
	if recs == 0 {
		t.Fatal("full, but nothing is held")
	}
	stable := w.Stable()
	seq, ok := w.SeqOf(stable)
	if !ok {
		t.Fatal("no sequence for the last stable position")
	}
	if err := w.Purge(t.Context(), seq); err != nil {
		t.Fatal(err)
	}
	drain(t, w)
	if st := w.State(); st.Phase != WriterOK {
		t.Fatalf("%+v", st)
	}
	n := Position(0)
	last, _ := w.SeqOf(w.Stable())
	err := l.ReadTo(t.Context(), seq, last, func(e Entry) error {
		if n == 0 && e.Pos > stable || n != 0 && e.Pos != n+1 {
			return fmt.Errorf("position %d after %d", e.Pos, n)
		}
		n = e.Pos
		return nil
	})
	if err != nil || n != w.Next()-1 {
		t.Fatalf("read to %d of %d: %v", n, w.Next()-1, err)
	}
	// A full log must not stop a takeover, though its owner goes on trying.
	held(w)
	w2 := acquire(t, l, "b")
	if w2.Epoch() != 2 {
		t.Fatalf("epoch %d", w2.Epoch())
	}
	eventually(t, 10*time.Second, "the old writer is fenced", func() error {
		if w.State().Phase != WriterFenced {
			return fmt.Errorf("%+v", w.State())
		}
		return nil
	})
	if w2.Next() <= stable {
		t.Fatalf("the new writer begins at %d, before %d which was stable", w2.Next(), stable)
	}
}

func testPurge(t *testing.T, tg *target) {
	l := tg.open(t, "purge", nil, nil)
	ld := startLoad(t, acquire(t, l, "a"))
	ld.waitTold(20*time.Second, 20000)
	ld.halt()
	drain(t, ld.w)
	w := ld.w
	newest, _ := w.SeqOf(w.Stable())
	mid := w.Stable() / 2
	seq, ok := w.SeqOf(mid)
	if !ok {
		t.Fatal("no sequence for a stable position")
	}
	if err := w.Purge(t.Context(), seq); err != nil {
		t.Fatal(err)
	}
	if got, ok := w.SeqOf(mid); !ok || got != seq {
		t.Fatalf("SeqOf(%d) is %d, %v after the purge, was %d", mid, got, ok, seq)
	}
	if got, ok := w.SeqOf(1); ok {
		t.Fatalf("SeqOf(1) is still %d", got)
	}
	f, err := l.LastFence(t.Context())
	if err != nil || f.Seq != 1 {
		t.Fatalf("the fence after a purge: %+v, %v", f, err)
	}
	spans := audit(t, l, seq, newest)
	if spans[1][0] > mid || spans[1][1] != w.Stable() {
		t.Fatalf("left is %v", spans)
	}
	if err := l.ReadTo(t.Context(), seq-1, newest, func(Entry) error { return nil }); !errors.Is(err, ErrPurged) {
		t.Fatalf("reading what was purged: %v", err)
	}
	if spans := audit(t, l, 0, newest); spans[1][0] > mid {
		t.Fatalf("from the oldest on there is %v", spans)
	}
	// All of it: the newest batch stays, and tells the next writer where to go on.
	if err := w.Purge(t.Context(), newest+1000); err != nil {
		t.Fatal(err)
	}
	w2 := acquire(t, l, "b")
	if w2.Epoch() != 2 || w2.Next() != w.Next() {
		t.Fatalf("after a purge of everything: epoch %d, next %d, want %d", w2.Epoch(), w2.Next(), w.Next())
	}
	w3 := acquire(t, l, "c") // behind a fence without a batch
	if w3.Epoch() != 3 || w3.Next() != w.Next() {
		t.Fatalf("epoch %d, next %d, want %d", w3.Epoch(), w3.Next(), w.Next())
	}
	p := w3.Next()
	if err := w3.Append(p, &Bytes{Conn: 1, Payload: payload(nil, 3, p)}); err != nil {
		t.Fatal(err)
	}
	drain(t, w3)
	last, _ := w3.SeqOf(p)
	if spans := audit(t, l, newest, last); spans[3] != [2]Position{p, p} {
		t.Fatalf("left is %v", spans)
	}
}

// testStale puts a batch of a fenced epoch into the log, which no Writer can,
// and holds readers and the next writer to not believing it.
func testStale(t *testing.T, tg *target) {
	l := tg.open(t, "stale", nil, nil)
	for i, node := range []string{"a", "b", "c"} {
		w := acquire(t, l, node)
		for range 3 {
			p := w.Next()
			if err := w.Append(p, &Bytes{Conn: 1, Payload: payload(nil, w.Epoch(), p)}); err != nil {
				t.Fatal(err)
			}
			drain(t, w)
		}
		if want := Position(3*(i+1)) + 1; w.Next() != want {
			t.Fatalf("after %s: next %d, want %d", node, w.Next(), want)
		}
		w.Close()
		if i == 0 {
			continue
		}
		c, err := l.control(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		bad := encodeBatch(t, Epoch(i), 3, w.Next(), ServerExit{Status: 666})
		m, err := c.nc.RequestMsgWithContext(t.Context(), &nats.Msg{Subject: l.names.data, Data: bad})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseAck(m); err != nil {
			t.Fatal(err)
		}
	}
	st, err := l.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range []StreamSeq{0, 2, st.Last - 1} {
		err := l.ReadTo(t.Context(), from, st.Last, func(e Entry) error {
			if _, ok := e.Rec.(ServerExit); ok {
				return fmt.Errorf("a record of a fenced epoch came through at %d", e.Pos)
			}
			return nil
		})
		if err != nil {
			t.Errorf("from %d: %v", from, err)
		}
	}
	want := map[Epoch][2]Position{1: {1, 3}, 2: {4, 6}, 3: {7, 9}}
	if got := audit(t, l, 0, st.Last); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the log has %v, want %v", got, want)
	}
}

// testTail: a reader follows a live writer, over its own lost connections and
// a takeover, and sees each record once.
func testTail(t *testing.T, tg *target) {
	via := newProxy(t, tg.addr())
	l := tg.open(t, "tail", nil, nil)
	lr := tg.open(t, "tail", nil, via)
	r, err := lr.NewReader(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	var pos atomic.Uint64
	var epochs atomic.Uint64
	done := make(chan error, 1)
	go func() {
		for {
			e, err := r.Next(context.Background())
			if err != nil {
				done <- err
				return
			}
			if e.Fence != nil {
				epochs.Store(uint64(e.Fence.Epoch))
			} else if !pos.CompareAndSwap(uint64(e.Pos-1), uint64(e.Pos)) {
				done <- fmt.Errorf("position %d after %d", e.Pos, pos.Load())
				return
			}
		}
	}()
	caughtUp := func(p Position) {
		t.Helper()
		eventually(t, 15*time.Second, "the reader catches up", func() error {
			select {
			case err := <-done:
				t.Fatal(err)
			default:
			}
			if pos.Load() < uint64(p) {
				return fmt.Errorf("at %d of %d", pos.Load(), p)
			}
			return nil
		})
	}
	a := startLoad(t, acquire(t, l, "a"))
	for range 4 {
		a.waitTold(15*time.Second, 500)
		via.cut()
		a.waitTold(15*time.Second, 500)
		caughtUp(Position(a.told.Load()))
	}
	b := startLoad(t, acquire(t, l, "b"))
	b.waitTold(15*time.Second, 500)
	b.halt()
	drain(t, b.w)
	caughtUp(b.w.Stable())
	if epochs.Load() != 2 {
		t.Errorf("the reader saw epoch %d", epochs.Load())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.log.NewReader(ctx, 0); err != nil {
		t.Errorf("a reader from the start needs no server yet: %v", err)
	}
	r.Close()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Fatalf("a closed reader: %v", err)
	}
}

// testCrash: kill -9 of the server, or of the cluster's leader, under load.
func testCrash(t *testing.T, tg *target) {
	if tg.crash == nil {
		t.Skip("the server lives in this process")
	}
	kills := 5
	if tg.name == "cluster" {
		kills = 2
	}
	l := tg.open(t, "crash", nil, nil)
	ld := startLoad(t, acquire(t, l, "a"))
	r, err := l.NewReader(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.disconnect()
	for i := range kills {
		ld.waitTold(20*time.Second, 1000)
		at := time.Now()
		tg.crash(l)
		ld.waitTold(30*time.Second, 1000)
		t.Logf("kill %d: 1000 more stable after %v", i, time.Since(at).Round(time.Millisecond))
	}
	ld.halt()
	drain(t, ld.w)
	t.Logf("%+v, %d records", ld.w.Stats(), ld.w.Stable())
	// The same reader has seen it all.
	for p := Position(0); p < ld.w.Stable(); {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		e, err := r.Next(ctx)
		cancel()
		if err != nil {
			t.Fatalf("reader at %d: %v", p, err)
		}
		p = e.Pos
	}
	last, _ := ld.w.SeqOf(ld.w.Stable())
	spans := audit(t, l, 0, last)
	ld.checkSpan(spans)
	if spans[1][1] != ld.w.Next()-1 {
		t.Errorf("drained to %d, the log ends at %d", ld.w.Next()-1, spans[1][1])
	}
}

func testStore(t *testing.T, tg *target) {
	l := tg.open(t, "store", nil, nil)
	ctx := t.Context()
	// An image of 40 chunks: 10 zero, 20 soft, 10 hard; the last is short.
	img := make([]byte, 40*ChunkSize-1000)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := 10 * ChunkSize; i < len(img); i += 8 {
		v := rnd.Uint64()
		if i < 30*ChunkSize {
			v = v & 3 * 0x0101010101010101
		}
		copy(img[i:], binary.BigEndian.AppendUint64(nil, v))
	}
	s := l.Store(StoreOptions{Compress: true})
	chunks, sent, err := s.PutReader(ctx, bytes.NewReader(img))
	if err != nil || len(chunks) != 40 {
		t.Fatalf("%d chunks, %v", len(chunks), err)
	}
	if sent < 10*ChunkSize || sent > 20*ChunkSize {
		t.Errorf("sent %d octets for an image of %d", sent, len(img))
	}
	_, sent, err = s.PutReader(ctx, bytes.NewReader(img))
	if err != nil || sent != 0 {
		t.Errorf("the second time %d octets were sent, %v", sent, err)
	}
	other := tg.open(t, "store", nil, nil).Store(StoreOptions{})
	if _, sent, err = other.PutReader(ctx, bytes.NewReader(img)); err != nil || sent != 0 {
		t.Errorf("another process sent %d octets, %v", sent, err)
	}
	// A store that does not know is told by the server.
	other.known = map[Hash]struct{}{}
	if got, _, err := other.PutReader(ctx, bytes.NewReader(img)); err != nil || !slices.Equal(got, chunks) {
		t.Errorf("sending all of it again: %v", err)
	}
	var out bytes.Buffer
	if err := other.CopyTo(ctx, &out, chunks); err != nil || !bytes.Equal(out.Bytes(), img) {
		t.Fatalf("read %d octets of %d: %v", out.Len(), len(img), err)
	}

	manifest := []byte(`{"id":1}`)
	large := bytes.Repeat([]byte("manifest "), 100_000)
	var blobs []Hash
	for _, b := range [][]byte{manifest, large, {}} {
		h, err := s.PutBlob(ctx, b)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := other.Get(ctx, h); err != nil || !bytes.Equal(got, b) || h != Sum(b) {
			t.Fatalf("blob of %d octets: %d octets, %v", len(b), len(got), err)
		}
		if again, err := s.PutBlob(ctx, b); err != nil || again != h {
			t.Fatalf("blob of %d octets again: %v", len(b), err)
		}
		blobs = append(blobs, h)
	}
	if _, err := s.PutBlob(ctx, make([]byte, MaxBlob+1)); !errors.Is(err, ErrInvalid) {
		t.Fatalf("a blob too large: %v", err)
	}
	if _, err := s.Get(ctx, Hash{1}); !errors.Is(err, ErrMissing) {
		t.Fatalf("a chunk that is not there: %v", err)
	}
	if err := s.CopyTo(ctx, &out, []Hash{chunks[0], {2}, chunks[1]}); !errors.Is(err, ErrMissing) {
		t.Fatalf("chunks one of which is not there: %v", err)
	}
	if chunks, sent, err := s.PutReader(ctx, strings.NewReader("")); len(chunks) != 0 || sent != 0 || err != nil {
		t.Fatal(chunks, sent, err)
	}

	// Garbage: all but half the image and the large blob.
	live := map[Hash]bool{blobs[1]: true}
	for _, h := range chunks[20:] {
		live[h] = true
	}
	before, err := s.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n, err := s.Collect(ctx, func(h Hash) bool { return live[h] })
	if err != nil {
		t.Fatal(err)
	}
	after, err := s.List(ctx)
	if err != nil || len(after) != len(before)-n || n == 0 {
		t.Fatalf("%d of %d dropped, %d left, %v", n, len(before), len(after), err)
	}
	if got, err := s.Get(ctx, blobs[1]); err != nil || !bytes.Equal(got, large) {
		t.Fatalf("a live blob after the collection: %v", err)
	}
	if err := s.CopyTo(ctx, &bytes.Buffer{}, chunks[20:]); err != nil {
		t.Fatalf("live chunks after the collection: %v", err)
	}
	for _, h := range []Hash{chunks[15], blobs[0]} {
		if _, err := s.Get(ctx, h); !errors.Is(err, ErrMissing) {
			t.Fatalf("garbage after the collection: %v", err)
		}
	}
	// What was dropped is sent again.
	if got, sent, err := s.PutReader(ctx, bytes.NewReader(img)); err != nil || sent == 0 || !slices.Equal(got, chunks) {
		t.Fatalf("%d octets, %v", sent, err)
	}

	// Corruption, of a chunk and of a blob's index.
	c, err := l.control(ctx)
	if err != nil {
		t.Fatal(err)
	}
	spoil := func(subject string, data []byte) {
		t.Helper()
		var r struct{}
		if err := c.request(ctx, "$JS.API.STREAM.PURGE."+l.names.storeStream, map[string]string{"filter": subject}, &r); err != nil {
			t.Fatal(err)
		}
		m, err := c.nc.RequestWithContext(ctx, subject, data)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseAck(m); err != nil {
			t.Fatal(err)
		}
	}
	spoil(l.names.chunk+chunks[25].String(), other.pack.packChunk([]byte("not what it was")))
	spoil(l.names.blob+blobs[1].String(), packIndexOf(len(large), append(slices.Clone(chunks[20:23]), chunks[39])))
	corrupt := func(what string, f func() error) {
		t.Helper()
		eventually(t, 5*time.Second, what+" is found corrupt", func() error { // a replica may lag
			if err := f(); !errors.Is(err, ErrCorrupt) {
				return fmt.Errorf("got %v", err)
			}
			return nil
		})
	}
	corrupt("a chunk", func() error { _, err := s.Get(ctx, chunks[25]); return err })
	corrupt("an image", func() error {
		out.Reset()
		err := s.CopyTo(ctx, &out, chunks)
		if !bytes.HasPrefix(img, out.Bytes()) {
			t.Fatal("wrong octets came out")
		}
		return err
	})
	corrupt("a blob", func() error { _, err := s.Get(ctx, blobs[1]); return err })
	// The way out: collect it, store it anew.
	if _, err := s.Collect(ctx, func(h Hash) bool { return h != chunks[25] && h != blobs[1] }); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.PutReader(ctx, bytes.NewReader(img)); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	eventually(t, 5*time.Second, "the image is whole again", func() error {
		out.Reset()
		return s.CopyTo(ctx, &out, chunks)
	})
	if !bytes.Equal(out.Bytes(), img) {
		t.Fatal("wrong octets came out")
	}
}

func testBeats(t *testing.T, tg *target) {
	via := newProxy(t, tg.addr())
	l, lw := tg.open(t, "beats", nil, nil), tg.open(t, "beats", nil, via)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	beats := make(chan Beat, 4096)
	if err := lw.WatchBeats(ctx, func(b Beat) { beats <- b }); err != nil {
		t.Fatal(err)
	}
	if err := l.StartBeacon(ctx, "primary", "a", 5*time.Millisecond, func() []byte { return []byte("hello") }); err != nil {
		t.Fatal(err)
	}
	next := func() Beat {
		t.Helper()
		select {
		case b := <-beats:
			return b
		case <-time.After(10 * time.Second):
			t.Fatal("no heartbeat")
		}
		return Beat{}
	}
	first := next()
	if first.Role != "primary" || first.Node != "a" || first.N != 1 || string(first.Payload) != "hello" || first.At.IsZero() {
		t.Fatalf("%+v", first)
	}
	for n := uint64(2); n < 20; n++ {
		if b := next(); b.N != n || b.Run != first.Run {
			t.Fatalf("%+v, want the %dth", b, n)
		}
	}
	via.cut()
	eventually(t, 10*time.Second, "the watch hears again", func() error {
		if b := next(); b.N < 21 {
			return fmt.Errorf("at %d", b.N)
		}
		return nil
	})
	for _, bad := range []string{"", "a.b", "*"} {
		if err := l.StartBeacon(ctx, "primary", bad, time.Second, nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("node %q: %v", bad, err)
		}
	}
	cancel()
	l.Close()
	if err := l.StartBeacon(t.Context(), "primary", "a", time.Second, nil); err == nil {
		t.Error("a beacon of a closed log")
	}
}
