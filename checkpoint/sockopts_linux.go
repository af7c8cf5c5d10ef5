package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// Options that x/sys/unix does not name (include/uapi/linux/{tcp,in6}.h,
// asm-generic/socket.h).
const (
	tcpFastopenNoCookie = 34
	tcpInq              = 36
	tcpTxDelay          = 37
	tcpRTOMaxMS         = 44
	tcpRTOMinUS         = 45
	tcpDelackMaxUS      = 46
	soTxRehash          = 74
	ipLocalPortRange    = 51
	ipv6Minhopcount     = 73
)

// option is a socket option that CRIU 4.2.1 loses: each was set, dumped, restored
// and looked at. The others (SO_KEEPALIVE and its times, TCP_NODELAY, TCP_CORK,
// SO_LINGER, SO_SNDBUF and SO_RCVBUF with their locks, SO_MARK,
// SO_OOBINLINE, SO_RCVLOWAT, the timeouts, IP_TOS, IP_TTL, SO_BINDTODEVICE and
// their like) come back by themselves.
type option struct {
	name       string
	level, opt int
	family     int  // 0: of any
	listening  bool // says something of a socket that listens only
	// late is set for what could end a connection while it is being rolled
	// forward: for those of the image it counts from go-live on.
	late bool
}

var optionTable = []option{
	{name: "tcp_user_timeout", level: unix.IPPROTO_TCP, opt: unix.TCP_USER_TIMEOUT, late: true},
	{name: "tcp_syncnt", level: unix.IPPROTO_TCP, opt: unix.TCP_SYNCNT},
	{name: "tcp_linger2", level: unix.IPPROTO_TCP, opt: unix.TCP_LINGER2},
	{name: "tcp_defer_accept", level: unix.IPPROTO_TCP, opt: unix.TCP_DEFER_ACCEPT, listening: true},
	{name: "tcp_window_clamp", level: unix.IPPROTO_TCP, opt: unix.TCP_WINDOW_CLAMP, listening: true},
	{name: "tcp_maxseg", level: unix.IPPROTO_TCP, opt: unix.TCP_MAXSEG, listening: true},
	{name: "tcp_fastopen", level: unix.IPPROTO_TCP, opt: unix.TCP_FASTOPEN, listening: true},
	{name: "tcp_fastopen_no_cookie", level: unix.IPPROTO_TCP, opt: tcpFastopenNoCookie, listening: true},
	{name: "tcp_save_syn", level: unix.IPPROTO_TCP, opt: unix.TCP_SAVE_SYN, listening: true},
	{name: "tcp_thin_linear_timeouts", level: unix.IPPROTO_TCP, opt: unix.TCP_THIN_LINEAR_TIMEOUTS},
	{name: "tcp_notsent_lowat", level: unix.IPPROTO_TCP, opt: unix.TCP_NOTSENT_LOWAT},
	{name: "tcp_inq", level: unix.IPPROTO_TCP, opt: tcpInq},
	{name: "tcp_tx_delay", level: unix.IPPROTO_TCP, opt: tcpTxDelay},
	{name: "tcp_rto_max_ms", level: unix.IPPROTO_TCP, opt: tcpRTOMaxMS},
	{name: "tcp_rto_min_us", level: unix.IPPROTO_TCP, opt: tcpRTOMinUS},
	{name: "tcp_delack_max_us", level: unix.IPPROTO_TCP, opt: tcpDelackMaxUS},

	{name: "so_priority", level: unix.SOL_SOCKET, opt: unix.SO_PRIORITY}, // IP_TOS, restored after it, overwrites it
	{name: "so_busy_poll", level: unix.SOL_SOCKET, opt: unix.SO_BUSY_POLL},
	{name: "so_prefer_busy_poll", level: unix.SOL_SOCKET, opt: unix.SO_PREFER_BUSY_POLL},
	{name: "so_max_pacing_rate", level: unix.SOL_SOCKET, opt: unix.SO_MAX_PACING_RATE},
	{name: "so_txrehash", level: unix.SOL_SOCKET, opt: soTxRehash},
	{name: "so_zerocopy", level: unix.SOL_SOCKET, opt: unix.SO_ZEROCOPY},
	{name: "so_timestampns", level: unix.SOL_SOCKET, opt: unix.SO_TIMESTAMPNS},
	{name: "so_timestamping", level: unix.SOL_SOCKET, opt: unix.SO_TIMESTAMPING},
	{name: "so_select_err_queue", level: unix.SOL_SOCKET, opt: unix.SO_SELECT_ERR_QUEUE},
	{name: "so_rxq_ovfl", level: unix.SOL_SOCKET, opt: unix.SO_RXQ_OVFL},

	{name: "ip_mtu_discover", level: unix.IPPROTO_IP, opt: unix.IP_MTU_DISCOVER},
	{name: "ip_recverr", level: unix.IPPROTO_IP, opt: unix.IP_RECVERR},
	{name: "ip_recvtos", level: unix.IPPROTO_IP, opt: unix.IP_RECVTOS},
	{name: "ip_recvttl", level: unix.IPPROTO_IP, opt: unix.IP_RECVTTL},
	{name: "ip_minttl", level: unix.IPPROTO_IP, opt: unix.IP_MINTTL},
	{name: "ip_transparent", level: unix.IPPROTO_IP, opt: unix.IP_TRANSPARENT},
	{name: "ip_bind_address_no_port", level: unix.IPPROTO_IP, opt: unix.IP_BIND_ADDRESS_NO_PORT},
	{name: "ip_local_port_range", level: unix.IPPROTO_IP, opt: ipLocalPortRange},

	{name: "ipv6_tclass", level: unix.IPPROTO_IPV6, opt: unix.IPV6_TCLASS, family: unix.AF_INET6},
	{name: "ipv6_unicast_hops", level: unix.IPPROTO_IPV6, opt: unix.IPV6_UNICAST_HOPS, family: unix.AF_INET6},
	{name: "ipv6_mtu_discover", level: unix.IPPROTO_IPV6, opt: unix.IPV6_MTU_DISCOVER, family: unix.AF_INET6},
	{name: "ipv6_dontfrag", level: unix.IPPROTO_IPV6, opt: unix.IPV6_DONTFRAG, family: unix.AF_INET6},
	{name: "ipv6_recverr", level: unix.IPPROTO_IPV6, opt: unix.IPV6_RECVERR, family: unix.AF_INET6},
	{name: "ipv6_recvtclass", level: unix.IPPROTO_IPV6, opt: unix.IPV6_RECVTCLASS, family: unix.AF_INET6},
	{name: "ipv6_recvhoplimit", level: unix.IPPROTO_IPV6, opt: unix.IPV6_RECVHOPLIMIT, family: unix.AF_INET6},
	{name: "ipv6_minhopcount", level: unix.IPPROTO_IPV6, opt: ipv6Minhopcount, family: unix.AF_INET6},
	{name: "ipv6_autoflowlabel", level: unix.IPPROTO_IPV6, opt: unix.IPV6_AUTOFLOWLABEL, family: unix.AF_INET6},
}

