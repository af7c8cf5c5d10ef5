package tcpwrap

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// NFQueueOptions say which queue to open.
type NFQueueOptions struct {
	// NetNS is the network namespace of the service, as nsthread.InNamed takes it.
	NetNS string
	// Queue is the number that the Rules send packets to.
	Queue uint16
	// Mark is on what SendOut sends, so that the Rules let it pass; not 0.
	Mark uint32
	// MaxPackets bounds what the kernel holds for us, caught and not yet given a
	// verdict; more are dropped and counted. 0 means 16384.
	MaxPackets uint32
}

const (
	nfqBatch       = 32
	nfqBufSize     = 65536 + 4096 // the largest packet message
	nfqRecvBuffer  = 64 << 20
	nfqSendBuffer  = 4 << 20
	nfqAutoFlush   = 64 << 10 // octets of verdicts
	nfqDefaultMax  = 16384
	nfqCopyRange   = 0xffff
	nfqRecvTimeout = 1 // seconds; a net under Close, which wakes Recv itself
)

// NFQueue is the Datapath on netfilter's NFQUEUE. One queue takes both
// directions, so their order is the order in which the stack handled them.
// The kernel drops what the queue held as soon as the socket is closed, also
// by the death of this process, and the Rules have no bypass: it fails closed.
//
// Recv should run on a locked thread of its own where latency matters.
type NFQueue struct {
	fd    int
	queue uint16
	stats int    // /proc/net/netfilter/nfnetlink_queue, kept open
	up    [2]int // raw sockets IPv4, IPv6: to the own stack
	out   [2]int // the same, with the mark: to the wire

	recvMu sync.Mutex // held while Recv uses fd; Close waits for it
	bufs   []byte
	iovs   [nfqBatch]unix.Iovec
	hdrs   [nfqBatch]mmsghdr
	early  []Packet // caught while the queue was being configured

	verdictMu sync.Mutex // guards pending
	pending   []byte
	sendMu    sync.Mutex // guards sending and keeps Flushes in order
	sending   []byte

	closed    atomic.Bool
	fdMu      sync.RWMutex // held for reading around uses of the other fds
	strays    atomic.Uint64
	failed    atomic.Uint64
	lastDrops atomic.Uint64
}

type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   [4]byte
}

var _ Datapath = (*NFQueue)(nil)

// OpenNFQueue takes the queue. Open it before the Rules are installed: with
// rules and no queue the service's packets are dropped. An error that wraps
// EPERM for a queue says that another process owns it.
func OpenNFQueue(o NFQueueOptions) (*NFQueue, error) {
	if o.Mark == 0 {
		return nil, errors.New("open nfqueue: a mark other than 0 is needed")
	}
	if o.MaxPackets == 0 {
		o.MaxPackets = nfqDefaultMax
	}
	q := &NFQueue{fd: -1, queue: o.Queue, stats: -1, up: [2]int{-1, -1}, out: [2]int{-1, -1}}
	if err := nsthread.InNamed(o.NetNS, func() error { return q.openSockets(o.Mark) }); err != nil {
		_ = q.closeAll() // what went wrong is told below
		return nil, fmt.Errorf("open nfqueue %d: %w", o.Queue, err)
	}
	q.bufs = make([]byte, nfqBatch*nfqBufSize)
	for i := range q.hdrs {
		q.iovs[i].Base = &q.bufs[i*nfqBufSize]
		q.iovs[i].SetLen(nfqBufSize)
		q.hdrs[i].hdr.Iov = &q.iovs[i]
		q.hdrs[i].hdr.Iovlen = 1
	}
	if err := q.configure(o.MaxPackets); err != nil {
		_ = q.closeAll() // what went wrong is told below
		return nil, fmt.Errorf("open nfqueue %d: %w", o.Queue, err)
	}
	return q, nil
}

