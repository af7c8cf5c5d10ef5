package sim

import (
	"encoding/binary"

	"github.com/ftckpt/ftckpt/stream"
)

// storeServer keeps chunks and blobs under their hashes, one message for each.
// All its operations are requests of their own, so a node can be stopped between
// any two of them.
type storeServer struct {
	at   map[stream.Hash]uint64 // sequence of its message
	list []stream.Hash          // by sequence; some are gone
	last uint64
}

func (s *storeServer) has(h stream.Hash) bool { return s.at[h] != 0 }

// put stores h; that it is there is as good.
func (s *storeServer) put(h stream.Hash) {
	if s.at[h] == 0 {
		s.last++
		s.at[h] = s.last
		s.list = append(s.list, h)
	}
}

// drop purges the subject of h up to the message upTo.
func (s *storeServer) drop(h stream.Hash, upTo uint64) {
	if s.at[h] <= upTo {
		delete(s.at, h)
	}
}

// all calls f for everything there is, in order.
func (s *storeServer) all(f func(stream.Hash)) {
	kept := s.list[:0]
	for _, h := range s.list {
		if s.at[h] != 0 {
			kept = append(kept, h)
			f(h)
		}
	}
	s.list = kept
}

// hashOf makes a hash of a kind and a number.
func hashOf(kind byte, n uint64) (h stream.Hash) {
	h[0] = kind
	binary.BigEndian.PutUint64(h[1:], n)
	return h
}

// Kinds of hashes.
const (
	hashManifest = iota + 1
	hashSame     // a chunk that every generation has
	hashSome     // a chunk that comes back now and then
	hashOwn      // a chunk of one generation
)
