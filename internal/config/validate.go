package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/ftckpt/ftckpt/internal/remote"
)

// SettingError is a setting whose value cannot work.
type SettingError struct {
	Key string
	Err error
}

func (p *SettingError) Error() string { return p.Key + ": " + p.Err.Error() }

// Unwrap gives the cause to errors.Is and errors.As.
func (p *SettingError) Unwrap() error { return p.Err }

func problem(key, format string, args ...any) error {
	return &SettingError{Key: key, Err: fmt.Errorf(format, args...)}
}

// nameSyntax leaves out what a file name, a NATS subject or a shell would take
// for more than a letter.
var nameSyntax = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`)

// CheckName says why name cannot be a service's, or nil.
func CheckName(name string) error {
	if len(name) > MaxName || !nameSyntax.MatchString(name) {
		return problem("name", "%q is not a service name: want 1 to %d of a-z, 0-9, '-' and '_', a letter or a digit first",
			name, MaxName)
	}
	return nil
}

// Validate says which setting cannot work, or nil.
func (c *Common) Validate() error {
	for _, d := range []struct{ key, dir string }{{"run-dir", c.RunDir}, {"state-dir", c.StateDir}} {
		if !filepath.IsAbs(d.dir) {
			return problem(d.key, "%q is not an absolute path", d.dir)
		}
	}
	return nil
}

// Validate says which setting cannot work, or nil.
func (p *Protect) Validate() error {
	if err := p.Common.Validate(); err != nil {
		return err
	}
	if err := CheckName(p.Name); err != nil {
		return err
	}
	if p.PID < 2 {
		return problem("pid", "%d is not a process that can be protected", p.PID)
	}
	if err := checkVIPs(p.VIPs); err != nil {
		return err
	}
	if err := checkClients(p.Clients, p.VIPs); err != nil {
		return err
	}
	if err := checkDev(p.Dev); err != nil {
		return err
	}
	if err := checkPorts(p.Ports); err != nil {
		return err
	}
	if err := checkOutgoing(p.Outgoing, p.VIPs); err != nil {
		return err
	}
	if p.Interval != 0 && (p.Interval < MinInterval || p.Interval > MaxInterval) {
		return problem("interval", "%v is out of bounds: want %v to %v, or 0 for only when asked", p.Interval, MinInterval, MaxInterval)
	}
	if _, err := ParseSchedule(p.Schedule); err != nil {
		return problem("schedule", "%w", err)
	}
	if p.IdleExpiry != 0 && (p.IdleExpiry < MinIdleExpiry || p.IdleExpiry > MaxIdleExpiry) {
		return problem("idle-expiry", "%v is out of bounds: want %v to %v, or 0 for never", p.IdleExpiry, MinIdleExpiry, MaxIdleExpiry)
	}
	if p.MaxReplay != 0 && (p.MaxReplay < MinInterval || p.MaxReplay > MaxInterval) {
		return problem("max-replay", "%v is out of bounds: want %v to %v, or 0 for never", p.MaxReplay, MinInterval, MaxInterval)
	}
	if p.Join != "" {
		return checkJoin(p.Join)
	}
	u, err := ParseLogURL(p.Log)
	if err != nil {
		return err
	}
	if u.Embedded() && p.OnCrash != OnCrashLocal {
		return problem("log", "a log in the primary's own process would die with it: take the join string of a standby or a logserver, or the URL of a NATS server elsewhere")
	}
	return nil
}

// Validate says which setting cannot work, or nil.
func (s *Standby) Validate() error {
	if err := s.Common.Validate(); err != nil {
		return err
	}
	if err := CheckName(s.Name); err != nil {
		return err
	}
	if err := checkDev(s.Dev); err != nil {
		return err
	}
	if s.Detect < MinDetect || s.Detect > MaxDetect {
		return problem("detect", "%v is out of bounds: want %v to %v", s.Detect, MinDetect, MaxDetect)
	}
	if s.Join != "" {
		return checkJoin(s.Join)
	}
	_, err := ParseLogURL(s.Log)
	return err
}

// Validate says which setting cannot work, or nil.
func (l *LogServer) Validate() error {
	if err := l.Common.Validate(); err != nil {
		return err
	}
	if err := checkHostPort(l.Listen); err != nil {
		return problem("listen", "%w", err)
	}
	return nil
}

// StoreDir is where the log server keeps the log.
func (l *LogServer) StoreDir() string {
	if l.Store != "" {
		return l.Store
	}
	return filepath.Join(l.StateDir, "logserver")
}

// Validate says which setting cannot work, or nil.
func (d *Demo) Validate() error {
	if err := d.Common.Validate(); err != nil {
		return err
	}
	if d.Connections < 1 || d.Connections > MaxDemoConnections {
		return problem("connections", "%d is out of bounds: want 1 to %d", d.Connections, MaxDemoConnections)
	}
	if d.Duration < MinDemoDuration || d.Duration > MaxDemoDuration {
		return problem("duration", "%v is out of bounds: want %v to %v", d.Duration, MinDemoDuration, MaxDemoDuration)
	}
	return nil
}

// checkVIPs accepts some host addresses, each once.
func checkVIPs(vips []netip.Prefix) error {
	if len(vips) == 0 {
		return problem("vip", "want ADDR/LEN, as 192.0.2.10/24 or 2001:db8::10/64")
	}
	if len(vips) > MaxVIPs {
		return problem("vip", "%d addresses are too many: want at most %d", len(vips), MaxVIPs)
	}
	seen := map[netip.Addr]bool{}
	for _, v := range vips {
		if err := checkVIP(v); err != nil {
			return err
		}
		if seen[v.Addr()] {
			return problem("vip", "%v is given twice", v.Addr())
		}
		seen[v.Addr()] = true
	}
	return nil
}

// checkVIP accepts one host address inside the network that its length gives.
func checkVIP(vip netip.Prefix) error {
	a := vip.Addr()
	switch {
	case !vip.IsValid():
		return problem("vip", "want ADDR/LEN, as 192.0.2.10/24 or 2001:db8::10/64")
	case a.Is4In6():
		return problem("vip", "%v: write it as the IPv4 address that it is", vip)
	case a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || vip.Bits() == 0:
		return problem("vip", "%v is not an address that a service can have", vip)
	case a.Is6() && a.IsLinkLocalUnicast():
		return problem("vip", "%v: a link-local address means another host's on another link: take one that clients can name without an interface", vip)
	case a.Is4() && vip.Bits() < 31 && a == vip.Masked().Addr():
		return problem("vip", "%v is the network, not an address in it", vip)
	case a.Is6() && vip.Bits() < 127 && a == vip.Masked().Addr():
		return problem("vip", "%v is the network's router anycast address (RFC 4291, 2.6.1), not one that a service can have", vip)
	case a.Is4() && vip.Bits() < 31 && a == lastOf(vip):
		return problem("vip", "%v is the network's broadcast address", vip)
	}
	return nil
}

// checkClients accepts networks from which one of the addresses can be reached.
func checkClients(nets, vips []netip.Prefix) error {
	if len(nets) > MaxClientNets {
		return problem("client-net", "%d networks are too many: want at most %d", len(nets), MaxClientNets)
	}
	for i, n := range nets {
		same := func(v netip.Prefix) bool { return v.Addr().Is4() == n.Addr().Is4() }
		switch {
		case n != n.Masked():
			return problem("client-net", "%v is an address in a network, not the network: want %v (or %v for that address alone)", n, n.Masked(), netip.PrefixFrom(n.Addr(), n.Addr().BitLen()))
		case n.Addr().Is4In6():
			return problem("client-net", "%v: write it as the IPv4 network that it is", n)
		case !slices.ContainsFunc(vips, same):
			return problem("client-net", "%v is of an address family in which the service has no --vip", n)
		}
		for _, other := range nets[:i] {
			if n.Overlaps(other) {
				return problem("client-net", "%v and %v overlap: give the larger one alone", other, n)
			}
		}
	}
	return nil
}

// lastOf is the last address of an IPv4 network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(b)
}

func checkDev(dev string) error {
	if dev == "" || len(dev) > linuxIfNameLimit || strings.ContainsAny(dev, "/ \t\n") {
		return problem("dev", "%q is not the name of a network interface", dev)
	}
	return nil
}

func checkPorts(ports []uint16) error {
	if len(ports) > MaxPorts {
		return problem("port", "%d ports are too many: want at most %d", len(ports), MaxPorts)
	}
	seen := map[uint16]bool{}
	for _, p := range ports {
		switch {
		case p == 0:
			return problem("port", "0 is not a port a service can have")
		case seen[p]:
			return problem("port", "%d is given twice", p)
		}
		seen[p] = true
	}
	return nil
}

func checkOutgoing(peers []remote.Range, vips []netip.Prefix) error {
	if len(peers) > MaxOutgoing {
		return problem("outgoing", "%d networks are too many: want at most %d", len(peers), MaxOutgoing)
	}
	seen := map[remote.Range]bool{}
	for _, p := range peers {
		same := func(v netip.Prefix) bool { return v.Addr().Is4() == p.Net.Addr().Is4() }
		switch {
		case !slices.ContainsFunc(vips, same):
			return problem("outgoing", "%v is of an address family in which the service has no --vip, from which such connections come", p)
		case seen[p]:
			return problem("outgoing", "%v is given twice", p)
		}
		seen[p] = true
	}
	return nil
}

// checkJoin only looks for what a person does wrong when copying; what the
// string says is for package stream.
func checkJoin(s string) error {
	if strings.ContainsAny(s, " \t\r\n") {
		return problem("join", "it has white space in it: pass what follows \"join: \" on the line that standby or logserver printed")
	}
	return nil
}

// LogURL is a checked --log setting, its credentials apart.
type LogURL struct {
	embed   string // host:port
	servers string // URLs with commas between
	// User and Password, or Token alone, as in nats://USER:PASSWORD@HOST and
	// nats://TOKEN@HOST.
	User, Password, Token string
}

// Embedded says whether the log runs in this process, at Addr.
func (u LogURL) Embedded() bool { return u.embed != "" }

// Addr is where an embedded log listens (host:port, the host empty for all
// addresses), and "" for any other.
func (u LogURL) Addr() string { return u.embed }

// String is the URL without credentials, several of a cluster with commas
// between.
func (u LogURL) String() string {
	if u.Embedded() {
		return schemeEmbed + "://" + u.embed
	}
	return u.servers
}

// ParseLogURL reads nats:// and tls:// URLs, several of a cluster with commas
// between, or one embed://ADDR:PORT. Its errors never repeat the URL, which
// may hold a password.
func ParseLogURL(s string) (LogURL, error) {
	const want = "want nats://HOST:PORT, tls://HOST:PORT or embed://ADDR:PORT"
	if len(s) > maxLogURL || strings.ContainsAny(s, " \t\r\n") {
		return LogURL{}, problem("log", "not a URL: %s", want)
	}
	if rest, ok := strings.CutPrefix(s, schemeEmbed+"://"); ok {
		if err := checkHostPort(rest); err != nil {
			return LogURL{}, problem("log", "embed:// takes an address and a port, as embed://:4222: %w", err)
		}
		return LogURL{embed: rest}, nil
	}
	var out LogURL
	var servers []string
	for i, part := range strings.Split(s, ",") {
		u, err := url.Parse(part)
		if err != nil {
			return LogURL{}, problem("log", "not a URL: %s", want)
		}
		switch {
		case u.Scheme != schemeNATS && u.Scheme != schemeTLS:
			return LogURL{}, problem("log", "unknown scheme %q: %s", u.Scheme, want)
		case u.Hostname() == "":
			return LogURL{}, problem("log", "the URL names no host: %s", want)
		case (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.Fragment != "":
			return LogURL{}, problem("log", "the URL has more than a host and a port: %s", want)
		}
		here := LogURL{}
		if u.User != nil {
			if password, ok := u.User.Password(); ok {
				here.User, here.Password = u.User.Username(), password
			} else {
				here.Token = u.User.Username()
			}
		}
		if i == 0 {
			out = here
		} else if u.User != nil && here != out {
			return LogURL{}, problem("log", "the servers of one cluster must have the same credentials")
		}
		servers = append(servers, u.Scheme+"://"+u.Host)
	}
	out.servers = strings.Join(servers, ",")
	return out, nil
}

// checkHostPort accepts an address to listen on; port 0 lets the kernel choose.
func checkHostPort(s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q is not ADDR:PORT", s)
	}
	if host != "" {
		if _, err := netip.ParseAddr(host); err != nil {
			return fmt.Errorf("%q is not an IP address", host)
		}
	}
	if _, err := parsePort(port); err != nil {
		return fmt.Errorf("%q is not a port", port)
	}
	return nil
}
