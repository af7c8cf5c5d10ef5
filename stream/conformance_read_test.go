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
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

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
	idle, err := l.NewReader(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if e, err := idle.Next(t.Context()); err != nil || e.Fence == nil || e.Fence.Epoch != 1 {
		t.Fatalf("%+v, %v", e, err)
	}
	if _, err := idle.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("a cancelled Next: %v", err)
	}
	if e, err := idle.Next(t.Context()); err != nil || e.Pos != 1 {
		t.Fatalf("after a cancelled Next: %+v, %v", e, err)
	}
	idle.Close() // nobody is in Next: nothing may be left of it all the same
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
	defer r.Close()
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
	n, err := s.Collect(ctx, survey(t, s), func(h Hash) bool { return live[h] })
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
	if _, err := s.Collect(ctx, survey(t, s), func(h Hash) bool { return h != chunks[25] && h != blobs[1] }); err != nil {
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
