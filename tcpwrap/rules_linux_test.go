package tcpwrap

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/remote"
)

func saved(t *testing.T, ns, tool string) []string {
	t.Helper()
	var rules []string
	for line := range strings.Lines(run(t, "ip", "netns", "exec", ns, tool, "-t", rulesTable)) {
		if strings.HasPrefix(line, "-A ") {
			rules = append(rules, strings.TrimSpace(line))
		}
	}
	return rules
}

func TestRulesComeAndGoAsOne(t *testing.T) {
	l := newLab(t)
	foreign := []string{"OUTPUT", "-p", "udp", "-j", "ACCEPT", "-m", "comment", "--comment", "ftckpt:test2 is not test"}
	run(t, "ip", append([]string{"netns", "exec", l.server, "iptables", "-t", rulesTable, "-A"}, foreign...)...)
	before := saved(t, l.server, "iptables-save")
	other := l.rules(netip.MustParseAddr("10.201.0.9"))
	other.Name = "test.2"
	if err := other.Install(); err != nil {
		t.Fatal(err)
	}
	r := l.rules(labServer4)
	for range 2 { // again changes nothing
		if err := r.Install(); err != nil {
			t.Fatal(err)
		}
		want := []string{
			`-A INPUT -d 10.201.0.1/32 -i srv0 -p tcp -m tcp --dport 7777 -m comment --comment "ftckpt:test" -j NFQUEUE --queue-num 77`,
			`-A OUTPUT -s 10.201.0.1/32 -o srv0 -p tcp -m tcp --sport 7777 -m mark ! --mark 0x66746370 -m comment --comment "ftckpt:test" -j NFQUEUE --queue-num 77`,
		}
		got := slices.DeleteFunc(saved(t, l.server, "iptables-save"), func(s string) bool { return !strings.Contains(s, `"ftckpt:test"`) })
		if !slices.Equal(got, want) {
			t.Errorf("rules\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	count := func(want int) {
		t.Helper()
		if got, err := Installed(l.server, "test"); err != nil || len(got) != want {
			t.Errorf("%d rules, want %d (%v): %q", len(got), want, err, got)
		}
	}
	r.Ports = []uint16{1, 2, 3}
	if err := r.Install(); err != nil {
		t.Fatal(err)
	}
	count(6)
	if err := r.Install(); err != nil { // the order of ours is what iptables-save prints
		t.Fatal(err)
	}
	count(6)
	for range 2 {
		if err := r.Block(); err != nil {
			t.Fatal(err)
		}
		count(6)
	}
	for range 2 {
		if err := r.Remove(); err != nil {
			t.Fatal(err)
		}
		count(0)
	}
	if err := RemoveStale(l.server, "test.2"); err != nil {
		t.Fatal(err)
	}
	if got := saved(t, l.server, "iptables-save"); !slices.Equal(got, before) {
		t.Errorf("left %q, was %q", got, before)
	}
}

// The rules of peers are what iptables-save prints, so that installing them again
// changes nothing and no packet escapes.
func TestRulesOfPeers(t *testing.T) {
	l := newLab(t)
	r := l.rules(labServer4)
	for _, s := range []string{"0.0.0.0/0:5432", "192.0.2.0/24", "192.0.2.7/32:6379", "0.0.0.0/0"} {
		p, err := remote.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		r.Peers = append(r.Peers, p)
	}
	if err := r.Install(); err != nil {
		t.Fatal(err)
	}
	want := []string{
		`INPUT -d 10.201.0.1/32 -i srv0 -p tcp -m tcp --dport 7777 `,
		`INPUT -d 10.201.0.1/32 -i srv0 -p tcp -m tcp --sport 5432 `,
		`INPUT -s 192.0.2.0/24 -d 10.201.0.1/32 -i srv0 -p tcp `,
		`INPUT -s 192.0.2.7/32 -d 10.201.0.1/32 -i srv0 -p tcp -m tcp --sport 6379 `,
		`INPUT -d 10.201.0.1/32 -i srv0 -p tcp `,
		`OUTPUT -s 10.201.0.1/32 -o srv0 -p tcp -m tcp --sport 7777 -m mark ! --mark 0x66746370 `,
		`OUTPUT -s 10.201.0.1/32 -o srv0 -p tcp -m tcp --dport 5432 -m mark ! --mark 0x66746370 `,
		`OUTPUT -s 10.201.0.1/32 -d 192.0.2.0/24 -o srv0 -p tcp -m mark ! --mark 0x66746370 `,
		`OUTPUT -s 10.201.0.1/32 -d 192.0.2.7/32 -o srv0 -p tcp -m tcp --dport 6379 -m mark ! --mark 0x66746370 `,
		`OUTPUT -s 10.201.0.1/32 -o srv0 -p tcp -m mark ! --mark 0x66746370 `,
	}
	got, err := Installed(l.server, "test")
	if err != nil || len(got) != len(want) {
		t.Fatalf("%d rules, want %d (%v): %q", len(got), len(want), err, got)
	}
	for i := range want {
		if w := want[i] + `-m comment --comment "ftckpt:test" -j NFQUEUE --queue-num 77`; got[i] != w {
			t.Errorf("rule %d is\n%s\nwant\n%s", i, got[i], w)
		}
	}
	if l := r.lines(false, "-j NFQUEUE --queue-num 77", "-m mark ! --mark 0x66746370 ", r.Dev); !slices.Equal(sortedByChain(l), got) {
		t.Errorf("lines\n%q\nare printed as\n%q", sortedByChain(l), got)
	}
}

// Of some clients only: the others are not caught, or, alone, dropped. What is
// printed is what was meant, or each Install would change the rules.
func TestRulesOfSomeClients(t *testing.T) {
	l := newLab(t)
	r := l.rules(labServer4)
	r.VIPs = append(r.VIPs, labServer6)
	r.Clients = []netip.Prefix{netip.MustParsePrefix("10.201.0.0/28"), netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("2001:db8::/32")}
	for _, c := range []struct {
		install func() error
		drops   int
	}{{r.Install, 0}, {r.InstallAlone, 4}, {r.Install, 0}} {
		if err := c.install(); err != nil {
			t.Fatal(err)
		}
		got, err := Installed(l.server, "test")
		drops := 0
		for _, rule := range got {
			if strings.HasSuffix(rule, "-j DROP") {
				drops++
			}
		}
		if err != nil || len(got) != 6+c.drops || drops != c.drops {
			t.Errorf("%d rules, %d of them drop, want 6 and %d (%v):\n%s", len(got), drops, c.drops, err, strings.Join(got, "\n"))
		}
		if c.drops > 0 {
			continue
		}
		want := append(sortedByChain(r.catch(false)), sortedByChain(r.catch(true))...)
		if !slices.Equal(got, want) {
			t.Errorf("rules\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	only4 := r
	only4.VIPs, only4.Clients = r.VIPs[:1], r.Clients[:1]
	if err := errors.Join(only4.Install(), only4.RemoveOthers()); err != nil {
		t.Fatal(err)
	}
	if got, err := Installed(l.server, "test"); err != nil || len(got) != 2 {
		t.Errorf("after RemoveOthers: %q, %v", got, err)
	}
}

func TestRulesOfIPv6(t *testing.T) {
	l := newLab(t)
	r := l.rules(labServer6)
	for range 2 {
		if err := r.Install(); err != nil {
			t.Fatal(err)
		}
	}
	if got := saved(t, l.server, "ip6tables-save"); len(got) != 2 {
		t.Errorf("rules %q", got)
	}
	if got := saved(t, l.server, "iptables-save"); len(got) != 0 {
		t.Errorf("IPv4 rules %q", got)
	}
	if err := RemoveStale(l.server, "test"); err != nil {
		t.Fatal(err)
	}
	if got := saved(t, l.server, "ip6tables-save"); len(got) != 0 {
		t.Errorf("left %q", got)
	}
}

// Rules that another implementation of iptables put there are found as well.
func TestRulesOfTheOtherImplementation(t *testing.T) {
	for _, tool := range tools(false) {
		t.Run(string(tool), func(t *testing.T) {
			l := newLab(t)
			r := l.rules(labServer4)
			err := nsthread.InNamed(l.server, func() error {
				return tool.swap("test", r.lines(false, "-j NFQUEUE --queue-num 77", "", r.Dev))
			})
			if err != nil {
				t.Fatal(err)
			}
			l.serve(t, labServer4, echo)
			tp := newTap(t, l.open(t), nil)
			c := l.dial(t, labServer4) // it does catch
			ask(t, c, "before")
			tp.mu.Lock()
			if tp.big == 0 {
				t.Error("nothing was caught")
			}
			tp.mu.Unlock()
			if err := r.Install(); err != nil {
				t.Fatal(err)
			}
			if got, err := Installed(l.server, "test"); err != nil || len(got) != 2 {
				t.Errorf("rules %q, %v", got, err)
			}
			ask(t, c, "while")
			if err := RemoveStale(l.server, "test"); err != nil {
				t.Fatal(err)
			}
			if got, err := Installed(l.server, "test"); err != nil || len(got) != 0 {
				t.Errorf("left %q, %v", got, err)
			}
			ask(t, c, "after")
		})
	}
}

// Installing and removing under load breaks no connection.
func TestRulesChangeUnderTraffic(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	newTap(t, l.open(t), nil)
	c := l.dial(t, labServer4)
	r := l.rules(labServer4)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			f := r.Install
			if i%2 == 1 {
				f = r.Remove
			}
			if err := f(); err != nil {
				done <- err
				return
			}
		}
	}()
	for range 2000 {
		ask(t, c, "x")
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// The user's own firewall still decides about what the wrapper lets through.
func TestFirewallStaysInForce(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	tp := newTap(t, l.open(t), func(caught) Verdict { return Accept })
	l.install(t, labServer4)
	c := l.dial(t, labServer4)
	ask(t, c, "allowed")
	run(t, "ip", "netns", "exec", l.server, "iptables", "-A", "INPUT", "-p", "tcp", "--dport", "7777", "-j", "DROP")
	send(t, c, "forbidden")
	tp.until(t, "the packet", func() bool { return string(tp.seen[len(tp.seen)-1].Seg.Payload) == "forbidden" })
	silent(t, c)
}

func TestBlockedServiceIsSilent(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	tp := newTap(t, l.open(t), nil)
	r := l.install(t, labServer4)
	c := l.dial(t, labServer4)
	ask(t, c, "before")
	if err := r.Block(); err != nil {
		t.Fatal(err)
	}
	send(t, c, "after")
	silent(t, c)
	out := AppendSegment(nil, Build{Src: netip.AddrPortFrom(labServer4, labPort),
		Dst: netip.MustParseAddrPort(c.LocalAddr().String()), Flags: RST | ACK})
	if err := tp.q.SendOut(out); err != nil && !errors.Is(err, os.ErrPermission) {
		t.Fatal(err)
	}
	tp.q.Close()
	if n, err := DestroySockets(l.server, []netip.Addr{labServer4}, []uint16{labPort}); err != nil || n != 1 {
		t.Errorf("destroyed %d sockets, %v", n, err)
	}
	silent(t, c) // no RST of the destroyed socket
	if err := r.Remove(); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(afterDeadline())
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after Remove the client's retransmission meets no socket: want a reset, got %v", err)
	}
}

func TestRulesRefuse(t *testing.T) {
	good := Rules{Name: "a", VIPs: []netip.Addr{labServer4}, Ports: []uint16{1}, Dev: "eth0", Mark: 1}
	for name, f := range map[string]func(*Rules){
		"no name":       func(r *Rules) { r.Name = "" },
		"quote":         func(r *Rules) { r.Name = `a" -j ACCEPT` },
		"new line":      func(r *Rules) { r.Name = "a\nCOMMIT" },
		"long name":     func(r *Rules) { r.Name = strings.Repeat("a", 201) },
		"no address":    func(r *Rules) { r.VIPs = nil },
		"any address":   func(r *Rules) { r.VIPs[0] = netip.IPv4Unspecified() },
		"no ports":      func(r *Rules) { r.Ports = nil },
		"port 0":        func(r *Rules) { r.Ports = []uint16{80, 0} },
		"device":        func(r *Rules) { r.Dev = "eth0 -j ACCEPT" },
		"any device":    func(r *Rules) { r.Dev = "eth+" },
		"IPv6 peer":     func(r *Rules) { r.Peers = []remote.Range{{Net: netip.MustParsePrefix("2001:db8::/64")}} },
		"no mark":       func(r *Rules) { r.Mark = 0 },
		"mapped IPv4":   func(r *Rules) { r.VIPs[0] = netip.MustParseAddr("::ffff:1.2.3.4") },
		"client":        func(r *Rules) { r.Clients = []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")} },
		"device option": func(r *Rules) { r.Dev = "-j" },
	} {
		t.Run(name, func(t *testing.T) {
			r := good
			r.VIPs = slices.Clone(good.VIPs)
			f(&r)
			r.NetNS = "/nonexistent" // whatever is not refused fails there
			if err := r.Install(); err == nil || errors.Is(err, os.ErrNotExist) {
				t.Errorf("Install: %v", err)
			}
		})
	}
	if err := RemoveStale("", "a b"); err == nil {
		t.Error("RemoveStale took a bad name")
	}
}
