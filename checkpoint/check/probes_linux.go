package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// judge turns an error into an answer: what the kernel does not know is missing,
// what we may not do cannot be told.
func judge(err error) (State, string) {
	switch {
	case err == nil:
		return Works, ""
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return Unknown, err.Error()
	}
	return Missing, err.Error()
}

func probePrivileges(context.Context, Options) (State, string) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return Unknown, err.Error()
	}
	_, after, _ := strings.Cut(string(b), "CapEff:\t")
	hex, _, _ := strings.Cut(after, "\n")
	caps, err := strconv.ParseUint(hex, 16, 64)
	if err != nil {
		return Unknown, "read CapEff: " + err.Error()
	}
	var lack []string
	for _, c := range []struct {
		name string
		bit  uint
	}{
		{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN}, {"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE},
		{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}, {"CAP_NET_RAW", unix.CAP_NET_RAW},
	} {
		if caps&(1<<c.bit) == 0 {
			lack = append(lack, c.name)
		}
	}
	if len(lack) > 0 {
		return Missing, fmt.Sprintf("user %d without %s", os.Geteuid(), strings.Join(lack, ", "))
	}
	return Works, fmt.Sprintf("user %d", os.Geteuid())
}

func probeCriu(ctx context.Context, o Options) (State, string) {
	c, err := checkpoint.Locate(ctx, o.Criu)
	if err != nil {
		return judge(err)
	}
	return Works, fmt.Sprintf("%s, version %s", c.Path, c.Version)
}

func probeNamespaces(ctx context.Context, _ Options) (State, string) {
	cmd := exec.CommandContext(ctx, "/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	if err := cmd.Run(); err != nil {
		return judge(fmt.Errorf("make namespaces: %w", err))
	}
	return Works, "network, PID and mount"
}

// queueRule is a rule that catches nothing that matters: the namespace has no
// traffic.
var queueRule = []string{"-w", "5", "-t", "mangle", "-A", "INPUT", "-p", "tcp", "--dport", "7", "-j", "NFQUEUE", "--queue-num", "7"}

func probeNFQueue(ctx context.Context, _ Options) (State, string) {
	var tried []error
	for _, name := range []string{"iptables-nft", "iptables-legacy", "iptables"} {
		path, err := lookPath(name)
		if err != nil {
			continue
		}
		err = nsthread.RunInNewNet(func() error {
			out, err := exec.CommandContext(ctx, path, queueRule...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w: %s", name, err, firstLine(out))
			}
			return queueSocket()
		})
		if err == nil {
			return Works, name
		}
		tried = append(tried, err)
	}
	if len(tried) == 0 {
		return Missing, "no iptables on this host"
	}
	return judge(tried[0])
}

// lookPath looks in the places of system tools too, which a user's PATH may lack.
func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", name))
}

// queueSocket opens the kernel's side of NFQUEUE and binds a queue.
func queueSocket() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open netfilter socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return fmt.Errorf("set timeout: %w", err)
	}
	if err := unix.Sendto(fd, bindQueue(7), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind queue: %w", err)
	}
	b := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return fmt.Errorf("bind queue: %w", err)
	}
	return ackError(b[:n])
}

func probeRawSocket(context.Context, Options) (State, string) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return judge(fmt.Errorf("open raw socket: %w", err))
	}
	_ = unix.Close(fd)
	return Works, ""
}

func probePacketSocket(context.Context, Options) (State, string) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return judge(fmt.Errorf("open packet socket: %w", err))
	}
	_ = unix.Close(fd)
	return Works, ""
}

func probeMacvlan(context.Context, Options) (State, string) {
	var noParent bool
	err := nsthread.RunInNewNet(func() error {
		var parent netlink.Link = &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "ftcheck0"}}
		if netlink.LinkAdd(parent) != nil {
			parent = &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "ftcheck0"}, PeerName: "ftcheck1"}
			if err := netlink.LinkAdd(parent); err != nil {
				noParent = true
				return fmt.Errorf("make a device to put it on: %w", err)
			}
		}
		link, err := netlink.LinkByName("ftcheck0")
		if err != nil {
			noParent = true
			return fmt.Errorf("find the device: %w", err)
		}
		err = netlink.LinkAdd(&netlink.Macvlan{
			LinkAttrs: netlink.LinkAttrs{Name: "ftcheck2", ParentIndex: link.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE,
		})
		if err != nil {
			return fmt.Errorf("make macvlan: %w", err)
		}
		return nil
	})
	if noParent {
		return Unknown, err.Error()
	}
	return judge(err)
}

func probeSockDestroy(context.Context, Options) (State, string) {
	return judge(nsthread.RunInNewNet(destroyOne))
}

// destroyOne makes a connection and has the kernel destroy its end.
func destroyOne() error {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer l.Close()
	c, err := net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer c.Close()
	if err := netlink.SocketDestroy(c.LocalAddr(), c.RemoteAddr()); err != nil {
		return fmt.Errorf("destroy socket: %w", err)
	}
	if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
		return fmt.Errorf("destroy socket: it lives on: %v", err) //nolint:errorlint // how the read ended (nil, a timeout) is no cause to be judged by
	}
	return nil
}

func probeTimestamps(context.Context, Options) (State, string) { return sysctl("tcp_timestamps") }

func probeSyncookies(context.Context, Options) (State, string) { return sysctl("tcp_syncookies") }

func sysctl(name string) (State, string) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return Missing, "this kernel has no net.ipv4." + name
	}
	if err != nil {
		return Unknown, err.Error()
	}
	v := strings.TrimSpace(string(b))
	if v == "0" {
		return Missing, "net.ipv4." + name + " is 0"
	}
	return Works, "net.ipv4." + name + " is " + v
}

// minSpace is what an image of a middling service needs, twice over.
const minSpace = 1 << 30

func probeSpace(_ context.Context, o Options) (State, string) {
	dir := o.StateDir
	for dir != "/" && dir != "." { // the nearest one that exists: it will be made there
		if _, err := os.Stat(dir); err == nil {
			break
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return Unknown, fmt.Sprintf("look at %s: %v", dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	detail := fmt.Sprintf("%d MiB free in %s", free>>20, dir)
	if free < minSpace {
		return Missing, detail
	}
	return Works, detail
}

func probeShm(context.Context, Options) (State, string) {
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil {
		return judge(fmt.Errorf("look at /dev/shm: %w", err))
	}
	if st.Type != unix.TMPFS_MAGIC {
		return Missing, "/dev/shm is no tmpfs"
	}
	return Works, fmt.Sprintf("%d MiB free", int64(st.Bavail)*st.Bsize>>20)
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return fmt.Sprintf("%.200s", line)
}
