package capsule

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Option numbers of include/uapi/linux/tcp.h that x/sys/unix lacks.
const (
	tcpRecvQueue = 1
	tcpSendQueue = 2
	optMaxSeg    = 2
	optWindow    = 3
	optSackPerm  = 4
	optTimestamp = 8
)

type repairOpt struct{ code, val uint32 }

// connState is what repair mode tells about an idle connection.
type connState struct {
	snd, rcv  int
	mss       int
	window    [20]byte
	info      [8]byte // head of struct tcp_info; byte 6 holds both window scales
	timestamp int
	peer      unix.Sockaddr
}

func saveConn(fd int) (s connState, err error) {
	get := func(opt int) (v int) {
		var e error
		if v, e = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, opt); e != nil {
			err = errors.Join(err, e)
		}
		return v
	}
	set := func(opt, v int) { err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, opt, v)) }
	set(unix.TCP_REPAIR, 1)
	set(unix.TCP_REPAIR_QUEUE, tcpSendQueue)
	s.snd = get(unix.TCP_QUEUE_SEQ)
	set(unix.TCP_REPAIR_QUEUE, tcpRecvQueue)
	s.rcv = get(unix.TCP_QUEUE_SEQ)
	s.mss = get(unix.TCP_MAXSEG)
	s.timestamp = get(unix.TCP_TIMESTAMP)
	getBytes := func(opt int, b []byte) {
		n := uint32(len(b))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, uintptr(opt),
			uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
		if errno != 0 {
			err = errors.Join(err, errno)
		}
	}
	getBytes(unix.TCP_INFO, s.info[:])
	getBytes(unix.TCP_REPAIR_WINDOW, s.window[:])
	peer, e := unix.Getpeername(fd)
	s.peer = peer
	return s, errors.Join(err, e)
}

// restoreConn is what CRIU does with an established socket.
func restoreConn(s connState, local unix.Sockaddr) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	step := func(what string, e error) {
		if e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", what, e))
		}
	}
	set := func(what string, opt, v int) { step(what, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, opt, v)) }
	step("reuse", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	set("repair", unix.TCP_REPAIR, 1)
	set("queue", unix.TCP_REPAIR_QUEUE, tcpSendQueue)
	set("seq", unix.TCP_QUEUE_SEQ, s.snd)
	set("queue", unix.TCP_REPAIR_QUEUE, tcpRecvQueue)
	set("seq", unix.TCP_QUEUE_SEQ, s.rcv)
	step("bind", unix.Bind(fd, local))
	step("connect", unix.Connect(fd, s.peer))
	opts := []repairOpt{
		{optSackPerm, 0},
		{optWindow, uint32(s.info[6]&15) | uint32(s.info[6]>>4)<<16},
		{optTimestamp, 0},
		{optMaxSeg, uint32(s.mss)},
	}
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR_OPTIONS,
		uintptr(unsafe.Pointer(&opts[0])), uintptr(len(opts))*unsafe.Sizeof(opts[0]), 0)
	if errno != 0 {
		step("options", errno)
	}
	set("timestamp", unix.TCP_TIMESTAMP, s.timestamp)
	_, _, errno = unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR_WINDOW,
		uintptr(unsafe.Pointer(&s.window)), uintptr(len(s.window)), 0)
	if errno != 0 {
		step("window", errno)
	}
	return fd, err
}

// An established connection is restored in repair mode while the address is
// only prepared, as CRIU does it, and goes on with the client once the address
// is taken.
func TestEstablishedSocketIsRestoredBeforeTheAddressIsTaken(t *testing.T) {
	for where, client := range map[string]func(*lab) *os.File{
		"on link":            func(l *lab) *os.File { return l.client },
		"behind the gateway": func(l *lab) *os.File { return l.far },
	} {
		t.Run(where, func(t *testing.T) {
			l := newLab(t)
			from := client(l)
			local := &unix.SockaddrInet4{Port: port, Addr: vip.Addr().As4()}
			var listener net.Listener
			l.must(l.in(l.primary, func() (err error) {
				listener, err = net.Listen("tcp", fmt.Sprintf("%v:%d", vip.Addr(), port))
				return err
			}))
			defer listener.Close()
			var client net.Conn
			l.must(l.in(from, func() (err error) {
				client, err = net.DialTimeout("tcp", listener.Addr().String(), 2*time.Second)
				return err
			}))
			defer client.Close()
			server, err := listener.Accept()
			l.must(err)
			f, err := server.(*net.TCPConn).File()
			l.must(err)
			saved, err := saveConn(int(f.Fd()))
			l.must(err)
			l.down(l.primary, "p0")
			f.Close()
			server.Close()

			c := l.capsule(Options{VIPDev: "p0"})
			l.must(c.PrepareVIPs([]netip.Prefix{vip}))
			fd := -1
			l.must(c.Do(func() (err error) { fd, err = restoreConn(saved, local); return err }))
			defer unix.Close(fd)
			l.must(c.TakeVIP())
			l.must(c.Announce(t.Context()))
			l.must(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 0))
			if _, err := unix.Write(fd, []byte("from the capsule")); err != nil {
				t.Fatal(err)
			}
			l.must(client.SetDeadline(time.Now().Add(5 * time.Second)))
			b := make([]byte, 16)
			if _, err := io.ReadFull(client, b); err != nil || string(b) != "from the capsule" {
				t.Fatalf("client read %q, %v", b, err)
			}
			_, err = client.Write([]byte("and back"))
			l.must(err)
			n, err := unix.Read(fd, b)
			if err != nil || string(b[:n]) != "and back" {
				t.Fatalf("capsule read %q, %v", b[:n], err)
			}
		})
	}
}
