package checkpoint

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/stream"
)

// Collection never drops what a recovery may still need.
func TestRetain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ids := rapid.SliceOfNDistinct(rapid.Uint64Range(1, 50), 0, 10, rapid.ID[uint64]).Draw(t, "ids")
		gens := make([]stream.Generation, len(ids))
		for i, id := range ids {
			gens[i] = stream.Generation{ID: id, FromSeq: stream.StreamSeq(rapid.Uint64Range(1, 1000).Draw(t, "from"))}
		}
		var uploads []stream.StreamSeq
		for _, u := range rapid.SliceOfN(rapid.Uint64Range(1, 1000), 0, 2).Draw(t, "uploads") {
			uploads = append(uploads, stream.StreamSeq(u))
		}
		keep := rapid.IntRange(0, 4).Draw(t, "keep")
		r := Retain(gens, uploads, keep)

		if want := min(max(keep, 1), len(gens)); len(r.Keep) != want {
			t.Fatalf("kept %d of %d, want %d", len(r.Keep), len(gens), want)
		}
		if len(r.Keep)+len(r.Drop) != len(gens) {
			t.Fatal("a generation is neither kept nor dropped")
		}
		for _, k := range r.Keep {
			for _, d := range r.Drop {
				if d.ID > k.ID {
					t.Fatalf("dropped %d and kept the older %d", d.ID, k.ID)
				}
			}
			if r.PurgeBefore > k.FromSeq {
				t.Fatalf("purge to %d, generation %d needs %d", r.PurgeBefore, k.ID, k.FromSeq)
			}
		}
		for _, u := range uploads {
			if r.PurgeBefore > u {
				t.Fatalf("purge to %d, an upload needs %d", r.PurgeBefore, u)
			}
		}
		if len(gens) == 0 && r.PurgeBefore != 0 {
			t.Fatal("purge without a generation")
		}
		if r.Collect != (len(uploads) == 0) {
			t.Fatal("chunks collected during an upload")
		}
	})
}

func TestLive(t *testing.T) {
	g := stream.Generation{ID: 1, Manifest: stream.Hash{9}}
	m := sample()
	live, ok := Live([]stream.Generation{g}, map[stream.Hash]Manifest{{9}: m})
	if !ok || len(live) != 4 || !live[stream.Hash{9}] || !live[stream.Hash{3}] || !live[stream.Hash{2}] {
		t.Errorf("live %v %v", live, ok)
	}
	if _, ok := Live([]stream.Generation{g}, nil); ok {
		t.Error("collected without the manifest")
	}
}
