package stream

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

func survey(t testing.TB, s *Store) Survey {
	t.Helper()
	v, err := s.Survey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// noise is content of n chunks that nobody else has.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n*ChunkSize)
	r := rand.NewChaCha8([32]byte{byte(seed), 1})
	_, _ = r.Read(b)
	return b
}

// A primary that was stopped in the midst of a Collect goes on after another has
// taken over. It drops nothing that the other relies on: neither what that one
// stored, nor what was there already and came back into use (found by the
// simulator).
func TestLateCollect(t *testing.T) {
	srv := start(t, ServerOptions{Listen: "127.0.0.1:0"})
	open := func() *Store {
		l, err := openLog(t, Config{Service: "late", Join: srv.JoinString()})
		if err != nil {
			t.Fatal(err)
		}
		return l.Store(StoreOptions{})
	}
	put := func(s *Store, b []byte) map[Hash]bool {
		t.Helper()
		chunks, _, err := s.PutReader(t.Context(), bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		m := map[Hash]bool{}
		for _, h := range chunks {
			m[h] = true
		}
		return m
	}
	past, kept, fresh := noise(1, 2), noise(2, 2), noise(3, 2)

	old := open()
	put(old, past)
	live := put(old, kept)
	then := survey(t, old) // and now its host is stopped

	next := open()
	next.Trust(func(h Hash) bool { return live[h] })
	needs := put(next, append(append(bytes.Clone(past), kept...), fresh...))

	if _, err := old.Collect(t.Context(), then, func(h Hash) bool { return live[h] }); err != nil {
		t.Fatal(err)
	}
	for h := range needs {
		if _, err := next.Get(t.Context(), h); err != nil {
			t.Errorf("what the new primary needs: %v", err)
		}
	}
	// What nobody needs is still found by the next one.
	n, err := next.Collect(t.Context(), survey(t, next), func(h Hash) bool { return live[h] })
	if err != nil || n != 4 {
		t.Fatalf("%d dropped, %v", n, err)
	}
}
