package stream

import "slices"

// maxIndex bounds a seqIndex's memory: 16 octets each.
const maxIndex = 1 << 20

// seqIndex finds the batch that holds a position. When it has grown to its
// bound, every other entry is forgotten, so that an answer may be an earlier
// batch than the right one, which costs a reader time and nothing else.
type seqIndex struct {
	entries []indexEntry
	kept    StreamSeq // batches before this one were purged
}

type indexEntry struct {
	first Position
	seq   StreamSeq
}

func (x *seqIndex) add(first Position, seq StreamSeq) {
	if len(x.entries) >= maxIndex {
		half := x.entries[:0]
		for i := 0; i < len(x.entries); i += 2 {
			half = append(half, x.entries[i])
		}
		x.entries = half
	}
	x.entries = append(x.entries, indexEntry{first, seq})
}

func (x *seqIndex) find(p Position) (StreamSeq, bool) {
	i, exact := slices.BinarySearchFunc(x.entries, p, func(e indexEntry, p Position) int {
		switch {
		case e.first < p:
			return -1
		case e.first > p:
			return 1
		}
		return 0
	})
	if !exact {
		i--
	}
	if i < 0 {
		return 0, false
	}
	return max(x.entries[i].seq, x.kept), true
}

// trim forgets the batches before seq. The last entry stays: the newest batch
// is never purged.
func (x *seqIndex) trim(before StreamSeq) {
	x.kept = max(x.kept, before)
	// An entry stands for all batches up to the next entry's.
	n := 0
	for n+1 < len(x.entries) && x.entries[n+1].seq <= before {
		n++
	}
	x.entries = slices.Delete(x.entries, 0, n)
}
