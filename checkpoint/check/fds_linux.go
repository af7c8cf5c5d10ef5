package check

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// remedies says what to do about each kind of descriptor that CRIU 4.2 cannot
// dump, as tried one by one.
var remedies = map[string]string{
	"io_uring":     "switch the server to epoll (most have a setting for it), or deny it with sysctl kernel.io_uring_disabled=2 and restart it",
	"userfaultfd":  "turn off what uses it (post-copy migration, some garbage collectors) and restart the server",
	"perf_event":   "end the profiling",
	"bpf":          "close the BPF maps and programs, or leave them to another process",
	"memfd_secret": "turn off the use of secret memory in the server",
	"pidfd":        "the server watches a process that is not its child, which a standby does not have: turn that off",
	"vsock":        "have the server use TCP instead of vsock",
	"mptcp":        "restart the server without multipath TCP; a Go program: with GODEBUG=multipathtcp=0 in its environment",
	"socket":       "criu cannot dump a socket of this protocol: turn off what uses it",
	"terminal":     "restart the server with input and output not on a terminal (as a service, or with setsid and redirections)",
	"device":       "criu cannot dump a device's state: turn off what uses it",
	"unix socket":  "restart the server without the connection to the other process; for the output of a systemd service: StandardOutput=append:FILE",
	"descriptor":   "criu may not know this kind: try a dump (ftckpt protect says what it refuses)",
}

// anonKinds are the kinds of anonymous inodes. "" means that CRIU dumps it.
var anonKinds = map[string]string{
	"eventpoll": "", "eventfd": "", "timerfd": "", "signalfd": "", "inotify": "", "fanotify": "",
	"io_uring": "io_uring", "userfaultfd": "userfaultfd", "perf_event": "perf_event",
	"bpf-map": "bpf", "bpf-prog": "bpf", "bpf_link": "bpf", "bpf_iter": "bpf", "bpf-link": "bpf", "btf": "bpf", "bpf_token": "bpf",
}

// anonKind is the kind of "anon_inode:[NAME]"; ok is false for one we never saw.
func anonKind(link string) (kind string, ok bool) {
	name := strings.TrimPrefix(link, "anon_inode:")
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	kind, ok = anonKinds[name]
	return kind, ok
}

// protocols are the socket kinds that CRIU dumps, as the kernel names them
// (struct proto.name).
var protocols = map[string]bool{
	"TCP": true, "TCPv6": true, "UDP": true, "UDPv6": true, "UDP-Lite": true, "UDPLITEv6": true,
	"UNIX": true, "UNIX-STREAM": true, "NETLINK": true, "PACKET": true, "RAW": true, "RAWv6": true,
}

// descriptor looks at one open file: path is its link in /proc and to is where
// that points.
func (in *inspection) descriptor(pid, fd int, path, to string) {
	switch {
	case strings.HasPrefix(to, "socket:["):
		in.socket(pid, fd, path, to)
	case strings.HasPrefix(to, "pidfd:"), to == "anon_inode:[pidfd]":
		in.pidfd(pid, fd)
	case strings.HasPrefix(to, "anon_inode:"):
		kind, ok := anonKind(to)
		if !ok {
			kind = "descriptor"
		}
		if kind != "" {
			in.add(kind, pid, fd, to, remedies[kind])
		}
	case strings.HasPrefix(to, "/secretmem"):
		in.add("memfd_secret", pid, fd, to, remedies["memfd_secret"])
	case strings.HasPrefix(to, "/dev/"):
		in.device(pid, fd, path, to)
	}
}

func (in *inspection) socket(pid, fd int, path, to string) {
	inode, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(to, "socket:["), "]"), 10, 64)
	if err != nil {
		return
	}
	in.sockets[inode] = holder{pid, fd}
	b := make([]byte, 64)
	n, err := unix.Getxattr(path, "system.sockprotoname", b)
	if err != nil || n <= 1 {
		return // too old a kernel to say
	}
	name := unix.ByteSliceToString(b[:n])
	kind := "socket"
	switch {
	case protocols[name]:
		return
	case strings.HasPrefix(name, "MPTCP"):
		kind = "mptcp"
	case name == "AF_VSOCK":
		kind = "vsock"
	}
	in.add(kind, pid, fd, name+" socket", remedies[kind])
}

