package tcpwrap

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/remote"
)

// Rules are the netfilter rules that send a service's packets to its queue:
//
//	-A INPUT  -i DEV -d VIP -p tcp --dport PORT -j NFQUEUE
//	-A OUTPUT -o DEV -s VIP -p tcp --sport PORT -m mark ! --mark MARK -j NFQUEUE
//
// for each address and port, and each network of clients if they are limited,
// and those of the connections that the service opens to peers:
//
//	-A INPUT  -i DEV -s PEER -d VIP -p tcp --sport PORT -j NFQUEUE
//	-A OUTPUT -o DEV -s VIP -d PEER -p tcp --dport PORT -m mark ! --mark MARK -j NFQUEUE
//
// They have no bypass, so that without an owner of the queue nothing passes.
// They match the device: what a wrapper injects goes over lo and is not caught.
// They are in the mangle table, before filter: a verdict of NFQUEUE ends the
// table it is given in, and the user's own firewall must still see the packet.
//
// Every rule carries the comment "ftckpt:NAME", and rules are found by it
// alone: who comes after a crash needs to know nothing else. Each change is one
// transaction over both chains of an address family: there is no moment in which
// only one direction is caught.
type Rules struct {
	Name  string // of the service: letters, digits, "._-"
	VIPs  []netip.Addr
	Ports []uint16
	// Clients are the networks whose connections are caught; empty: all. The
	// packets of others pass untouched.
	Clients []netip.Prefix
	Peers   []remote.Range // that the service opens connections to
	Dev     string         // network device; "" means all but lo
	Queue   uint16
	Mark    uint32 // as in NFQueueOptions
	NetNS   string // as nsthread.InNamed takes it
}

const (
	rulesTable     = "mangle"
	rulesComment   = "ftckpt:"
	iptablesWait   = "10" // seconds to wait for the xtables lock
	maxServiceName = 200  // a comment is 255 octets at most

	iptablesLimit = 30 * time.Second // for one command, its wait included
)

var serviceName = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

func checkName(name string) error {
	if !serviceName.MatchString(name) || len(name) > maxServiceName {
		return fmt.Errorf("name of service %q: want 1 to %d letters, digits, dots, dashes and underscores", name, maxServiceName)
	}
	return nil
}

var devName = regexp.MustCompile(`^[^\s/!"'\\+-][^\s/!"'\\+]{0,14}$`)

func (r Rules) check() error {
	if err := checkName(r.Name); err != nil {
		return err
	}
	for _, v := range r.VIPs {
		if !v.IsValid() || v.IsUnspecified() || v.Is4In6() {
			return fmt.Errorf("address of service %s: %v cannot be matched", r.Name, v)
		}
	}
	for _, n := range r.Clients {
		if !n.IsValid() || n.Addr().Is4In6() || n != n.Masked() {
			return fmt.Errorf("clients of service %s: %v cannot be matched", r.Name, n)
		}
	}
	switch {
	case len(r.VIPs) == 0:
		return fmt.Errorf("addresses of service %s: want at least one", r.Name)
	case len(r.Ports) == 0 || slices.Contains(r.Ports, 0):
		return fmt.Errorf("ports of service %s: want at least one, and none may be 0", r.Name)
	case slices.ContainsFunc(r.Peers, func(p remote.Range) bool { return !r.has(p.Net.Addr().Is6()) }):
		return fmt.Errorf("peers of service %s: %v are not all of a family of %v", r.Name, r.Peers, r.VIPs)
	case r.Dev != "" && !devName.MatchString(r.Dev):
		return fmt.Errorf("device of service %s: %q is not a device name", r.Name, r.Dev)
	case r.Mark == 0:
		return fmt.Errorf("mark of service %s: want one other than 0", r.Name)
	}
	return nil
}

// Install puts the rules in place, instead of whatever rules of this name there
// are. It does nothing when they are there already. Open the queue first.
func (r Rules) Install() error {
	if err := r.check(); err != nil {
		return fmt.Errorf("install rules: %w", err)
	}
	if err := r.replace(r.catch); err != nil {
		return fmt.Errorf("install rules of %s: %w", r.Name, err)
	}
	return nil
}

// InstallAlone is Install, but what Clients leaves out is dropped instead of
// passed, both ways: for a recovery, in which nobody may meet sockets that are
// half restored. Install then lets it pass.
func (r Rules) InstallAlone() error {
	if err := r.check(); err != nil {
		return fmt.Errorf("install rules: %w", err)
	}
	if len(r.Clients) == 0 {
		return r.Install()
	}
	err := r.replace(func(v6 bool) []string {
		all := r
		all.Clients = nil
		return append(r.catch(v6), all.lines(v6, "-j DROP", r.mark(), r.Dev)...)
	})
	if err != nil {
		return fmt.Errorf("install rules of %s: %w", r.Name, err)
	}
	return nil
}

