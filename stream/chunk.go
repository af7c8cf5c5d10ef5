package stream

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
	"lukechampine.com/blake3"
)

// ChunkSize is the size of every chunk but the last of an input, in octets.
const ChunkSize = 256 << 10

// MaxBlob is the largest blob, in octets.
const MaxBlob = 64 << 20

// How a stored message's content is packed: its first octet.
const (
	packRaw   = 0
	packZstd  = 1
	packIndex = 2 // of a blob larger than a chunk: total length, then the parts' hashes
)

// Sum is the hash under which b is stored.
func Sum(b []byte) Hash { return blake3.Sum256(b) }

// packer makes and reads the messages of the store. It is safe for concurrent use.
type packer struct {
	enc *zstd.Encoder // nil: does not compress
	dec *zstd.Decoder
}

func newPacker(compress bool) (*packer, error) {
	p := &packer{}
	var err error
	// Bounded: a chunk never unpacks to more than ChunkSize, whatever it claims.
	p.dec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(2), zstd.WithDecoderMaxMemory(ChunkSize))
	if err == nil && compress {
		p.enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2))
	}
	return p, err
}

// packChunk makes the message of a chunk.
func (p *packer) packChunk(b []byte) []byte {
	if p.enc != nil && len(b) > 64 {
		m := p.enc.EncodeAll(b, append(make([]byte, 0, len(b)/2), packZstd))
		if len(m) < len(b)-len(b)/16 {
			return m
		}
	}
	return append(append(make([]byte, 0, len(b)+1), packRaw), b...)
}

// unpackChunk reads a chunk without trust: what it returns has the hash h.
func (p *packer) unpackChunk(m []byte, h Hash) ([]byte, error) {
	if len(m) == 0 {
		return nil, fmt.Errorf("%w chunk %s: empty message", ErrCorrupt, h)
	}
	b := m[1:]
	switch m[0] {
	case packRaw:
	case packZstd:
		var err error
		if b, err = p.dec.DecodeAll(b, nil); err != nil {
			return nil, fmt.Errorf("%w chunk %s: %w", ErrCorrupt, h, err)
		}
	default:
		return nil, fmt.Errorf("%w: packing %d of chunk %s; was it written by a newer ftckpt?", ErrVersion, m[0], h)
	}
	if len(b) > ChunkSize {
		return nil, fmt.Errorf("%w chunk %s: %d octets", ErrCorrupt, h, len(b))
	}
	if Sum(b) != h {
		return nil, fmt.Errorf("%w chunk %s: its content has another hash", ErrCorrupt, h)
	}
	return b, nil
}

func packIndexOf(size int, parts []Hash) []byte {
	m := be.AppendUint64(append(make([]byte, 0, 9+len(parts)*HashSize), packIndex), uint64(size))
	for _, h := range parts {
		m = append(m, h[:]...)
	}
	return m
}

// unpackIndex reads a blob's index without trust.
func unpackIndex(m []byte, h Hash) (size int, parts []Hash, err error) {
	c := cursor{b: m}
	kind, total := c.u8(), c.u64()
	if !c.bad && kind != packIndex {
		return 0, nil, fmt.Errorf("%w: packing %d of blob %s; was it written by a newer ftckpt?", ErrVersion, kind, h)
	}
	if c.bad || total > MaxBlob || uint64(len(c.b)) != (total+ChunkSize-1)/ChunkSize*HashSize {
		return 0, nil, fmt.Errorf("%w blob %s: index of %d octets for %d", ErrCorrupt, h, len(m), total)
	}
	for len(c.b) > 0 {
		parts = append(parts, Hash(c.take(HashSize)))
	}
	return int(total), parts, nil
}
