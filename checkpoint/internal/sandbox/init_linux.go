package sandbox

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/reap"
)

// addr is where the target listens, in a network of its own.
const addr = "127.0.0.1:7"

// initProc is PID 1 of a sandbox.
type initProc struct {
	o     Options
	conns []*client
}

type client struct {
	c    *net.TCPConn
	r    *bufio.Reader
	sent int
}

// runInit serves requests from stdin until it ends, and with it the sandbox.
func runInit() {
	p := &initProc{}
	if err := p.setUp(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	in, out := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	for in.Scan() {
		var q request
		if err := json.Unmarshal(in.Bytes(), &q); err != nil {
			os.Exit(1)
		}
		r, err := p.serve(q)
		if err != nil {
			r.Error = err.Error()
		}
		if out.Encode(r) != nil {
			break
		}
	}
	os.Exit(0)
}

func (p *initProc) setUp(spec string) error {
	if err := json.Unmarshal([]byte(spec), &p.o); err != nil {
		return fmt.Errorf("read options: %w", err)
	}
	if os.Getpid() != 1 {
		return errors.New("sandbox's init is not PID 1")
	}
	// What our parents left open is of another mount namespace, which CRIU
	// refuses; the target must not inherit it.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited files: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := nsthread.LoopbackUp(); err != nil {
		return err
	}
	for name, off := range map[string]bool{"tcp_window_scaling": p.o.NoWScale, "tcp_timestamps": p.o.NoTimestamps} {
		if !off {
			continue
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte("0"), 0); err != nil {
			return err
		}
	}
	go reap.Forever()
	return nil
}

func (p *initProc) serve(q request) (reply, error) {
	switch q.Op {
	case "start":
		return p.start()
	case "dial":
		return p.dial(q.Mode)
	}
	if q.Conn < 0 || q.Conn >= len(p.conns) {
		return reply{}, fmt.Errorf("no connection %d", q.Conn)
	}
	c := p.conns[q.Conn]
	switch q.Op {
	case "exchange":
		return reply{}, c.exchange()
	case "client":
		st, err := c.state()
		return reply{Client: st}, err
	case "halfclose":
		return reply{}, c.c.CloseWrite()
	}
	return reply{}, fmt.Errorf("unknown request %q", q.Op)
}

// start starts the target with an id far from those of CRIU's own processes.
func (p *initProc) start() (reply, error) {
	if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte("30000"), 0); err != nil {
		return reply{}, err
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return reply{}, err
	}
	defer null.Close()
	ready, theirs, err := os.Pipe()
	if err != nil {
		return reply{}, err
	}
	defer ready.Close()
	exe, err := os.Executable()
	if err != nil {
		return reply{}, err
	}
	pid, err := syscall.ForkExec(exe, append([]string{targetName}, p.o.Hold...), &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/bin:/bin"},
		Files: []uintptr{null.Fd(), theirs.Fd(), null.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	_ = theirs.Close()
	if err != nil {
		return reply{}, fmt.Errorf("start target: %w", err)
	}
	if err := ready.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return reply{}, err
	}
	b, err := io.ReadAll(io.LimitReader(ready, 512))
	if err != nil {
		return reply{}, fmt.Errorf("wait for target: %w", err)
	}
	if said := strings.TrimSpace(string(b)); said != "ready" {
		return reply{}, fmt.Errorf("target: %s", said)
	}
	return reply{PID: pid}, nil
}

func (p *initProc) dial(mode string) (reply, error) {
	d := net.Dialer{Timeout: patience}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		return reply{}, err
	}
	c := &client{c: conn.(*net.TCPConn), r: bufio.NewReader(conn)}
	if _, err := io.WriteString(conn, mode+"\n"); err != nil {
		return reply{}, err
	}
	p.conns = append(p.conns, c)
	return reply{Conn: len(p.conns) - 1}, c.settle(mode)
}

// settle waits until the target has done what the mode asks for.
func (c *client) settle(mode string) error {
	deadline := time.Now().Add(patience)
	if err := c.c.SetDeadline(deadline); err != nil {
		return err
	}
	if line, err := c.r.ReadString('\n'); err != nil || line != "ok\n" {
		return fmt.Errorf("target answered %q: %w", line, err)
	}
	switch mode {
	case Deaf: // send what is never read
		_, err := io.WriteString(c.c, strings.Repeat("x", deafOctets))
		if err == nil {
			err = c.acked(deadline)
		}
		if err != nil {
			return err
		}
	case Flood, FloodClose:
		return c.shut(mode == FloodClose, deadline)
	}
	return c.quiet()
}

