package check

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/procfs"
)

// Errors of InspectTarget. That the process does not exist is
// checkpoint.ErrNoProcess.
var (
	ErrNotOurs      = errors.New("not permitted")
	ErrNotProtected = errors.New("process cannot be protected")
)

// Listener is a listening TCP socket of the target.
type Listener struct {
	Addr netip.AddrPort `json:"addr"`
	PID  int            `json:"pid"`
	FD   int            `json:"fd"`
}

// Problem is something of the target that cannot be dumped or restored.
type Problem struct {
	Kind   string `json:"kind"` // a short name, e.g. "io_uring"
	PID    int    `json:"pid"`
	FD     int    `json:"fd"` // -1 when it is not a descriptor
	Detail string `json:"detail"`
	Remedy string `json:"remedy"`
}

func (p Problem) String() string {
	where := fmt.Sprintf("pid %d", p.PID)
	if p.FD >= 0 {
		where += fmt.Sprintf(" fd %d", p.FD)
	}
	return fmt.Sprintf("%s (%s: %s): %s", p.Kind, where, p.Detail, p.Remedy)
}

// TargetReport is what InspectTarget found.
type TargetReport struct {
	PID       int        `json:"pid"`
	Exe       string     `json:"exe"`
	Processes int        `json:"processes"`
	Listeners []Listener `json:"listeners"`
	// Opened are connections that it has opened itself, the first 64.
	Opened   []Connection `json:"opened,omitempty"`
	Problems []Problem    `json:"problems"`
}

// Err is nil when the target can be protected, and otherwise one line that says
// why not and wraps ErrNotProtected.
func (r TargetReport) Err() error {
	if len(r.Problems) == 0 {
		return nil
	}
	more := ""
	if n := len(r.Problems) - 1; n > 0 {
		more = fmt.Sprintf(" (and %d more: ftckpt check --pid %d)", n, r.PID)
	}
	return fmt.Errorf("%w: pid %d: %s%s", ErrNotProtected, r.PID, r.Problems[0], more)
}

// maxProblems bounds a report: a process with a thousand io_urings has one problem.
const maxProblems = 64

// InspectTarget looks at a process and its descendants from outside, without
// stopping or tracing it. Errors: checkpoint.ErrNoProcess, ErrNotOurs; everything
// else that stands in the way is a Problem.
func InspectTarget(pid int) (TargetReport, error) {
	r := TargetReport{PID: pid}
	tasks, err := checkpoint.ProcTree(pid)
	if err != nil {
		return r, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	r.Processes = len(tasks)
	in := inspection{report: &r, root: pid, tree: make(map[int]bool), sockets: make(map[uint64]holder)}
	for _, t := range tasks {
		in.tree[t.PID] = true
	}
	if err := in.whole(); err != nil {
		return r, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	for _, t := range tasks {
		err := in.task(t.PID)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			if t.PID != pid {
				continue // it ended while we looked
			}
			err = checkpoint.ErrNoProcess
		}
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: run as root, or as the owner with CAP_SYS_PTRACE: %w", ErrNotOurs, err)
		}
		if err != nil {
			return r, fmt.Errorf("inspect pid %d: %w", pid, err)
		}
	}
	if err := in.unixPeers(); err != nil {
		return r, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	if err := in.listeners(); err != nil {
		return r, fmt.Errorf("inspect pid %d: %w", pid, err)
	}
	return r, nil
}

// holder is a descriptor by process and number.
type holder struct{ pid, fd int }

type inspection struct {
	report  *TargetReport
	root    int
	tree    map[int]bool
	sockets map[uint64]holder // inode -> who holds it
}

func (in *inspection) add(kind string, pid, fd int, detail, remedy string) {
	if len(in.report.Problems) < maxProblems {
		in.report.Problems = append(in.report.Problems, Problem{kind, pid, fd, detail, remedy})
	}
}

// whole finds what concerns the tree's root.
func (in *inspection) whole() error {
	st, err := status(in.root)
	if err != nil {
		return err
	}
	if in.tree[os.Getpid()] {
		in.add("own process", in.root, -1, "ftckpt itself is in its tree", "give the id of the server, not of a shell or of an ancestor of ftckpt")
	}
	if strings.HasPrefix(st["State"], "Z") {
		in.add("zombie", in.root, -1, "it has ended already", "start the server again")
	}
	if st["Kthread"] == "1" {
		in.add("kernel thread", in.root, -1, st["Name"], "give the id of a server")
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", in.root)); err == nil {
		in.report.Exe = exe
		if strings.HasSuffix(exe, " (deleted)") {
			in.add("deleted program", in.root, -1, exe, "restart the server: its program was replaced since it was started, and a standby would not have it")
		}
	}
	return nil
}

// status reads /proc/PID/status.
func status(pid int) (map[string]string, error) {
	st, err := procfs.Status(pid)
	if procfs.Gone(err) {
		return nil, checkpoint.ErrNoProcess
	}
	return st, err
}

// task inspects one process of the tree.
func (in *inspection) task(pid int) error {
	st, err := status(pid)
	if err != nil {
		if errors.Is(err, checkpoint.ErrNoProcess) {
			return fs.ErrNotExist
		}
		return err
	}
	if strings.HasPrefix(st["State"], "Z") {
		return nil // has nothing open
	}
	if tracer := st["TracerPid"]; tracer != "0" && tracer != "" {
		in.add("traced", pid, -1, "by process "+tracer, "detach that debugger or strace: a process has one tracer at a time, and criu must be it")
	}
	for _, ns := range []string{"pid", "pid_for_children"} {
		own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err != nil {
			if ns == "pid_for_children" {
				continue // none made in it yet
			}
			return err
		}
		root, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", in.root))
		if err != nil {
			return err
		}
		if own != root {
			in.add("nested PID namespace", pid, -1, own, "criu dumps one PID namespace: give the id of a process inside, or run the server without a container of its own")
			break
		}
	}
	if err := in.descriptors(pid); err != nil {
		return err
	}
	return in.mappings(pid)
}

func (in *inspection) descriptors(pid int) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		path := filepath.Join(dir, e.Name())
		to, err := os.Readlink(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed while we looked
		}
		if err != nil {
			return err
		}
		in.descriptor(pid, fd, path, to)
	}
	return nil
}

