package reqsk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// What Recreator.Result answers besides nil.
var (
	// ErrUnwanted says that Want was not called, or Forget was since.
	ErrUnwanted = errors.New("connection is not wanted")
	// ErrWaiting says that the connection's ACK has not been seen.
	ErrWaiting = errors.New("no acknowledgement has come")
	// ErrNoListener says that nobody listens at the server's address.
	ErrNoListener = errors.New("nobody listens there")
	// ErrTaken says that there is a socket with these addresses already.
	ErrTaken = errors.New("another socket has these addresses")
	// ErrRefused says that the kernel does not make it; an MPTCP listener's never.
	ErrRefused = errors.New("refused by the kernel (is the listener MPTCP?)")
)

// The states of conn_want, as in reqsk.bpf.c.
const (
	stWaiting = iota
	stAssigned
	stNoListener
	stTaken
	stRefused
)

// Recreator re-creates connections in one network namespace. Its methods may be
// called from any goroutine. The BPF program is there until Close, or until the
// process ends in whatever way.
type Recreator struct {
	objs reqskObjects
	link link.Link // kept: a TCX link is detached when nothing refers to it
	ns   *os.File

	mu       sync.Mutex
	settings settings
	diag     int // sock_diag socket
}

// Open loads the program and attaches it to lo of the network namespace netns,
// named as for nsthread.InNamed. lo must be up. TCP settings of the namespace
// that the kernel insists on (tcp_syncookies here, others in Want) are changed
// and put back by Close. It needs CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN; an
// error that wraps ebpf.ErrNotSupported says that the kernel is too old.
func Open(netns string) (*Recreator, error) {
	r := &Recreator{diag: -1}
	if err := r.open(netns); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare re-creation of connections: %w", err), r.Close())
	}
	return r, nil
}

func (r *Recreator) open(netns string) error {
	if err := loadReqskObjects(&r.objs, nil); err != nil {
		return fmt.Errorf("load BPF program (needs kernel 6.9 with BTF): %w", err)
	}
	return nsthread.InNamed(netns, func() (err error) {
		if r.ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		if r.diag, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG); err != nil {
			return fmt.Errorf("open sock_diag socket: %w", err)
		}
		if err := r.settings.turnOn(tcpSyncookies); err != nil {
			return err
		}
		lo, err := net.InterfaceByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if lo.Flags&net.FlagUp == 0 {
			return errors.New("lo is down: set it up first")
		}
		r.link, err = link.AttachTCX(link.TCXOptions{
			Interface: lo.Index, Program: r.objs.Recreate, Attach: ebpf.AttachTCXIngress,
		})
		if err != nil {
			return fmt.Errorf("attach BPF program to lo: %w", err)
		}
		return nil
	})
}

// inside runs fn in the namespace, which may have lost its name since Open.
func (r *Recreator) inside(fn func() error) error {
	return nsthread.InNamed(fmt.Sprintf("/proc/self/fd/%d", r.ns.Fd()), fn)
}

// Want prepares for the connection's ACK. A connection is re-created once;
// Want again permits it again. The namespace's TCP settings are made to allow
// what the connection negotiated. At most 65,536 connections are wanted at a
// time.
func (r *Recreator) Want(t stream.FourTuple, a Attrs) error {
	since, err := monotonic()
	if err != nil {
		return fmt.Errorf("want %v: %w", t, err)
	}
	if err := a.check(t); err != nil {
		return fmt.Errorf("want %v: %w", t, err)
	}
	if err := r.permit(&a); err != nil {
		return fmt.Errorf("want %v: %w", t, err)
	}
	w := reqskConnWant{Since: since, Seq: uint32(a.ClientISN.Add(1)), Ack: uint32(a.ServerISN.Add(1))}
	w.Attrs.Mss = a.MSS
	w.Attrs.SackOk, w.Attrs.EcnOk = octet(a.SACKOK), octet(a.ECNOK)
	if a.WScaleOK {
		w.Attrs.WscaleOk, w.Attrs.SndWscale, w.Attrs.RcvWscale = 1, a.SndWScale, a.RcvWScale
	}
	if a.TSOK {
		w.Attrs.TstampOk, w.Attrs.RcvTsval, w.Attrs.RcvTsecr = 1, a.ClientTSVal, a.ServerTSVal
	}
	if err := r.objs.Want.Put(keyOf(t), w); err != nil {
		return fmt.Errorf("want %v: %w", t, err)
	}
	return nil
}

