package tcpwrap

import (
	"slices"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// fragment is client data that came ahead of its turn.
type fragment struct {
	seq  seqnum.Value
	data []byte
	fin  bool
}

func (f *fragment) end() seqnum.Value { return f.seq.Add(seqnum.Size(len(f.data))) }

// covers reports whether f has all that g has. A FIN with data behind it
// contradicts itself and counts for nothing.
func (f *fragment) covers(g *fragment) bool {
	return f.seq.LessEq(g.seq) && g.end().LessEq(f.end()) && (!g.fin || f.fin || g.end() != f.end())
}

// assembly puts one connection's instream in order: US 7,673,038's "complete"
// is nxt, the octet up to which everything has been handed on.
type assembly struct {
	nxt     seqnum.Value
	fin     bool // the client's FIN was reached; nothing can follow
	ahead   []fragment
	pending int // octets in ahead
}

// offer takes a segment's data and calls emit with each run of octets that is
// now in order, once and in sequence; eof follows the last octet. The data of
// emit aliases the segment or assembly's own memory and is good for the call
// only. budget is how many octets may be kept for later; offer answers false,
// and takes nothing, when a fragment would not fit.
func (a *assembly) offer(seq seqnum.Value, data []byte, fin bool, budget int, emit func(seq seqnum.Value, data []byte), eof func(seq seqnum.Value)) bool {
	if a.fin {
		return true
	}
	if a.nxt.Less(seq) {
		return a.keep(seq, data, fin, budget)
	}
	a.take(fragment{seq, data, fin}, emit, eof)
	n := 0
	for ; n < len(a.ahead) && a.ahead[n].seq.LessEq(a.nxt) && !a.fin; n++ {
		a.pending -= len(a.ahead[n].data)
		a.take(a.ahead[n], emit, eof)
	}
	a.ahead = slices.Delete(a.ahead, 0, n) // at once: one by one is quadratic
	if a.fin {
		a.ahead, a.pending = nil, 0
	}
	return true
}

func (a *assembly) take(f fragment, emit func(seqnum.Value, []byte), eof func(seqnum.Value)) {
	if end := f.end(); a.nxt.Less(end) {
		skip := f.seq.To(a.nxt)
		at := a.nxt
		a.nxt = end
		emit(at, f.data[skip:])
	}
	if f.fin && f.end() == a.nxt {
		a.fin = true
		at := a.nxt
		a.nxt = a.nxt.Add(1)
		eof(at)
	}
}

// keep stores a copy of what came ahead, sorted by sequence number. No fragment
// covers another, so both their beginnings and their ends are in order. A
// covered duplicate costs nothing: a client's retransmissions must not use the
// budget up.
func (a *assembly) keep(seq seqnum.Value, data []byte, fin bool, budget int) bool {
	i := a.place(seq)
	if i > 0 { // what the one before has already is not kept twice
		if end := a.ahead[i-1].end(); seq.Less(end) {
			skip := min(int(seq.To(end)), len(data))
			seq, data = seq.Add(seqnum.Size(skip)), data[skip:]
			i = a.place(seq)
		}
	}
	f := fragment{seq, data, fin}
	if i < len(a.ahead) && a.ahead[i].covers(&f) || i > 0 && a.ahead[i-1].covers(&f) {
		return true
	}
	if len(data) == 0 && !fin {
		return true
	}
	j, freed := i, 0 // what the new one covers is not kept twice either
	for ; j < len(a.ahead) && f.covers(&a.ahead[j]); j++ {
		freed += len(a.ahead[j].data)
	}
	if len(data)+fragmentCost > budget+freed+fragmentCost*(j-i) {
		return false
	}
	f.data = slices.Clone(data)
	a.ahead = slices.Replace(a.ahead, i, j, f)
	a.pending += len(data) - freed
	return true
}

// place is where a fragment that starts at seq belongs in ahead.
func (a *assembly) place(seq seqnum.Value) int {
	i, _ := slices.BinarySearchFunc(a.ahead, seq, func(f fragment, s seqnum.Value) int {
		switch {
		case f.seq == s:
			return 0
		case f.seq.Less(s):
			return -1
		}
		return 1
	})
	return i
}

// fragmentCost is what one kept fragment is charged beside its octets: what
// Linux charges the smallest segment at least, so that a shower of one-octet
// fragments runs into the limit here when it would there, and ahead stays short
// enough to insert into.
const fragmentCost = 512

// kept is what the assembly holds, in octets including the cost of keeping.
func (a *assembly) kept() int { return a.pending + fragmentCost*len(a.ahead) }
