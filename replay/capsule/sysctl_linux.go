package capsule

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

const sysctlRoot = "/proc/sys"

// inherited are the per-namespace settings, besides net.ipv4.tcp_*, that a server
// feels and that a new namespace does not take from its parent.
var inherited = []string{
	"net.core.somaxconn", "net.ipv4.ip_default_ttl", "net.ipv4.ip_local_port_range",
	"net.ipv4.ip_local_reserved_ports", "net.ipv4.ip_no_pmtu_disc",
	"net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range",
}

// fixed are what restore and replay need whatever the host has.
var fixed = map[string]string{
	// A restored connection that uses timestamps goes on using them, and one that
	// is re-created needs the kernel to accept them.
	"net.ipv4.tcp_timestamps": "1",
	// bpf_sk_assign_tcp_reqsk refuses to work with syncookies off.
	"net.ipv4.tcp_syncookies": "1",
	// Replayed packets come in over lo with the client's source address.
	"net.ipv4.conf.all.rp_filter":     "0",
	"net.ipv4.conf.default.rp_filter": "0",
	"net.ipv4.conf.lo.rp_filter":      "0",
	// Listening sockets are restored even before the address is prepared, or
	// where it is IPv6 on a device that is down.
	"net.ipv4.ip_nonlocal_bind": "1",
	"net.ipv4.ip_forward":       "0",
}

// fixed6 are the same for IPv6, where the kernel has it.
var fixed6 = map[string]string{
	"net.ipv6.ip_nonlocal_bind":           "1",
	"net.ipv6.conf.default.accept_dad":    "0",
	"net.ipv6.conf.default.accept_ra":     "0",
	"net.ipv6.conf.default.autoconf":      "0",
	"net.ipv6.conf.all.forwarding":        "0",
	"net.ipv6.conf.lo.disable_ipv6":       "0",
	"net.ipv6.conf.default.disable_ipv6":  "0",
	"net.ipv6.conf.default.addr_gen_mode": "0",
}

// needed must not fail: without them restored connections behave differently.
var needed = []string{"net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem", "net.ipv4.tcp_window_scaling", "net.ipv4.tcp_sack"}

// sysctlFile is the file of a setting that has no device name with dots in it.
func sysctlFile(name string) string {
	return filepath.Join(sysctlRoot, strings.ReplaceAll(name, ".", "/"))
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(sysctlFile(name))
	return strings.TrimSpace(string(b)), err
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile(sysctlFile(name), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s = %s inside: %w", name, value, err)
	}
	return nil
}

// setSysctls gives the new network namespace the host's settings of TCP, then
// those that restore and replay need, then the caller's.
func (c *Capsule) setSysctls() error {
	var host map[string]string
	if err := nsthread.InNet(c.hostns, func() (err error) { host, err = hostSysctls(); return err }); err != nil {
		return fmt.Errorf("read the host's TCP settings: %w", err)
	}
	return nsthread.InNet(c.netns, func() error {
		for _, name := range slices.Sorted(maps.Keys(host)) {
			if _, ok := fixed[name]; ok {
				continue
			}
			now, err := readSysctl(name)
			if err == nil && now == host[name] {
				continue
			}
			if err == nil {
				err = writeSysctl(name, host[name])
			}
			if err != nil && slices.Contains(needed, name) {
				return err
			}
		}
		for name, value := range fixed {
			if err := writeSysctl(name, value); err != nil {
				return err
			}
		}
		for name, value := range fixed6 {
			if err := writeSysctl(name, value); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		for _, name := range slices.Sorted(maps.Keys(c.opt.Sysctls)) {
			if err := writeSysctl(name, c.opt.Sysctls[name]); err != nil {
				return err
			}
		}
		return nil
	})
}

// hostSysctls reads what is to be inherited, in the thread's network namespace.
func hostSysctls() (map[string]string, error) {
	files, err := filepath.Glob(sysctlFile("net.ipv4.tcp_") + "*")
	if err != nil {
		return nil, err
	}
	names := slices.Clone(inherited)
	for _, f := range files {
		// A key is no setting; it is drawn anew per namespace.
		if base := filepath.Base(f); base != "tcp_fastopen_key" {
			names = append(names, "net.ipv4."+base)
		}
	}
	all := make(map[string]string, len(names))
	for _, name := range names {
		fi, err := os.Stat(sysctlFile(name))
		if err != nil || fi.Mode()&0o200 == 0 {
			continue
		}
		if v, err := readSysctl(name); err == nil {
			all[name] = v
		}
	}
	for _, name := range needed {
		if _, ok := all[name]; !ok {
			return nil, fmt.Errorf("%s cannot be read: is /proc mounted?", name)
		}
	}
	return all, nil
}

// setDevSysctls sets what is per device; the thread is in the capsule.
func setDevSysctls(dev string) error {
	for name, value := range map[string]string{
		"rp_filter":    "0",
		"arp_announce": "2", // ask for neighbours in the name of the service
		"arp_ignore":   "1", // answer for what is on this device only
	} {
		f := filepath.Join(sysctlRoot, "net/ipv4/conf", dev, name)
		if err := os.WriteFile(f, []byte(value), 0); err != nil {
			return fmt.Errorf("set %s of %s: %w", name, dev, err)
		}
	}
	return nil
}