// shut waits until the client's window is shut and the target has stopped: all
// that was sent is acknowledged and there is more, with a FIN or without.
func (c *client) shut(fin bool, deadline time.Time) error {
	want := uint8(unix.BPF_TCP_ESTABLISHED)
	if fin {
		want = unix.BPF_TCP_FIN_WAIT1
	}
	for still := 0; time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		server, err := c.server()
		if err != nil {
			return err
		}
		if still++; server.InetDiagMsg.State != want || server.TCPInfo.Unacked > 0 || server.TCPInfo.Notsent_bytes == 0 {
			still = 0
		}
		if still == 25 { // longer than a flooding target waits before it stops
			return nil
		}
	}
	return errors.New("flood does not end")
}

// quiet waits until the client has acknowledged all it got. A delayed
// acknowledgement must not come when the target is gone: its kernel would answer
// with a reset. (The real thing has its packets held instead.)
func (c *client) quiet() error {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		server, err := c.server()
		if err != nil {
			return err
		}
		if server.TCPInfo.Unacked == 0 {
			return nil
		}
	}
	return errors.New("not quiet in time")
}

// server is the target's end of the connection.
func (c *client) server() (*netlink.InetDiagTCPInfoResp, error) {
	port := uint16(c.c.LocalAddr().(*net.TCPAddr).Port)
	socks, err := netlink.SocketDiagTCPInfo(unix.AF_INET)
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	for _, k := range socks {
		if k.InetDiagMsg.ID.DestinationPort == port && k.TCPInfo != nil {
			return k, nil
		}
	}
	return nil, errors.New("the target's socket is gone")
}

// acked waits until the target's kernel has acknowledged all.
func (c *client) acked(deadline time.Time) error {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return err
	}
	for time.Now().Before(deadline) {
		var n int
		var ioErr error
		if err := raw.Control(func(fd uintptr) { n, ioErr = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) }); err != nil {
			return err
		}
		if ioErr != nil || n == 0 {
			return ioErr
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("not acknowledged in time")
}

// exchange adds one octet more each time, and the target answers with the total.
func (c *client) exchange() error {
	if err := c.c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	c.sent++
	if _, err := fmt.Fprintf(c.c, "%s\n", strings.Repeat("a", c.sent)); err != nil {
		return err
	}
	line, err := c.r.ReadString('\n')
	if err != nil {
		return err
	}
	want := strconv.Itoa(c.sent * (c.sent + 1) / 2)
	if strings.TrimSpace(line) != want {
		return fmt.Errorf("target answered %q, want %s", line, want)
	}
	return c.quiet()
}

// state reads the client's sequence numbers, which TCP shows in repair mode only.
func (c *client) state() (Client, error) {
	st := Client{Port: uint16(c.c.LocalAddr().(*net.TCPAddr).Port)}
	raw, err := c.c.SyscallConn()
	if err != nil {
		return st, err
	}
	var opErr error
	err = raw.Control(func(fd uintptr) {
		opErr = func() error {
			f := int(fd)
			q, err := unix.IoctlGetInt(f, unix.TIOCINQ)
			if err != nil {
				return err
			}
			st.Queued = q + c.r.Buffered()
			if err := unix.SetsockoptInt(f, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
				return err
			}
			// -1: out of repair without the window probe that 0 sends.
			defer func() { _ = unix.SetsockoptInt(f, unix.IPPROTO_TCP, unix.TCP_REPAIR, -1) }()
			for queue, seq := range map[int]*uint32{recvQueue: &st.RcvNxt, sendQueue: &st.WriteSeq} {
				if err := unix.SetsockoptInt(f, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
					return err
				}
				v, err := unix.GetsockoptInt(f, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
				if err != nil {
					return err
				}
				*seq = uint32(v)
			}
			return nil
		}()
	})
	return st, errors.Join(err, opErr)
}

// Queues of TCP_REPAIR_QUEUE (include/uapi/linux/tcp.h).
const recvQueue, sendQueue = 1, 2
