package capsule

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// endTimeout bounds how long Close waits for what it killed.
const endTimeout = 10 * time.Second

// DefaultVIPDev is the name of the service's device when Options does not say.
const DefaultVIPDev = "vip0"

// Options of a capsule.
type Options struct {
	// Name of the service; letters, digits and _.- only.
	Name string
	// RunDir holds the state file; it is made (0700) if missing.
	RunDir string
	// Dev is the interface of the caller's network namespace that the macvlan
	// stands on. Without it PrepareVIPs fails.
	Dev string
	// VIPDev names the macvlan inside; DefaultVIPDev if empty. The primary's own
	// name for the device is the best choice: a server may have bound to it.
	VIPDev string
	// AvoidPIDs are PIDs that PID 1's own threads must not use as TIDs.
	AvoidPIDs []int
	// Sysctls ("net.ipv4.tcp_rmem") are set inside after all others.
	Sysctls map[string]string
	// Log takes what background work has to say; slog.Default() if nil.
	Log *slog.Logger
}

// Capsule is a running capsule. Its methods may be called from any goroutine.
type Capsule struct {
	opt      Options
	path     string   // of the state file
	pid      int      // PID 1, as we count
	pidMax   int      // inside
	lifeline *os.File // write end; PID 1 reads its end of file when we die
	pidfd    *os.File
	netns    *os.File
	hostns   *os.File
	done     chan struct{}

	mu       sync.Mutex
	st       state
	taken    bool
	closed   bool
	announce announcer
}

// Start makes a capsule. ctx bounds the start only. It answers ErrExists when
// one of that name lives.
func Start(ctx context.Context, opt Options) (*Capsule, error) {
	fail := func(err error) (*Capsule, error) {
		return nil, fmt.Errorf("start capsule %s: %w", opt.Name, err)
	}
	if !routed.Load() {
		return fail(errors.New("this program does not call capsule.RunInit first, so it cannot be executed as PID 1"))
	}
	if opt.VIPDev == "" {
		opt.VIPDev = DefaultVIPDev
	}
	if !validDev.MatchString(opt.VIPDev) {
		return fail(fmt.Errorf("device name %q is not valid", opt.VIPDev))
	}
	path, err := statePath(opt.RunDir, opt.Name)
	if err != nil {
		return fail(err)
	}
	if err := checkProc(); err != nil {
		return fail(err)
	}
	if old, err := readState(path, opt.Name); err == nil {
		if now, err := identify(old.PID); err == nil && now == old.identity {
			return fail(ErrExists)
		}
	} else if !errors.Is(err, ErrNoCapsule) {
		return fail(err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fail(err)
	}

	c := &Capsule{opt: opt, path: path, done: make(chan struct{})}
	if err := c.spawn(ctx); err != nil {
		return fail(err)
	}
	if err := c.furnish(); err != nil {
		return fail(errors.Join(err, c.Close()))
	}
	return c, nil
}

// spawn starts PID 1 and waits until it is ready.
func (c *Capsule) spawn(ctx context.Context) error {
	lifeR, lifeW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer lifeR.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		_ = lifeW.Close()
		return err
	}
	defer readyR.Close()
	defer readyW.Close()

	args := []string{InitArg, "setup"}
	for _, p := range c.opt.AvoidPIDs {
		args = append(args, strconv.Itoa(p))
	}
	// By its inode, not its path: the program may have been replaced since.
	// Its life is the capsule's, not that of ctx, which bounds only the start.
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe", args...)
	cmd.Args[0] = "ftckpt"
	// One processor: PID 1 has next to nothing to do, and every thread is a PID.
	cmd.Env = []string{"GOMAXPROCS=1", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.ExtraFiles = []*os.File{lifeR, readyW} // lifelineFD, readyFD
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS,
		Setsid:     true, // a Ctrl-C for the agent is not for the service
	}
	if err := cmd.Start(); err != nil {
		_ = lifeW.Close()
		return fmt.Errorf("clone namespaces (needs root): %w", err)
	}
	c.lifeline = lifeW
	go func() {
		_ = cmd.Wait() // how it ended does not matter
		close(c.done)
	}()
	abandon := func(err error) error {
		_ = cmd.Process.Kill()
		<-c.done
		_ = lifeW.Close()
		return err
	}

	_ = readyW.Close()
	stop := context.AfterFunc(ctx, func() { _ = readyR.SetReadDeadline(time.Unix(1, 0)) })
	line, err := bufio.NewReader(readyR).ReadString('\n')
	stop()
	if err != nil {
		return abandon(fmt.Errorf("wait for its first process: %w", errors.Join(ctx.Err(), err)))
	}
	max, ok := strings.CutPrefix(strings.TrimSpace(line), "ok ")
	if !ok {
		return abandon(fmt.Errorf("its first process: %s", strings.TrimSpace(line)))
	}
	c.pidMax, err = strconv.Atoi(max)
	if err != nil {
		return abandon(fmt.Errorf("its first process: %w", err))
	}
	if c.pidfd, err = openPIDFD(cmd.Process.Pid); err != nil {
		return abandon(err)
	}
	id, err := identify(cmd.Process.Pid)
	if err != nil {
		_ = c.pidfd.Close()
		return abandon(err)
	}
	c.pid = id.PID
	c.st = state{
		Version: stateVersion, Name: c.opt.Name, identity: id,
		PIDMax: c.pidMax, Dev: c.opt.Dev, VIPDev: c.opt.VIPDev,
	}
	return nil
}

