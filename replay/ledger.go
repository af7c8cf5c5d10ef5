// Package replay is recovery: it restores the newest generation in a capsule,
// feeds the logged octets back through the south side, swallows what the client
// already has, and goes live (the recovery of US 7,673,038).
//
// The protocol is in two pure parts: Ledger, which knows from the log where
// every connection stands, and Engine, which rolls restored connections
// forward. Neither has a goroutine, a clock or a socket.
package replay

import (
	"cmp"
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// Line is what the log says of one connection.
type Line struct {
	Conn  stream.ConnID
	Tuple stream.FourTuple // zero until an open record or a manifest has told

	State   stream.ConnState
	Known   bool      // State was seen
	StateAt time.Time // when State was read, by this host's clock

	Ended  bool
	Reason stream.EndReason

	Digests []stream.OutDigest // the newest few, oldest first
	Logged  Instream           // what its client has said

	opened, accepted bool // its open and accept records were seen
	answered         bool // and something that the client sent after them
	open             stream.ConnOpen
	accept           stream.ConnAccept
	openPos, endPos  stream.Position
	fin              bool         // the client's FIN was seen
	finNxt           seqnum.Value // the octet after it
	acceptAt         time.Time

	dialled bool // the server opened it: dial and answer are its open and accept
	dial    stream.ConnDial
	answer  stream.ConnAnswer
	refused bool
}

// Ledger follows a service's log. Feed it every entry in order. The zero value
// is not usable; see NewLedger.
type Ledger struct {
	Config   []byte // newest Hello's
	Fence    stream.Fence
	Last     stream.Position
	LastSeq  stream.StreamSeq
	Gen      stream.Generation // newest; ID 0: none
	GenAt    time.Time
	Exited   bool   // the server of this epoch is gone though its host lives
	Released bool   // the primary of this epoch ended protection on purpose
	Heir     string // node to which the primary of this epoch offers the service

	lines map[stream.ConnID]*Line
	late  []tcpwrap.Late // ended, the server first, oldest first
}

// keptLate bounds Ledger.late.
const keptLate = 16384

// keptDigests is how many digests of a connection are remembered. The newest is
// ahead of what its client had acknowledged when there was a transfer under way,
// and a restored server does not say that much before it is live.
const keptDigests = 8

// NewLedger makes an empty ledger.
func NewLedger() *Ledger { return &Ledger{lines: map[stream.ConnID]*Line{}} }

// Apply takes the log's next entry, read at now.
func (l *Ledger) Apply(now time.Time, e stream.Entry) {
	l.LastSeq = e.Seq
	if e.Fence != nil {
		l.Fence = *e.Fence
		l.Exited, l.Released, l.Heir = false, false, ""
		return
	}
	l.Last = e.Pos
	switch r := e.Rec.(type) {
	case stream.Hello:
		l.Config = r.Config
	case stream.ConnOpen:
		ln := l.line(r.Conn)
		ln.Tuple, ln.opened = r.Tuple, true
		ln.open, ln.openPos = r, e.Pos
	case stream.ConnAccept:
		ln := l.line(r.Conn)
		ln.accepted = true
		ln.accept, ln.acceptAt = r, now
		if !ln.Known {
			ln.State = stream.ConnState{Conn: r.Conn, ClientAck: r.ISN, ClientEdge: r.ISN, ServerNxt: r.ISN.Add(1)}
		}
	case stream.ConnDial:
		ln := l.line(r.Conn)
		ln.Tuple, ln.opened, ln.dialled = r.Tuple, true, true
		ln.dial, ln.openPos, ln.acceptAt = r, e.Pos, now
	case stream.ConnAnswer:
		l.line(r.Conn).answeredBy(r)
	case stream.ConnState:
		ln := l.line(r.Conn)
		ln.State, ln.Known, ln.StateAt = r, true, now
	case stream.OutDigest:
		ln := l.line(r.Conn)
		if len(ln.Digests) == keptDigests {
			ln.Digests = slices.Delete(ln.Digests, 0, 1)
		}
		ln.Digests = append(ln.Digests, r)
	case stream.Bytes:
		ln := l.line(r.Conn)
		ln.answered = true
		ln.Logged.add(r.Seq, len(r.Payload), false)
	case stream.ClientFin:
		ln := l.line(r.Conn)
		ln.answered, ln.finNxt, ln.fin = true, r.Seq.Add(1), true
		ln.Logged.add(r.Seq, 1, true)
	case stream.ConnEnd:
		ln := l.line(r.Conn)
		ln.Ended, ln.Reason, ln.endPos = true, r.Reason, e.Pos
		if r.Reason == stream.EndTimeWait && ln.fin {
			l.late = append(l.late, tcpwrap.Late{Tuple: ln.Tuple, Nxt: ln.finNxt, Since: now})
			if len(l.late) >= 2*keptLate {
				l.late = slices.Delete(l.late, 0, keptLate)
			}
		}
	case stream.ClientReset:
		ln := l.line(r.Conn)
		ln.refused = ln.dialled && !ln.accepted
		ln.Ended, ln.Reason, ln.endPos = true, stream.EndReset, e.Pos
	case stream.Generation:
		l.Gen, l.GenAt = r, now
	case stream.ServerExit:
		l.Exited = true
	case stream.Goodbye:
		l.Released = true
	case stream.Handover:
		l.Heir = r.Node
	}
}

// Introduce tells the ledger the connections of a generation's manifest, which
// may have no open record of their own, and lets it forget those that ended
// before its cut: no recovery from this generation or a later one meets them
// again.
func (l *Ledger) Introduce(gen stream.Generation, tuples map[stream.ConnID]stream.FourTuple) {
	for id, t := range tuples {
		l.line(id).Tuple = t
	}
	for id, ln := range l.lines {
		if _, ok := tuples[id]; !ok && ln.Ended && ln.endPos <= gen.Cut {
			delete(l.lines, id)
		}
	}
}

// SeenAsIn takes the times at which things were read from a ledger that read
// them when they came: this one has read them all at once.
func (l *Ledger) SeenAsIn(other *Ledger) {
	l.late = slices.Clone(other.late)
	for id, ln := range l.lines {
		if o := other.lines[id]; o != nil {
			ln.StateAt, ln.acceptAt = o.StateAt, o.acceptAt
		}
	}
}

// TimeWait are the connections that ended not long before now with the server
// closing first: its TCP would still answer for them.
func (l *Ledger) TimeWait(now time.Time) []tcpwrap.Late {
	var out []tcpwrap.Late
	at := map[stream.FourTuple]int{} // the newest of one 4-tuple counts
	for _, t := range l.late {
		if t.Tuple == (stream.FourTuple{}) || now.Sub(t.Since) >= timeWait {
			continue
		}
		if i, again := at[t.Tuple]; again {
			out[i] = t
			continue
		}
		at[t.Tuple] = len(out)
		out = append(out, t)
	}
	for _, ln := range l.lines {
		if i, yes := at[ln.Tuple]; yes && !ln.Ended {
			out[i].Tuple = stream.FourTuple{} // another connection lives there
		}
	}
	return slices.DeleteFunc(out, func(t tcpwrap.Late) bool { return t.Tuple == stream.FourTuple{} })
}

// timeWait is how long a TCP answers for a connection that it closed first.
const timeWait = 60 * time.Second

// Line is what is known of a connection, nil when nothing is.
func (l *Ledger) Line(id stream.ConnID) *Line { return l.lines[id] }

// Lines calls f for every connection that is remembered, in no order.
func (l *Ledger) Lines(f func(*Line)) {
	for _, ln := range l.lines {
		f(ln)
	}
}

// Live is the number of connections that have not ended.
func (l *Ledger) Live() int {
	n := 0
	for _, ln := range l.lines {
		if !ln.Ended {
			n++
		}
	}
	return n
}

func (l *Ledger) line(id stream.ConnID) *Line {
	ln := l.lines[id]
	if ln == nil {
		ln = &Line{Conn: id}
		l.lines[id] = ln
	}
	return ln
}

// Orphan is a connection that a recovery cannot bring back: its client is told
// with a reset, never with silence (promise 4).
type Orphan struct {
	Conn  stream.ConnID
	Tuple stream.FourTuple
	// At are the sequence numbers at which the client may be expecting us; a
	// reset counts only where it matches exactly (RFC 5961, 3.2). None are known
	// of a connection of which the log has no more than its name: it is told when
	// it next speaks, by the TCP that has no such connection.
	At []seqnum.Value
}

// Orphans are the connections that live in the log and are not among the
// survivors. A survivor may be in the log under other names as well: when
// protection ends and begins again, what the first primary called it is no
// connection of its own, and a reset for that would hit the survivor.
func (l *Ledger) Orphans(survives func(stream.ConnID) bool) []Orphan {
	survivor := map[stream.FourTuple]stream.ConnID{}
	for id, ln := range l.lines {
		if survives(id) {
			survivor[ln.Tuple] = id
		}
	}
	var out []Orphan
	for id, ln := range l.lines {
		if other, yes := survivor[ln.Tuple]; yes && other != id {
			continue
		}
		quarantined := ln.Ended && ln.Reason == stream.EndQuarantine
		untold := quarantined || ln.Ended && ln.Reason == stream.EndExpired && !survives(id)
		if ln.Ended && !untold || survives(id) && !quarantined || ln.Tuple == (stream.FourTuple{}) {
			continue
		}
		if ln.opened && !ln.accepted {
			continue // its SYN was never answered: the client knows no connection
		}
		o := Orphan{Conn: id, Tuple: ln.Tuple}
		if ln.Known || ln.accepted {
			o.At = append(o.At, ln.State.ClientAck)
			if ln.State.ServerNxt != ln.State.ClientAck {
				o.At = append(o.At, ln.State.ServerNxt)
			}
		}
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b Orphan) int { return cmp.Compare(a.Conn, b.Conn) })
	return out
}