func (q *NFQueue) openSockets(mark uint32) (err error) {
	if q.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER); err != nil {
		return fmt.Errorf("open netfilter socket: %w", err)
	}
	if err = unix.Bind(q.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind netfilter socket: %w", err)
	}
	for _, s := range []struct{ level, opt, v int }{
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, nfqRecvBuffer},
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, nfqSendBuffer},
		{unix.SOL_NETLINK, unix.NETLINK_NO_ENOBUFS, 1},
	} {
		if err = unix.SetsockoptInt(q.fd, s.level, s.opt, s.v); err != nil {
			return fmt.Errorf("set netfilter socket option %d: %w", s.opt, err)
		}
	}
	if err = unix.SetsockoptTimeval(q.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: nfqRecvTimeout}); err != nil {
		return fmt.Errorf("set receive timeout: %w", err)
	}
	// thread-self: /proc/net is that of the process's first thread.
	const stats = "/proc/thread-self/net/netfilter/nfnetlink_queue"
	if q.stats, err = unix.Open(stats, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open %s (is nfnetlink_queue in this kernel?): %w", stats, err)
	}
	for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
		for _, s := range []struct {
			fd   *int
			mark int
		}{{&q.up[i], 0}, {&q.out[i], int(mark)}} {
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			if family == unix.AF_INET6 && errors.Is(err, unix.EAFNOSUPPORT) {
				continue // a kernel without IPv6: send refuses such packets
			}
			if err != nil {
				return fmt.Errorf("open raw socket: %w", err)
			}
			*s.fd = fd
			if s.mark == 0 {
				continue
			}
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, s.mark); err != nil {
				return fmt.Errorf("set mark: %w", err)
			}
		}
	}
	return nil
}

// configure binds the queue. The copy mode comes last: until it is set the
// kernel drops packets instead of queueing them with the wrong settings.
func (q *NFQueue) configure(maxPackets uint32) error {
	const flags = nfqFlagGSO // and not nfqFlagFailOpen
	for _, c := range []struct {
		what  string
		attrs []byte
	}{
		{"bind (does another process own the queue?)", appendAttr(nil, nfqCfgCmd, nfqCmdBind, 0, 0, 0)},
		{"set length", appendAttr(nil, nfqCfgMaxLen, be32(maxPackets)...)},
		{"set flags", appendAttr(appendAttr(nil, nfqCfgFlags, be32(flags)...), nfqCfgMask, be32(nfqFlagGSO|nfqFlagFailOpen)...)},
		{"set copy mode", appendAttr(nil, nfqCfgParams, append(be32(nfqCopyRange), nfqCopyPacket)...)},
	} {
		if err := q.request(appendConfig(nil, q.queue, c.attrs)); err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
	}
	return nil
}

// request sends a configuration message and waits for its answer, keeping the
// packets that come in between for the first Recv.
func (q *NFQueue) request(msg []byte) error {
	if err := writeNetlink(q.fd, msg); err != nil {
		return err
	}
	buf := make([]byte, nfqBufSize)
	for {
		n, _, err := unix.Recvfrom(q.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) > 0; {
			var m nfqMessage
			if b, err = nextNfqMessage(b, &m); err != nil {
				return err
			}
			if !m.packet {
				if m.errno != 0 {
					return m.errno
				}
				return nil
			}
			if p, ok := q.packet(&m); ok {
				p.Data = append([]byte(nil), p.Data...)
				q.early = append(q.early, p)
			}
		}
	}
}

// packet makes a Packet of a message. Of a hook that our rules do not use it
// drops the packet: there is no direction to give it.
func (q *NFQueue) packet(m *nfqMessage) (Packet, bool) {
	p := Packet{ID: m.id, Data: m.payload}
	switch m.hook {
	case nfHookLocalIn:
		p.Dir = Inbound
	case nfHookLocalOut:
		p.Dir = Outbound
	default:
		q.strays.Add(1)
		q.Verdict(m.id, Drop)
		return p, false
	}
	// Without the bit the checksum was verified by a device, or there is none
	// yet because the packet never left this machine or is one of ours (GSO,
	// offload): then there is nothing that could have been damaged.
	if m.skbInfo&nfqSKBNotVerified != 0 {
		p.Corrupt = !VerifyTCPChecksum(p.Data)
	}
	return p, true
}

