package e2e

import (
	"time"

	"golang.org/x/sys/unix"
)

// tcpInfo is how a client's own TCP gets on.
type tcpInfo struct {
	Backoff, Retransmits, Unacked int
	Timeout                       time.Duration // of the next retransmission
	Acked                         uint64        // octets, in all
}

func (w *world) tcpInfo(k *raw) tcpInfo {
	w.Helper()
	c, err := k.c.SyscallConn()
	w.must(err)
	var i *unix.TCPInfo
	var ierr error
	w.must(c.Control(func(fd uintptr) { i, ierr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }))
	w.must(ierr)
	return tcpInfo{
		Backoff: int(i.Backoff), Retransmits: int(i.Retransmits), Unacked: int(i.Unacked),
		Timeout: time.Duration(i.Rto) * time.Microsecond, Acked: i.Bytes_acked,
	}
}
