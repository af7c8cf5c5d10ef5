package capsule

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/l2"
)

const probeTime = 300 * time.Millisecond

// probe asks from ns whether somebody has the address.
func (l *lab) probe(ns *os.File, dev string, addr netip.Addr) (mac string, inUse bool) {
	l.t.Helper()
	l.must(l.in(ns, func() error {
		m, used, err := l2.Probe(context.Background(), dev, addr, probeTime)
		mac, inUse = m.String(), used
		return err
	}))
	return mac, inUse
}

// A client that has the primary in its ARP cache reaches the capsule with its
// next packet after TakeVIP and Announce, and not before.
func TestAddressMoves(t *testing.T) {
	l := newLab(t)
	service := fmt.Sprintf("%v:%d", vip.Addr(), port)

	serve := roleCommand(t, "serve "+service+" primary")
	l.must(l.in(l.primary, func() error { startLine(t, serve); return nil }))
	for _, from := range []*os.File{l.client, l.far} {
		if who, err := l.ask(from, service, time.Second); who != "primary" {
			t.Fatalf("before: %q, %v", who, err)
		}
	}
	if got, want := l.neighbour(l.client, vip.Addr()), l.mac(l.primary, "p0"); got != want {
		t.Fatalf("client has %s in its cache, the primary is %s", got, want)
	}
	if mac, used := l.probe(l.stand, "s0", vip.Addr()); !used || mac != l.mac(l.primary, "p0") {
		t.Fatalf("probe of the primary's address: %s, %v", mac, used)
	}

	c := l.capsule(Options{VIPDev: "p0"})
	l.must(c.PrepareVIPs([]netip.Prefix{vip}))
	l.must(c.PrepareVIPs([]netip.Prefix{vip})) // again does nothing
	if err := c.PrepareVIPs([]netip.Prefix{netip.MustParsePrefix("10.77.0.9/24")}); err == nil {
		t.Error("a second address was prepared")
	}
	startLine(t, roleInside(t, c, "serve "+service+" capsule")) // it can bind although the device is down
	if who, err := l.ask(l.client, service, time.Second); who != "primary" {
		t.Fatalf("prepared: %q, %v", who, err)
	}

	l.down(l.primary, "p0")
	if mac, used := l.probe(l.stand, "s0", vip.Addr()); used {
		t.Fatalf("%s answers for a dead primary's address: the capsule's device is not silent", mac)
	}
	if err := c.Announce(t.Context()); err == nil {
		t.Error("an address that was not taken was announced")
	}
	start := time.Now()
	l.must(c.TakeVIP())
	took := time.Since(start)
	if got, want := l.neighbour(l.client, vip.Addr()), l.mac(l.primary, "p0"); got != want {
		t.Errorf("client has %s in its cache before the announcement, the primary was %s", got, want)
	}
	l.must(c.Announce(t.Context()))
	t.Logf("TakeVIP %v, with announcement %v", took, time.Since(start))
	l.must(c.TakeVIP())

	var mac string
	l.must(c.Do(func() error {
		ifi, err := net.InterfaceByName("p0")
		if err == nil {
			mac = ifi.HardwareAddr.String()
		}
		return err
	}))
	if got := l.neighbour(l.client, vip.Addr()); got != mac {
		t.Errorf("client has %s in its cache, the capsule is %s", got, mac)
	}
	for name, from := range map[string]*os.File{"client": l.client, "far": l.far} {
		// A lost SYN would be sent again after a second.
		if who, err := l.ask(from, service, 900*time.Millisecond); who != "capsule" {
			t.Errorf("%s, after: %q, %v", name, who, err)
		}
	}
	if got, used := l.probe(l.client, "c0", vip.Addr()); !used || got != mac {
		t.Errorf("probe of the capsule's address: %s, %v; want %s", got, used, mac)
	}
	if _, used := l.probe(l.client, "c0", netip.MustParseAddr("10.77.0.77")); used {
		t.Error("somebody has a free address")
	}

	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	l.must(l.in(l.client, func() error {
		if _, _, err := l2.Probe(ctx, "c0", netip.MustParseAddr("10.77.0.77"), time.Minute); !errors.Is(err, context.Canceled) {
			t.Errorf("probe with an ended context: %v", err)
		}
		return nil
	}))

	l.must(c.DropVIP())
	if links := linksIn(t, c.netns); !slices.Equal(links, []string{"lo"}) {
		t.Errorf("after DropVIP the capsule has %v", links)
	}
	if _, used := l.probe(l.client, "c0", vip.Addr()); used {
		t.Error("the dropped address still answers")
	}
	l.must(c.PrepareVIPs([]netip.Prefix{vip})) // and once more round
	l.must(c.TakeVIP())
	l.must(c.Announce(t.Context()))
	if who, err := l.ask(l.client, service, 900*time.Millisecond); who != "capsule" {
		t.Errorf("taken again: %q, %v", who, err)
	}
}

