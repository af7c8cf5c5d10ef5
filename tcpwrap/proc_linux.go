package tcpwrap

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// pfExiting is PF_EXITING of the kernel's task flags (linux/sched.h): set
// before a dying process's files are closed, hence before TCP sends the FINs
// and RSTs of its sockets. Neither the pidfd nor the state says so that early.
const pfExiting = 0x4

// Life is how far a process has come.
type Life uint8

// The stages of a life.
const (
	Alive Life = iota
	Ended      // it exits, or has exited, by itself and with status 0: an end that it wanted
	Died       // it exits, or has exited, in any other way, or in one that cannot be told
)

// ProcWatch watches one process. It holds on to the process, not to its
// number: it is never mistaken when the kernel gives the number to another.
type ProcWatch struct {
	pid    int
	pidfd  int
	stat   int // /proc/PID/stat
	wake   int // eventfd: Close
	exited chan struct{}
	done   chan struct{} // the watching goroutine has ended

	mu     sync.Mutex
	closed bool
	buf    [1024]byte // of Life
}

// WatchProc watches the process pid. The error wraps unix.ESRCH when there is
// no such process. Close it after use.
func WatchProc(pid int) (*ProcWatch, error) {
	w := &ProcWatch{pid: pid, pidfd: -1, stat: -1, wake: -1, exited: make(chan struct{}), done: make(chan struct{})}
	err := func() (err error) {
		if w.pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			return err
		}
		if w.stat, err = unix.Open("/proc/"+strconv.Itoa(pid)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open its stat: %w", unix.ESRCH)
		}
		// Still there, so the number was not given away between the two.
		if err = unix.PidfdSendSignal(w.pidfd, 0, nil, 0); err != nil {
			return err
		}
		w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		return err
	}()
	if err != nil {
		w.closeFDs()
		return nil, fmt.Errorf("watch process %d: %w", pid, err)
	}
	go w.wait()
	return w, nil
}

// Exited is closed when the process has exited: later than Dying sees it.
func (w *ProcWatch) Exited() <-chan struct{} { return w.exited }

// Dying reports whether the process is going down otherwise than by its own
// will: what its kernel then says to its peers is not the server's word.
func (w *ProcWatch) Dying() bool { return w.Life() == Died }

// Life reports how far the process has come, as soon as its kernel knows: before
// its files are closed. One read of procfs, no allocation. After Close it
// answers Died.
func (w *ProcWatch) Life() Life {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return Died
	}
	for {
		n, err := unix.Pread(w.stat, w.buf[:], 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return w.afterlife()
		}
		return lifeIn(w.buf[:n])
	}
}

// afterlife asks for the status of a process that its parent has waited for
// (Linux 6.15; what an older kernel has forgotten counts as Died).
func (w *ProcWatch) afterlife() Life {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if w.pidfd < 0 || unix.IoctlPidfdInfo(w.pidfd, &info) != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 || info.Exit_code != 0 {
		return Died
	}
	return Ended
}

// Close stops watching. It does not touch the process.
func (w *ProcWatch) Close() error {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	w.closed = true
	w.mu.Unlock()
	one := [8]byte{0: 1, 7: 1} // not zero in either byte order
	if _, err := unix.Write(w.wake, one[:]); err != nil {
		return fmt.Errorf("stop watching process %d: %w", w.pid, err)
	}
	<-w.done
	w.closeFDs()
	return nil
}

func (w *ProcWatch) wait() {
	defer close(w.done)
	fds := []unix.PollFd{{Fd: int32(w.pidfd), Events: unix.POLLIN}, {Fd: int32(w.wake), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); errors.Is(err, unix.EINTR) {
			continue
		}
		if fds[0].Revents != 0 {
			close(w.exited)
		}
		return
	}
}

func (w *ProcWatch) closeFDs() {
	for _, fd := range []int{w.pidfd, w.stat, w.wake} {
		if fd >= 0 {
			_ = unix.Close(fd) // nothing was written to it
		}
	}
}

// Dying reports whether process pid is exiting, a zombie or gone. Who asks
// often watches it instead (WatchProc).
func Dying(pid int) bool {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	w := ProcWatch{stat: fd, pidfd: -1}
	return w.Life() != Alive
}

// LifeOf is how far process pid has come; there is false when it is gone, or was
// never there.
func LifeOf(pid int) (life Life, there bool) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Died, false
	}
	defer unix.Close(fd)
	var buf [1024]byte
	n, err := unix.Pread(fd, buf[:], 0)
	if err != nil {
		return Died, false
	}
	return lifeIn(buf[:n]), true
}

// lifeIn reads a line of /proc/PID/stat (proc_pid_stat(5)): state is field 3,
// flags field 9, the exit code the last one, counted after the command's closing
// parenthesis, for the command may hold anything. The exit code is that of the
// whole process, set before its files are closed. What cannot be read counts as
// Died: the one who asks then drops a FIN instead of showing it to a client.
func lifeIn(b []byte) Life {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || i+2 >= len(b) {
		return Died
	}
	b = bytes.TrimRight(b[i+2:], "\n")
	going := b[0] == 'Z' || b[0] == 'X'
	rest := b
	for range 6 {
		sp := bytes.IndexByte(rest, ' ')
		if sp < 0 {
			return Died
		}
		rest = rest[sp+1:]
	}
	var flags uint64
	digits := 0
	for ; digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9'; digits++ {
		flags = flags*10 + uint64(rest[digits]-'0')
	}
	switch {
	case digits == 0:
		return Died
	case !going && flags&pfExiting == 0:
		return Alive
	case bytes.Count(b, []byte(" ")) == exitCode-stateField && bytes.HasSuffix(b, []byte(" 0")):
		return Ended
	}
	return Died
}

// Fields of /proc/PID/stat, counted from 1.
const (
	stateField = 3
	exitCode   = 52
)
