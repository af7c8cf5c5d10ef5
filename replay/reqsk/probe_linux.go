package reqsk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
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
	return nsthread.RunInNewNet(probeHere)
}

// probeHere is the probe, in a network namespace of its own.
func probeHere() error {
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

// sendRaw sends an IPv4 packet from the thread's namespace.
func sendRaw(ip []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, ip, 0, &unix.SockaddrInet4{Addr: [4]byte(ip[16:20])})
}