// readOptions reads the options of the table that a socket has. What the kernel
// does not know it does not have.
func readOptions(fd, family int, listening bool) SocketOptions {
	o := SocketOptions{Set: map[string]int{}}
	for i := range optionTable {
		t := &optionTable[i]
		if t.family != 0 && t.family != family || t.listening && !listening {
			continue
		}
		if v, err := unix.GetsockoptInt(fd, t.level, t.opt); err == nil {
			o.Set[t.name] = v
		}
	}
	o.Congestion, _ = unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	return o
}

// newSocketOptions are what a new socket has in the network namespace of pid,
// for both families.
func newSocketOptions(pid int) (byFamily map[int]SocketOptions, err error) {
	byFamily = map[int]SocketOptions{}
	err = nsthread.InNamed(nsPath(pid, "net"), func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
			if errors.Is(err, unix.EAFNOSUPPORT) {
				continue
			}
			if err != nil {
				return fmt.Errorf("open socket: %w", err)
			}
			byFamily[family] = readOptions(fd, family, true)
			_ = unix.Close(fd)
		}
		return nil
	})
	return byFamily, err
}

// ReadSocketOptions reads, of the running process tree with the root pid, the
// options of those sockets that are in socks, as ReadSockets found them in the
// image. It may be called when the tree runs again: what the server has changed
// since the image it will change again in the replay.
func ReadSocketOptions(pid int, socks []Socket) ([]SocketOptions, error) {
	fail := func(err error) ([]SocketOptions, error) {
		return nil, fmt.Errorf("read socket options of pid %d: %w", pid, err)
	}
	wanted := make(map[uint32]*Socket, len(socks))
	for i := range socks {
		wanted[socks[i].Inode] = &socks[i]
	}
	fresh, err := newSocketOptions(pid)
	if err != nil {
		return fail(err)
	}
	tasks, err := ProcTree(pid)
	if err != nil {
		return fail(err)
	}
	var all []SocketOptions
	for _, t := range tasks {
		if len(wanted) == 0 {
			break
		}
		err := eachSocket(t.PID, func(fd int, inode uint32) {
			k := wanted[inode]
			if k == nil {
				return
			}
			delete(wanted, inode)
			family := unix.AF_INET
			if k.IPv6 {
				family = unix.AF_INET6
			}
			o := readOptions(fd, family, k.Listening())
			for name, v := range o.Set {
				if fresh[family].Set[name] == v {
					delete(o.Set, name)
				}
			}
			all = group(all, inode, o)
		})
		if err != nil && !errors.Is(err, ErrNoProcess) {
			return fail(err)
		}
	}
	return all, nil
}

