package stream

import (
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestDetector(t *testing.T) {
	ms := func(n int) time.Time { return t0.Add(time.Duration(n) * time.Millisecond) }
	d := NewDetector(200*time.Millisecond, 20*time.Millisecond)
	for i := 0; i < 5000; i += 20 {
		if s, _ := d.Tick(ms(i)); s {
			t.Fatal("suspects a node it never heard of")
		}
	}
	d.Observe(ms(5000))
	at := 5000
	for ; ; at += 20 {
		s, silence := d.Tick(ms(at))
		if s != (at >= 5200) {
			t.Fatalf("at %d ms: suspect %v after %v", at-5000, s, silence)
		}
		if s {
			break
		}
	}
	d.Observe(ms(at + 1))
	if s, _ := d.Tick(ms(at + 10)); s {
		t.Fatal("a node that is back is still suspected")
	}
	// Our own absence of a minute is no proof of the other's.
	if s, silence := d.Tick(ms(at + 60_000)); s || silence > 60*time.Millisecond {
		t.Fatalf("suspects after having been stopped itself: %v, %v", s, silence)
	}
}

func TestDetectorProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const timeout, tick = 200, 10
		d := NewDetector(timeout*time.Millisecond, tick*time.Millisecond)
		now, beat, heard := 0, 0, false
		for range rapid.IntRange(1, 200).Draw(t, "n") {
			now += rapid.IntRange(0, tick).Draw(t, "dt")
			at := t0.Add(time.Duration(now) * time.Millisecond)
			if rapid.IntRange(0, 20).Draw(t, "beat") == 0 {
				d.Observe(at)
				beat, heard = now, true
			}
			// Ticked on time, it is exact.
			if s, silence := d.Tick(at); s != (heard && now-beat >= timeout) || heard && silence != time.Duration(now-beat)*time.Millisecond {
				t.Fatalf("%d ms after the last beat: %v, %v", now-beat, s, silence)
			}
		}
	})
}

func TestLowSpace(t *testing.T) {
	low := false
	for i, c := range []struct {
		free uint64
		want bool
	}{{200, false}, {100, false}, {99, true}, {100, true}, {124, true}, {125, false}, {101, false}, {0, true}} {
		if low = lowSpace(low, c.free, 100); low != c.want {
			t.Fatalf("step %d: free %d, low %v", i, c.free, low)
		}
	}
}

func batchOf(e Epoch, first Position, n int) *Batch {
	return &Batch{Epoch: e, First: first, Records: make([]Record, n)}
}

func TestFollower(t *testing.T) {
	var f follower
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	take := func(b *Batch, want bool) {
		t.Helper()
		stale, err := f.batch(b, 1)
		must(err)
		if stale != want {
			t.Fatalf("stale %v", stale)
		}
	}
	must(f.fence(Fence{Epoch: 4, Seq: 1}))
	take(batchOf(4, 10, 3), false) // the first place is what it is
	take(batchOf(4, 13, 1), false)
	must(f.fence(Fence{Epoch: 5, Seq: 4}))
	take(batchOf(4, 14, 5), true)
	take(batchOf(5, 14, 1), false)
	for name, c := range map[string]struct {
		b    *Batch
		want error
	}{
		"hole":           {batchOf(5, 16, 1), ErrHole},
		"back":           {batchOf(5, 14, 1), ErrCorrupt},
		"unlicensed":     {batchOf(6, 15, 1), ErrHole},
		"over the place": {batchOf(5, 1, 100), ErrCorrupt},
	} {
		g := f
		if _, err := g.batch(c.b, 9); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := f.fence(Fence{Epoch: 5, Seq: 9}); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a second fence of one epoch: %v", err)
	}
}

func TestSeqIndex(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var x seqIndex
		var firsts []Position // of batch i, which has sequence i+1
		next := Position(1)
		purged := StreamSeq(0)
		for range rapid.IntRange(1, 100).Draw(t, "n") {
			if rapid.IntRange(0, 9).Draw(t, "trim") == 0 && len(firsts) > 0 {
				purged = max(purged, StreamSeq(rapid.IntRange(1, len(firsts)).Draw(t, "before")))
				x.trim(purged)
			}
			firsts = append(firsts, next)
			x.add(next, StreamSeq(len(firsts)))
			next += Position(rapid.IntRange(1, 5).Draw(t, "count"))
		}
		firsts = append(firsts, next)
		for i := 0; i+1 < len(firsts); i++ {
			for p := firsts[i]; p < firsts[i+1]; p++ {
				got, ok := x.find(p)
				if want := StreamSeq(i + 1); want >= purged && (!ok || got != want) || want < purged && ok {
					t.Fatalf("position %d is in %d (purged before %d), found %d, %v", p, want, purged, got, ok)
				}
			}
		}
	})
}

// TestSeqIndexThinned: beyond its bound it may answer too early, never too late.
func TestSeqIndexThinned(t *testing.T) {
	var x seqIndex
	const n = maxIndex + maxIndex/2 + 3
	for i := 1; i <= n; i++ {
		x.add(Position(i*10), StreamSeq(i))
	}
	if len(x.entries) > maxIndex {
		t.Fatalf("%d entries", len(x.entries))
	}
	for i := 1; i <= n; i += 997 {
		if got, ok := x.find(Position(i*10 + 9)); !ok || got > StreamSeq(i) || got+4 <= StreamSeq(i) {
			t.Fatalf("batch %d: found %d, %v", i, got, ok)
		}
	}
	x.trim(1001)
	if got, ok := x.find(10010); !ok || got != 1001 {
		t.Fatalf("found %d, %v", got, ok)
	}
}

func TestChunkPacking(t *testing.T) {
	plain, _ := newPacker(false)
	zipped, _ := newPacker(true)
	soft := make([]byte, ChunkSize)
	for i := range soft {
		soft[i] = byte(i / 1000)
	}
	for _, b := range [][]byte{nil, []byte("x"), soft} {
		for _, p := range []*packer{plain, zipped} {
			m := p.packChunk(b)
			got, err := plain.unpackChunk(m, Sum(b))
			if err != nil || string(got) != string(b) {
				t.Fatalf("%d octets: %v", len(b), err)
			}
			if p == zipped && len(b) == ChunkSize && len(m) > ChunkSize/4 {
				t.Fatalf("packed %d octets into %d", len(b), len(m))
			}
			for i := 0; i < len(m); i += 1 + len(m)/50 {
				bad := append([]byte(nil), m...)
				bad[i] ^= 1
				if got, err := plain.unpackChunk(bad, Sum(b)); err == nil && string(got) != string(b) {
					t.Fatalf("a flipped bit in octet %d goes unnoticed", i)
				}
			}
		}
	}
	bomb := zipped.enc.EncodeAll(make([]byte, 100<<20), []byte{packZstd})
	if _, err := plain.unpackChunk(bomb, Hash{}); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a bomb of %d octets: %v", len(bomb), err)
	}
	if _, err := plain.unpackChunk([]byte{9}, Hash{}); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
	parts := []Hash{{1}, {2}}
	size, got, err := unpackIndex(packIndexOf(ChunkSize+1, parts), Hash{})
	if err != nil || size != ChunkSize+1 || len(got) != 2 || got[1] != parts[1] {
		t.Fatal(size, got, err)
	}
	for name, m := range map[string][]byte{"empty": nil, "short": {packIndex, 0}, "parts missing": packIndexOf(3*ChunkSize, parts), "too large": packIndexOf(MaxBlob+1, nil)} {
		if _, _, err := unpackIndex(m, Hash{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
