package tcpwrap

import (
	"github.com/cespare/xxhash/v2"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// Digest hashes one connection's outstream, from a base on and in order, so
// that what a restored server says can be compared with what the old one said.
// It is no defence against a server that lies: XXH64 finds accidents.
type Digest struct {
	base, nxt seqnum.Value
	begun     bool
	broken    bool // octets were missed: nothing can be said any more
	news      bool // since the last Sum
	h         xxhash.Digest
}

// Begin starts anew at base: octets before it count for nothing.
func (d *Digest) Begin(base seqnum.Value) {
	*d = Digest{base: base, nxt: base, begun: true}
	d.h.Reset()
}

// Write takes the payload of a segment; what was taken before is left out.
func (d *Digest) Write(seq seqnum.Value, data []byte) {
	end := seq.Add(seqnum.Size(len(data)))
	switch {
	case !d.begun || d.broken || end.LessEq(d.nxt):
	case d.nxt.Less(seq):
		d.broken = true
	default:
		_, _ = d.h.Write(data[seq.To(d.nxt):]) // never fails
		d.nxt, d.news = end, true
	}
}

// WriteUpTo is Write of what lies before limit. It reports whether the digest
// stands exactly at limit now.
func (d *Digest) WriteUpTo(limit, seq seqnum.Value, data []byte) bool {
	if end := seq.Add(seqnum.Size(len(data))); limit.Less(end) {
		if limit.Less(seq) {
			data = nil
		} else {
			data = data[:seq.To(limit)]
		}
	}
	d.Write(seq, data)
	return d.nxt == limit && !d.broken
}

// Sum is the hash of the octets from Base up to Next.
func (d *Digest) Sum() uint64 { return d.h.Sum64() }

// Base is where the digest begins, and Next where it stands.
func (d *Digest) Base() seqnum.Value { return d.base }

// Next is the octet after the last one taken.
func (d *Digest) Next() seqnum.Value { return d.nxt }

// fresh reports whether there is something new to log, and makes it old.
func (d *Digest) fresh() bool {
	yes := d.news && !d.broken
	d.news = false
	return yes
}
