package lab

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/reap"
)

// InitArg is the hidden first argument that makes a program a host's PID 1.
const InitArg = "lab-host-init"

// Hook turns the process into a host's PID 1, and never returns, if it was
// started as one. Call it first thing in TestMain (or main) of every program
// that creates labs: a lab starts its own executable again.
func Hook() {
	if len(os.Args) > 1 && os.Args[1] == InitArg {
		os.Exit(Main(os.Args[2:]))
	}
}

// Main is PID 1 of a host: args are the lab's directory (which identifies the
// lab in a process listing) and the host's name. It prepares the mount
// namespace, says "ready", then obeys one-line commands on stdin until its end,
// and returns an exit code. It must run in fresh PID, mount and UTS namespaces.
func Main(args []string) int {
	if len(args) != 2 || os.Getpid() != 1 {
		fmt.Fprintf(os.Stderr, "%s is internal to ftckpt's lab\n", InitArg)
		return 2
	}
	// Without a handler the runtime would end PID 1, and the host, on a
	// SIGTERM that some process of the host sends to everything.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT)
	go reap.Forever()
	if err := furnish(args[1]); err != nil {
		fmt.Printf("error: %v\n", err)
		return 1
	}
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if err := obey(in.Text()); err != nil {
			fmt.Printf("error: %v\n", err)
			continue
		}
		fmt.Println("ok")
	}
	return 0
}

func obey(line string) error {
	verb, arg, _ := strings.Cut(line, " ")
	switch verb {
	case "last-pid": // the next process of this namespace gets arg+1
		if _, err := strconv.ParseUint(arg, 10, 31); err != nil {
			return fmt.Errorf("parse pid: %w", err)
		}
		return os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(arg), 0)
	case "stop":
		if err := signalAll(unix.SIGSTOP); err != nil {
			return err
		}
		return waitStopped()
	case "continue":
		return signalAll(unix.SIGCONT)
	}
	return fmt.Errorf("obey: unknown command %q", verb)
}

// signalAll signals every process of the host but PID 1, those of nested
// namespaces included, in one system call.
func signalAll(s syscall.Signal) error {
	if err := unix.Kill(-1, s); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal all processes: %w", err)
	}
	return nil
}

// stopTime bounds the wait for a process that is in the kernel to stop.
const stopTime = 10 * time.Second

// waitStopped waits until no thread of the host but ours can run: the signal
// alone does not stop one that is on another processor just now.
func waitStopped() error {
	for deadline := time.Now().Add(stopTime); ; time.Sleep(time.Millisecond) {
		running, err := runningThread()
		if err != nil || running == "" {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("stop all processes: %s did not stop in %v", running, stopTime)
		}
	}
}

// runningThread names a thread of another process that is not stopped.
func runningThread() (string, error) {
	threads, err := filepath.Glob("/proc/[0-9]*/task/*/stat")
	if err != nil {
		return "", err
	}
	for _, file := range threads {
		if strings.HasPrefix(file, "/proc/1/") {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it ended meanwhile
		}
		// The state follows the command, which may hold anything.
		if i := strings.LastIndex(string(b), ") "); i >= 0 && !strings.ContainsRune("TtZX", rune(b[i+2])) {
			return file, nil
		}
	}
	return "", nil
}

// furnish gives the host's mount namespace what must be its own.
func furnish(hostname string) error {
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := mountFresh("proc", "/proc", ""); err != nil {
		return err
	}
	if err := mountSys(); err != nil {
		return err
	}
	if err := mountFresh("tmpfs", "/run", "mode=755"); err != nil {
		return err
	}
	if err := os.MkdirAll("/run/lock", 0o1777); err != nil {
		return err
	}
	if fi, err := os.Lstat("/var/run"); err == nil && fi.IsDir() {
		if err := unix.Mount("/run", "/var/run", "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind /var/run: %w", err)
		}
	}
	return mountFresh("tmpfs", "/dev/shm", "mode=1777")
}

// mountFresh replaces what is mounted at path. The old mount goes first: CRIU
// does not like to find one mount hidden by another.
func mountFresh(fstype, path, data string) error {
	_ = unix.Unmount(path, unix.MNT_DETACH) // not a mount point everywhere
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if fstype == "proc" || fstype == "sysfs" {
		flags |= unix.MS_NOEXEC
	}
	if err := unix.Mount(fstype, path, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, path, err)
	}
	return nil
}

// mountSys mounts the sysfs of this network namespace and puts the cgroup,
// tracing and debug file systems of the machine back on it. BPF pins are the
// host's own.
func mountSys() error {
	points, err := mountsUnder("/sys/")
	if err != nil {
		return err
	}
	trees := make(map[string]int, len(points))
	defer func() {
		for _, fd := range trees {
			_ = unix.Close(fd)
		}
	}()
	for _, p := range points {
		fd, err := unix.OpenTree(unix.AT_FDCWD, p,
			unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return fmt.Errorf("clone mount %s: %w", p, err)
		}
		trees[p] = fd
	}
	if err := mountFresh("sysfs", "/sys", ""); err != nil {
		return err
	}
	for _, p := range points {
		if p == "/sys/fs/bpf" {
			continue
		}
		err := unix.MoveMount(trees[p], "", unix.AT_FDCWD, p, unix.MOVE_MOUNT_F_EMPTY_PATH)
		if err != nil {
			return fmt.Errorf("put mount %s back: %w", p, err)
		}
	}
	// Kernels without BPF or tracing lack the directory; then nothing that
	// runs here can want it.
	for fstype, p := range map[string]string{"bpf": "/sys/fs/bpf", "tracefs": "/sys/kernel/tracing"} {
		if _, there := trees[p]; there && fstype != "bpf" {
			continue
		}
		if _, err := os.Stat(p); err == nil {
			_ = unix.Mount(fstype, p, fstype, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}
	}
	return nil
}

// mountsUnder lists the mount points below prefix that are not themselves below
// another one of the list.
func mountsUnder(prefix string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var out []string
next:
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 || !strings.HasPrefix(f[4], prefix) {
			continue
		}
		for _, p := range out {
			if f[4] == p || strings.HasPrefix(f[4], p+"/") {
				continue next
			}
		}
		out = append(out, f[4])
	}
	return out, nil
}