// eachSocket calls f with a descriptor of ours for every socket a process has
// open; f must not keep it.
func eachSocket(pid int, f func(fd int, inode uint32)) error {
	pidfd, err := openPID(pid)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return procError(err)
	}
	for _, e := range entries {
		link, err := os.Readlink(dir + "/" + e.Name())
		num, isSocket := strings.CutPrefix(link, "socket:[")
		if err != nil || !isSocket {
			continue
		}
		inode, err := strconv.ParseUint(strings.TrimSuffix(num, "]"), 10, 32)
		if err != nil {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			continue // closed meanwhile
		}
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Ino == inode { // still the same
			f(fd, uint32(inode))
		}
		_ = unix.Close(fd)
	}
	return nil
}

func openPID(pid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, ErrNoProcess
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	return fd, nil
}

// Moment says which options ApplySocketOptions sets.
type Moment bool

// Moments of a takeover.
const (
	// BeforeResume is before the restored tree runs (RestoreRequest.BeforeResume).
	BeforeResume Moment = false
	// AfterLive is when clients are served again: now a timeout counts.
	AfterLive Moment = true
)

// ApplySocketOptions gives restored sockets the options that CRIU has lost, and
// before they run also makes them work out their segment size again: CRIU
// leaves them at 536 octets less options, for good, because it connects first and
// restores the peer's MSS after. dir is the image they were restored from, whose
// sockets are socks, and initPID as in RestoreRequest. What cannot be set on this host is told in lost,
// once for each reason; it costs no connection.
func ApplySocketOptions(dir string, initPID int, socks []Socket, all []SocketOptions, when Moment) (lost []string, err error) {
	if when == AfterLive && !slices.ContainsFunc(all, func(o SocketOptions) bool { return o.late(&Socket{}) }) {
		return nil, nil
	}
	places, err := socketPlaces(dir)
	if err != nil {
		return nil, fmt.Errorf("apply socket options: %w", err)
	}
	byInode := make(map[uint32]*Socket, len(socks))
	for i := range socks {
		byInode[socks[i].Inode] = &socks[i]
	}
	options := map[uint32]*SocketOptions{}
	for i := range all {
		for _, inode := range all[i].Inodes {
			options[inode] = &all[i]
		}
	}
	a := applier{when: when, why: map[string]int{}}
	defer a.close()
	for _, p := range places {
		k := byInode[p.inode]
		if o := options[p.inode]; k != nil && (o != nil && (when == BeforeResume || o.late(k)) || when == BeforeResume && k.Stream) {
			if err := a.apply(p, initPID, k, o); err != nil {
				return nil, fmt.Errorf("apply socket options: %w", err)
			}
		}
	}
	for why, n := range a.why {
		lost = append(lost, fmt.Sprintf("%s (%d sockets)", why, n))
	}
	slices.Sort(lost)
	return lost, nil
}

