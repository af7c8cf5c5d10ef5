package reqsk

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	sockDiagByFamily = 20
	diagIDLen        = 48
	diagRequestLen   = unix.SizeofNlMsghdr + 8 + diagIDLen
)

// State asks the kernel for the connection's socket: its state, or 0 when there
// is none. It is one exact look-up, whatever the number of sockets. A
// connection that waits to be accepted is established.
func (r *Recreator) State(t stream.FourTuple) (tcpwrap.TCPState, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	st, err := lookup(r.diag, t)
	if err != nil {
		return 0, fmt.Errorf("look up socket of %v: %w", t, err)
	}
	return st, nil
}

func lookup(fd int, t stream.FourTuple) (tcpwrap.TCPState, error) {
	if _, err := unix.Write(fd, diagRequest(t)); err != nil {
		return 0, err
	}
	buf := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, err
		}
		body := buf[min(n, unix.SizeofNlMsghdr):n]
		if len(body) < 4 {
			return 0, fmt.Errorf("sock_diag answer of %d octets", n)
		}
		switch binary.NativeEndian.Uint16(buf[4:]) {
		case unix.NLMSG_ERROR:
			if e := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); e != 0 && e != unix.ENOENT {
				return 0, e
			}
			return 0, nil
		case sockDiagByFamily:
			st := tcpwrap.TCPState(body[1])
			if st == tcpwrap.TCPListen { // where there is no connection, its listener is found
				st = 0
			}
			return st, nil
		}
	}
}

// diagRequest asks for one socket (struct inet_diag_req_v2), with any cookie.
func diagRequest(t stream.FourTuple) []byte {
	b := make([]byte, diagRequestLen)
	binary.NativeEndian.PutUint32(b, diagRequestLen)
	binary.NativeEndian.PutUint16(b[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	q := b[unix.SizeofNlMsghdr:]
	q[0], q[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(q[4:], ^uint32(0)) // all states
	id := q[8:]
	binary.BigEndian.PutUint16(id, t.Server.Port())
	binary.BigEndian.PutUint16(id[2:], t.Client.Port())
	server, client := t.Server.Addr().AsSlice(), t.Client.Addr().AsSlice()
	if t.Server.Addr().Is6() {
		q[0] = unix.AF_INET6
	}
	copy(id[4:20], server)
	copy(id[20:36], client)
	binary.NativeEndian.PutUint64(id[40:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	return b
}
