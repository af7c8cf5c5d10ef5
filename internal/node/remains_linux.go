package node

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/procfs"
)

// endServer is what becomes of a server that is not the service any more:
// without its clients it must not go on doing things to files and other hosts
// that its successor does as well. One in a capsule ends with the capsule.
func (p *primary) endServer() error {
	if p.where.initPID != 0 {
		return nil
	}
	var sig unix.Signal
	switch p.fencedServer {
	case config.FencedStop:
		sig = unix.SIGSTOP
	case config.FencedKill:
		sig = unix.SIGKILL
	default:
		return nil
	}
	n, err := signalTree(p.where.pid, sig)
	if n > 0 {
		p.log.Warn("the server here is not the service any more", "pid", p.where.pid, "processes", n, "signal", unix.SignalName(sig))
	}
	return err
}

// signalTree sends a signal to a process and its descendants, until a look finds
// nobody who has not had it: what is stopped or dead does not fork any more.
func signalTree(root int, sig unix.Signal) (n int, err error) {
	had := map[int]bool{}
	for {
		tree, err := procfs.Tree(root)
		if procfs.Gone(err) {
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("find the server's processes: %w", err)
		}
		anew := false
		for i, pid := range tree {
			if had[pid] {
				continue
			}
			had[pid], anew = true, true
			if err := signalChild(pid, i == 0, tree, sig); err != nil {
				return n, fmt.Errorf("send %s to process %d: %w", unix.SignalName(sig), pid, err)
			}
			n++
		}
		if !anew {
			return n, nil
		}
	}
}

// signalChild signals a process that still is the child of one of the tree: its
// number may be somebody else's by now. The root's own is kept by whoever
// watches it.
func signalChild(pid int, root bool, tree []int, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !root {
		f, err := procfs.Stat(pid)
		if err != nil {
			return nil // it has ended
		}
		parent, err := strconv.Atoi(f[procfs.PPID])
		if err != nil || !slices.Contains(tree, parent) {
			return nil
		}
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}