func (r *Recreator) permit(a *Attrs) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var need []string
	for name, use := range map[string]bool{tcpWindowScaling: a.WScaleOK, tcpSACK: a.SACKOK, tcpTimestamps: a.TSOK} {
		if use && !r.settings.on(name) {
			need = append(need, name)
		}
	}
	if len(need) == 0 {
		return nil
	}
	return r.inside(func() error {
		for _, name := range need {
			if err := r.settings.turnOn(name); err != nil {
				return err
			}
		}
		return nil
	})
}

// monotonic is the clock that the BPF program reads too.
func monotonic() (ns uint64, err error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("read clock: %w", err)
	}
	return uint64(ts.Nano()), nil
}

func octet(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

func keyOf(t stream.FourTuple) *reqskConnKey {
	return &reqskConnKey{
		Client: t.Client.Addr().As16(), Server: t.Server.Addr().As16(),
		ClientPort: wirePort(t.Client), ServerPort: wirePort(t.Server),
	}
}

func wirePort(a netip.AddrPort) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], a.Port())
	return binary.NativeEndian.Uint16(b[:])
}

// Forget undoes Want; a socket that there is by now stays.
func (r *Recreator) Forget(t stream.FourTuple) error {
	if err := r.objs.Want.Delete(keyOf(t)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget %v: %w", t, err)
	}
	return nil
}

// Result tells what the last ACK came to: nil when TCP has been told to make
// the connection (see State), an error that wraps ErrWaiting, ErrUnwanted,
// ErrNoListener or ErrTaken, or else ErrRefused and the kernel's own. After the last
// three the ACK was dropped, so that TCP sent no reset for it, and it may be sent
// again.
func (r *Recreator) Result(t stream.FourTuple) error {
	var w reqskConnWant
	err := r.objs.Want.Lookup(keyOf(t), &w)
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		err = ErrUnwanted
	case err != nil:
		return fmt.Errorf("look up %v: %w", t, err)
	case w.State == stAssigned:
		return nil
	case w.State == stWaiting:
		err = ErrWaiting
	case w.State == stNoListener:
		err = ErrNoListener
	case w.State == stTaken:
		err = fmt.Errorf("%w (%v)", ErrTaken, tcpwrap.TCPState(w.Detail))
	default:
		err = fmt.Errorf("%w: %w", ErrRefused, unix.Errno(-w.Detail))
	}
	return fmt.Errorf("re-create %v: %w", t, err)
}

// Counts are how often an ACK came to what.
type Counts struct {
	Assigned   uint64 // handed to TCP
	NoListener uint64
	Taken      uint64
	Refused    uint64 // by the kernel
}

// Counts reads the counters.
func (r *Recreator) Counts() (Counts, error) {
	var n [stRefused + 1]uint64
	for i := range n {
		if err := r.objs.Counts.Lookup(uint32(i), &n[i]); err != nil {
			return Counts{}, fmt.Errorf("read counters of re-creation: %w", err)
		}
	}
	return Counts{Assigned: n[stAssigned], NoListener: n[stNoListener], Taken: n[stTaken], Refused: n[stRefused]}, nil
}

// Close detaches the program and puts back the settings. Connections that were
// made stay. The Recreator must not be used any more.
func (r *Recreator) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	if r.link != nil {
		errs = append(errs, r.link.Close())
		r.link = nil
	}
	if r.objs.Recreate != nil {
		errs = append(errs, r.objs.Close())
		r.objs = reqskObjects{}
	}
	if r.diag >= 0 {
		errs = append(errs, unix.Close(r.diag))
		r.diag = -1
	}
	if r.ns != nil {
		if r.settings.changed() {
			errs = append(errs, r.inside(r.settings.putBack))
		}
		errs = append(errs, r.ns.Close())
		r.ns = nil
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end re-creation of connections: %w", err)
	}
	return nil
}