// Recv implements Datapath.
func (q *NFQueue) Recv(dst []Packet) ([]Packet, error) {
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	if len(q.early) > 0 && !q.closed.Load() {
		dst = append(dst, q.early...)
		q.early = nil
		return dst, nil
	}
	start := len(dst)
	for {
		if q.closed.Load() {
			return dst, ErrClosed
		}
		n, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(q.fd), uintptr(unsafe.Pointer(&q.hdrs[0])), nfqBatch, unix.MSG_WAITFORONE, 0, 0)
		switch e {
		case 0:
		case unix.EINTR, unix.EAGAIN, unix.ENOBUFS:
			continue
		default:
			return dst, fmt.Errorf("receive from nfqueue %d: %w", q.queue, e)
		}
		for i := range int(n) {
			b := q.bufs[i*nfqBufSize:][:min(int(q.hdrs[i].n), nfqBufSize)]
			for len(b) > 0 {
				var m nfqMessage
				var err error
				if b, err = nextNfqMessage(b, &m); err != nil {
					return dst, fmt.Errorf("receive from nfqueue %d: %w", q.queue, err)
				}
				if !m.packet {
					if m.errno != 0 {
						q.failed.Add(1)
					}
					continue
				}
				if p, ok := q.packet(&m); ok {
					dst = append(dst, p)
				}
			}
		}
		if len(dst) > start {
			return dst, nil
		}
	}
}

// Verdict implements Datapath.
func (q *NFQueue) Verdict(id PacketID, v Verdict) {
	verdict := uint32(nfDrop)
	if v == Accept {
		verdict = nfAccept
	}
	q.verdictMu.Lock()
	q.pending = appendVerdict(q.pending, q.queue, id, verdict)
	full := len(q.pending) >= nfqAutoFlush
	q.verdictMu.Unlock()
	if full {
		// What cannot be sent now stays for the caller's own Flush to report.
		_ = q.Flush()
	}
}

// Rewrite implements Datapath.
func (q *NFQueue) Rewrite(id PacketID, ip []byte) {
	if len(ip) > MaxRewrite {
		q.Verdict(id, Drop)
		return
	}
	q.verdictMu.Lock()
	q.pending = appendRewrite(q.pending, q.queue, id, ip)
	full := len(q.pending) >= nfqAutoFlush
	q.verdictMu.Unlock()
	if full {
		_ = q.Flush() // as in Verdict
	}
}

// Flush implements Datapath. Concurrent calls share one system call. After an
// error the verdicts are still there and the next Flush tries them again.
func (q *NFQueue) Flush() error {
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	if len(q.sending) > 0 { // of a Flush that failed
		if err := q.sendVerdicts(); err != nil {
			return err
		}
	}
	// Once: what comes from here on has a Flush of its own behind it.
	q.verdictMu.Lock()
	q.pending, q.sending = q.sending, q.pending
	q.verdictMu.Unlock()
	if len(q.sending) == 0 {
		return nil
	}
	return q.sendVerdicts()
}

// sendVerdicts gives the kernel q.sending in pieces that its send buffer takes.
func (q *NFQueue) sendVerdicts() error {
	q.fdMu.RLock()
	defer q.fdMu.RUnlock()
	if q.closed.Load() {
		q.sending = q.sending[:0]
		return ErrClosed
	}
	b := q.sending
	for len(b) > 0 {
		n := firstMessages(b, 2*nfqAutoFlush)
		if err := writeNetlink(q.fd, b[:n]); err != nil {
			q.sending = append(q.sending[:0], b...)
			return fmt.Errorf("send verdicts to nfqueue %d: %w", q.queue, err)
		}
		b = b[n:]
	}
	q.sending = q.sending[:0]
	return nil
}

