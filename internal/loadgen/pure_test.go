package loadgen

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestPatternIsAFunctionOfPosition(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := pattern(rapid.Uint64().Draw(t, "pattern"))
		off := rapid.IntRange(0, 1000).Draw(t, "off")
		n := rapid.IntRange(1, 100).Draw(t, "n")
		part := make([]byte, n)
		p.fill(part, off)
		if !bytes.Equal(part, p.bytes(off + n)[off:]) {
			t.Fatal("a part filled at its offset differs from the whole")
		}
		if i := p.check(part, off); i != -1 {
			t.Fatalf("its own bytes are wrong at %d", i)
		}
		bad := rapid.IntRange(0, n-1).Draw(t, "bad")
		part[bad] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if i := p.check(part, off); i != off+bad {
			t.Fatalf("flipped byte %d, found %d", off+bad, i)
		}
	})
}

func TestPatternShowsShiftsAndOthers(t *testing.T) {
	b := pattern(1).bytes(64)
	if pattern(1).check(b[1:], 0) == -1 || pattern(1).check(b[8:], 0) == -1 || pattern(2).check(b, 0) == -1 {
		t.Error("shifted or foreign bytes pass")
	}
}

func TestSamplesKeepTheSlowest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(2, 16).Draw(t, "limit")
		took := rapid.SliceOfN(rapid.Int64Range(0, 1000), 1, 300).Draw(t, "took")
		s := newSamples(limit)
		slowest, at := int64(-1), int64(0)
		for i, d := range took {
			s.add(int64(i), d)
			if d > slowest {
				slowest, at = d, int64(i)
			}
		}
		if len(s.AtUS) > limit || len(s.AtUS) != len(s.TookUS) {
			t.Fatalf("%d, %d samples, limit %d", len(s.AtUS), len(s.TookUS), limit)
		}
		found := false
		for i := range s.AtUS {
			found = found || s.TookUS[i] == slowest && s.AtUS[i] == at
			if i > 0 && s.AtUS[i] <= s.AtUS[i-1] {
				t.Fatal("not in order of time")
			}
		}
		if !found {
			t.Fatalf("the slowest, %d at %d, was lost: %v", slowest, at, s)
		}
	})
}

func TestSame(t *testing.T) {
	list := func(v ...any) []any { return v }
	for _, c := range []struct {
		want, got any
		same      bool
	}{
		{nil, nil, true},
		{nil, "", false},
		{"a", "a", true},
		{"a", "b", false},
		{int64(1), int64(1), true},
		{int64(1), "1", false},
		{list(), list(), true},
		{list(), nil, false},
		{nil, list(), false},
		{list("a", "b"), list("a", "b"), true},
		{list("a", "b"), list("a"), false},
		{list("a", "b"), list("b", "a"), false},
	} {
		if same(c.want, c.got) != c.same {
			t.Errorf("same(%v, %v) is not %v", c.want, c.got, c.same)
		}
	}
}

// The same seed must send the same commands: a failed run can be run again.
func TestModelIsAFunctionOfItsSeed(t *testing.T) {
	all := func() (b []byte) {
		m := newModel(rand.New(rand.NewPCG(1, 2)), "p")
		for range 2000 {
			o := m.next()
			b = appendReply(appendCommand(b, o.args), o)
		}
		return b
	}
	if !bytes.Equal(all(), all()) {
		t.Error("two models of one seed differ")
	}
}

func TestRESP(t *testing.T) {
	for _, c := range []struct {
		o         op
		cmd, repl string
	}{
		{op{[]any{"SET", "k", "v"}, "OK"}, "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n", "+OK\r\n"},
		{op{[]any{"GET", "k"}, nil}, "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", "$-1\r\n"},
		{op{[]any{"GET", "k"}, "v"}, "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", "$1\r\nv\r\n"},
		{op{[]any{"INCR", "k"}, int64(7)}, "*2\r\n$4\r\nINCR\r\n$1\r\nk\r\n", ":7\r\n"},
		{
			op{[]any{"LRANGE", "k", 0, 10}, []any{"a", ""}},
			"*4\r\n$6\r\nLRANGE\r\n$1\r\nk\r\n$1\r\n0\r\n$2\r\n10\r\n", "*2\r\n$1\r\na\r\n$0\r\n\r\n",
		},
	} {
		if got := string(appendCommand(nil, c.o.args)); got != c.cmd {
			t.Errorf("command %q, want %q", got, c.cmd)
		}
		if got := string(appendReply(nil, c.o)); got != c.repl {
			t.Errorf("reply %q, want %q", got, c.repl)
		}
	}
}

func TestMerge(t *testing.T) {
	t0 := time.Unix(100, 0)
	part := func(start time.Time, id int) Result {
		r := Result{Seed: 1, Started: start, Ended: start.Add(time.Second), Conns: []ConnResult{{
			ID: id, Requests: 10, BytesChecked: 100, Mismatches: 1, Resets: 2, StallUS: int64(id),
			Samples: Samples{AtUS: []int64{5}, TookUS: []int64{6}, Stride: 1},
		}}}
		r.sum()
		return r
	}
	var r Result
	r.Merge(part(t0, 1))
	r.Merge(part(t0.Add(time.Second), 2))
	got := []any{r.Connections, r.Requests, r.BytesChecked, r.Mismatches, r.Resets, r.StallUS, r.Ended, r.Conns[1].Samples.AtUS[0]}
	want := []any{2, int64(20), int64(200), int64(2), int64(4), int64(2), t0.Add(2 * time.Second), int64(1_000_005)}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestFollow(t *testing.T) {
	var seen []int64
	f := func(m Message) { seen = append(seen, m.Requests) }
	r, err := Follow(strings.NewReader(`{"event":"progress","requests":5}
		{"event":"result","result":{"requests":9}}`), f)
	if err != nil || r.Requests != 9 || len(seen) != 1 || seen[0] != 5 {
		t.Errorf("%v %v %v", r, seen, err)
	}
	if _, err := Follow(strings.NewReader(`{"event":"progress"}`), f); !errors.Is(err, ErrNoResult) {
		t.Errorf("truncated: %v", err)
	}
	if _, err := Follow(strings.NewReader(`{"event":"error","error":"why"}`), f); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("error: %v", err)
	}
	if _, err := Follow(strings.NewReader(`{"event":`), f); err == nil {
		t.Error("garbage was accepted")
	}
}

func TestBadConfig(t *testing.T) {
	for _, c := range []Config{
		{Redis: 1}, {Addr: "a:1"}, {Addr: "a:1", Redis: -1, Idle: 3}, {Addr: "a:1", Redis: 1 << 20},
		{Addr: "a:1", Redis: 1, TransferBytes: 1 << 40}, {Addr: "a:1", Redis: 1, MaxSamples: 1},
		{Addr: "a:1", Redis: 1, PaceUS: -1},
	} {
		if _, err := Run(t.Context(), c, nil, nil); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}