func TestAddressMovesIPv6(t *testing.T) {
	l := newLab(t)
	vip6 := netip.MustParsePrefix("2001:db8:77::1/64")
	service := fmt.Sprintf("[%v]:%d", vip6.Addr(), port)
	l.addr(l.client, "c0", "2001:db8:77::2/64")
	l.addr(l.primary, "p0", vip6.String())
	serve := roleCommand(t, "serve "+service+" primary")
	l.must(l.in(l.primary, func() error { startLine(t, serve); return nil }))
	if who, err := l.ask(l.client, service, 3*time.Second); who != "primary" {
		t.Fatalf("before: %q, %v", who, err)
	}
	if mac, used := l.probe(l.stand, "s0", vip6.Addr()); !used || mac != l.mac(l.primary, "p0") {
		t.Errorf("probe of the primary's address: %s, %v", mac, used)
	}
	c := l.capsule(Options{})
	l.must(c.PrepareVIPs([]netip.Prefix{vip6}))
	l.down(l.primary, "p0")
	if _, used := l.probe(l.stand, "s0", vip6.Addr()); used {
		t.Error("somebody answers for a dead primary's address")
	}
	startLine(t, roleInside(t, c, "serve "+service+" capsule"))
	l.must(c.TakeVIP())
	l.must(c.Announce(t.Context()))
	if who, err := l.ask(l.client, service, 900*time.Millisecond); who != "capsule" {
		t.Errorf("after: %q, %v", who, err)
	}
}

func TestTakeVIPWithoutCarrier(t *testing.T) {
	l := newLab(t)
	c := l.capsule(Options{})
	if err := c.TakeVIP(); err == nil {
		t.Error("took an address that was never prepared")
	}
	l.must(c.PrepareVIPs([]netip.Prefix{vip}))
	l.down(l.bridge, "ws0")
	if err := c.TakeVIP(); err == nil {
		t.Fatal("took the address with the cable out")
	} else {
		t.Log(err)
	}
	l.up(l.bridge, "ws0")
	l.must(c.TakeVIP())
}

func TestInheritRoutes(t *testing.T) {
	dst := func(s string) *net.IPNet {
		_, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	gw := net.IPv4(10, 0, 0, 254).To4()
	const u = unix.RTN_UNICAST
	got := inheritRoutes([]netlink.Route{
		{Type: u, LinkIndex: 4, Dst: dst("0.0.0.0/0"), Gw: gw, Priority: 100, Src: net.IPv4(10, 0, 0, 3)},
		{Type: u, LinkIndex: 4, Dst: dst("10.0.0.0/24"), Scope: netlink.SCOPE_LINK, Src: net.IPv4(10, 0, 0, 3)},
		{Type: u, LinkIndex: 5, Dst: dst("10.9.0.0/24"), Gw: gw},
		{Type: unix.RTN_BLACKHOLE, LinkIndex: 4, Dst: dst("10.8.0.0/24")},
		{Type: u, Dst: dst("10.7.0.0/24"), MultiPath: []*netlink.NexthopInfo{{LinkIndex: 5, Gw: net.IPv4(1, 1, 1, 1)}, {LinkIndex: 4, Gw: gw}}},
		{Type: u, LinkIndex: 4, Dst: dst("fe80::/64")},
	}, 4, 2)
	main, onlink := unix.RT_TABLE_MAIN, int(netlink.FLAG_ONLINK)
	want := []netlink.Route{
		{LinkIndex: 2, Dst: dst("10.0.0.0/24"), Scope: netlink.SCOPE_LINK, Table: main},
		{LinkIndex: 2, Dst: dst("0.0.0.0/0"), Gw: gw, Priority: 100, Table: main, Flags: onlink},
		{LinkIndex: 2, Dst: dst("10.7.0.0/24"), Gw: gw, Table: main, Flags: onlink},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
