package sandbox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the target does with a connection: its client's first line.
const (
	Echo       = "echo"       // answer each line with the octets so far
	Deaf       = "deaf"       // never read again
	HalfClose  = "halfclose"  // close its sending side
	Flood      = "flood"      // write until the client's window is shut
	FloodClose = "floodclose" // the same, then close its sending side
)

// MPTCP in Options.Hold makes the target's listener a multipath one.
const MPTCP = "mptcp"

// deafOctets is what a client sends to a deaf target.
const deafOctets = 1234

// runTarget holds what it is told to, says so on stdout and serves for ever.
func runTarget(hold []string) {
	for _, h := range hold {
		f, ok := holders[h]
		if !ok {
			fail(fmt.Errorf("cannot hold %q", h))
		}
		if err := f(); err != nil {
			fail(fmt.Errorf("hold %s: %w", h, err))
		}
	}
	// Go listens with MPTCP unless told otherwise, which CRIU cannot dump.
	var lc net.ListenConfig
	lc.SetMultipathTCP(slices.Contains(hold, MPTCP))
	l, err := lc.Listen(context.Background(), "tcp4", addr)
	if err != nil {
		fail(err)
	}
	fmt.Println("ready")
	// The pipe leads out of the tree; a server has no such thing.
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		os.Exit(1)
	}
	if err := unix.Dup3(int(null.Fd()), 1, 0); err != nil {
		os.Exit(1)
	}
	_ = null.Close()
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		go serve(c.(*net.TCPConn))
	}
}

func fail(err error) {
	fmt.Println(err)
	os.Exit(1)
}

// parked keeps connections and other things that nobody uses from being
// collected.
var parked = make(chan any, 1024)

func serve(c *net.TCPConn) {
	defer c.Close()
	r := bufio.NewReader(c)
	mode, err := r.ReadString('\n')
	if err != nil {
		return
	}
	if _, err := io.WriteString(c, "ok\n"); err != nil {
		return
	}
	switch strings.TrimSpace(mode) {
	case Echo:
		for total := 0; ; {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			total += len(line) - 1
			if _, err := fmt.Fprintln(c, strconv.Itoa(total)); err != nil {
				return
			}
		}
	case HalfClose:
		_ = c.CloseWrite()
	case Flood, FloodClose:
		b := make([]byte, 64<<10)
		for {
			// Full when nothing went within the deadline.
			_ = c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			if n, _ := c.Write(b); n == 0 {
				break
			}
		}
		if strings.TrimSpace(mode) == FloodClose {
			_ = c.CloseWrite()
		}
	}
	parked <- c
	select {}
}

// holders make things that CRIU cannot dump, or can although they look odd. Each
// leaves one of its kind open for good.
var holders = map[string]func() error{
	MPTCP: func() error { return nil },
	"child": func() error {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		_, err = syscall.ForkExec(exe, []string{targetName, "nothing"}, &syscall.ProcAttr{Dir: "/", Files: []uintptr{0, 0, 2}})
		return err
	},
	"nothing": func() error { select {} },
	"memory": func() error { //nolint:unparam // 64 MiB, so that a dump takes a while; the error is of the map's type
		b := make([]byte, 64<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = byte(i >> 12)
		}
		parked <- b
		return nil
	},
	"io_uring": func() error {
		var params [120]byte // struct io_uring_params
		return rawFD(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&params)), 0)
	},
	"userfaultfd": func() error {
		const userModeOnly = 1
		return rawFD(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|userModeOnly, 0, 0)
	},
	"perf_event": func() error {
		a := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_CPU_CLOCK}
		a.Size = uint32(unsafe.Sizeof(a))
		_, err := unix.PerfEventOpen(&a, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
		return err
	},
	"bpf": func() error { // an array map
		attr := [18]uint32{2, 4, 8, 4} // BPF_MAP_TYPE_ARRAY, key, value, entries
		return rawFD(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	},
	"memfd_secret": func() error { return rawFD(unix.SYS_MEMFD_SECRET, 0, 0, 0) },
	"pidfd": func() error {
		_, err := unix.PidfdOpen(1, 0)
		return err
	},
	"pidfd_self": func() error {
		_, err := unix.PidfdOpen(os.Getpid(), 0)
		return err
	},
	"vsock": func() error {
		_, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return err
	},
	"sysvshm": func() error {
		id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 64<<10, unix.IPC_CREAT|0o600)
		if err != nil {
			return err
		}
		_, err = unix.SysvShmAttach(id, 0, 0)
		_, rmErr := unix.SysvShmCtl(id, unix.IPC_RMID, nil)
		return errors.Join(err, rmErr)
	},
	"pidns": func() error { // a child in a PID namespace of its own
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		_, err = syscall.ForkExec(exe, []string{targetName, "nothing"}, &syscall.ProcAttr{
			Dir: "/", Files: []uintptr{0, 0, 2}, Sys: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID},
		})
		return err
	},
	"tty": func() error {
		m, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			return err
		}
		if err := unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		n, err := unix.IoctlGetInt(m, unix.TIOCGPTN)
		if err != nil {
			return err
		}
		_, err = unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY, 0)
		return errors.Join(err, unix.Close(m))
	},
	"unix_stream": func() error { // connected to a process outside of the tree
		l, err := net.Listen("unix", "@ftckpt-sandbox-"+strconv.Itoa(os.Getpid()))
		if err != nil {
			return err
		}
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		// A grandchild whose parent ends is init's child, and not of the tree.
		cmd := exec.Command(exe)
		cmd.Args = []string{targetName, "outsider"}
		if err := cmd.Run(); err != nil {
			return err
		}
		c, err := l.Accept()
		if err != nil {
			return err
		}
		parked <- c
		return l.Close()
	},
	"outsider": func() error { // fork away, and let the outsider connect
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		_, err = syscall.ForkExec(exe, []string{targetName, "connect", strconv.Itoa(os.Getppid())}, &syscall.ProcAttr{
			Dir: "/", Files: []uintptr{0, 0, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
		})
		if err != nil {
			return err
		}
		os.Exit(0)
		return nil
	},
	"connect": func() error {
		c, err := net.Dial("unix", "@ftckpt-sandbox-"+os.Args[2])
		if err != nil {
			return err
		}
		parked <- c
		select {}
	},
}

// rawFD makes a system call whose result is a descriptor, and leaves it open.
func rawFD(call uintptr, a, b, c uintptr) error {
	if _, _, errno := unix.Syscall(call, a, b, c); errno != 0 {
		return errno
	}
	return nil
}
