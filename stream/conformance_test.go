package stream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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
	if e := w.Next(); e != audit(t, l, 0, w.Fence().Seq)[1][1]+1 {
		t.Fatalf("the winner goes on at %d", e)
	}
}