// furnish writes the state file and fits the new network namespace out.
func (c *Capsule) furnish() error {
	if err := c.st.write(c.path); err != nil {
		return err
	}
	if err := c.openNamespaces(); err != nil {
		return err
	}
	return c.setSysctls()
}

func (c *Capsule) openNamespaces() (err error) {
	if c.netns, err = os.Open(c.NetNS()); err != nil {
		return fmt.Errorf("open its network namespace: %w", err)
	}
	if c.hostns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return fmt.Errorf("open own network namespace: %w", err)
	}
	return nil
}

// Adopt takes over a living capsule that an earlier agent started; from then on
// the caller is its agent. The calling thread's network namespace must be the
// one Start was called in. It answers ErrNoCapsule when there is none that the
// state file proves to be ours.
func Adopt(runDir, name string) (*Capsule, error) {
	c, err := adopt(runDir, name)
	if err != nil {
		return nil, fmt.Errorf("adopt capsule %s: %w", name, err)
	}
	return c, nil
}

func adopt(runDir, name string) (_ *Capsule, err error) {
	path, err := statePath(runDir, name)
	if err != nil {
		return nil, err
	}
	if err := checkProc(); err != nil {
		return nil, err
	}
	st, err := readState(path, name)
	if err != nil {
		return nil, err
	}
	c := &Capsule{
		opt:  Options{Name: name, RunDir: runDir, Dev: st.Dev, VIPDev: st.VIPDev},
		path: path, pid: st.PID, pidMax: st.PIDMax, st: st, done: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			c.closeHandles()
		}
	}()
	// The pidfd before the proof: what is proved is then what is held.
	if c.pidfd, err = openPIDFD(st.PID); err != nil {
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			err = ErrNoCapsule
		}
		return nil, err
	}
	if now, err := identify(st.PID); err != nil || now != st.identity {
		return nil, ErrNoCapsule
	}
	// The pipe PID 1 already reads, opened anew for writing.
	lifeline := fmt.Sprintf("/proc/%d/fd/%d", st.PID, lifelineFD)
	if c.lifeline, err = os.OpenFile(lifeline, os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = ErrNoCapsule // it ended just now
		}
		return nil, err
	}
	if err := c.openNamespaces(); err != nil {
		return nil, err
	}
	if err := c.lookUp(); err != nil {
		return nil, err
	}
	go func() {
		if awaitExit(c.pidfd) == nil {
			close(c.done)
		}
	}()
	return c, nil
}

// CleanupStale ends what an earlier agent left under that name: the capsule and
// all inside, if the state file proves it to be ours, and the state file. That
// there is nothing is not an error.
func CleanupStale(runDir, name string) error {
	c, err := adopt(runDir, name)
	switch {
	case err == nil:
		return c.Close()
	case !errors.Is(err, ErrNoCapsule):
		return fmt.Errorf("clean up capsule %s: %w", name, err)
	}
	path, err := statePath(runDir, name)
	if err != nil {
		return err
	}
	return removeState(path)
}

func removeState(path string) error {
	for _, p := range []string{path, path + ".tmp"} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove capsule state: %w", err)
		}
	}
	return nil
}

// InitPID is PID 1 as the caller's PID namespace counts.
func (c *Capsule) InitPID() int { return c.pid }

// NetNS is the path of the network namespace, valid while the capsule lives.
func (c *Capsule) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", c.pid) }

// Done is closed when PID 1 and all inside have ended.
func (c *Capsule) Done() <-chan struct{} { return c.done }

// Do runs fn on a thread that is in the capsule's network namespace (and in the
// caller's other namespaces) and returns its error. Sockets that fn opens and
// processes it starts are in there; goroutines it starts are not. fn must not
// call runtime.UnlockOSThread.
func (c *Capsule) Do(fn func() error) error {
	if err := nsthread.InNet(c.netns, fn); err != nil {
		return fmt.Errorf("in capsule %s: %w", c.opt.Name, err)
	}
	return nil
}

