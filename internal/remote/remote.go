// Package remote names the other ends of connections: hosts or networks, and a
// port or any.
package remote

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Range is a network of remote addresses. Its text form is ADDR/LEN or
// ADDR/LEN:PORT.
type Range struct {
	Net  netip.Prefix
	Port uint16 // 0: any
}

// Host is the range of one address and port.
func Host(a netip.AddrPort) Range {
	return Range{netip.PrefixFrom(a.Addr(), a.Addr().BitLen()), a.Port()}
}

var errSyntax = errors.New("want ADDR/LEN or ADDR/LEN:PORT, as 192.0.2.7/32:5432; a single host may go without its length")

// Parse reads a range. A single address may stand for its host: 192.0.2.7,
// 192.0.2.7:5432, [2001:db8::7]:5432.
func Parse(s string) (Range, error) {
	if strings.Contains(s, "%") {
		return Range{}, errors.New("an address with a zone cannot be matched")
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return check(Host(ap), ap.Port() == 0)
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return check(Host(netip.AddrPortFrom(a, 0)), false)
	}
	addr, rest, ok := strings.Cut(s, "/")
	if !ok {
		return Range{}, errSyntax
	}
	bits, port, hasPort := strings.Cut(rest, ":")
	p, err := netip.ParsePrefix(addr + "/" + bits)
	if err != nil {
		return Range{}, errSyntax
	}
	r := Range{Net: p}
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return Range{}, errors.New("want a port from 1 to 65535")
		}
		r.Port = uint16(n)
	}
	return check(r, hasPort && r.Port == 0)
}

func check(r Range, portZero bool) (Range, error) {
	a := r.Net.Addr()
	switch {
	case portZero:
		return Range{}, errors.New("want a port from 1 to 65535")
	case a.Is4In6():
		return Range{}, fmt.Errorf("%v cannot be matched: want a plain IPv4 or IPv6 address", a)
	case r.Net.Masked() != r.Net:
		return Range{}, fmt.Errorf("%v has bits behind its length: want %v", r.Net, r.Net.Masked())
	}
	return r, nil
}

// Contains reports whether a is in the range.
func (r Range) Contains(a netip.AddrPort) bool {
	return r.Net.Contains(a.Addr()) && (r.Port == 0 || r.Port == a.Port())
}

// Any reports whether one of the ranges has a.
func Any(rs []Range, a netip.AddrPort) bool {
	for _, r := range rs {
		if r.Contains(a) {
			return true
		}
	}
	return false
}

func (r Range) String() string {
	if r.Port == 0 {
		return r.Net.String()
	}
	return fmt.Sprintf("%s:%d", r.Net, r.Port)
}

// MarshalText implements encoding.TextMarshaler.
func (r Range) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Range) UnmarshalText(b []byte) (err error) {
	*r, err = Parse(string(b))
	return err
}
