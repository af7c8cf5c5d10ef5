package l2

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	mac1 = net.HardwareAddr{2, 0xaa, 0xbb, 0xcc, 0xdd, 1}
	ip4  = netip.MustParseAddr("10.77.0.1")
	ip6  = netip.MustParseAddr("2001:db8::1:2:3")
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The wanted bytes are written down from RFC 826 and what arping -U and -A
// send, not from the code.
func TestARPFrames(t *testing.T) {
	request, reply, err := GratuitousARP(mac1, ip4)
	if err != nil {
		t.Fatal(err)
	}
	probe, err := ProbeARP(mac1, ip4)
	if err != nil {
		t.Fatal(err)
	}
	const eth = "ffffffffffff 02aabbccdd01 0806 0001 0800 06 04 "
	pad := strings.Repeat("00", 60-14-28)
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"gratuitous request", request, eth + "0001 02aabbccdd01 0a4d0001 000000000000 0a4d0001" + pad},
		{"gratuitous reply", reply, eth + "0002 02aabbccdd01 0a4d0001 02aabbccdd01 0a4d0001" + pad},
		{"probe", probe, eth + "0001 02aabbccdd01 00000000 000000000000 0a4d0001" + pad},
	} {
		if want := unhex(t, c.want); !bytes.Equal(c.got, want) {
			t.Errorf("%s:\n got %x\nwant %x", c.name, c.got, want)
		}
	}
	if _, err := ProbeARP(mac1, ip6); err == nil {
		t.Error("an ARP probe for an IPv6 address was built")
	}
	if _, err := ProbeARP(nil, ip4); err == nil {
		t.Error("an ARP probe without a hardware address was built")
	}
}

func TestParseARP(t *testing.T) {
	_, reply, err := GratuitousARP(mac1, ip4)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseARP(reply)
	if err != nil {
		t.Fatal(err)
	}
	want := ARP{Op: Reply, SenderMAC: mac1, SenderIP: ip4, TargetMAC: mac1, TargetIP: ip4}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Error(d)
	}
	for name, change := range map[string]func([]byte) []byte{
		"truncated":                       func(b []byte) []byte { return b[:41] },
		"other ethertype":                 func(b []byte) []byte { b[13] = 0; return b },
		"hardware size overflows a uint8": func(b []byte) []byte { b[18] = 128; return b },
		"protocol size":                   func(b []byte) []byte { b[19] = 16; return b },
		"hardware type":                   func(b []byte) []byte { b[15] = 6; return b },
	} {
		if a, err := ParseARP(change(bytes.Clone(reply))); err == nil {
			t.Errorf("%s: parsed as %+v", name, a)
		}
	}
}

func TestClaims(t *testing.T) {
	other := netip.MustParseAddr("10.77.0.9")
	zero := netip.IPv4Unspecified()
	for _, c := range []struct {
		name string
		a    ARP
		want bool
	}{
		{"reply from it", ARP{Op: Reply, SenderIP: ip4, TargetIP: zero}, true},
		{"request from it for another", ARP{Op: Request, SenderIP: ip4, TargetIP: other}, true},
		{"another's probe for it", ARP{Op: Request, SenderIP: zero, TargetIP: ip4}, true},
		{"an ordinary request for it", ARP{Op: Request, SenderIP: other, TargetIP: ip4}, false},
		{"about another", ARP{Op: Reply, SenderIP: other, TargetIP: zero}, false},
	} {
		if got := c.a.Claims(ip4); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	other6 := netip.MustParseAddr("2001:db8::9")
	for _, c := range []struct {
		name string
		n    Neighbour
		want bool
	}{
		{"advertisement", Neighbour{Advertisement: true, SenderIP: other6, Target: ip6}, true},
		{"another's probe for it", Neighbour{SenderIP: netip.IPv6Unspecified(), Target: ip6}, true},
		{"an ordinary solicitation for it", Neighbour{SenderIP: other6, Target: ip6}, false},
		{"a solicitation from it", Neighbour{SenderIP: ip6, Target: other6}, true},
		{"about another", Neighbour{Advertisement: true, SenderIP: other6, Target: other6}, false},
	} {
		if got := c.n.Claims(ip6); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestNeighbourFrames(t *testing.T) {
	na, err := UnsolicitedNA(mac1, ip6)
	if err != nil {
		t.Fatal(err)
	}
	// Ethernet, IPv6 (length 32, ICMPv6, hop limit 255), then the body after its
	// checksum: override flag, target, target link-layer option.
	head := unhex(t, "333300000001 02aabbccdd01 86dd 60000000 0020 3a ff"+
		"20010db8000000000000000100020003 ff020000000000000000000000000001 8800")
	tail := unhex(t, "20000000 20010db8000000000000000100020003 0201 02aabbccdd01")
	if !bytes.HasPrefix(na, head) || !bytes.HasSuffix(na, tail) || len(na) != len(head)+2+len(tail) {
		t.Errorf("advertisement: %x", na)
	}
	if s := icmp6Sum(na[14:]); s != 0xffff {
		t.Errorf("checksum sums to %#x", s)
	}
	ns, err := ProbeNS(mac1, ip6)
	if err != nil {
		t.Fatal(err)
	}
	head = unhex(t, "3333ff020003 02aabbccdd01 86dd 60000000 0018 3a ff"+
		"00000000000000000000000000000000 ff0200000000000000000001ff020003 8700")
	if !bytes.HasPrefix(ns, head) || len(ns) != 14+40+24 {
		t.Errorf("solicitation: %x", ns)
	}
	got, err := ParseNeighbour(na)
	if err != nil || !got.Advertisement || got.Target != ip6 || got.SenderIP != ip6 || !bytes.Equal(got.SenderMAC, mac1) {
		t.Errorf("parsed %+v, %v", got, err)
	}
	far := bytes.Clone(na)
	far[14+7] = 254
	if _, err := ParseNeighbour(far); err == nil {
		t.Error("a packet that crossed a router was believed")
	}
	if _, err := UnsolicitedNA(mac1, ip4); err == nil {
		t.Error("a neighbour advertisement for an IPv4 address was built")
	}
}

// icmp6Sum is RFC 1071's sum over pseudo-header and payload, checksum included.
func icmp6Sum(ip []byte) uint16 {
	b := append(bytes.Clone(ip[8:40]), 0, 0, ip[4], ip[5], 0, 0, 0, ip[6])
	b = append(b, ip[40:]...)
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func FuzzParse(f *testing.F) {
	_, reply, err := GratuitousARP(mac1, ip4)
	if err != nil {
		f.Fatal(err)
	}
	na, err := UnsolicitedNA(mac1, ip6)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(reply)
	f.Add(na)
	bad := bytes.Clone(reply)
	bad[18], bad[19] = 128, 128
	f.Add(bad)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if a, err := ParseARP(frame); err == nil && (len(a.SenderMAC) != macLen || !a.SenderIP.Is4() || !a.TargetIP.Is4()) {
			t.Errorf("accepted %+v", a)
		}
		if n, err := ParseNeighbour(frame); err == nil && (len(n.SenderMAC) != macLen || !n.Target.Is6()) {
			t.Errorf("accepted %+v", n)
		}
	})
}
