package stream

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

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
