package north

import (
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// What a server did with a connection.
type What uint8

// The events of a recorder.
const (
	// Read says that octets were taken out of the receive queue: Seq is the one
	// that the next read returns. Reading the end of the stream counts as one octet,
	// the FIN's. An event may tell nothing new.
	Read What = iota + 1
	// Accept says that the connection left its listener's queue.
	Accept
	// Closed says that the server will not read from the connection any more.
	Closed
)

// Event is one thing that the server did.
type Event struct {
	What  What
	Tuple stream.FourTuple
	Seq   seqnum.Value
	// Socket tells sockets with the same addresses apart: two acknowledgements of
	// one SYN-ACK, on two processors, make two, and one is destroyed. 0: not known.
	Socket uint64
}
