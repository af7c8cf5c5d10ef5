// Package tcpwrap is the south side (US 7,673,038, the "south side wrapper"):
// what stands between TCP and the network.
package tcpwrap

import "errors"

// Direction of a packet, seen from the protected server.
type Direction uint8

// Directions.
const (
	Inbound  Direction = iota + 1 // client to server
	Outbound                      // server to client
)

// PacketID names a caught packet until its verdict; a Datapath never has two
// packets of one ID outstanding.
type PacketID uint32

// Verdict is what becomes of a caught packet.
type Verdict uint8

// Verdicts.
const (
	Accept Verdict = iota + 1 // let it go on as it is
	Drop                      // as if it had never been
)

// Packet is one caught IP packet.
type Packet struct {
	ID  PacketID
	Dir Direction
	// Data is the packet from its IP header on. It is valid until the next Recv.
	// It may be a GSO super-segment of up to 64 KiB.
	Data []byte
	// Corrupt says that the TCP checksum was looked at and is wrong. Such a
	// packet must not be logged: TCP is going to drop it.
	Corrupt bool
}

// MaxRewrite is the longest packet that Datapath.Rewrite takes: a netlink
// attribute has 16 bits for its length.
const MaxRewrite = 65535 - 4

// ErrClosed is what a closed Datapath answers.
var ErrClosed = errors.New("datapath closed")

// Datapath catches the packets of a service and puts others in. Between the
// catch and the verdict a packet is held by the kernel: it is neither with TCP
// nor on the wire. When the process that owns a Datapath dies, everything it
// held and everything that comes after is dropped (fail closed).
//
// Recv is for one goroutine. The other methods may be called from any, also
// while Recv blocks.
type Datapath interface {
	// Recv blocks until there is at least one packet and appends what there is
	// to dst. It answers ErrClosed after Close.
	Recv(dst []Packet) ([]Packet, error)
	// Verdict queues a verdict; it takes effect at the next Flush at the latest.
	// Verdicts of one direction take effect in the order they were given.
	Verdict(id PacketID, v Verdict)
	// Rewrite is Verdict with Accept, but what goes on is ip: the whole packet in
	// another form, with a full checksum, whatever offloading it was caught with
	// (the kernel keeps its GSO size). ip is free when Rewrite returns. At most
	// MaxRewrite octets; a longer one is dropped, as if it had been lost.
	Rewrite(id PacketID, ip []byte)
	// Flush makes all queued verdicts take effect.
	Flush() error
	// SendUp gives the host's own TCP a packet as if it had come from the
	// client: source the client, destination the service. It is not caught.
	SendUp(ip []byte) error
	// SendOut puts a packet on the wire towards the client. It is not caught.
	SendOut(ip []byte) error
	// Drops counts packets the kernel discarded because the queue was full.
	Drops() uint64
	// Close stops Recv and lets go of the queue. It leaves the rules, which fail
	// closed from then on; removing them is a step of its own (Rules.Remove).
	Close() error
}
