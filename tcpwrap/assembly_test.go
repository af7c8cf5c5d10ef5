package tcpwrap

import (
	"bytes"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// piece is a run of a test's stream, by offsets.
type piece struct {
	from, to int
	fin      bool
}

// octets is a stream whose octets tell where they belong.
func octets(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)*31
	}
	return b
}

// collector takes what an assembly emits and checks that it follows.
type collector struct {
	t    rapid.TB
	next seqnum.Value
	got  []byte
	fin  bool
}

func (c *collector) emit(seq seqnum.Value, data []byte) {
	if c.fin || seq != c.next || len(data) == 0 {
		c.t.Fatalf("emitted %d octets at %d (after FIN: %v), expected %d", len(data), seq, c.fin, c.next)
	}
	c.got = append(c.got, data...)
	c.next = c.next.Add(seqnum.Size(len(data)))
}

func (c *collector) eof(seq seqnum.Value) {
	if c.fin || seq != c.next {
		c.t.Fatalf("FIN at %d (another: %v), expected %d", seq, c.fin, c.next)
	}
	c.fin = true
	c.next = c.next.Add(1)
}

// Whatever the network does to the segments of a stream, the stream comes out:
// all of it, once and in order.
func TestAssemblyPutsAnyArrivalInOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		stream := octets(rapid.IntRange(1, 3000).Draw(t, "octets"))
		isn := seqnum.Value(rapid.OneOf(rapid.Uint32(), rapid.Uint32Range(1<<32-4000, 1<<32-1), rapid.Uint32Range(1<<31-4000, 1<<31)).Draw(t, "isn"))
		budget := rapid.SampledFrom([]int{0, 700, 2000, 10_000, 1 << 20}).Draw(t, "budget")

		// A client's first transmissions, then what it repeats, cut as it likes.
		var pieces []piece
		for at := 0; at < len(stream); {
			n := min(rapid.IntRange(1, 700).Draw(t, "size"), len(stream)-at)
			pieces = append(pieces, piece{at, at + n, at+n == len(stream)})
			at += n
		}
		for range rapid.IntRange(0, 30).Draw(t, "repeats") {
			from := rapid.IntRange(0, len(stream)).Draw(t, "from")
			to := min(from+rapid.IntRange(0, 900).Draw(t, "length"), len(stream))
			pieces = append(pieces, piece{from, to, to == len(stream)})
		}
		order := rapid.Permutation(pieces).Draw(t, "arrival")
		lost := rapid.IntRange(0, 3).Draw(t, "loss")

		a := assembly{nxt: isn}
		c := collector{t: t, next: isn}
		offer := func(p piece) {
			before, seq := a.nxt, isn.Add(seqnum.Size(p.from))
			room := budget - a.kept()
			data := bytes.Clone(stream[p.from:p.to])
			if !a.offer(seq, data, p.fin, room, c.emit, c.eof) && (a.nxt != before || room >= len(data)+fragmentCost) {
				t.Fatalf("refused %v with room for %d octets, at %d", p, room, before)
			}
			for i := range data {
				data[i] = 0xee // what is kept must be a copy
			}
			if a.kept() > budget {
				t.Fatalf("keeps %d of %d octets", a.kept(), budget)
			}
			if a.nxt != c.next {
				t.Fatalf("expects %d, emitted up to %d", a.nxt, c.next)
			}
		}
		for i, p := range order {
			if lost > 0 && i%4 < lost {
				continue
			}
			offer(p)
		}
		// The client repeats what is missing; it knows from the acknowledgement.
		for at := 0; !a.fin; {
			from := int(isn.To(a.nxt))
			if from < at {
				t.Fatal("went back")
			}
			at = from
			to := min(from+rapid.IntRange(1, 1500).Draw(t, "repeat"), len(stream))
			offer(piece{from, to, to == len(stream)})
		}
		if !c.fin || !bytes.Equal(c.got, stream) {
			t.Fatalf("%d of %d octets came out right", len(c.got), len(stream))
		}
		if a.kept() != 0 || len(a.ahead) != 0 {
			t.Fatalf("keeps %d octets after the end", a.kept())
		}
	})
}