// pidfd is fine when it names a process of the tree.
func (in *inspection) pidfd(pid, fd int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
	if err != nil {
		return
	}
	_, after, ok := strings.Cut("\n"+string(b), "\nPid:")
	line, _, _ := strings.Cut(after, "\n")
	of, err := strconv.Atoi(strings.TrimSpace(line))
	if ok && err == nil && !in.tree[of] && of != -1 {
		in.add("pidfd", pid, fd, fmt.Sprintf("of process %d", of), remedies["pidfd"])
	}
}

// device allows the devices that have no state.
func (in *inspection) device(pid, fd int, path, to string) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR && st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return
	}
	major, minor := unix.Major(st.Rdev), unix.Minor(st.Rdev)
	switch {
	case major == 1 && (minor == 3 || minor == 5 || minor == 7 || minor == 8 || minor == 9): // null zero full random urandom
	case major == 10 && minor == 200: // /dev/net/tun
	case major >= 136 && major <= 143, major == 4, major == 5:
		in.add("terminal", pid, fd, to, remedies["terminal"])
	default:
		in.add("device", pid, fd, to, remedies["device"])
	}
}

// unixPeers finds Unix sockets that are connected to a process outside of the
// tree: criu cannot cut a stream in two, and it cannot find the other end of a
// datagram socket (/dev/log) that is in another network namespace.
func (in *inspection) unixPeers() error {
	var all []*netlink.UnixDiagInfoResp
	err := nsthread.Run(func() error {
		if err := enterNet(in.root); err != nil {
			return err
		}
		var err error
		all, err = netlink.UnixSocketDiagInfo()
		return err
	})
	if err != nil {
		return fmt.Errorf("list unix sockets: %w", err)
	}
	here := make(map[uint32]bool, len(all))
	for _, s := range all {
		here[s.DiagMsg.INode] = true
	}
	for _, s := range all {
		h, ours := in.sockets[uint64(s.DiagMsg.INode)]
		if !ours || s.Peer == nil || *s.Peer == 0 {
			continue
		}
		if _, ours := in.sockets[uint64(*s.Peer)]; ours {
			continue
		}
		if s.DiagMsg.Type == unix.SOCK_DGRAM && here[*s.Peer] {
			continue
		}
		in.add("unix socket", h.pid, h.fd, "connected to a process outside of the tree", remedies["unix socket"])
	}
	return nil
}

func enterNet(pid int) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	same, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	if theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && theirs == same {
		return nil // needs no privilege
	}
	return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
}

// parseListener reads a line of /proc/net/tcp or tcp6 (Documentation/networking/
// proc_net_tcp.rst) and is ok for a socket that listens.
func parseListener(line string) (addr netip.AddrPort, inode uint64, ok bool) {
	f := strings.Fields(line)
	const listen = "0A"
	if len(f) < 10 || f[3] != listen {
		return addr, 0, false
	}
	if addr, ok = parseAddr(f[1]); !ok {
		return addr, 0, false
	}
	inode, err := strconv.ParseUint(f[9], 10, 64)
	return addr, inode, err == nil
}

// parseAddr reads an address of those tables.
func parseAddr(s string) (addr netip.AddrPort, ok bool) {
	host, port, ok := strings.Cut(s, ":")
	if !ok {
		return addr, false
	}
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return addr, false
	}
	for i := 0; i < len(raw); i += 4 { // printed as the machine's own words
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	ip, ok := netip.AddrFromSlice(raw)
	if !ok {
		return addr, false
	}
	p, err := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(ip.Unmap(), uint16(p)), err == nil
}
