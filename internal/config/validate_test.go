package config

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/remote"
)

func goodProtect() Protect {
	p := defaults()
	p.PID, p.VIPs, p.Dev, p.Join = 4242, []netip.Prefix{netip.MustParsePrefix("192.0.2.10/24")}, "eth0", "ftckpt-join"
	return p
}

// check compares an error of Validate with "key: part of the message", "" for
// none.
func check(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" {
		if err != nil {
			t.Errorf("unexpected error: %v", err)
		}
		return
	}
	if err == nil {
		t.Fatalf("no error, want %q", want)
	}
	if _, ok := errors.AsType[*SettingError](err); !ok {
		t.Errorf("error is %T, want *SettingError: %v", err, err)
	}
	key, part, _ := strings.Cut(want, ": ")
	if !strings.HasPrefix(err.Error(), key+": ") || !strings.Contains(err.Error(), part) {
		t.Errorf("error %q, want key %q and %q in it", err, key, part)
	}
}

func TestProtectValidate(t *testing.T) {
	vip := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	tests := []struct {
		name string
		edit func(*Protect)
		want string
	}{
		{"good", func(*Protect) {}, ""},
		{"relative run-dir", func(p *Protect) { p.RunDir = "run" }, `run-dir: "run" is not an absolute path`},
		{"empty state-dir", func(p *Protect) { p.StateDir = "" }, `state-dir: "" is not an absolute path`},
		{"empty name", func(p *Protect) { p.Name = "" }, `name: "" is not a service name`},
		{"name with a slash", func(p *Protect) { p.Name = "../x" }, `name: "../x" is not a service name`},
		{"name with a dot", func(p *Protect) { p.Name = "a.b" }, "name: not a service name"},
		{"name with capitals", func(p *Protect) { p.Name = "Redis" }, "name: not a service name"},
		{"name with a newline", func(p *Protect) { p.Name = "a\n" }, "name: not a service name"},
		{"longest name", func(p *Protect) { p.Name = strings.Repeat("a", MaxName) }, ""},
		{"longer name", func(p *Protect) { p.Name = strings.Repeat("a", MaxName+1) }, "name: not a service name"},
		{"pid 0", func(p *Protect) { p.PID = 0 }, "pid: 0 is not a process"},
		{"pid 1", func(p *Protect) { p.PID = 1 }, "pid: 1 is not a process"},
		{"no vip", func(p *Protect) { p.VIPs = nil }, "vip: want ADDR/LEN"},
		{"ipv6", func(p *Protect) { p.VIPs = vip("2001:db8::1/64") }, ""},
		{"both families", func(p *Protect) { p.VIPs = append(vip("2001:db8::1/64"), vip("192.0.2.10/24")...) }, ""},
		{"ipv6 anycast", func(p *Protect) { p.VIPs = vip("2001:db8::/64") }, "vip: router anycast"},
		{"ipv6 link-local", func(p *Protect) { p.VIPs = vip("fe80::1/64") }, "vip: link-local"},
		{"mapped", func(p *Protect) { p.VIPs = vip("::ffff:192.0.2.1/120") }, "vip: IPv4 address that it is"},
		{"vip twice", func(p *Protect) { p.VIPs = append(vip("192.0.2.1/24"), vip("192.0.2.1/25")...) }, "vip: given twice"},
		{"too many vips", func(p *Protect) { p.VIPs = slices.Repeat(vip("192.0.2.1/24"), MaxVIPs+1) }, "vip: too many"},
		{"client net", func(p *Protect) { p.Clients = append(vip("10.0.0.0/8"), vip("192.0.2.0/24")...) }, ""},
		{"client nets of another family", func(p *Protect) { p.Clients = vip("2001:db8::/64") }, "client-net: no --vip"},
		{"client address", func(p *Protect) { p.Clients = vip("10.0.0.1/8") }, "client-net: want 10.0.0.0/8"},
		{"client nets overlap", func(p *Protect) { p.Clients = append(vip("10.0.0.0/8"), vip("10.1.0.0/16")...) }, "client-net: overlap"},
		{"too many client nets", func(p *Protect) { p.Clients = slices.Repeat(vip("10.0.0.0/8"), MaxClientNets+1) }, "client-net: too many"},
		{"network", func(p *Protect) { p.VIPs = vip("192.0.2.0/24") }, "vip: the network, not an address in it"},
		{"broadcast", func(p *Protect) { p.VIPs = vip("192.0.2.255/24") }, "vip: broadcast"},
		{"broadcast in mid-octet", func(p *Protect) { p.VIPs = vip("192.0.3.255/23") }, "vip: broadcast"},
		{"no broadcast in mid-octet", func(p *Protect) { p.VIPs = vip("192.0.2.255/23") }, ""},
		{"point to point", func(p *Protect) { p.VIPs = vip("192.0.2.0/31") }, ""},
		{"host", func(p *Protect) { p.VIPs = vip("192.0.2.10/32") }, ""},
		{"loopback", func(p *Protect) { p.VIPs = vip("127.0.0.1/8") }, "vip: not an address that a service can have"},
		{"multicast", func(p *Protect) { p.VIPs = vip("224.0.0.9/24") }, "vip: not an address that a service can have"},
		{"length 0", func(p *Protect) { p.VIPs = vip("192.0.2.1/0") }, "vip: not an address that a service can have"},
		{"long dev", func(p *Protect) { p.Dev = "abcdefghijklmnop" }, "dev: not the name of a network interface"},
		{"dev with a slash", func(p *Protect) { p.Dev = "a/b" }, "dev: not the name of a network interface"},
		{"port 0", func(p *Protect) { p.Ports = []uint16{0} }, "port: 0 is not a port"},
		{"port twice", func(p *Protect) { p.Ports = []uint16{1, 2, 1} }, "port: 1 is given twice"},
		{"peer of the other family", func(p *Protect) { p.Outgoing = []remote.Range{{Net: netip.MustParsePrefix("2001:db8::/64")}} }, "outgoing: 2001:db8::/64 is of an address family"},
		{"peer twice", func(p *Protect) {
			r := remote.Range{Net: netip.MustParsePrefix("192.0.2.0/24"), Port: 5432}
			p.Outgoing = []remote.Range{r, r}
		}, "outgoing: 192.0.2.0/24:5432 is given twice"},
		{"peers", func(p *Protect) {
			p.Outgoing = []remote.Range{{Net: netip.MustParsePrefix("0.0.0.0/0"), Port: 5432}, {Net: netip.MustParsePrefix("192.0.2.0/24")}}
		}, ""},
		{"many peers", func(p *Protect) { p.Outgoing = make([]remote.Range, MaxOutgoing+1) }, "outgoing: 65 networks are too many"},
		{"many ports", func(p *Protect) { p.Ports = make([]uint16, MaxPorts+1) }, "port: too many"},
		{"on request only", func(p *Protect) { p.Interval = 0 }, ""},
		{"short interval", func(p *Protect) { p.Interval = MinInterval - 1 }, "interval: out of bounds"},
		{"negative interval", func(p *Protect) { p.Interval = -time.Second }, "interval: out of bounds"},
		{"long interval", func(p *Protect) { p.Interval = MaxInterval + 1 }, "interval: out of bounds"},
		{"copied too much", func(p *Protect) { p.Join = "join: x" }, "join: white space"},
		{"url", func(p *Protect) { p.Join, p.Log = "", "tls://h:4222" }, ""},
		{"log in itself", func(p *Protect) { p.Join, p.Log = "", "embed://:4222" }, "log: would die with it"},
		{"http", func(p *Protect) { p.Join, p.Log = "", "http://h" }, `log: unknown scheme "http"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := goodProtect()
			tt.edit(&p)
			check(t, p.Validate(), tt.want)
		})
	}
}

func TestOtherValidate(t *testing.T) {
	c := defaults().Common
	standby := Standby{Common: c, Name: "a", Dev: "eth0", Log: DefaultEmbed, Mode: ModeWarm, Detect: DefaultDetect}
	demo := Demo{Common: c, Connections: 1, Duration: MinDemoDuration}
	tests := []struct {
		name string
		v    interface{ Validate() error }
		want string
	}{
		{"standby", func() *Standby { s := standby; return &s }(), ""},
		{"standby that joins", func() *Standby { s := standby; s.Log, s.Join = "", "J"; return &s }(), ""},
		{"standby without log", func() *Standby { s := standby; s.Log = ""; return &s }(), "log: unknown scheme"},
		{"short detect", func() *Standby { s := standby; s.Detect = MinDetect - 1; return &s }(), "detect: out of bounds"},
		{"long detect", func() *Standby { s := standby; s.Detect = MaxDetect + 1; return &s }(), "detect: out of bounds"},
		{"logserver", &LogServer{Common: c, Listen: "127.0.0.1:0"}, ""},
		{"logserver on all addresses", &LogServer{Common: c, Listen: ":4222"}, ""},
		{"logserver without port", &LogServer{Common: c, Listen: "127.0.0.1"}, `listen: "127.0.0.1" is not ADDR:PORT`},
		{"logserver by name", &LogServer{Common: c, Listen: "host:1"}, `listen: "host" is not an IP address`},
		{"logserver on a wrong port", &LogServer{Common: c, Listen: ":65536"}, `listen: "65536" is not a port`},
		{"demo", func() *Demo { d := demo; return &d }(), ""},
		{"demo without client", func() *Demo { d := demo; d.Connections = 0; return &d }(), "connections: out of bounds"},
		{"short demo", func() *Demo { d := demo; d.Duration--; return &d }(), "duration: out of bounds"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { check(t, tt.v.Validate(), tt.want) })
	}
}

func TestParseLogURL(t *testing.T) {
	const secret = "s3cret"
	tests := []struct {
		in   string
		want LogURL
		err  string
	}{
		{"nats://10.0.0.1:4222", LogURL{servers: "nats://10.0.0.1:4222"}, ""},
		{"tls://u:s3cret@h", LogURL{servers: "tls://h", User: "u", Password: secret}, ""},
		{"nats://s3cret@h:1", LogURL{servers: "nats://h:1", Token: secret}, ""},
		{"nats://u:s3cret@a:1,nats://b:1,nats://u:s3cret@c:1", LogURL{servers: "nats://a:1,nats://b:1,nats://c:1", User: "u", Password: secret}, ""},
		{"nats://[2001:db8::1]:4222", LogURL{servers: "nats://[2001:db8::1]:4222"}, ""},
		{"embed://:4222", LogURL{embed: ":4222"}, ""},
		{"embed://10.0.0.1:0", LogURL{embed: "10.0.0.1:0"}, ""},
		{"nats://u:s3cret@a,nats://v:s3cret@b", LogURL{}, "same credentials"},
		{"nats://u:s3cret@a/path", LogURL{}, "more than a host"},
		{"nats://u:s3cret@", LogURL{}, "names no host"},
		{"nats://u:s3cret@h:port", LogURL{}, "not a URL"},
		{"s3cret", LogURL{}, "unknown scheme"},
		{"", LogURL{}, "unknown scheme"},
		{"nats://a, nats://b", LogURL{}, "not a URL"},
		{"embed://", LogURL{}, "takes an address and a port"},
		{"embed://localhost:1", LogURL{}, "takes an address and a port"},
		{"embed://:1,nats://h", LogURL{}, "takes an address and a port"},
		{"nats://" + strings.Repeat("a", maxLogURL), LogURL{}, "not a URL"},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			got, err := ParseLogURL(tt.in)
			if tt.err != "" {
				check(t, err, "log: "+tt.err)
				if err != nil && strings.Contains(err.Error(), secret) {
					t.Errorf("the error tells the secret: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			if strings.Contains(got.String(), secret) {
				t.Errorf("String tells the secret: %v", got)
			}
		})
	}
}