// Command prepares a command that runs inside all three namespaces, with / as
// its working directory. The process that is started is nsenter, outside: it
// passes the exit status on, but killing it leaves the command alive inside.
func (c *Capsule) Command(name string, args ...string) *exec.Cmd {
	return exec.CommandContext(context.Background(), "nsenter", append([]string{"-t", strconv.Itoa(c.pid), "-m", "-p", "-n", "--", name}, args...)...)
}

// ErrPIDTaken says that a PID the image needs is in use inside. A new capsule
// with that PID in Options.AvoidPIDs helps if it is a thread of PID 1.
var ErrPIDTaken = errors.New("pids are in use inside the capsule")

// ReservePIDs makes the processes that are started inside from now on take PIDs
// from a run of 1024 that holds none of avoid (all PIDs, TIDs, process groups
// and sessions of the image). Call it right before the restore.
func (c *Capsule) ReservePIDs(avoid []int) error {
	fail := func(err error) error { return fmt.Errorf("reserve pids in capsule %s: %w", c.opt.Name, err) }
	used, err := c.pids()
	if err != nil {
		return fail(err)
	}
	var taken []int
	for _, p := range avoid {
		if p >= c.pidMax {
			return fail(fmt.Errorf("the image needs pid %d, this host's limit is %d: raise kernel.pid_max", p, c.pidMax))
		}
		if slices.Contains(used, p) {
			taken = append(taken, p)
		}
	}
	if len(taken) > 0 {
		return fail(fmt.Errorf("%w: %v", ErrPIDTaken, taken))
	}
	first, ok := lowWindow(append(used, avoid...), c.pidMax, helperPIDs)
	if !ok {
		return fail(fmt.Errorf("no %d pids in a row are free below %d: raise kernel.pid_max", helperPIDs, c.pidMax))
	}
	// ns_last_pid means the writer's own namespace, so it takes a process inside.
	out, err := c.Command("sh", "-c", fmt.Sprintf("echo %d >/proc/sys/kernel/ns_last_pid", first-1)).CombinedOutput()
	if err != nil {
		return fail(fmt.Errorf("write ns_last_pid: %w: %s", err, strings.TrimSpace(string(out))))
	}
	return nil
}

// pids returns all thread IDs inside, as they are counted inside.
func (c *Capsule) pids() ([]int, error) {
	// Through PID 1's root: its /proc counts as the capsule does.
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/proc/[0-9]*/task/[0-9]*", c.pid))
	if err != nil {
		return nil, err
	}
	if len(tasks) == 0 {
		return nil, errors.New("its /proc cannot be read: has it ended?")
	}
	pids := make([]int, 0, len(tasks))
	for _, t := range tasks {
		if p, err := strconv.Atoi(filepath.Base(t)); err == nil {
			pids = append(pids, p)
		}
	}
	return pids, nil
}

// Empty reports whether PID 1 is alone: whether Close would kill nobody. Someone
// who adopted the capsule asks before closing it.
func (c *Capsule) Empty() (bool, error) {
	processes, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/proc/[0-9]*", c.pid))
	if err != nil {
		return false, err
	}
	if len(processes) == 0 {
		select {
		case <-c.done:
			return true, nil
		default:
			return false, fmt.Errorf("look into capsule %s: its /proc cannot be read", c.opt.Name)
		}
	}
	return len(processes) == 1, nil
}

// Release lets go of the capsule without ending it: if a process lives inside,
// it goes on and keeps the address, and Adopt finds it; else it ends by itself.
// Announcements stop.
func (c *Capsule) Release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.announce.stop()
	c.closed = true
	c.closeHandles()
}

// Close must be called even when Done is closed: until then the address stays
// where it is. It takes the address away, so that the dying sockets' packets reach nobody,
// kills PID 1 and with it everything inside, waits for their end and removes the
// state file. A second Close does nothing.
func (c *Capsule) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.announce.stop()
	if c.closed {
		return nil
	}
	var errs []error
	if c.netns != nil && c.hostns != nil {
		errs = append(errs, c.dropVIP())
	}
	errs = append(errs, killPIDFD(c.pidfd))
	select {
	case <-c.done:
	case <-time.After(endTimeout):
		return errors.Join(append(errs, fmt.Errorf("close capsule %s: process %d and what is inside has not ended %v after SIGKILL", c.opt.Name, c.pid, endTimeout))...)
	}
	c.closed = true
	c.closeHandles()
	return errors.Join(append(errs, removeState(c.path))...)
}

func (c *Capsule) closeHandles() {
	for _, f := range []*os.File{c.lifeline, c.pidfd, c.netns, c.hostns} {
		if f != nil {
			_ = f.Close() // nothing was written to any of them
		}
	}
}

func (c *Capsule) log() *slog.Logger {
	if c.opt.Log != nil {
		return c.opt.Log
	}
	return slog.Default()
}

// VIPs are the addresses PrepareVIPs was given; nil if none.
func (c *Capsule) VIPs() []netip.Prefix {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.st.VIPs)
}