// late reports whether there are options for AfterLive.
func (o *SocketOptions) late(k *Socket) bool {
	return slices.ContainsFunc(optionTable, func(t option) bool { _, yes := o.Set[t.name]; return yes && t.when(k) == AfterLive })
}

// when is the moment for an option. What a listener has it is to hand down to
// connections that the replay makes.
func (t *option) when(k *Socket) Moment { return Moment(t.late && !k.Listening()) }

// applier sets options on sockets of restored processes.
type applier struct {
	when  Moment
	pid   int // of pidfd, in the image's PID namespace
	pidfd int // 0: none
	why   map[string]int
}

func (a *applier) close() {
	if a.pidfd > 0 {
		_ = unix.Close(a.pidfd)
	}
}

func (a *applier) apply(p openSocket, initPID int, k *Socket, o *SocketOptions) error {
	if a.pidfd <= 0 || a.pid != p.pid {
		a.close()
		outer, err := OuterPID(p.pid, initPID)
		if err != nil {
			return err
		}
		if a.pidfd, err = openPID(outer); err != nil {
			return err
		}
		a.pid = p.pid
	}
	fd, err := unix.PidfdGetfd(a.pidfd, p.fd, 0)
	if a.when == AfterLive && err != nil {
		return nil // closed by the replay, or its process has ended
	}
	if err != nil {
		return fmt.Errorf("get descriptor %d of process %d: %w", p.fd, p.pid, err)
	}
	defer unix.Close(fd)
	if a.when == AfterLive && !sameSocket(fd, k) {
		return nil
	}
	if a.when == BeforeResume && k.Stream {
		if err := syncMSS(fd, k); err != nil {
			a.why[fmt.Sprintf("segment size: %v", err)]++
		}
	}
	if o == nil {
		return nil
	}
	for i := range optionTable {
		t := &optionTable[i]
		v, yes := o.Set[t.name]
		if !yes || t.when(k) != a.when {
			continue
		}
		if a.when == AfterLive {
			if now, err := unix.GetsockoptInt(fd, t.level, t.opt); err != nil || now != 0 {
				continue // the server has set it itself meanwhile
			}
		}
		if err := unix.SetsockoptInt(fd, t.level, t.opt, v); err != nil {
			a.why[fmt.Sprintf("%s: %v", t.name, err)]++
		}
	}
	if a.when == AfterLive || o.Congestion == "" {
		return nil
	}
	if now, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil && now == o.Congestion {
		return nil
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, o.Congestion); err != nil {
		a.why[fmt.Sprintf("congestion control %s: %v (load the module tcp_%s on this host)", o.Congestion, err, o.Congestion)]++
	}
	return nil
}

// syncMSS makes TCP work out its segment size from the path's MTU and the peer's
// MSS, which setting IP options, if only to none, does (icsk_sync_mss).
func syncMSS(fd int, k *Socket) error {
	if k.IPv6 && !k.Tuple.Server.Addr().Is4() {
		return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, "")
	}
	return unix.SetsockoptString(fd, unix.IPPROTO_IP, unix.IP_OPTIONS, "")
}

// sameSocket reports whether fd is still the connection or listener of an image.
func sameSocket(fd int, k *Socket) bool {
	local, err := unix.Getsockname(fd)
	if err != nil || portOf(local) != int(k.Tuple.Server.Port()) {
		return false
	}
	if k.Listening() {
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		return err == nil && v == 1
	}
	remote, err := unix.Getpeername(fd)
	return err == nil && portOf(remote) == int(k.Tuple.Client.Port())
}

func portOf(sa unix.Sockaddr) int {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sa.Port
	case *unix.SockaddrInet6:
		return sa.Port
	}
	return -1
}
