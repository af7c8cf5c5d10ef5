package north

import (
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// Order finds out where a server takes things in another order than that of
// the log, and says so in stream.Order records. A replay that takes whatever no
// such record speaks of in the log's order takes everything as the server did.
//
// It is a plain value: records and events in, records out; not safe for
// concurrent use. A record must be Logged before the server can have taken what
// it holds. The orders that are ready belong into the log before anything that
// the server has made since.
type Order struct {
	conns map[stream.FourTuple]*reader
	byID  map[stream.ConnID]*reader

	dialled map[stream.ConnID]stream.FourTuple // by the server, and not answered

	queue []item // logged and not taken, in the log's order; taken ones among them
	tidy  int    // length of queue at which taken ones are looked for
	last  stream.Position

	ready []stream.Order
	said  uint64
	age   int
}

// reader is one connection of the server.
type reader struct {
	id    stream.ConnID
	tuple stream.FourTuple
	read  seqnum.Value // what the server has read up to
	told  seqnum.Value // how much of that the log says, or its own order does
	sock  uint64       // Event.Socket of what the server has accepted
	open  bool         // it has
	gone  bool         // the server will not read any more
	reset bool         // by its client, which the server has not noticed
	since int          // age at which that was
}

// item is one record that the server will take, or has taken, something of.
type item struct {
	pos   stream.Position
	of    *reader
	seq   seqnum.Value
	end   seqnum.Value
	reset bool
}

func (i *item) taken() bool { return i.of.gone || !i.reset && i.end.LessEq(i.of.read) }

// tidyLength is how long the queue may be before it is looked through.
const tidyLength = 256

// NewOrder makes an Order for a log whose records up to last are taken.
func NewOrder(last stream.Position) *Order {
	return &Order{dialled: map[stream.ConnID]stream.FourTuple{}, conns: map[stream.FourTuple]*reader{}, byID: map[stream.ConnID]*reader{}, last: last, tidy: tidyLength}
}

// Adopt takes on a connection whose octets before from are not in this log, or
// are taken. One that is known stays as it is.
func (o *Order) Adopt(id stream.ConnID, t stream.FourTuple, from seqnum.Value) {
	if o.byID[id] == nil {
		o.add(&reader{id: id, tuple: t, read: from, told: from, open: true})
	}
}

// Aged forgets connections that clients reset before the last call and whose end
// was never seen. Call it at each generation.
func (o *Order) Aged() {
	o.age++
	for _, r := range o.byID {
		if r.reset && o.age-r.since > 1 {
			o.forget(r)
		}
	}
}

func (o *Order) add(r *reader) {
	if old := o.conns[r.tuple]; old != nil {
		o.forget(old)
	}
	o.conns[r.tuple], o.byID[r.id] = r, r
}

func (o *Order) forget(r *reader) {
	r.gone = true
	delete(o.byID, r.id)
	if o.conns[r.tuple] == r {
		delete(o.conns, r.tuple)
	}
}

// Logged takes a record that is in the log, at pos.
func (o *Order) Logged(pos stream.Position, rec stream.Record) {
	switch rec := rec.(type) {
	case stream.ConnOpen:
		first := rec.ISN.Add(1)
		o.add(&reader{id: rec.Conn, tuple: rec.Tuple, read: first, told: first})
	case stream.ConnDial:
		o.dialled[rec.Conn] = rec.Tuple
	case stream.ConnAnswer:
		if t, ok := o.dialled[rec.Conn]; ok {
			delete(o.dialled, rec.Conn)
			o.Adopt(rec.Conn, t, rec.ISN.Add(1))
		}
	case stream.Bytes:
		o.put(pos, rec.Conn, rec.Seq, rec.Seq.Add(seqnum.Size(len(rec.Payload))))
	case stream.ClientFin:
		o.put(pos, rec.Conn, rec.Seq, rec.Seq.Add(1))
	case stream.ClientReset:
		if r := o.byID[rec.Conn]; r != nil && !r.gone {
			r.reset, r.since = true, o.age
			o.queue = append(o.queue, item{pos: pos, of: r, reset: true})
			o.last = pos
		}
	case stream.ConnEnd:
		delete(o.dialled, rec.Conn)
		if r := o.byID[rec.Conn]; r != nil {
			o.forget(r)
		}
	}
}

func (o *Order) put(pos stream.Position, id stream.ConnID, seq, end seqnum.Value) {
	r := o.byID[id]
	if r == nil || r.gone || end.LessEq(r.read) {
		return
	}
	if len(o.queue) >= o.tidy {
		o.advance()
		kept := o.queue[:0]
		for _, i := range o.queue {
			if !i.taken() {
				kept = append(kept, i)
			}
		}
		clear(o.queue[len(kept):])
		o.queue = kept
		o.tidy = 2*len(kept) + tidyLength
	}
	o.queue = append(o.queue, item{pos: pos, of: r, seq: seq, end: end})
	o.last = pos
}

// Event takes what the server did.
func (o *Order) Event(e Event) {
	r := o.conns[e.Tuple]
	if r == nil || r.gone {
		return
	}
	if e.What != Closed {
		r.sock = e.Socket
	}
	switch e.What {
	case Read:
		o.read(r, e.Seq)
	case Accept:
		r.open = true
		o.say(stream.Take{Conn: r.id, What: stream.TakeAccept})
	case Closed:
		if r.open && (r.sock == 0 || r.sock == e.Socket) {
			o.closed(r)
		}
	}
}

func (o *Order) read(r *reader, to seqnum.Value) {
	if to.LessEq(r.read) {
		return
	}
	r.read, r.open = to, true
	o.advance()
	if to.LessEq(r.told) || len(o.queue) > 0 && o.queue[0].of == r {
		return // as in the log, or the first part of what is next there
	}
	o.say(stream.Take{Conn: r.id, What: stream.TakeRead, Seq: to})
	r.told = to
}

func (o *Order) closed(r *reader) {
	if !r.reset {
		r.gone = true // what is left of it in the log is read by nobody
		return
	}
	o.advance()
	if i := o.queue; len(i) == 0 || i[0].of != r || !i[0].reset {
		o.say(stream.Take{Conn: r.id, What: stream.TakeClosed})
	}
	o.forget(r)
}

// advance drops what is taken from the front of the queue.
func (o *Order) advance() {
	n := 0
	for ; n < len(o.queue) && o.queue[n].taken(); n++ {
		i := &o.queue[n]
		if !i.reset && i.of.told.Less(i.end) {
			i.of.told = i.end
		}
		*i = item{}
	}
	o.queue = o.queue[n:]
}

// say makes what the server took a part of the log.
func (o *Order) say(t stream.Take) {
	o.advance()
	upto := o.last
	if len(o.queue) > 0 {
		upto = o.queue[0].pos - 1
		// It may have taken a part of what is next before it turned to another one.
		if head := o.queue[0].of; head.told.Less(head.read) {
			head.told = head.read
			o.append(upto, stream.Take{Conn: head.id, What: stream.TakeRead, Seq: head.read})
		}
	}
	o.append(upto, t)
}

func (o *Order) append(upto stream.Position, t stream.Take) {
	n := len(o.ready)
	if n == 0 || o.ready[n-1].Upto != upto || len(o.ready[n-1].Takes) == stream.MaxTakes {
		o.ready = append(o.ready, stream.Order{Upto: upto})
		n++
	}
	r := &o.ready[n-1]
	if k := len(r.Takes); k > 0 && t.What == stream.TakeRead && r.Takes[k-1].What == stream.TakeRead && r.Takes[k-1].Conn == t.Conn {
		r.Takes[k-1].Seq = t.Seq
		return
	}
	r.Takes = append(r.Takes, t)
	o.said++
}

// Ready answers the orders to be appended to the log now, and forgets them.
func (o *Order) Ready() []stream.Order {
	out := o.ready
	o.ready = nil
	return out
}

// Unread is something logged that the server has not read.
type Unread struct {
	Conn     stream.ConnID
	Seq, End seqnum.Value
	Pos      stream.Position // of its record
}

// Unread answers what is logged and not read, in the log's order.
func (o *Order) Unread() []Unread {
	o.advance()
	var out []Unread
	for i := range o.queue {
		if q := &o.queue[i]; !q.reset && !q.taken() {
			out = append(out, Unread{q.of.id, q.seq, q.end, q.pos})
		}
	}
	return out
}

// Holds reports whether what there is of a connection in unread has all octets
// from seq up to end, and from which record on.
func Holds(unread []Unread, id stream.ConnID, seq, end seqnum.Value) (from stream.Position, all bool) {
	for i := range unread {
		u := &unread[i]
		if u.Conn != id || u.End.LessEq(seq) {
			continue
		}
		if seq.Less(u.Seq) {
			return from, false
		}
		if from == 0 {
			from = u.Pos
		}
		if seq = u.End; end.LessEq(seq) {
			return from, true
		}
	}
	return from, false
}

// Said is how many takes there were to be said.
func (o *Order) Said() uint64 { return o.said }