// Nonsense, too, comes out in sequence and within bounds: FINs in the middle,
// data behind them, numbers from anywhere.
func TestAssemblyBearsNonsense(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		isn := seqnum.Value(rapid.Uint32().Draw(t, "isn"))
		a := assembly{nxt: isn}
		c := collector{t: t, next: isn}
		const budget = 5000
		for range rapid.IntRange(1, 60).Draw(t, "segments") {
			seq := a.nxt.Add(seqnum.Size(rapid.OneOf(rapid.Uint32Range(0, 1000), rapid.Uint32Range(1<<32-1000, 1<<32-1), rapid.Uint32()).Draw(t, "seq")))
			data := octets(rapid.IntRange(0, 900).Draw(t, "length"))
			a.offer(seq, data, rapid.Bool().Draw(t, "fin"), budget-a.kept(), c.emit, c.eof)
			if a.kept() > budget || a.fin && a.kept() != 0 {
				t.Fatalf("keeps %d octets", a.kept())
			}
			starts := slices.IsSortedFunc(a.ahead, func(f, g fragment) int { return int(int32(f.seq - g.seq)) })
			ends := slices.IsSortedFunc(a.ahead, func(f, g fragment) int { return int(int32(f.end() - g.end())) })
			if !starts || !ends {
				t.Fatal("fragments are not in order")
			}
		}
	})
}

func TestAssemblyKeepsNothingTwice(t *testing.T) {
	keep := func(ps ...piece) *assembly {
		a := &assembly{nxt: 1000}
		for _, p := range ps {
			if !a.offer(seqnum.Value(1000+p.from), octets(p.to-p.from), p.fin, 1<<20, nil, nil) {
				t.Fatalf("refused %v", p)
			}
		}
		return a
	}
	for _, c := range []struct {
		name             string
		a                *assembly
		octets, segments int
	}{
		{"the same again", keep(piece{10, 20, false}, piece{10, 20, false}), 10, 1},
		{"a part again", keep(piece{10, 20, false}, piece{12, 18, false}), 10, 1},
		{"what covers it", keep(piece{12, 18, false}, piece{10, 20, false}), 10, 1},
		{"what covers several", keep(piece{12, 14, false}, piece{16, 18, false}, piece{10, 20, false}), 10, 1},
		{"behind what covers", keep(piece{20, 30, false}, piece{10, 100, false}, piece{40, 50, false}), 90, 1},
		{"overlap to the right", keep(piece{10, 20, false}, piece{15, 25, false}), 15, 2},
		{"the FIN again", keep(piece{10, 20, true}, piece{10, 20, true}), 10, 1},
		{"the FIN alone again", keep(piece{10, 20, true}, piece{20, 20, true}), 10, 1},
		{"nothing", keep(piece{10, 10, false}), 0, 0},
	} {
		if c.a.pending != c.octets || len(c.a.ahead) != c.segments {
			t.Errorf("%s: keeps %d octets in %d segments, want %d in %d", c.name, c.a.pending, len(c.a.ahead), c.octets, c.segments)
		}
	}
}

// A client can make the assembly keep as many fragments as the budget has room
// for; to take them all up at once must stay cheap.
func BenchmarkAssemblyDrain(b *testing.B) {
	const n = 8 << 20 / (fragmentCost + 1)
	one := []byte{1}
	for b.Loop() {
		a := assembly{nxt: 1}
		for i := range n {
			a.offer(seqnum.Value(3+2*i), one, false, 8<<20, nil, nil)
		}
		emit := func(seqnum.Value, []byte) {}
		fill := make([]byte, 2*n)
		a.offer(1, fill, false, 0, emit, nil)
		if a.kept() != 0 {
			b.Fatal("kept")
		}
	}
}
