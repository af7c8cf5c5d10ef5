package tcpwrap

import (
	"testing"

	"github.com/cespare/xxhash/v2"
	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// However a stream is cut into segments, repeated and overlapped, its digest up
// to a place is that of its octets.
func TestDigestOfAnySegments(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := seqnum.Value(rapid.Uint32().Draw(t, "base"))
		data := rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(t, "data")
		limit := rapid.IntRange(0, len(data)).Draw(t, "limit")
		var all, part Digest
		all.Begin(base)
		part.Begin(base)
		reached := part.WriteUpTo(base.Add(seqnum.Size(limit)), base, nil)
		for at := 0; at < len(data); {
			from := max(0, at-rapid.IntRange(0, 20).Draw(t, "again"))
			to := min(len(data), at+rapid.IntRange(1, 60).Draw(t, "more"))
			seq := base.Add(seqnum.Size(from))
			all.Write(seq, data[from:to])
			reached = part.WriteUpTo(base.Add(seqnum.Size(limit)), seq, data[from:to]) || reached
			at = to
		}
		if all.Sum() != xxhash.Sum64(data) || all.Next() != base.Add(seqnum.Size(len(data))) {
			t.Fatal("digest of the whole")
		}
		if !reached || part.Sum() != xxhash.Sum64(data[:limit]) {
			t.Fatalf("digest of %d of %d octets, reached %v", limit, len(data), reached)
		}
	})
}

func TestDigestSaysNothingAfterAGap(t *testing.T) {
	var d Digest
	d.Write(5, []byte("before the beginning"))
	if d.fresh() {
		t.Error("a digest that has not begun has news")
	}
	d.Begin(100)
	d.Write(90, []byte("0123456789ab")) // two octets of it count
	if !d.fresh() || d.Next() != 102 || d.Sum() != xxhash.Sum64([]byte("ab")) {
		t.Errorf("at %d", d.Next())
	}
	d.Write(103, []byte("x"))
	d.Write(102, []byte("xy"))
	if d.fresh() || d.WriteUpTo(102, 102, nil) {
		t.Error("a digest with a gap still says something")
	}
}
