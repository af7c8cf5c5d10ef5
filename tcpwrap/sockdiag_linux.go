package tcpwrap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/remote"
	"github.com/ftckpt/ftckpt/stream"
)

// TCPState is a socket's state (net/tcp_states.h).
type TCPState uint8

// States.
const (
	TCPEstablished TCPState = iota + 1
	TCPSynSent
	TCPSynRecv
	TCPFinWait1
	TCPFinWait2
	TCPTimeWait
	TCPClose
	TCPCloseWait
	TCPLastAck
	TCPListen
	TCPClosing
	TCPNewSynRecv // a request not yet a socket
)

var tcpStates = [...]string{"", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2",
	"time-wait", "close", "close-wait", "last-ack", "listen", "closing", "new-syn-recv"}

func (s TCPState) String() string {
	if int(s) < len(tcpStates) && s > 0 {
		return tcpStates[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Socket is a TCP socket as the kernel's diagnosis shows it (sock_diag(7)).
type Socket struct {
	State         TCPState
	Local, Remote netip.AddrPort // IPv4 on an IPv6 socket is shown as IPv4
	// Inode is the socket file's; 0 when no process has it any more (an orphan:
	// closed by a server, or by its death, and not yet done with its client).
	Inode uint32
	// ReadQueue and WriteQueue are octets the server has not read, and octets
	// the client has not acknowledged. For a listener: connections waiting to be
	// accepted, and how many may.
	ReadQueue, WriteQueue uint32

	id [diagIDLen]byte // as the kernel gave it, with its cookie
	af uint8
}

const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	diagIDLen        = 48
	diagReqLen       = 8 + diagIDLen
	diagMsgLen       = 4 + diagIDLen + 20
	diagAllStates    = 1<<(TCPNewSynRecv+1) - 1
)

// Sockets lists the TCP sockets of a service in a network namespace: those
// bound to one of vips and one of ports, listeners there or on all addresses, and
// connections from one of vips to peers.
func Sockets(netns string, vips []netip.Addr, ports []uint16, peers ...remote.Range) ([]Socket, error) {
	var found []Socket
	err := withDiag(netns, func(fd int) (err error) {
		found, err = listSockets(fd, serving(vips, ports, peers))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list sockets of %v: %w", vips, err)
	}
	return found, nil
}

// DestroySockets aborts the connections of a service in a network namespace,
// listeners not included, and says how many there were. TCP sends a RST for
// most: the rules must be in place and Drop what comes, or Block must have been
// called, or clients will see it.
func DestroySockets(netns string, vips []netip.Addr, ports []uint16, peers ...remote.Range) (int, error) {
	n := 0
	err := withDiag(netns, func(fd int) error {
		socks, err := listSockets(fd, serving(vips, ports, peers))
		if err == nil {
			n, err = destroyAll(fd, socks)
		}
		return err
	})
	if err != nil {
		return n, fmt.Errorf("destroy sockets of %v: %w", vips, err)
	}
	return n, nil
}

// DestroyConnections aborts those of the given connections that there are in a
// network namespace, as DestroySockets does.
func DestroyConnections(netns string, tuples map[stream.FourTuple]bool) (int, error) {
	n := 0
	err := withDiag(netns, func(fd int) error {
		socks, err := listSockets(fd, func(s *Socket) bool {
			return tuples[stream.FourTuple{Server: s.Local, Client: s.Remote}]
		})
		if err == nil {
			n, err = destroyAll(fd, socks)
		}
		return err
	})
	if err != nil {
		return n, fmt.Errorf("destroy connections: %w", err)
	}
	return n, nil
}

// destroyAll aborts sockets, listeners not included.
func destroyAll(fd int, socks []Socket) (n int, err error) {
	for _, s := range socks {
		if s.State == TCPListen {
			continue
		}
		switch err := destroySocket(fd, &s); {
		case err == nil:
			n++
		case errors.Is(err, unix.ENOENT): // ended by itself
		default:
			return n, fmt.Errorf("%v to %v: %w", s.State, s.Remote, err)
		}
	}
	return n, nil
}

func withDiag(netns string, fn func(fd int) error) error {
	fd := -1
	err := nsthread.InNamed(netns, func() (err error) {
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG); err != nil {
			return fmt.Errorf("open sock_diag socket: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return fn(fd)
}

func appendDiagRequest(b []byte, typ, flags uint16, family uint8, states uint32, id *[diagIDLen]byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, unix.SizeofNlMsghdr+diagReqLen)
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	b = append(b, family, protoTCP, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, states)
	return append(b, id[:]...)
}

// serving says which sockets are of a service.
func serving(vips []netip.Addr, ports []uint16, peers []remote.Range) func(*Socket) bool {
	return func(s *Socket) bool {
		return s.serves(vips, ports) || slices.Contains(vips, s.Local.Addr()) && remote.Any(peers, s.Remote)
	}
}

func listSockets(fd int, wanted func(*Socket) bool) ([]Socket, error) {
	var found []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var any [diagIDLen]byte
		req := appendDiagRequest(nil, sockDiagByFamily, unix.NLM_F_DUMP, family, diagAllStates, &any)
		if err := writeNetlink(fd, req); err != nil {
			return nil, err
		}
		err := readAnswers(fd, func(body []byte) {
			if s, ok := parseSocket(body); ok && wanted(&s) {
				found = append(found, s)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("dump family %d (is tcp_diag in this kernel?): %w", family, err)
		}
	}
	return found, nil
}

func (s *Socket) serves(vips []netip.Addr, ports []uint16) bool {
	if !slices.Contains(ports, s.Local.Port()) {
		return false
	}
	return slices.Contains(vips, s.Local.Addr()) || s.State == TCPListen && s.Local.Addr().IsUnspecified()
}

func destroySocket(fd int, s *Socket) error {
	req := appendDiagRequest(nil, sockDestroy, unix.NLM_F_ACK, s.af, 1<<s.State, &s.id)
	if err := writeNetlink(fd, req); err != nil {
		return err
	}
	return readAnswers(fd, func([]byte) {})
}

// readAnswers reads to the end of a dump or to an acknowledgement.
func readAnswers(fd int, each func(body []byte)) error {
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			l := int(binary.NativeEndian.Uint32(b))
			if l < unix.SizeofNlMsghdr || l > len(b) {
				return fmt.Errorf("netlink message of %d octets in %d", l, len(b))
			}
			body := b[unix.SizeofNlMsghdr:l]
			switch binary.NativeEndian.Uint16(b[4:]) {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR: // both carry a status
				if len(body) < 4 {
					return fmt.Errorf("netlink answer of %d octets", len(body))
				}
				if e := int32(binary.NativeEndian.Uint32(body)); e != 0 {
					return unix.Errno(-e)
				}
				return nil
			case sockDiagByFamily:
				each(body)
			}
			b = b[min((l+3)&^3, len(b)):]
		}
	}
}

func parseSocket(b []byte) (s Socket, ok bool) {
	if len(b) < diagMsgLen {
		return s, false
	}
	s.af, s.State = b[0], TCPState(b[1])
	s.id = [diagIDLen]byte(b[4:])
	s.Local = diagAddr(s.af, s.id[4:20], s.id[0:2])
	s.Remote = diagAddr(s.af, s.id[20:36], s.id[2:4])
	q := b[4+diagIDLen:]
	s.ReadQueue = binary.NativeEndian.Uint32(q[4:])
	s.WriteQueue = binary.NativeEndian.Uint32(q[8:])
	s.Inode = binary.NativeEndian.Uint32(q[16:])
	return s, true
}

func diagAddr(family uint8, addr, port []byte) netip.AddrPort {
	p := binary.BigEndian.Uint16(port)
	if family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr)), p)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(addr)).Unmap(), p)
}
