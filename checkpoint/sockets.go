package checkpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	skinet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	tcpstream "github.com/checkpoint-restore/go-criu/v7/crit/images/tcp-stream"
	"google.golang.org/protobuf/proto"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// TCPState is a TCP state with the kernel's numbers (include/net/tcp_states.h).
type TCPState uint8

// TCP states that an image may hold.
const (
	Established TCPState = 1
	SynSent     TCPState = 2
	SynRecv     TCPState = 3
	FinWait1    TCPState = 4
	FinWait2    TCPState = 5
	TimeWait    TCPState = 6
	Closed      TCPState = 7
	CloseWait   TCPState = 8
	LastAck     TCPState = 9
	Listen      TCPState = 10
	Closing     TCPState = 11
)

var stateNames = [...]string{"", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "closed", "close-wait", "last-ack", "listen", "closing"}

func (s TCPState) String() string {
	if int(s) < len(stateNames) && s > 0 {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// finSent reports whether the server's FIN is in its send queue or beyond.
func (s TCPState) finSent() bool {
	return s == FinWait1 || s == FinWait2 || s == Closing || s == LastAck || s == Closed
}

// finAcked reports whether the client has acknowledged that FIN.
func (s TCPState) finAcked() bool { return s == FinWait2 || s == Closed }

// finReceived reports whether rcv_nxt counts the client's FIN.
func (s TCPState) finReceived() bool {
	return s == CloseWait || s == LastAck || s == Closing || s == Closed
}

// Option bits of a connection (TCPI_OPT_*, include/uapi/linux/tcp.h).
const (
	OptTimestamps = 1
	OptSACK       = 2
	OptWScale     = 4
)

// Socket is a TCP socket of an image. The sequence fields have the kernel's
// meaning and are zero for one that listens or is only bound.
type Socket struct {
	Inode  uint32           // names the socket within the image
	Tuple  stream.FourTuple // v4-mapped addresses as IPv4, which is what the wire has
	IPv6   bool             // an AF_INET6 socket, also with a v4-mapped address
	State  TCPState
	Stream bool // has a tcp-stream image: sequence numbers are valid

	RcvNxt    seqnum.Value // next octet expected of the client; counts its FIN
	CopiedSeq seqnum.Value // next octet that the server's read(2) returns
	WriteSeq  seqnum.Value // end of what the server has written; counts its FIN
	SndNxt    seqnum.Value // end of what TCP has sent; see ReadSockets about a FIN
	SndUna    seqnum.Value // first octet the client has not acknowledged

	SndWScale, RcvWScale uint8
	Options              uint32 // OptTimestamps | OptSACK | OptWScale
	MSS                  uint16
	Timestamp            uint32 // the server's TSval clock at the dump, 0 without timestamps
	SndWnd, RcvWnd       uint32 // windows in octets, unscaled
	RcvWup               seqnum.Value
}

// Listening reports whether the socket accepts connections.
func (s Socket) Listening() bool { return s.State == Listen }

// ReadSockets reads every TCP socket of the image in dir, listeners included.
//
// An image cannot tell a FIN that waits in the send queue from one that was just
// sent when no data waits before it: SndNxt then says it was sent.
func ReadSockets(dir string) ([]Socket, error) {
	files, err := decodeAll[fdinfo.FileEntry](dir, "files.img", magicFiles)
	if err != nil {
		return nil, err
	}
	var socks []Socket
	for _, f := range files {
		sk := f.GetIsk()
		if f.GetType() != fdinfo.FdTypes_INETSK || sk.GetProto() != protoTCP {
			continue
		}
		s, err := decodeSocket(sk)
		if err != nil {
			return nil, fmt.Errorf("read files.img: socket %#x: %w", sk.GetIno(), err)
		}
		socks = append(socks, s)
	}
	// A file for each connection, read while clients wait.
	if err := inParallel(len(socks), func(i int) error { return readStream(dir, &socks[i]) }); err != nil {
		return nil, err
	}
	return socks, nil
}

const (
	protoTCP = 6
	afInet   = 2
	afInet6  = 10
)

func decodeSocket(sk *skinet.InetSkEntry) (Socket, error) {
	s := Socket{Inode: sk.GetIno(), State: TCPState(sk.GetState()), IPv6: sk.GetFamily() == afInet6}
	var err error
	if s.Tuple.Server, err = addrPort(sk.GetFamily(), sk.GetSrcAddr(), sk.GetSrcPort()); err != nil {
		return s, err
	}
	s.Tuple.Client, err = addrPort(sk.GetFamily(), sk.GetDstAddr(), sk.GetDstPort())
	return s, err
}

// addrPort turns the words of an image, which are the address's octets as they
// lie in memory, into an address.
func addrPort(family uint32, words []uint32, port uint32) (netip.AddrPort, error) {
	if port > 0xffff {
		return netip.AddrPort{}, fmt.Errorf("%w: port %d", errImage, port)
	}
	var b [16]byte
	for i, w := range words[:min(len(words), 4)] {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	switch {
	case family == afInet && len(words) >= 1:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), uint16(port)), nil
	case family == afInet6 && len(words) == 4:
		return netip.AddrPortFrom(netip.AddrFrom16(b).Unmap(), uint16(port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("%w: address of %d words in family %d", errImage, len(words), family)
}

func streamName(inode uint32) string { return fmt.Sprintf("tcp-stream-%x.img", inode) }

// readStream fills in what tcp-stream-INODE.img says, if there is one.
func readStream(dir string, s *Socket) error {
	var t *tcpstream.TcpStreamEntry
	err := readImage(dir, streamName(s.Inode), magicTCPStream, func(msg []byte) (int64, error) {
		if t != nil {
			return 0, fmt.Errorf("%w: two connections", errImage)
		}
		t = &tcpstream.TcpStreamEntry{}
		if err := proto.Unmarshal(msg, t); err != nil {
			return 0, fmt.Errorf("%w: %w", errImage, err)
		}
		return int64(t.GetInqLen()) + int64(t.GetOutqLen()), nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if t == nil {
		return fmt.Errorf("read %s: %w: empty", streamName(s.Inode), errImage)
	}
	s.fill(t)
	return nil
}

// fill undoes what libsoccr does to the kernel's figures (soccr/soccr.c,
// refresh_sk and get_queue): inq_seq is rcv_nxt and outq_seq is write_seq, both
// counting a FIN, while the three lengths do not count one.
func (s *Socket) fill(t *tcpstream.TcpStreamEntry) {
	s.Stream = true
	s.RcvNxt = seqnum.Value(t.GetInqSeq())
	s.CopiedSeq = s.RcvNxt.Sub(seqnum.Size(t.GetInqLen()))
	if s.State.finReceived() {
		s.CopiedSeq = s.CopiedSeq.Sub(1)
	}
	s.WriteSeq = seqnum.Value(t.GetOutqSeq())
	s.SndUna = s.WriteSeq.Sub(seqnum.Size(t.GetOutqLen()))
	s.SndNxt = s.WriteSeq.Sub(seqnum.Size(t.GetUnsqLen()))
	if s.State.finSent() && !s.State.finAcked() {
		s.SndUna = s.SndUna.Sub(1)
		if t.GetUnsqLen() > 0 {
			s.SndNxt = s.SndNxt.Sub(1)
		}
	}
	s.Options = t.GetOptMask()
	if s.Options&OptWScale != 0 {
		s.SndWScale, s.RcvWScale = uint8(t.GetSndWscale()), uint8(t.GetRcvWscale())
	}
	s.MSS = uint16(t.GetMssClamp())
	s.Timestamp = t.GetTimestamp()
	s.SndWnd, s.RcvWnd = t.GetSndWnd(), t.GetRcvWnd()
	s.RcvWup = seqnum.Value(t.GetRcvWup())
}
