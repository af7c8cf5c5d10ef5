// Package seqnum gives TCP sequence numbers a type of their own.
//
// RFC 9293 section 3.4: sequence space is finite and all arithmetic on it is
// modulo 2**32, so a bare "<" between two sequence numbers is a bug that waits
// for a connection to wrap. Values of this package compare only through its
// methods. The shape is gVisor's pkg/tcpip/seqnum.
package seqnum

// Value is a position in the sequence space of one direction of one
// connection.
type Value uint32

// Size is a distance in sequence space, in octets (SYN and FIN count as one).
type Size uint32

// Less reports whether v comes before w, for v and w less than 2**31 apart.
func (v Value) Less(w Value) bool { return int32(v-w) < 0 }

// LessEq reports whether v is w or comes before it.
func (v Value) LessEq(w Value) bool { return int32(v-w) <= 0 }

// Add returns the value s octets after v.
func (v Value) Add(s Size) Value { return v + Value(s) }

// Sub returns the value s octets before v.
func (v Value) Sub(s Size) Value { return v - Value(s) }

// To returns the distance from v to w: w must not come before v.
func (v Value) To(w Value) Size { return Size(w - v) }

// InWindow reports whether v is in [first, first+size).
func (v Value) InWindow(first Value, size Size) bool { return first.To(v) < size }

// Max returns the later of v and w.
func Max(v, w Value) Value {
	if v.Less(w) {
		return w
	}
	return v
}

// Min returns the earlier of v and w.
func Min(v, w Value) Value {
	if w.Less(v) {
		return w
	}
	return v
}
