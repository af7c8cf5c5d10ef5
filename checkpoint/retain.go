package checkpoint

import (
	"sort"

	"github.com/ftckpt/ftckpt/stream"
)

// KeepGenerations is how many generations are kept: the newest, and one before
// it in case the newest turns out not to verify or not to restore.
const KeepGenerations = 2

// Retention is what may be forgotten.
type Retention struct {
	Keep, Drop []stream.Generation // newest first
	// PurgeBefore bounds the purge of the log: no message from it on may go. 0
	// means that nothing may go.
	PurgeBefore stream.StreamSeq
	// Collect says whether chunks may be collected now. Chunks of an upload in
	// flight are in no manifest yet, so nobody could tell them from garbage.
	Collect bool
}

// Retain says which of the stable generations to keep and how far the log may be
// purged. A recovery from a kept generation needs the log from its FromSeq on;
// uploads in flight, with the FromSeq they are going to have, need it as well,
// since they may be the only ones left when the kept ones fail.
func Retain(stable []stream.Generation, uploads []stream.StreamSeq, keep int) Retention {
	gens := append([]stream.Generation(nil), stable...)
	sort.SliceStable(gens, func(i, j int) bool { return gens[i].ID > gens[j].ID })
	n := min(max(keep, 1), len(gens))
	r := Retention{Keep: gens[:n:n], Drop: gens[n:], Collect: len(uploads) == 0}
	// With fewer than were asked for, what is there has no understudy yet, but
	// the log before it is of no use to anybody either.
	if n == 0 {
		return r
	}
	r.PurgeBefore = r.Keep[0].FromSeq
	for _, g := range r.Keep[1:] {
		r.PurgeBefore = min(r.PurgeBefore, g.FromSeq)
	}
	for _, from := range uploads {
		r.PurgeBefore = min(r.PurgeBefore, from)
	}
	return r
}

// Live is the set of chunks and blobs that the kept generations are made of.
// manifests maps each kept generation's manifest hash to the manifest; ok is
// false when one is missing, and then nothing may be collected.
func Live(keep []stream.Generation, manifests map[stream.Hash]Manifest) (live map[stream.Hash]bool, ok bool) {
	live = make(map[stream.Hash]bool)
	for _, g := range keep {
		m, have := manifests[g.Manifest]
		if !have {
			return nil, false
		}
		live[g.Manifest] = true
		for _, h := range m.Image.Hashes() {
			live[h] = true
		}
	}
	return live, true
}
