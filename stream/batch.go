package stream

import (
	"fmt"
	"hash/crc32"
	"time"
)

// MaxBatch bounds a batch with its header, in octets. With the message's
// headers it stays well under the server's max_payload of 1 MB.
const MaxBatch = 700 << 10

// batchHeader is the length of a batch's header.
const batchHeader = 40

// Magic numbers; the last octet is the format's version.
const (
	magicBatch = 'F'<<24 | 'T'<<16 | 'B'<<8 | 1
	magicFence = 'F'<<24 | 'T'<<16 | 'F'<<8 | 1
	magicBeat  = 'F'<<24 | 'T'<<16 | 'H'<<8 | 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crcOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// Batch is one message of the log's data subject.
type Batch struct {
	Epoch   Epoch
	Number  uint64   // counts from 0 in each epoch
	First   Position // of Records[0]
	Records []Record // never empty; their slices alias the message
}

// Last is the position of the batch's last record.
func (b *Batch) Last() Position { return b.First + Position(len(b.Records)) - 1 }

// header is a batch's header.
type header struct {
	epoch  Epoch
	number uint64
	first  Position
	count  uint32
}

// sealBatch fills in the header of buf, whose first batchHeader octets were
// left free in front of the records.
func sealBatch(buf []byte, h header) {
	be.PutUint32(buf, magicBatch)
	be.PutUint64(buf[8:], uint64(h.epoch))
	be.PutUint64(buf[16:], h.number)
	be.PutUint64(buf[24:], uint64(h.first))
	be.PutUint32(buf[32:], h.count)
	be.PutUint32(buf[36:], uint32(len(buf)-batchHeader))
	be.PutUint32(buf[4:], crcOf(buf[8:]))
}

// checkMagic compares all but the version octet for identity.
func checkMagic(what string, b []byte, magic uint32, min int) error {
	if len(b) < 4 || be.Uint32(b)>>8 != magic>>8 {
		return fmt.Errorf("%w %s: no such thing (%d octets)", ErrCorrupt, what, len(b))
	}
	if v := b[3]; v != byte(magic) {
		return fmt.Errorf("%w %d of a %s; was it written by a newer ftckpt?", ErrVersion, v, what)
	}
	if len(b) < min {
		return fmt.Errorf("%w %s: %d octets", ErrCorrupt, what, len(b))
	}
	return nil
}

// decodeHeader checks a whole message, its checksum too, and reads its header.
func decodeHeader(b []byte) (header, error) {
	if err := checkMagic("batch", b, magicBatch, batchHeader); err != nil {
		return header{}, err
	}
	if len(b) > MaxBatch {
		return header{}, fmt.Errorf("%w batch: %d octets are more than %d", ErrCorrupt, len(b), MaxBatch)
	}
	if crcOf(b[8:]) != be.Uint32(b[4:]) {
		return header{}, fmt.Errorf("%w batch: checksum", ErrCorrupt)
	}
	h := header{
		epoch:  Epoch(be.Uint64(b[8:])),
		number: be.Uint64(b[16:]),
		first:  Position(be.Uint64(b[24:])),
		count:  be.Uint32(b[32:]),
	}
	// A record takes at least two octets, so a count within bounds also bounds
	// what decoding it allocates.
	body := len(b) - batchHeader
	if int64(be.Uint32(b[36:])) != int64(body) || h.epoch == 0 || h.first == 0 ||
		h.count == 0 || int64(h.count) > int64(body)/2 || h.first+Position(h.count) < h.first {
		return header{}, fmt.Errorf("%w batch: header (epoch %d, first %d, count %d, body %d)", ErrCorrupt, h.epoch, h.first, h.count, body)
	}
	return h, nil
}

// DecodeBatch reads a batch without trust: ErrCorrupt for one that is damaged
// or out of bounds, ErrVersion for a format or a kind of record that this
// program does not know. The records' slices alias b.
func DecodeBatch(b []byte) (Batch, error) {
	h, err := decodeHeader(b)
	if err != nil {
		return Batch{}, err
	}
	out := Batch{Epoch: h.epoch, Number: h.number, First: h.first, Records: make([]Record, 0, h.count)}
	for rest := b[batchHeader:]; len(out.Records) < int(h.count); {
		var r Record
		if r, rest, err = decodeRecord(rest); err != nil {
			return Batch{}, fmt.Errorf("decode record %d at position %d: %w", len(out.Records), h.first+Position(len(out.Records)), err)
		}
		out.Records = append(out.Records, r)
		if len(out.Records) == int(h.count) && len(rest) != 0 {
			return Batch{}, fmt.Errorf("%w batch: %d octets behind the last record", ErrCorrupt, len(rest))
		}
	}
	return out, nil
}

const fenceHeader = 4 + 4 + 8 + 8 + 16 + 8 + 1

func encodeFence(f Fence) []byte {
	dst := be.AppendUint32(make([]byte, 0, fenceHeader+len(f.Node)), magicFence)
	dst = be.AppendUint32(dst, 0)
	dst = be.AppendUint64(dst, uint64(f.Epoch))
	dst = be.AppendUint64(dst, uint64(f.Prev))
	dst = append(dst, f.Nonce[:]...)
	dst = be.AppendUint64(dst, uint64(f.At.UnixMicro()))
	dst = append(append(dst, byte(len(f.Node))), f.Node...)
	be.PutUint32(dst[4:], crcOf(dst[8:]))
	return dst
}

// decodeFence reads a fence without trust; seq is where it was found.
func decodeFence(b []byte, seq StreamSeq) (Fence, error) {
	if err := checkMagic("fence", b, magicFence, fenceHeader); err != nil {
		return Fence{}, err
	}
	if crcOf(b[8:]) != be.Uint32(b[4:]) {
		return Fence{}, fmt.Errorf("%w fence: checksum", ErrCorrupt)
	}
	c := cursor{b: b[8:]}
	f := Fence{Epoch: Epoch(c.u64()), Prev: StreamSeq(c.u64()), Nonce: [16]byte(c.take(16)),
		At: time.UnixMicro(int64(c.u64())), Seq: seq}
	n := int(c.u8())
	if len(c.b) != n || f.Epoch == 0 || f.Prev >= seq {
		return Fence{}, fmt.Errorf("%w fence: epoch %d, at %d, behind %d", ErrCorrupt, f.Epoch, seq, f.Prev)
	}
	f.Node = string(c.b)
	if err := checkName("node", f.Node, maxNodeName); err != nil {
		return Fence{}, fmt.Errorf("%w fence: %w", ErrCorrupt, err)
	}
	return f, nil
}
