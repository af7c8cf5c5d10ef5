package capsule

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/reap"
)

// InitArg is the hidden first argument with which Start executes its own
// program as the capsule's PID 1.
const InitArg = "capsule-init"

// Descriptors that Start passes to PID 1.
const (
	lifelineFD = 3 // read end; at its end of file the agent is gone
	readyFD    = 4 // write end; one line: "ok PID_MAX", or what failed
)

// orphanPoll is how often a PID 1 without an agent looks whether it is alone.
// Processes that were entered from outside are not its children, so nothing
// tells it of their end.
const orphanPoll = 200 * time.Millisecond

// routed says that this program asked IsInit, so that executing it again does
// not run it from the top.
var routed atomic.Bool

// IsInit reports whether this process was started as a capsule's PID 1. If so,
// the program must do nothing but os.Exit(Main(os.Args[2:])).
func IsInit() bool {
	routed.Store(true)
	return len(os.Args) > 1 && os.Args[1] == InitArg
}

// RunInit does not return in a capsule's PID 1, and does nothing elsewhere. It
// belongs at the top of main and of every TestMain that starts capsules.
func RunInit() {
	if IsInit() {
		os.Exit(Main(os.Args[2:]))
	}
}

// Main is the capsule's PID 1; args are the arguments after InitArg. It returns
// the exit status when the capsule is to end.
func Main(args []string) int {
	if os.Getpid() != 1 || len(args) == 0 {
		fmt.Fprintf(os.Stderr, "%s is internal: it is only for the first process of a capsule\n", InitArg)
		return 2
	}
	ready := os.NewFile(readyFD, "ready")
	var err error
	switch args[0] {
	case "setup":
		err = setup(args[1:]) // returns only if it failed
	case "run":
		err = run(ready)
	default:
		err = fmt.Errorf("unknown stage %q", args[0])
	}
	if err != nil {
		fmt.Fprintln(ready, err)
		return 1
	}
	return 0
}

// setup makes the namespaces usable and executes the program once more. The
// second time is for its threads: those of the first have the lowest TIDs, which
// an image may need, and only an exec is rid of them.
func setup(avoid []string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts slaves: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := os.Chdir("/"); err != nil { // pin no file system of the agent's
		return err
	}
	if err := nsthread.LoopbackUp(); err != nil {
		return err
	}

	pidMax, err := readPIDMax()
	if err != nil {
		return err
	}
	taken := make([]int, 0, len(avoid))
	for _, a := range avoid {
		p, err := strconv.Atoi(a)
		if err != nil {
			return fmt.Errorf("pid to avoid: %w", err)
		}
		taken = append(taken, p)
	}
	first, ok := highWindow(taken, pidMax, helperPIDs)
	if !ok {
		return fmt.Errorf("find %d free pids below %d: raise kernel.pid_max", helperPIDs, pidMax)
	}
	if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(first-1)), 0); err != nil {
		return fmt.Errorf("set ns_last_pid (the kernel needs CONFIG_CHECKPOINT_RESTORE): %w", err)
	}
	// What the agent itself inherited without close-on-exec must not live on here.
	if err := unix.CloseRange(readyFD+1, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited descriptors: %w", err)
	}
	return fmt.Errorf("execute again: %w",
		syscall.Exec("/proc/self/exe", []string{os.Args[0], InitArg, "run"}, os.Environ()))
}

// run reaps until the capsule is to end.
func run(ready *os.File) error {
	// PID 1 takes everything inside with it: nothing but SIGKILL may end it, and
	// the kernel's OOM killer should look elsewhere first.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGPIPE,
		unix.SIGUSR1, unix.SIGUSR2, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	_ = os.WriteFile("/proc/self/comm", []byte("ftckpt-capsule"), 0)
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)

	pidMax, err := readPIDMax()
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(lifelineFD, true); err != nil {
		return fmt.Errorf("prepare lifeline: %w", err)
	}
	lifeline := os.NewFile(lifelineFD, "lifeline")
	unix.CloseOnExec(lifelineFD)
	if _, err := fmt.Fprintf(ready, "ok %d\n", pidMax); err != nil {
		return err // the agent is gone already
	}
	_ = ready.Close()

	lost := make(chan struct{}, 1)
	watch := func() {
		var b [16]byte
		for {
			if _, err := lifeline.Read(b[:]); err != nil {
				lost <- struct{}{}
				return
			}
		}
	}
	go watch()
	var tick <-chan time.Time
	for {
		select {
		case <-children:
		case <-lost:
			tick = time.Tick(orphanPoll)
		case <-tick:
		}
		reap.Ended()
		if tick == nil {
			continue
		}
		switch agent, err := hasWriter(lifelineFD); {
		case err != nil:
			return err
		case agent: // adopted
			tick = nil
			go watch()
		case alone():
			return nil
		}
	}
}

// alone reports whether PID 1 is the only process of its namespace.
func alone() bool {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return false
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != 1 {
			return false
		}
	}
	return true
}

// hasWriter reports whether the pipe that fd reads has a writer again.
func hasWriter(fd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("poll lifeline: %w", err)
		}
		return p[0].Revents&unix.POLLHUP == 0, nil
	}
}

func readPIDMax() (int, error) {
	b, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("read pid_max: %w", err)
	}
	return n, nil
}
