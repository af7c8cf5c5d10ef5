package reqsk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// probeLimit is how long the probe's connection may take to appear.
const probeLimit = 2 * time.Second

// Probe finds out whether this kernel can re-create connections, by doing it
// once between two addresses of a network namespace of its own. The error says
// why the answer is not Yes: with No the kernel lacks what it takes, with
// CannotTell the probe could not be made (as a rule for want of privileges, in
// which case Open fails too). It takes some 50 ms.
func Probe() (Support, error) {
	err := probe()
	if err != nil {
		err = fmt.Errorf("probe re-creation of connections: %w", err)
	}
	return verdict(err), err
}

func verdict(err error) Support {
	switch {
	case err == nil:
		return Yes
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EOPNOTSUPP):
		return No
	}
	return CannotTell
}

func probe() error {
	if _, err := os.Stat(settingsDir + tcpSyncookies); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(settingsDir); err == nil {
			return fmt.Errorf("kernel without SYN cookies (CONFIG_SYN_COOKIES): %w", ebpf.ErrNotSupported)
		}
	}
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread, and with it the namespace, ends here.
		runtime.LockOSThread()
		done <- probeHere()
	}()
	return <-done
}

// probeHere is the probe, on a thread of its own.
func probeHere() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make a network namespace (needs CAP_SYS_ADMIN): %w", err)
	}
	if err := linkUp("lo"); err != nil {
		return err
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	r, err := Open(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()))
	if err != nil {
		return err
	}
	defer r.Close()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // Go's default, and not to be had
	l, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:1024")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer l.Close()
	ln := l.(*net.TCPListener)

	t := stream.FourTuple{Server: netip.MustParseAddrPort("127.0.0.1:1024"), Client: netip.MustParseAddrPort("127.0.0.2:1025")}
	a := Attrs{ClientISN: 1 << 31, ServerISN: 1 << 30, MSS: 1460, WScaleOK: true, SACKOK: true, TSOK: true, ClientTSVal: 1, ServerTSVal: 1}
	if err := r.Want(t, a); err != nil {
		return err
	}
	o := a.ACK(t, a.ServerISN)
	if err := sendRaw(tcpwrap.AppendOutgoing(nil, &o)); err != nil {
		return fmt.Errorf("send packet over lo: %w", err)
	}
	if err := ln.SetDeadline(time.Now().Add(probeLimit)); err != nil {
		return err
	}
	c, err := ln.AcceptTCP()
	if err != nil {
		return errors.Join(fmt.Errorf("wait for the connection: %w", err), r.Result(t))
	}
	defer c.Close()
	if got := c.RemoteAddr().String(); got != t.Client.String() {
		return fmt.Errorf("accepted a connection of %s instead of %v", got, t.Client)
	}
	return nil
}

func linkUp(dev string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(dev)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set %s up: %w", dev, err)
	}
	return nil
}

// sendRaw sends an IPv4 packet from the thread's namespace.
func sendRaw(ip []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, ip, 0, &unix.SockaddrInet4{Addr: [4]byte(ip[16:20])})
}
