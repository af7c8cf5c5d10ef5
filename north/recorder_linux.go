//go:build amd64 || arm64

package north

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// Flags of bpf_ringbuf_submit (include/uapi/linux/bpf.h).
const (
	noWakeup    = 1
	forceWakeup = 2
)

// Recorder tells what the servers of one network namespace take from the
// connections of some ports, in the order in which they do. Nothing is injected
// into them. Its methods are not safe for concurrent use, but for Wait. The BPF
// programs are there until Close, or until the process ends in whatever way.
type Recorder struct {
	objs  recorderObjects
	links []link.Link // kept: a link that nothing refers to is detached
	ring  *ring
	epoll int
	lost  uint64
	ports []byte // bitmap
}

// Open prepares a recorder for the network namespace netns, named as for
// nsthread.InNamed. It needs CAP_BPF, CAP_PERFMON and a kernel of 6.3 or newer
// with BTF, and takes some 50 ms.
func Open(netns string) (*Recorder, error) {
	r := &Recorder{epoll: -1}
	if err := r.open(netns); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare the recording of reads: %w", err), r.Close())
	}
	return r, nil
}

func (r *Recorder) open(netns string) error {
	var inode uint64
	err := nsthread.InNamed(netns, func() error {
		info, err := os.Stat("/proc/thread-self/ns/net")
		if err != nil {
			return fmt.Errorf("find the network namespace: %w", err)
		}
		inode = info.Sys().(*syscall.Stat_t).Ino
		return nil
	})
	if err != nil {
		return err
	}
	spec, err := loadRecorder()
	if err != nil {
		return fmt.Errorf("read BPF program: %w", err)
	}
	if err := spec.Variables["netns"].Set(uint32(inode)); err != nil {
		return fmt.Errorf("set network namespace: %w", err)
	}
	if err := spec.Variables["wake"].Set(uint64(noWakeup)); err != nil {
		return fmt.Errorf("set wake-up: %w", err)
	}
	if err := spec.LoadAndAssign(&r.objs, nil); err != nil {
		return fmt.Errorf("load BPF program (needs kernel 6.3 with BTF): %w", err)
	}
	if r.ring, err = newRing(r.objs.Events.FD(), int(r.objs.Events.MaxEntries())); err != nil {
		return err
	}
	if r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("make epoll instance: %w", err)
	}
	if err := unix.EpollCtl(r.epoll, unix.EPOLL_CTL_ADD, r.objs.Events.FD(), &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return fmt.Errorf("watch the ring: %w", err)
	}
	return nil
}

// Attach begins to record the connections of the given local ports, of all for
// none. It takes a millisecond.
func (r *Recorder) Attach(ports []uint16) error {
	r.ports = make([]byte, 65536/8)
	for _, p := range ports {
		r.ports[p>>3] |= 1 << (p & 7)
	}
	for i := range r.ports {
		if len(ports) == 0 {
			r.ports[i] = 0xff
		}
	}
	if err := r.setPorts(); err != nil {
		return err
	}
	if len(r.links) > 0 {
		return nil
	}
	for _, p := range []*ebpf.Program{r.objs.OnRead, r.objs.OnEnd, r.objs.OnState, r.objs.OnDestroy, r.objs.OnAccept} {
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			return fmt.Errorf("attach BPF program to a tracepoint: %w", err)
		}
		r.links = append(r.links, l)
	}
	return nil
}

// Add records the connections of one more local port.
func (r *Recorder) Add(port uint16) error {
	if r.ports[port>>3]&(1<<(port&7)) != 0 {
		return nil
	}
	r.ports[port>>3] |= 1 << (port & 7)
	return r.setPorts()
}

func (r *Recorder) setPorts() error {
	if err := r.objs.Ports.Set(r.ports); err != nil {
		return fmt.Errorf("set the recorded ports: %w", err)
	}
	return nil
}

// Wake chooses whether events end a Wait. It costs the server a good part of a
// request each; without it the ring has to be drained now and then.
func (r *Recorder) Wake(yes bool) error {
	flags := uint64(noWakeup)
	if yes {
		flags = forceWakeup
	}
	if err := r.objs.Wake.Set(flags); err != nil {
		return fmt.Errorf("set wake-up: %w", err)
	}
	return nil
}

// Wait waits until there may be events, if Wake is on, or for limit.
func (r *Recorder) Wait(limit time.Duration) {
	var ev [1]unix.EpollEvent
	_, _ = unix.EpollWait(r.epoll, ev[:], int(limit.Milliseconds())) // a signal ends it, too
}

// Drain hands over all that the server did before the call: whatever it has sent
// by now was sent after these.
func (r *Recorder) Drain(f func(Event)) {
	r.ring.drain(func(b []byte) {
		if len(b) < int(unsafe.Sizeof(recorderTaken{})) {
			return
		}
		t := (*recorderTaken)(unsafe.Pointer(&b[0]))
		f(Event{
			What: What(t.What), Seq: seqnum.Value(t.Copied), Socket: t.Socket,
			Tuple: stream.FourTuple{
				Server: netip.AddrPortFrom(address(t.Family, &t.Local), t.LocalPort),
				Client: netip.AddrPortFrom(address(t.Family, &t.Remote), t.RemotePort),
			},
		})
	})
}

func address(family uint16, words *[4]uint32) netip.Addr {
	var b [16]byte
	for i, w := range words {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16(b).Unmap()
}

// Lost is how many events were lost since the last call because the ring was
// full.
func (r *Recorder) Lost() uint64 {
	var n uint64
	if err := r.objs.Lost.Get(&n); err != nil {
		return 0
	}
	fresh := n - r.lost
	r.lost = n
	return fresh
}

// Close detaches the programs. The Recorder must not be used any more.
func (r *Recorder) Close() error {
	var errs []error
	for _, l := range r.links {
		errs = append(errs, l.Close())
	}
	r.links = nil
	if r.ring != nil {
		errs = append(errs, r.ring.close())
		r.ring = nil
	}
	if r.epoll >= 0 {
		errs = append(errs, unix.Close(r.epoll))
		r.epoll = -1
	}
	if r.objs.OnRead != nil {
		errs = append(errs, r.objs.Close())
		r.objs = recorderObjects{}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end the recording of reads: %w", err)
	}
	return nil
}
