package stream

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// KindOrder is the kind of Order.
const KindOrder Kind = 33

// TakeKind is what a server did with a connection.
type TakeKind uint8

// The kinds of a Take.
const (
	TakeRead   TakeKind = 0 // it read up to Seq
	TakeAccept TakeKind = 1 // it accepted the connection
	TakeClosed TakeKind = 2 // it closed the connection, or noticed that its client has reset it
)

// Take is one thing that the server took from its connections.
type Take struct {
	Conn ConnID
	What TakeKind
	// Seq is the sequence number of the first octet that was not read, the FIN
	// counting as one; of TakeRead only.
	Seq seqnum.Value
}

// Order says in which order the server took things from its connections, where
// that is not the order in which the log has them. Bytes, ClientFin and
// ClientReset records are taken in the log's order, whole and one after the
// other, unless an Order record says otherwise: first all those up to position
// Upto (in so far as no earlier Take covered them), then Takes in their order.
// Accepts are always said.
//
// An Order is behind the records of what it speaks of. Output depends on it as
// on those.
type Order struct {
	Upto  Position
	Takes []Take
}

// Kind implements Record.
func (Order) Kind() Kind { return KindOrder }

// MaxTakes bounds the Takes of one Order.
const MaxTakes = 4096

// maxConnStep bounds the distance of two connections' identities in one Order,
// and of the first from 0: two bits of the number on the wire are taken.
const maxConnStep = 1 << 61

func appendOrder(dst []byte, r *Order) ([]byte, error) {
	if len(r.Takes) > MaxTakes {
		return dst, fmt.Errorf("%w record: %d takes", ErrInvalid, len(r.Takes))
	}
	body := be.AppendUint64(make([]byte, 0, 8+6*len(r.Takes)), uint64(r.Upto))
	prev := ConnID(0)
	for _, t := range r.Takes {
		step := int64(t.Conn - prev)
		if t.What > TakeClosed || step >= maxConnStep || step < -maxConnStep {
			return dst, fmt.Errorf("%w record: take %d of connection %d after %d", ErrInvalid, t.What, t.Conn, prev)
		}
		prev = t.Conn
		body = binary.AppendUvarint(body, uint64(step<<1^step>>63)<<2|uint64(t.What))
		if t.What == TakeRead {
			body = appendSeq(body, t.Seq)
		}
	}
	return append(appendHead(dst, KindOrder, len(body)), body...), nil
}

// order reads an Order's body; it is bounded by the record's own length.
func (c *cursor) order() Order {
	r := Order{Upto: Position(c.u64())}
	prev := ConnID(0)
	for len(c.b) > 0 && !c.bad {
		v, n := binary.Uvarint(c.b)
		if n <= 0 || len(r.Takes) == MaxTakes {
			c.bad = true
			break
		}
		c.b = c.b[n:]
		zigzag := v >> 2
		t := Take{Conn: prev + ConnID(int64(zigzag>>1)^-int64(zigzag&1)), What: TakeKind(v & 3)}
		switch t.What {
		case TakeRead:
			t.Seq = c.seq()
		case TakeAccept, TakeClosed:
		default:
			c.bad = true
		}
		prev = t.Conn
		r.Takes = append(r.Takes, t)
	}
	r.Takes = slices.Clip(r.Takes)
	return r
}
