package loadgen

import (
	"encoding/binary"
)

// pattern is an endless, position-dependent string of bytes: a byte that is
// lost, doubled, moved or of another pattern shows as a difference.
type pattern uint64

// word is splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
// Generators, 2014) of the i-th state, so that any position costs the same.
func (p pattern) word(i uint64) uint64 {
	z := uint64(p) + (i+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// fill writes the bytes from offset off into b.
func (p pattern) fill(b []byte, off int) {
	var w [8]byte
	for len(b) > 0 {
		binary.LittleEndian.PutUint64(w[:], p.word(uint64(off)/8))
		n := copy(b, w[off%8:])
		b, off = b[n:], off+n
	}
}

// check returns the offset of the first byte that is not the pattern's, or -1.
func (p pattern) check(b []byte, off int) int {
	var want [8]byte
	for len(b) > 0 {
		binary.LittleEndian.PutUint64(want[:], p.word(uint64(off)/8))
		w := want[off%8:]
		n := min(len(w), len(b))
		for i := range n {
			if b[i] != w[i] {
				return off + i
			}
		}
		b, off = b[n:], off+n
	}
	return -1
}

func (p pattern) bytes(n int) []byte {
	b := make([]byte, n)
	p.fill(b, 0)
	return b
}
