package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is one machine of the lab. Its methods may be called concurrently.
type Host struct {
	lab  *Lab
	name string
	dir  string
	addr net.IP

	space *space
	dead  atomic.Bool

	mu    sync.Mutex // guards procs, and the use of last-pid
	procs []*Process
}

// Name is the host's name in the topology.
func (h *Host) Name() string { return h.name }

// Addr is the address of eth0 from the topology, nil if it has none.
func (h *Host) Addr() net.IP { return h.addr }

// Dir is a directory for the host's own files. It is part of the file system
// that all hosts share, so a file of the same name elsewhere does not collide.
func (h *Host) Dir() string { return h.dir }

// InitPID is the machine's PID of the host's PID 1: `nsenter -t PID -a` is a
// shell on the host.
func (h *Host) InitPID() int { return h.space.init.Process.Pid }

func (h *Host) alive() bool { return !h.dead.Load() }

// Do runs f on a thread in the host's network namespace (and no other
// namespace). Sockets that f makes belong to the host for good, though not to a
// process of it: Kill silences them and does not close them. Goroutines that f
// starts are outside.
func (h *Host) Do(f func() error) error { return h.space.inside(unix.CLONE_NEWNET, f) }

// Dial connects from the host. The address must be literal.
func (h *Host) Dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = h.Do(func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Listen listens on the host. The address must be literal.
func (h *Host) Listen(network, addr string) (l net.Listener, err error) {
	err = h.Do(func() (err error) {
		var lc net.ListenConfig
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	return l, err
}

// AddAddr adds an address ("10.77.0.100/24") to eth0, as the VIP of a service.
func (h *Host) AddAddr(cidr string) error {
	a, err := parseAddr(cidr)
	if err != nil {
		return err
	}
	return h.onDevice("add address "+cidr, func(n *netlink.Handle, eth0 netlink.Link) error {
		return n.AddrAdd(eth0, a)
	})
}

// DelAddr removes an address from eth0.
func (h *Host) DelAddr(cidr string) error {
	a, err := parseAddr(cidr)
	if err != nil {
		return err
	}
	return h.onDevice("remove address "+cidr, func(n *netlink.Handle, eth0 netlink.Link) error {
		return n.AddrDel(eth0, a)
	})
}

func (h *Host) onDevice(what string, f func(*netlink.Handle, netlink.Link) error) error {
	return withLink(h.space, deviceName, what, f)
}

// onPort works on the switch's end of the host's link.
func (h *Host) onPort(what string, f func(*netlink.Handle, netlink.Link) error) error {
	return withLink(h.lab.sw, h.name, what, f)
}

func withLink(s *space, name, what string, f func(*netlink.Handle, netlink.Link) error) error {
	n, err := s.handle()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer n.Close()
	l, err := n.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: find %s of %s: %w", what, name, s.name, err)
	}
	if err := f(n, l); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// CutLink takes the link down at the switch: the host runs on, sees its carrier
// go, and nothing it sends or is sent arrives.
func (h *Host) CutLink() error {
	return h.onPort("cut link of "+h.name, func(n *netlink.Handle, l netlink.Link) error { return n.LinkSetDown(l) })
}

// RestoreLink undoes CutLink.
func (h *Host) RestoreLink() error {
	return h.onPort("restore link of "+h.name, func(n *netlink.Handle, l netlink.Link) error { return n.LinkSetUp(l) })
}

// Pause stops every process of the host but PID 1 (SIGSTOP, in one system
// call). Its kernel goes on answering: acknowledgements, resets, ARP.
func (h *Host) Pause() error { return h.space.ask("stop") }

// Resume lets the processes of a paused host go on.
func (h *Host) Resume() error { return h.space.ask("continue") }

// Kill is the host's death: the link is cut at the switch, then all its
// processes die at once; when it returns they are gone, and nobody on the
// network has heard of it. The host does not come back.
func (h *Host) Kill() error {
	if h.dead.Swap(true) {
		return nil
	}
	err := h.CutLink()
	if err := errors.Join(err, h.space.kill()); err != nil {
		return err
	}
	h.waitAll()
	return nil
}

// waitAll waits for the processes Start started; they are dead.
func (h *Host) waitAll() {
	h.mu.Lock()
	procs := h.procs
	h.mu.Unlock()
	for _, p := range procs {
		<-p.Done()
	}
}

// Alive reports whether the host was not killed and its PID 1 lives.
func (h *Host) Alive() bool {
	select {
	case <-h.space.gone:
		return false
	default:
		return h.alive()
	}
}

// Exists reports whether the host has a process with that PID (of the host).
func (h *Host) Exists(pid int) bool {
	err := h.space.inside(unix.CLONE_NEWNS, func() error {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		return err
	})
	return err == nil
}
