package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
)

// Problem is a setting whose value cannot work.
type Problem struct {
	Key string
	Err error
}

func (p *Problem) Error() string { return p.Key + ": " + p.Err.Error() }

// Unwrap gives the cause to errors.Is and errors.As.
func (p *Problem) Unwrap() error { return p.Err }

func problem(key, format string, args ...any) error {
	return &Problem{Key: key, Err: fmt.Errorf(format, args...)}
}

// nameSyntax leaves out what a file name, a NATS subject or a shell would take
// for more than a letter.
var nameSyntax = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]*$`)

// CheckName says why name cannot be a service's, or nil.
func CheckName(name string) error {
	if len(name) > MaxName || !nameSyntax.MatchString(name) {
		return problem("name", "%q is not a service name: want 1 to %d letters, digits, '-' and '_', a letter or a digit first",
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
	if err := checkVIP(p.VIP); err != nil {
		return err
	}
	if err := checkDev(p.Dev); err != nil {
		return err
	}
	if err := checkPorts(p.Ports); err != nil {
		return err
	}
	if p.Interval != 0 && (p.Interval < MinInterval || p.Interval > MaxInterval) {
		return problem("interval", "%v is out of bounds: want %v to %v, or 0 for only when asked", p.Interval, MinInterval, MaxInterval)
	}
	if p.Join != "" {
		if strings.ContainsAny(p.Join, " \t\r\n") {
			return problem("join", "the join string has white space in it: pass the one line that standby or logserver printed, without \"join: \"")
		}
		return nil
	}
	u, err := checkLogURL(p.Log)
	if err != nil {
		return err
	}
	if u.Scheme == schemeEmbed {
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
	_, err := checkLogURL(s.Log)
	return err
}

// Embedded says whether the log runs in the standby's own process, and where
// it listens (host:port, the host empty for all addresses).
func (s *Standby) Embedded() (listen string, ok bool) {
	return strings.CutPrefix(s.Log, schemeEmbed+"://")
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

// checkVIP accepts one IPv4 host address inside the network that its length
// gives.
func checkVIP(vip netip.Prefix) error {
	a := vip.Addr()
	switch {
	case !vip.IsValid():
		return problem("vip", "want ADDR/LEN, as 192.0.2.10/24")
	case !a.Is4():
		return problem("vip", "%v: IPv6 is not supported yet", vip)
	case a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || vip.Bits() == 0:
		return problem("vip", "%v is not an address that a service can have", vip)
	case vip.Bits() < 31 && a == vip.Masked().Addr():
		return problem("vip", "%v is the network, not an address in it", vip)
	case vip.Bits() < 31 && a == lastOf(vip):
		return problem("vip", "%v is the network's broadcast address", vip)
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

// checkLogURL never repeats the URL whole: it may hold a password.
func checkLogURL(s string) (*url.URL, error) {
	const want = "want nats://HOST:PORT, tls://HOST:PORT or embed://ADDR:PORT"
	if len(s) > 4096 || strings.ContainsAny(s, " \t\r\n") {
		return nil, problem("log", "not a URL: %s", want)
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, problem("log", "not a URL: %s", want)
	}
	switch u.Scheme {
	case schemeNATS, schemeTLS:
		if u.Hostname() == "" {
			return nil, problem("log", "the URL names no host: %s", want)
		}
	case schemeEmbed:
		if u.User != nil || (u.Path != "" && u.Path != "/") || u.RawQuery != "" {
			return nil, problem("log", "embed:// takes only an address and a port, as embed://:4222")
		}
		if err := checkHostPort(u.Host); err != nil {
			return nil, problem("log", "embed://: %w", err)
		}
	default:
		return nil, problem("log", "unknown scheme %q: %s", u.Scheme, want)
	}
	return u, nil
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
