package l2

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// probes is how often Probe asks (PROBE_NUM of RFC 5227 section 1.1).
const probes = 3

// Announcer tells everyone on a segment that an address is at an interface's
// hardware address. It is for one goroutine.
type Announcer struct {
	what   string
	conn   *packet.Conn
	to     *packet.Addr
	frames [][]byte
}

// NewAnnouncer builds what is to be said of addr on iface, which must be up. It
// does not look whether addr is configured. Close takes the kernel some
// milliseconds (an RCU grace period), New and Send do not.
func NewAnnouncer(iface string, addr netip.Addr) (*Announcer, error) {
	a := &Announcer{what: fmt.Sprintf("announce %v on %s", addr, iface)}
	ifi, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.what, err)
	}
	proto := unix.ETH_P_ARP
	if addr.Is4() {
		request, reply, err := GratuitousARP(ifi.HardwareAddr, addr)
		if err != nil {
			return nil, err
		}
		a.frames, a.to = [][]byte{request, reply}, &packet.Addr{HardwareAddr: broadcast}
	} else {
		na, err := UnsolicitedNA(ifi.HardwareAddr, addr)
		if err != nil {
			return nil, err
		}
		a.frames, a.to, proto = [][]byte{na}, &packet.Addr{HardwareAddr: allNodesMAC}, unix.ETH_P_IPV6
	}
	if a.conn, err = packet.Listen(ifi, packet.Raw, proto, &packet.Config{Filter: nothing}); err != nil {
		return nil, fmt.Errorf("%s: open packet socket (needs CAP_NET_RAW): %w", a.what, err)
	}
	return a, nil
}

// nothing is the socket filter that lets nothing in.
var nothing = []bpf.RawInstruction{{Op: unix.BPF_RET | unix.BPF_K}}

// Send says it once: gratuitous ARP as request and as reply, or an unsolicited
// neighbour advertisement. It may be lost: callers repeat it.
func (a *Announcer) Send() error {
	for _, f := range a.frames {
		if _, err := a.conn.WriteTo(f, a.to); err != nil {
			return fmt.Errorf("%s: %w", a.what, err)
		}
	}
	return nil
}

// Close lets go of the socket.
func (a *Announcer) Close() error { return a.conn.Close() }

// Announce is one Send of an Announcer.
func Announce(iface string, addr netip.Addr) error {
	a, err := NewAnnouncer(iface, addr)
	if err != nil {
		return err
	}
	defer a.Close()
	return a.Send()
}

// Probe asks three times within timeout whether anybody on iface's segment has
// addr, and answers as soon as somebody shows that he has, with his hardware
// address. Hardware addresses of this network namespace's own interfaces and
// those in ours are not taken for an answer. inUse false means only that nobody
// answered in time.
//
// A macvlan and the interface it stands on do not hear each other: probing on
// a host interface never finds an address on a macvlan of that same interface.
func Probe(ctx context.Context, iface string, addr netip.Addr, timeout time.Duration, ours ...net.HardwareAddr) (mac net.HardwareAddr, inUse bool, err error) {
	fail := func(err error) error { return fmt.Errorf("probe %v on %s: %w", addr, iface, err) }
	ifi, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, false, fail(err)
	}
	own, err := net.Interfaces()
	if err != nil {
		return nil, false, fail(err)
	}
	for _, i := range own {
		ours = append(ours, i.HardwareAddr)
	}

	proto, build, claimant := unix.ETH_P_ARP, ProbeARP, arpClaimant
	if !addr.Is4() {
		proto, build, claimant = unix.ETH_P_IPV6, ProbeNS, neighbourClaimant
	}
	question, err := build(ifi.HardwareAddr, addr)
	if err != nil {
		return nil, false, err
	}
	dst := &packet.Addr{HardwareAddr: question[:macLen]}

	conn, err := packet.Listen(ifi, packet.Raw, proto, nil)
	if err != nil {
		return nil, false, fail(fmt.Errorf("open packet socket (needs CAP_NET_RAW): %w", err))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()

	start := time.Now()
	buf := make([]byte, ifi.MTU+ethernetLen)
	for i := range probes {
		if _, err := conn.WriteTo(question, dst); err != nil {
			return nil, false, fail(errors.Join(ctx.Err(), err))
		}
		until := start.Add(timeout * time.Duration(i+1) / probes)
		if err := conn.SetReadDeadline(until); err != nil {
			return nil, false, fail(errors.Join(ctx.Err(), err))
		}
		for {
			n, _, err := conn.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return nil, false, fail(errors.Join(ctx.Err(), err))
			}
			who := claimant(buf[:n], addr)
			if who != nil && !slices.ContainsFunc(ours, func(m net.HardwareAddr) bool { return slices.Equal(m, who) }) {
				return who, true, nil
			}
		}
	}
	return nil, false, nil
}

// arpClaimant returns the hardware address that frame shows addr to be at.
func arpClaimant(frame []byte, addr netip.Addr) net.HardwareAddr {
	a, err := ParseARP(frame)
	if err != nil || !a.Claims(addr) {
		return nil
	}
	return a.SenderMAC
}

func neighbourClaimant(frame []byte, addr netip.Addr) net.HardwareAddr {
	n, err := ParseNeighbour(frame)
	if err != nil || !n.Claims(addr) {
		return nil
	}
	return n.SenderMAC
}
