package stream

import (
	"fmt"
	"net/netip"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// Epoch is one tenure as primary. Every takeover adds one; the first is 1.
type Epoch uint64

// Position is the ordinal of a record in a service's log, counted from 1 over
// all epochs. Zero is the place before the first record. Positions are dense:
// the record after p is p+1, whatever batch it travels in.
type Position uint64

// StreamSeq is JetStream's own sequence number of one message: a batch of
// records, or a fence. It says where to start reading and what to purge.
type StreamSeq uint64 //nolint:revive // stream.Seq would read as a TCP sequence number

// ConnID names one connection of a service for as long as the service lives;
// it is never used again, not even when the same 4-tuple is.
type ConnID uint64

// FourTuple is a connection's address pair, seen from the server: Server is the
// service's own address whoever opened the connection, so on one that the server
// has dialled, Client is the peer that listens.
type FourTuple struct {
	Server, Client netip.AddrPort
}

func (t FourTuple) String() string { return fmt.Sprintf("%s<-%s", t.Server, t.Client) }

// Kind is the type octet of a record on the wire.
type Kind uint8

// Record kinds. The numbers are the wire format (docs/WIRE.md) and never
// change meaning. Kinds 33 to 63 are kept for the north side (accept, read,
// close, shim results) and the output digest.
const (
	KindConnOpen    Kind = 1
	KindConnAccept  Kind = 2
	KindBytes       Kind = 3
	KindClientFin   Kind = 4
	KindClientReset Kind = 5
	KindConnState   Kind = 6
	KindConnEnd     Kind = 7
	KindGeneration  Kind = 8
	KindServerExit  Kind = 9
	KindHello       Kind = 10
	KindGoodbye     Kind = 11
	KindUrgent      Kind = 12
	KindConnDial    Kind = 14
	KindConnAnswer  Kind = 15
	KindHandover    Kind = 16
	KindOutDigest   Kind = 32
)

// Record is one entry of the log. The concrete types below are all there are.
type Record interface {
	Kind() Kind
}

// Hello opens an epoch: it is the first record a live primary writes (a standby that
// takes over may have logged what clients sent to it before), and tells
// a reader what the service is. Config is a small JSON document of the
// service's name, VIP and ports; the log does not interpret it.
type Hello struct {
	Config []byte
}

// ConnOpen is a client's SYN (RFC 9293, 3.5): a connection younger than every
// generation before it.
type ConnOpen struct {
	Conn    ConnID
	Tuple   FourTuple
	ISN     seqnum.Value // client's initial sequence number
	Window  uint16       // unscaled, as every SYN's window is
	Options []byte       // TCP options of the SYN, raw, at most 40 octets
}

// ConnAccept is the server's SYN-ACK as it was first sent.
type ConnAccept struct {
	Conn    ConnID
	ISN     seqnum.Value // server's initial sequence number
	Options []byte       // TCP options of the SYN-ACK, raw, at most 40 octets
}

// ConnDial is a SYN of the server's own: it opens a connection to a peer. What
// the other records call the client is that peer.
type ConnDial struct {
	Conn    ConnID
	Tuple   FourTuple
	ISN     seqnum.Value // server's initial sequence number
	Window  uint16       // unscaled
	Options []byte       // TCP options of the SYN, raw, at most 40 octets
}

// ConnAnswer is the peer's SYN-ACK to a ConnDial.
type ConnAnswer struct {
	Conn    ConnID
	ISN     seqnum.Value // peer's initial sequence number
	Window  uint16       // unscaled
	Options []byte       // TCP options of the SYN-ACK, raw, at most 40 octets
}

// Bytes are client octets in sequence order: Seq is the sequence number of
// Payload's first octet, and it follows what was logged before for Conn,
// except just after a change of epoch, where a reader must drop what overlaps.
type Bytes struct {
	Conn    ConnID
	Seq     seqnum.Value
	Payload []byte
}

// ClientFin is the client's FIN; Seq is the FIN's own sequence number.
type ClientFin struct {
	Conn ConnID
	Seq  seqnum.Value
}

// ClientReset is a RST the client sent with an acceptable sequence number.
type ClientReset struct {
	Conn ConnID
	Seq  seqnum.Value
}

// Urgent says that the client has announced urgent data (RFC 9293, 3.8.5): Up is
// the segment's sequence number plus its urgent pointer. It comes ahead of the
// octets that it is about, which a server may have taken out of line.
type Urgent struct {
	Conn ConnID
	Up   seqnum.Value
}

// Kind implements Record.
func (Urgent) Kind() Kind { return KindUrgent }

// ConnState is where a connection stood when a batch was sealed. It is
// coalesced: only the last one of a connection matters, and a stale one is
// harmless.
type ConnState struct {
	Conn       ConnID
	ClientAck  seqnum.Value // highest acknowledgement number of the client
	ClientEdge seqnum.Value // right edge of the client's receive window
	ServerNxt  seqnum.Value // highest server sequence number released, plus one
	ClientTS   uint32       // client's last TSval (RFC 7323), 0 when off
	ServerTS   uint32       // server's last released TSval, 0 when off
	ServerEdge seqnum.Value // right edge of the window the client has been given
}

// EndReason says how a connection ended.
type EndReason uint8

// How a connection ended.
const (
	EndClosed     EndReason = 1 // both FINs acknowledged
	EndReset      EndReason = 2 // a RST of either side
	EndQuarantine EndReason = 3 // reset by us because recovery could not be exact
	EndTimeWait   EndReason = 4 // both FINs acknowledged, and the server's came first: its TCP is in TIME_WAIT
	EndExpired    EndReason = 5 // idle for too long: no longer protected; a takeover resets it
)

// ConnEnd says that a connection is over; its records are garbage.
type ConnEnd struct {
	Conn   ConnID
	Reason EndReason
}

// Generation makes a checkpoint count. Cut is the position the image stands
// at; From (<= Cut) is the first record that a recovery from it needs, and
// FromSeq the batch which holds it.
type Generation struct {
	ID       uint64
	Manifest Hash // of the manifest in the checkpoint store
	Cut      Position
	From     Position
	FromSeq  StreamSeq
}

// ServerExit says that the server process is gone although its host lives, so
// that a standby need not wait for silence.
type ServerExit struct {
	Status uint32 // wait status as in wait(2); 0 when it could not be had
}

// OutDigest is what the server has said on a connection: the XXH64 of its
// outstream from Base up to Seq. A recovery that makes other octets is not exact.
// A base is where the connection stood in a generation's image, or its first
// octet.
type OutDigest struct {
	Conn ConnID
	Base seqnum.Value
	Seq  seqnum.Value
	Sum  uint64
}

// Kind implements Record.
func (OutDigest) Kind() Kind { return KindOutDigest }

// Goodbye says that the primary ended protection on purpose and left the
// server running: its silence from here on is no failure, and a standby must
// not take over.
type Goodbye struct{}

// Handover says that the primary holds everything back and that Node is to take
// over now, on an operator's request. A later one with no Node takes that back.
// It is an offer, no licence: the fence decides, as ever.
type Handover struct {
	Node string // a node's name, or "" to take the offer back
}

// Kind implements Record.
func (Handover) Kind() Kind { return KindHandover }

// Kind implements Record.
func (Goodbye) Kind() Kind { return KindGoodbye }

// Kind implements Record.
func (Hello) Kind() Kind { return KindHello }

// Kind implements Record.
func (ConnOpen) Kind() Kind { return KindConnOpen }

// Kind implements Record.
func (ConnAccept) Kind() Kind { return KindConnAccept }

// Kind implements Record.
func (ConnDial) Kind() Kind { return KindConnDial }

// Kind implements Record.
func (ConnAnswer) Kind() Kind { return KindConnAnswer }

// Kind implements Record.
func (Bytes) Kind() Kind { return KindBytes }

// Kind implements Record.
func (ClientFin) Kind() Kind { return KindClientFin }

// Kind implements Record.
func (ClientReset) Kind() Kind { return KindClientReset }

// Kind implements Record.
func (ConnState) Kind() Kind { return KindConnState }

// Kind implements Record.
func (ConnEnd) Kind() Kind { return KindConnEnd }

// Kind implements Record.
func (Generation) Kind() Kind { return KindGeneration }

// Kind implements Record.
func (ServerExit) Kind() Kind { return KindServerExit }

// HashSize is the length of a Hash in octets.
const HashSize = 32

// Hash is a BLAKE3-256 content hash: the address of a chunk or a manifest in
// the checkpoint store.
type Hash [HashSize]byte

func (h Hash) String() string { return fmt.Sprintf("%x", h[:]) }