// mappings finds what is mapped although its descriptor may be closed.
func (in *inspection) mappings(pid int) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	seen := make(map[string]bool)
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		fields := strings.SplitN(sc.Text(), " ", 6)
		if len(fields) < 6 {
			continue
		}
		name := strings.TrimSpace(fields[5])
		if seen[name] {
			continue
		}
		seen[name] = true
		switch {
		case strings.HasPrefix(name, "/SYSV"):
			if own, err := ownIPC(pid); err == nil && !own {
				in.add("SysV shared memory", pid, -1, name, "run the server in an IPC namespace of its own (unshare --ipc, or PrivateIPC=yes), or have it use shm_open")
			}
		case strings.HasPrefix(name, "/secretmem"):
			in.add("memfd_secret", pid, -1, "mapped", remedies["memfd_secret"])
		case strings.HasPrefix(name, "anon_inode:"):
			if kind, ok := anonKind(name); ok && kind != "" {
				in.add(kind, pid, -1, "mapped", remedies[kind])
			}
		}
	}
	return sc.Err()
}

// ownIPC reports whether a process has an IPC namespace that is not ours; criu
// then carries what is in it.
func ownIPC(pid int) (bool, error) {
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/ipc", pid))
	if err != nil {
		return false, err
	}
	ours, err := os.Readlink("/proc/self/ns/ipc")
	return theirs != ours, err
}

// listeners lists the tree's listening sockets, and calls it a problem when there
// are none.
func (in *inspection) listeners() error {
	l := &in.report.Listeners
	var tables []string
	for _, name := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", in.root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		tables = append(tables, lines...)
		for _, line := range lines {
			addr, inode, ok := parseListener(line)
			if !ok {
				continue
			}
			if h, ours := in.sockets[inode]; ours {
				*l = append(*l, Listener{addr, h.pid, h.fd})
			}
		}
	}
	sort.Slice(*l, func(i, j int) bool { return (*l)[i].Addr.Compare((*l)[j].Addr) < 0 })
	in.opened(tables)
	if len(*l) == 0 {
		in.add("no listener", in.root, -1, "neither it nor a child listens on TCP", "give the id of the process that serves (ss -tlnp shows it), or wait until it listens")
	}
	return nil
}