// writeNetlink sends one netlink datagram to the kernel, which is where an
// unconnected netlink socket writes to.
func writeNetlink(fd int, b []byte) error {
	for {
		if _, err := unix.Write(fd, b); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// SendUp implements Datapath. The packet goes over lo; its destination must be
// an address of the namespace.
func (q *NFQueue) SendUp(ip []byte) error { return q.sendRaw(&q.up, ip, "up") }

// SendOut implements Datapath. The packet must fit the route's MTU.
func (q *NFQueue) SendOut(ip []byte) error { return q.sendRaw(&q.out, ip, "out") }

func (q *NFQueue) sendRaw(fds *[2]int, ip []byte, where string) error {
	w, err := locate(ip)
	if err != nil && !errors.Is(err, ErrNotTCP) { // ICMP is sent, too
		return fmt.Errorf("send packet %s: %w", where, err)
	}
	q.fdMu.RLock()
	defer q.fdMu.RUnlock()
	if q.closed.Load() {
		return ErrClosed
	}
	for {
		if w.v6 {
			if fds[1] < 0 {
				return fmt.Errorf("send packet %s: no IPv6 on this host: %w", where, unix.EAFNOSUPPORT)
			}
			err = unix.Sendto(fds[1], ip[:w.end], 0, &unix.SockaddrInet6{Addr: [16]byte(ip[24:40])})
		} else {
			err = unix.Sendto(fds[0], ip[:w.end], 0, &unix.SockaddrInet4{Addr: [4]byte(ip[16:20])})
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		default:
			return fmt.Errorf("send packet %s to %s: %w", where, destination(ip, w), err)
		}
	}
}

func destination(ip []byte, w ipView) netip.Addr {
	if w.v6 {
		return netip.AddrFrom16([16]byte(ip[24:40]))
	}
	return netip.AddrFrom4([4]byte(ip[16:20]))
}

// Drops implements Datapath: packets dropped because the queue was full or its
// socket's buffer was. After Close it answers the last number known.
func (q *NFQueue) Drops() uint64 {
	if s, err := q.kernelStats(); err == nil {
		q.lastDrops.Store(s.dropped + s.userDropped)
	}
	return q.lastDrops.Load()
}

// Held is how many packets the kernel holds without a verdict, including those
// that Recv has not seen yet. Zero after Rules.Remove says that letting go of
// the queue loses nothing.
func (q *NFQueue) Held() (int, error) {
	s, err := q.kernelStats()
	return int(s.total), err
}

// Strays counts caught packets that were dropped because they came from a hook
// that Rules do not use: somebody else's rule names our queue.
func (q *NFQueue) Strays() uint64 { return q.strays.Load() }

// FailedVerdicts counts verdicts the kernel refused, as a rule because the
// packet was gone already: it drops what is queued when a netfilter table of
// the namespace is removed.
func (q *NFQueue) FailedVerdicts() uint64 { return q.failed.Load() }

type nfqStats struct{ total, dropped, userDropped uint64 }

func (q *NFQueue) kernelStats() (nfqStats, error) {
	q.fdMu.RLock()
	defer q.fdMu.RUnlock()
	if q.closed.Load() {
		return nfqStats{}, ErrClosed
	}
	buf := make([]byte, 16<<10)
	n, err := unix.Pread(q.stats, buf, 0)
	if err != nil {
		return nfqStats{}, fmt.Errorf("read statistics of nfqueue %d: %w", q.queue, err)
	}
	for line := range strings.Lines(string(buf[:n])) {
		// number, owner, waiting, copy mode, copy range, dropped, dropped for the socket, ...
		var num, port, mode, rng uint64
		var s nfqStats
		if _, err := fmt.Sscan(line, &num, &port, &s.total, &mode, &rng, &s.dropped, &s.userDropped); err == nil && num == uint64(q.queue) {
			return s, nil
		}
	}
	return nfqStats{}, fmt.Errorf("read statistics of nfqueue %d: no such queue", q.queue)
}

// Close implements Datapath. Verdicts not flushed are lost with the packets
// they are of.
func (q *NFQueue) Close() error {
	q.Drops() // for whoever asks later
	if q.closed.Swap(true) {
		return nil
	}
	// Recv may be blocked on the socket. A request that does nothing makes the
	// kernel answer on it, which costs nothing as long as nobody closes.
	wake := appendConfig(nil, q.queue, appendAttr(nil, nfqCfgCmd, nfqCmdPFUnbind, 0, 0, 0))
	q.fdMu.RLock()
	_ = writeNetlink(q.fd, wake) // else the receive timeout ends it
	q.fdMu.RUnlock()
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	q.fdMu.Lock()
	defer q.fdMu.Unlock()
	return q.closeAll()
}

func (q *NFQueue) closeAll() error {
	var errs []error
	for _, fd := range []*int{&q.fd, &q.stats, &q.up[0], &q.up[1], &q.out[0], &q.out[1]} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close nfqueue %d: %w", q.queue, err)
	}
	return nil
}
