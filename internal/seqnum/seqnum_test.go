package seqnum

import (
	"testing"

	"pgregory.net/rapid"
)

func TestOrderAcrossTheWrap(t *testing.T) {
	for _, c := range []struct {
		a, b Value
		less bool
	}{
		{0, 1, true}, {1, 0, false}, {5, 5, false},
		{0xffffffff, 0, true}, {0, 0xffffffff, false},
		{0xfffffff0, 0x10, true}, {0x80000001, 0, true},
	} {
		if got := c.a.Less(c.b); got != c.less {
			t.Errorf("%d.Less(%d) = %v, want %v", c.a, c.b, got, c.less)
		}
	}
}

func TestAlgebra(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := Value(rapid.Uint32().Draw(t, "v"))
		s := Size(rapid.Uint32Range(1, 1<<31-1).Draw(t, "s"))
		w := v.Add(s)
		if !v.Less(w) || w.Less(v) || !v.LessEq(w) || w.LessEq(v) {
			t.Fatalf("order of %d and %d+%d", v, v, s)
		}
		if v.To(w) != s || w.Sub(s) != v {
			t.Fatalf("distance from %d to %d is %d, want %d", v, w, v.To(w), s)
		}
		if Max(v, w) != w || Max(w, v) != w || Min(v, w) != v || Min(w, v) != v {
			t.Fatal("max or min")
		}
		if !v.InWindow(v, s) || w.InWindow(v, s) {
			t.Fatal("window edges")
		}
	})
}