// catch are the rules that send packets of one address family to the queue.
func (r Rules) catch(v6 bool) []string {
	return r.lines(v6, fmt.Sprintf("-j NFQUEUE --queue-num %d", r.Queue), r.mark(), r.Dev)
}

func (r Rules) mark() string { return fmt.Sprintf("-m mark ! --mark %#x ", r.Mark) }

// Block replaces the rules by plain DROPs on every device but lo, for all
// clients: nothing of the service enters or leaves, whatever becomes of the queue and of this
// process, until Remove or Install. What SendOut sends is dropped as well, and
// it answers EPERM. A packet that is held already has passed the rules: give it Drop, or close the
// queue, but do not accept it.
func (r Rules) Block() error {
	if err := r.check(); err != nil {
		return fmt.Errorf("block service: %w", err)
	}
	r.Clients = nil
	if err := r.replace(func(v6 bool) []string { return r.lines(v6, "-j DROP", "", "") }); err != nil {
		return fmt.Errorf("block service %s: %w", r.Name, err)
	}
	return nil
}

// Remove takes away all rules of this name. What the queue holds is still to be
// given its verdicts: go on receiving until NFQueue.Held is zero, then close.
func (r Rules) Remove() error { return RemoveStale(r.NetNS, r.Name) }

// RemoveStale removes the rules that carry the comment of name, of either
// address family, whoever left them. It is no error when there are none.
func RemoveStale(netns, name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("remove rules: %w", err)
	}
	err := nsthread.InNamed(netns, func() error {
		for _, v6 := range []bool{false, true} {
			for _, t := range presentTools(v6) {
				if err := t.swap(name, nil); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove rules of %s: %w", name, err)
	}
	return nil
}

// Installed lists the rules of name as iptables-save prints them.
func Installed(netns, name string) (lines []string, err error) {
	err = nsthread.InNamed(netns, func() error {
		for _, v6 := range []bool{false, true} {
			for _, t := range presentTools(v6) {
				l, err := t.rules(name)
				if err != nil {
					return err
				}
				lines = append(lines, l...)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list rules of %s: %w", name, err)
	}
	return lines, nil
}

// lines are the rules of one address family in the form, and the order of
// matches, in which iptables-save prints them, so that what is there can be
// compared.
func (r Rules) lines(v6 bool, target, mark, dev string) []string {
	in, out := "! -i lo", "! -o lo"
	if dev != "" {
		in, out = "-i "+dev, "-o "+dev
	}
	comment := fmt.Sprintf("-m comment --comment %q ", rulesComment+r.Name)
	var l []string
	for _, vip := range r.VIPs {
		if vip.Is6() != v6 {
			continue
		}
		host := netip.PrefixFrom(vip.WithZone(""), vip.BitLen())
		for _, c := range r.clients(v6) {
			from, to := "", ""
			if c.Bits() > 0 { // what all match is not printed
				from, to = fmt.Sprintf("-s %s ", c), fmt.Sprintf("-d %s ", c)
			}
			for _, p := range r.Ports {
				l = append(l,
					fmt.Sprintf("INPUT %s-d %s %s -p tcp -m tcp --dport %d %s%s", from, host, in, p, comment, target),
					fmt.Sprintf("OUTPUT -s %s %s%s -p tcp -m tcp --sport %d %s%s%s", host, to, out, p, mark, comment, target))
			}
		}
		for _, p := range r.Peers {
			if p.Net.Addr().Is6() == v6 {
				l = append(l,
					fmt.Sprintf("INPUT %s-d %s %s -p tcp %s%s%s", peerMatch("-s", p), host, in, portMatch("--sport", p), comment, target),
					fmt.Sprintf("OUTPUT -s %s %s%s -p tcp %s%s%s%s", host, peerMatch("-d", p), out, portMatch("--dport", p), mark, comment, target))
			}
		}
	}
	return l
}

// peerMatch leaves out what matches all, as iptables-save does.
func peerMatch(flag string, p remote.Range) string {
	if p.Net.Bits() == 0 {
		return ""
	}
	return fmt.Sprintf("%s %s ", flag, p.Net)
}

func portMatch(flag string, p remote.Range) string {
	if p.Port == 0 {
		return ""
	}
	return fmt.Sprintf("-m tcp %s %d ", flag, p.Port)
}

// clients are the networks of an address family to be matched.
func (r Rules) clients(v6 bool) []netip.Prefix {
	if len(r.Clients) == 0 {
		return []netip.Prefix{{}} // all: it has 0 bits, or fewer
	}
	return slices.DeleteFunc(slices.Clone(r.Clients), func(n netip.Prefix) bool { return n.Addr().Is6() != v6 })
}

// replace makes lines the rules of r.Name, in each address family of VIPs with
// the first tool that can, and then removes what another tool had put in place.
// The other family is left alone (RemoveOthers).
func (r Rules) replace(lines func(v6 bool) []string) error {
	return nsthread.InNamed(r.NetNS, func() error {
		for _, v6 := range []bool{false, true} {
			if !r.has(v6) {
				continue
			}
			if err := r.replaceIn(v6, lines(v6)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (r Rules) has(v6 bool) bool {
	return slices.ContainsFunc(r.VIPs, func(a netip.Addr) bool { return a.Is6() == v6 })
}

// RemoveOthers takes away the rules of this name in an address family in which
// it has no address: an earlier agent's, whose service had one. Install first.
func (r Rules) RemoveOthers() error {
	err := nsthread.InNamed(r.NetNS, func() error {
		for _, v6 := range []bool{false, true} {
			if r.has(v6) {
				continue
			}
			for _, t := range presentTools(v6) {
				if err := t.swap(r.Name, nil); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove other rules of %s: %w", r.Name, err)
	}
	return nil
}

func (r Rules) replaceIn(v6 bool, lines []string) error {
	var errs []error
	for _, t := range tools(v6) {
		if err := t.swap(r.Name, lines); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, other := range presentTools(v6) {
			if other != t {
				if err := other.swap(r.Name, nil); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if len(errs) == 0 {
		return errors.New("no iptables on this host: install the iptables package")
	}
	return errors.Join(errs...)
}

// tool is one of iptables' two implementations for one address family, by the
// name its commands begin with.
type tool string

// tools are the implementations on this host, each once, the default one first:
// on some kernels iptables-nft lacks the modules behind NFQUEUE, on others
// legacy does. A name is a link to the implementation's one binary.
func tools(v6 bool) (found []tool) {
	base := "iptables"
	if v6 {
		base = "ip6tables"
	}
	var seen []string
	for _, name := range []string{base, base + "-legacy", base + "-nft"} {
		t := tool(name)
		path, err := exec.LookPath(t.restore())
		if err != nil {
			continue
		}
		if _, err := exec.LookPath(t.save()); err != nil {
			continue
		}
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
		if !slices.Contains(seen, path) {
			seen = append(seen, path)
			found = append(found, t)
		}
	}
	return found
}

// presentTools leaves out a legacy implementation which has nothing in this
// namespace: merely asking it would make its tables.
func presentTools(v6 bool) (found []tool) {
	names := "/proc/thread-self/net/ip_tables_names"
	if v6 {
		names = "/proc/thread-self/net/ip6_tables_names"
	}
	legacy, _ := os.ReadFile(names) // absent: the module is not loaded
	hasLegacy := slices.Contains(strings.Fields(string(legacy)), rulesTable)
	for _, t := range tools(v6) {
		if strings.HasSuffix(string(t), "-legacy") && !hasLegacy {
			continue
		}
		found = append(found, t)
	}
	return found
}

func (t tool) restore() string { return string(t) + "-restore" }
func (t tool) save() string    { return string(t) + "-save" }

// swap replaces the rules of name by lines ("CHAIN matches target") in one
// transaction.
func (t tool) swap(name string, lines []string) error {
	old, err := t.rules(name)
	if err != nil {
		return err
	}
	if slices.Equal(old, sortedByChain(lines)) {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", rulesTable)
	for _, l := range old {
		fmt.Fprintf(&b, "-D %s\n", l)
	}
	// At the head, so that no rule of others lets the packets pass before. The
	// last inserted comes first.
	for _, l := range slices.Backward(lines) {
		fmt.Fprintf(&b, "-I %s\n", l)
	}
	b.WriteString("COMMIT\n")
	ctx, cancel := context.WithTimeout(context.Background(), iptablesLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, t.restore(), "-w", iptablesWait, "--noflush")
	cmd.Stdin = strings.NewReader(b.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run %s: %w: %s", t.restore(), err, oneLine(out))
	}
	return nil
}

// rules are the rules that carry name's comment, without the leading "-A ".
func (t tool) rules(name string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), iptablesLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, t.save(), "-t", rulesTable)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("run %s: %w: %s", t.save(), err, oneLine([]byte(stderr.String())))
	}
	var found []string
	for line := range strings.Lines(string(out)) {
		rule, ok := strings.CutPrefix(strings.TrimSpace(line), "-A ")
		if ok && commentOf(rule) == rulesComment+name {
			found = append(found, rule)
		}
	}
	return found, nil
}

// commentOf is the comment of a saved rule: iptables quotes it when it must.
func commentOf(rule string) string {
	_, rest, ok := strings.Cut(rule, "--comment ")
	if !ok {
		return ""
	}
	if q, err := strconv.QuotedPrefix(rest); err == nil {
		s, _ := strconv.Unquote(q)
		return s
	}
	s, _, _ := strings.Cut(rest, " ")
	return s
}

// sortedByChain is the order in which iptables-save prints lines.
func sortedByChain(lines []string) []string {
	s := slices.Clone(lines)
	slices.SortStableFunc(s, func(a, b string) int {
		ca, _, _ := strings.Cut(a, " ")
		cb, _, _ := strings.Cut(b, " ")
		return strings.Compare(ca, cb)
	})
	return s
}

func oneLine(out []byte) string {
	return strings.Join(strings.Fields(string(out)), " ")
}
