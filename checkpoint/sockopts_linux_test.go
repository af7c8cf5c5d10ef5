package checkpoint_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/checkpoint/internal/sandbox"
)

// socketsOf gives a descriptor of ours for every socket of a process.
func socketsOf(t *testing.T, pid int) map[string]int {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, e := range entries {
		if link, err := os.Readlink(dir + "/" + e.Name()); err != nil || !strings.HasPrefix(link, "socket:") {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		kind := "connection"
		if v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && v == 1 {
			kind = "listener"
		}
		out[kind] = fd
	}
	return out
}

// Every option that a server can set on its TCP sockets is there after a
// restore, be it that CRIU restores it or that we do.
func TestSocketOptionsSurvive(t *testing.T) {
	const sol, ip, tcp = unix.SOL_SOCKET, unix.IPPROTO_IP, unix.IPPROTO_TCP
	both := []string{"listener", "connection"}
	listener := both[:1]
	options := []struct {
		name       string
		level, opt int
		v          int
		of         []string
	}{
		{"IP_TOS", ip, unix.IP_TOS, 0x10, both}, // sets SO_PRIORITY as well
		{"SO_KEEPALIVE", sol, unix.SO_KEEPALIVE, 1, both}, {"SO_OOBINLINE", sol, unix.SO_OOBINLINE, 1, both},
		{"SO_PRIORITY", sol, unix.SO_PRIORITY, 5, both}, {"SO_MARK", sol, unix.SO_MARK, 77, both},
		{"SO_RCVLOWAT", sol, unix.SO_RCVLOWAT, 3, both}, {"SO_SNDBUF", sol, unix.SO_SNDBUF, 40_000, both},
		{"SO_RCVBUF", sol, unix.SO_RCVBUF, 50_000, both}, {"SO_MAX_PACING_RATE", sol, unix.SO_MAX_PACING_RATE, 1 << 30, both},
		{"SO_ZEROCOPY", sol, unix.SO_ZEROCOPY, 1, both}, {"SO_BUSY_POLL", sol, unix.SO_BUSY_POLL, 10, both},
		{"IP_TTL", ip, unix.IP_TTL, 33, both},
		{"IP_MTU_DISCOVER", ip, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, both}, {"IP_RECVERR", ip, unix.IP_RECVERR, 1, both},
		{"IP_MINTTL", ip, unix.IP_MINTTL, 5, both}, {"IP_FREEBIND", ip, unix.IP_FREEBIND, 1, both},
		{"TCP_NODELAY", tcp, unix.TCP_NODELAY, 1, both}, {"TCP_CORK", tcp, unix.TCP_CORK, 1, both},
		{"TCP_KEEPIDLE", tcp, unix.TCP_KEEPIDLE, 111, both}, {"TCP_KEEPINTVL", tcp, unix.TCP_KEEPINTVL, 12, both},
		{"TCP_KEEPCNT", tcp, unix.TCP_KEEPCNT, 4, both}, {"TCP_SYNCNT", tcp, unix.TCP_SYNCNT, 4, both},
		{"TCP_LINGER2", tcp, unix.TCP_LINGER2, 13, both}, {"TCP_DEFER_ACCEPT", tcp, unix.TCP_DEFER_ACCEPT, 7, listener},
		{"TCP_WINDOW_CLAMP", tcp, unix.TCP_WINDOW_CLAMP, 30_000, listener}, {"TCP_MAXSEG", tcp, unix.TCP_MAXSEG, 1300, listener},
		{"TCP_FASTOPEN", tcp, unix.TCP_FASTOPEN, 5, listener}, {"TCP_SAVE_SYN", tcp, unix.TCP_SAVE_SYN, 1, listener},
		{"TCP_USER_TIMEOUT", tcp, unix.TCP_USER_TIMEOUT, 54_321, both}, {"TCP_NOTSENT_LOWAT", tcp, unix.TCP_NOTSENT_LOWAT, 4444, both},
		{"TCP_INQ", tcp, 36, 1, both}, {"TCP_RTO_MAX_MS", tcp, 44, 5000, both}, {"TCP_RTO_MIN_US", tcp, 45, 100_000, both},
		{"TCP_DELACK_MAX_US", tcp, 46, 28_000, both},
	}
	c := criu(t)
	s := start(t, sandbox.Options{})
	n := dial(t, s, sandbox.Echo)
	exchange(t, s, n)
	pid := target(t, s)
	socks := socketsOf(t, pid)
	want := map[string]int{}
	for _, o := range options {
		for _, kind := range o.of {
			err := unix.SetsockoptInt(socks[kind], o.level, o.opt, o.v)
			if err == unix.ENOPROTOOPT { //nolint:errorlint // a plain errno
				continue // an older kernel
			}
			if err != nil {
				t.Fatalf("set %s of %s: %v", o.name, kind, err)
			}
			v, err := unix.GetsockoptInt(socks[kind], o.level, o.opt)
			if err != nil {
				t.Fatal(err)
			}
			want[o.name+" of "+kind] = v // SO_SNDBUF and others are rounded
		}
	}
	for _, kind := range both {
		if err := unix.SetsockoptString(socks[kind], tcp, unix.TCP_CONGESTION, "reno"); err != nil {
			t.Fatal(err)
		}
		if err := unix.SetsockoptLinger(socks[kind], sol, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 9}); err != nil {
			t.Fatal(err)
		}
	}
	mss := segmentSize(t, socks["connection"])
	for _, fd := range socks { // what we hold would keep the connection from ending with the target
		_ = unix.Close(fd)
	}
	// The first image only names the sockets: what CRIU stops it also ends.
	first := imageDir(t)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: pid, InitPID: s.InitPID, Dir: first}); err != nil {
		t.Fatalf("%+v", err)
	}
	named, err := checkpoint.ReadSockets(first)
	if err != nil {
		t.Fatal(err)
	}
	all, err := checkpoint.ReadSocketOptions(pid, named)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].Congestion != "reno" { // a listener has more of them
		t.Fatalf("read %+v", all)
	}
	dir := imageDir(t)
	if _, err := c.Dump(t.Context(), checkpoint.DumpRequest{PID: pid, InitPID: s.InitPID, Dir: dir, Stop: true}); err != nil {
		t.Fatalf("%+v", err)
	}
	var lost []string
	got, err := c.Restore(t.Context(), checkpoint.RestoreRequest{Dir: dir, InitPID: s.InitPID, BeforeResume: func(int) (err error) {
		lost, err = checkpoint.ApplySocketOptions(dir, s.InitPID, named, all, checkpoint.BeforeResume)
		return err
	}})
	if err != nil || len(lost) > 0 {
		t.Fatalf("%+v, lost %q", err, lost)
	}
	socks = socketsOf(t, got.PID)
	userTimeout := func(kind string) int {
		v, err := unix.GetsockoptInt(socks[kind], tcp, unix.TCP_USER_TIMEOUT)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if userTimeout("listener") == 0 || userTimeout("connection") != 0 {
		t.Errorf("user timeouts before go-live: %d of the listener, %d of the connection; the latter must not end while it is rolled forward",
			userTimeout("listener"), userTimeout("connection"))
	}
	if lost, err = checkpoint.ApplySocketOptions(dir, s.InitPID, named, all, checkpoint.AfterLive); err != nil || len(lost) > 0 {
		t.Fatalf("%+v, lost %q", err, lost)
	}
	for _, o := range options {
		for _, kind := range o.of {
			v, err := unix.GetsockoptInt(socks[kind], o.level, o.opt)
			if w, set := want[o.name+" of "+kind]; set && (err != nil || v != w) {
				t.Errorf("%s of %s is %d after the restore (%v), was %d", o.name, kind, v, err, w)
			}
		}
	}
	for _, kind := range both {
		if name, err := unix.GetsockoptString(socks[kind], tcp, unix.TCP_CONGESTION); err != nil || name != "reno" {
			t.Errorf("congestion control of %s is %s (%v)", kind, name, err)
		}
		if l, err := unix.GetsockoptLinger(socks[kind], sol, unix.SO_LINGER); err != nil || l.Onoff != 1 || l.Linger != 9 {
			t.Errorf("linger of %s is %+v (%v)", kind, l, err)
		}
	}
	if now := segmentSize(t, socks["connection"]); now != mss {
		t.Errorf("segments of %d octets after the restore, %d before", now, mss)
	}
	// A cork, without a round-trip time measured yet, holds answers for 3 s.
	if err := unix.SetsockoptInt(socks["connection"], tcp, unix.TCP_CORK, 0); err != nil {
		t.Fatal(err)
	}
	exchange(t, s, n)

	// What this host does not have costs a word, not a connection.
	for i := range all {
		all[i].Congestion = "nosuch"
	}
	lost, err = checkpoint.ApplySocketOptions(dir, s.InitPID, named, all, checkpoint.BeforeResume)
	if err != nil || len(lost) != 1 || !strings.Contains(lost[0], "tcp_nosuch") {
		t.Errorf("an unknown congestion control: %v, %q", err, lost)
	}
	exchange(t, s, n)
}

func segmentSize(t *testing.T, fd int) uint32 {
	t.Helper()
	i, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		t.Fatal(err)
	}
	return i.Snd_mss
}
