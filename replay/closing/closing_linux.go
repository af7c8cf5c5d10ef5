// Package closing makes again what TCP has of a connection whose server has
// closed it: an orphan, which no process has and so no checkpoint.
package closing

import (
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// Of linux/tcp.h; they are not in x/sys/unix.
const (
	queueReceive = 1
	queueSend    = 2
	repairOff    = -1 // without a window probe

	optMSS       = 2
	optWindow    = 3
	optSACK      = 4
	optTimestamp = 8

	mss        = 536   // nothing but a FIN is left to send
	window     = 65535 // offered to a client that has nothing left to say
	leastToFIN = 1     // octets of the client's window that the FIN needs
)

type repairOption struct{ code, value uint32 }

// repairWindow is struct tcp_repair_window.
type repairWindow struct{ sndWl1, sndWnd, maxWindow, rcvWnd, rcvWup uint32 }

// Revive makes a socket in the network namespace netns that stands where c says,
// before the server's FIN, and closes it: its FIN goes out, to be treated like
// all that a restored TCP repeats, and what follows (FIN-WAIT-2, TIME-WAIT, the
// timers of both) is TCP's own. When the cut has the client's FIN, TCP has still
// to be given it.
func Revive(netns string, c tcpwrap.Cut) error {
	if !c.ServerFin {
		return errors.New("the server has not closed it")
	}
	err := nsthread.InNamed(netns, func() error { return revive(c) })
	if err != nil {
		return fmt.Errorf("revive %s: %w", c.Tuple, err)
	}
	return nil
}

func revive(c tcpwrap.Cut) (err error) {
	family, local := address(c.Tuple.Server)
	_, remote := address(c.Tuple.Client)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer func() {
		if cerr := unix.Close(fd); err == nil && cerr != nil {
			err = fmt.Errorf("close: %w", cerr)
		}
	}()
	step := func(what string, e error) {
		if err == nil && e != nil { // the first one is the cause of the others
			err = fmt.Errorf("%s: %w", what, e)
		}
	}
	set := func(what string, opt, v int) {
		if err == nil {
			step(what, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, opt, v))
		}
	}
	rcv := c.RcvNxt
	if c.ClientFin {
		rcv = rcv.Sub(1)
	}
	set("begin repair", unix.TCP_REPAIR, 1)
	set("choose send queue", unix.TCP_REPAIR_QUEUE, queueSend)
	set("set send sequence", unix.TCP_QUEUE_SEQ, int(int32(c.SndNxt.Sub(1))))
	set("choose receive queue", unix.TCP_REPAIR_QUEUE, queueReceive)
	set("set receive sequence", unix.TCP_QUEUE_SEQ, int(int32(rcv)))
	if err == nil {
		step("bind", unix.Bind(fd, local))
	}
	if err == nil {
		step("connect", unix.Connect(fd, remote))
	}
	// Without the scales TCP would take its own for a connection that has none.
	opts := []repairOption{{optMSS, mss}, {optWindow, uint32(c.SndWScale) | uint32(c.RcvWScale)<<16}, {optSACK, 0}}
	if c.HasTS {
		opts = append(opts, repairOption{optTimestamp, 0})
	}
	if err == nil {
		step("set options", setBytes(fd, unix.TCP_REPAIR_OPTIONS, unsafe.Pointer(&opts[0]), uintptr(len(opts))*unsafe.Sizeof(opts[0])))
	}
	if c.HasTS {
		set("set timestamp", unix.TCP_TIMESTAMP, int(int32(c.ServerTS)))
	}
	snd := max(uint32(c.SndWnd), leastToFIN)
	w := repairWindow{uint32(rcv), snd, max(snd, mss), window, uint32(rcv)}
	if err == nil {
		step("set window", setBytes(fd, unix.TCP_REPAIR_WINDOW, unsafe.Pointer(&w), unsafe.Sizeof(w)))
	}
	set("end repair", unix.TCP_REPAIR, repairOff)
	return err
}

func setBytes(fd, opt int, p unsafe.Pointer, n uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, uintptr(opt), uintptr(p), n, 0); errno != 0 {
		return errno
	}
	return nil
}

func address(a netip.AddrPort) (family int, sa unix.Sockaddr) {
	if a.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
