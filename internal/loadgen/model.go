package loadgen

import (
	"fmt"
	"math/rand/v2"
)

// op is one command and the reply it must get: nil, a string, an int64, or a
// []any of strings.
type op struct {
	args []any
	want any
}

// Bounds of what one connection keeps on the server and here.
const (
	keysEach   = 16
	maxAppend  = 8 << 10
	maxList    = 64
	largeFrom  = 256 << 10
	largeTo    = 1 << 20
	largeOdds  = 500
	smallValue = 512
)

// model knows what the server holds under one connection's keys. It is a pure
// function of its seed: next both chooses a command and foretells its reply.
type model struct {
	rng      *rand.Rand
	prefix   string
	strs     map[string]string
	counters map[string]int64
	lists    map[string][]any
	large    string // value of the one large key
}

func newModel(rng *rand.Rand, prefix string) *model {
	return &model{
		rng: rng, prefix: prefix,
		strs: map[string]string{}, counters: map[string]int64{}, lists: map[string][]any{},
	}
}

func (m *model) key(kind string) string {
	return fmt.Sprintf("%s:%s%d", m.prefix, kind, m.rng.IntN(keysEach))
}

func (m *model) value(limit int) string {
	return string(pattern(m.rng.Uint64()).bytes(1 + m.rng.IntN(limit)))
}

// pipeline returns the next request: mostly one command, sometimes many.
func (m *model) pipeline() []op {
	n := 1
	if m.rng.IntN(8) == 0 {
		n = 2 + m.rng.IntN(40)
	}
	ops := make([]op, n)
	for i := range ops {
		ops[i] = m.next()
	}
	return ops
}

func (m *model) next() op {
	if m.rng.IntN(largeOdds) == 0 {
		return m.nextLarge()
	}
	switch m.rng.IntN(12) {
	case 0, 1:
		k, v := m.key("s"), m.value(smallValue)
		m.strs[k] = v
		return op{[]any{"SET", k, v}, "OK"}
	case 2, 3:
		k := m.key("s")
		return op{[]any{"GET", k}, m.str(k)}
	case 4:
		return m.nextAppend()
	case 5:
		k := m.key("s")
		v := m.strs[k]
		from, to := m.rng.IntN(len(v)+1), m.rng.IntN(len(v)+1)
		return op{[]any{"GETRANGE", k, from, to}, getRange(v, from, to)}
	case 6, 7:
		k := m.key("n")
		m.counters[k]++
		return op{[]any{"INCR", k}, m.counters[k]}
	case 8:
		return m.nextPush()
	case 9:
		k := m.key("l")
		l := m.lists[k]
		from, to := m.rng.IntN(maxList), m.rng.IntN(maxList)
		return op{[]any{"LRANGE", k, from, to}, listRange(l, from, to)}
	case 10:
		return m.nextPop()
	default:
		v := m.value(smallValue)
		return op{[]any{"ECHO", v}, v}
	}
}

func (m *model) str(k string) any {
	if v, ok := m.strs[k]; ok {
		return v
	}
	return nil
}

func (m *model) nextAppend() op {
	k, v := m.key("s"), m.value(smallValue)
	if len(m.strs[k])+len(v) > maxAppend {
		delete(m.strs, k)
		return op{[]any{"DEL", k}, int64(1)}
	}
	m.strs[k] += v
	return op{[]any{"APPEND", k, v}, int64(len(m.strs[k]))}
}

func (m *model) nextPush() op {
	k, v := m.key("l"), m.value(64)
	l := m.lists[k]
	if len(l) >= maxList {
		delete(m.lists, k)
		return op{[]any{"DEL", k}, int64(1)}
	}
	m.lists[k] = append([]any{v}, l...)
	return op{[]any{"LPUSH", k, v}, int64(len(l) + 1)}
}

func (m *model) nextPop() op {
	k := m.key("l")
	l := m.lists[k]
	if len(l) == 0 {
		return op{[]any{"RPOP", k}, nil}
	}
	last := l[len(l)-1]
	m.lists[k] = l[:len(l)-1]
	return op{[]any{"RPOP", k}, last}
}

func (m *model) nextLarge() op {
	k := m.prefix + ":large"
	if m.large == "" || m.rng.IntN(2) == 0 {
		m.large = string(pattern(m.rng.Uint64()).bytes(largeFrom + m.rng.IntN(largeTo-largeFrom+1)))
		return op{[]any{"SET", k, m.large}, "OK"}
	}
	return op{[]any{"GET", k}, m.large}
}

// getRange is redis's GETRANGE for non-negative ends, which are inclusive.
func getRange(v string, from, to int) any {
	to = min(to, len(v)-1)
	if from > to {
		return ""
	}
	return v[from : to+1]
}

// listRange is redis's LRANGE for non-negative ends, which are inclusive.
func listRange(l []any, from, to int) any {
	to = min(to, len(l)-1)
	if from > to {
		return []any{}
	}
	return append([]any{}, l[from:to+1]...)
}

// same reports whether a reply is the one foretold.
func same(want, got any) bool {
	w, isList := want.([]any)
	if !isList {
		if _, gotList := got.([]any); gotList {
			return false
		}
		return want == got
	}
	g, ok := got.([]any)
	if !ok || len(g) != len(w) {
		return false
	}
	for i := range w {
		if !same(w[i], g[i]) {
			return false
		}
	}
	return true
}

// short describes a reply in an error message.
func short(v any) string {
	s := fmt.Sprintf("%q", v)
	if len(s) > 120 {
		s = fmt.Sprintf("%s... (%d bytes quoted)", s[:120], len(s))
	}
	return s
}
