package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/stats"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

const (
	dumpLog    = "dump.log"
	restoreLog = "restore.log"

	// ghostLimit is how much of a deleted but open file goes into the image.
	ghostLimit = 64 << 20

	// logLevel 2 is errors and warnings: more costs milliseconds of pause.
	logLevel = 2
)

// DumpRequest says what to dump.
type DumpRequest struct {
	// PID is the root of the process tree, as this process sees it.
	PID int
	// InitPID is the capsule's init when the tree lives in a capsule: CRIU then
	// runs in all of that process's namespaces. 0 means CRIU runs in the
	// network, PID and mount namespaces of the target itself.
	InitPID int
	// Dir is where the image goes: an absolute path that names the same, empty
	// directory here and in the target's mount namespace. It is made if need be.
	Dir string
	// Hold is called just before the target is frozen. From its return on, until
	// Dump returns, no packet may pass in either direction. An error makes the
	// dump fail with it, the target untouched. May be nil.
	Hold func() error
	// Stop ends the target once its image is complete, without a word to its
	// clients, and waits until it is reaped. Otherwise it goes on.
	Stop bool
}

// DumpResult describes a dump that succeeded.
type DumpResult struct {
	Pause    time.Duration // from the call of Hold to Dump's return
	Frozen   time.Duration // how long the tree stood still, as CRIU measured it
	Pages    int64         // memory pages written
	Bytes    int64         // size of all image files
	ShellJob bool          // session or group leader is not in the tree
}

// Dump writes an image of a process tree. Errors are a *CriuError where CRIU
// refused or failed; the target then runs on as if nothing had been. When ctx
// ends, Dump still waits for CRIU to let go of the target, which takes milliseconds.
// Dump may be called from several goroutines for different targets.
func (c Criu) Dump(ctx context.Context, r DumpRequest) (DumpResult, error) {
	var res DumpResult
	tasks, err := ProcTree(r.PID)
	if err != nil {
		return res, fmt.Errorf("dump pid %d: %w", r.PID, err)
	}
	res.ShellJob = foreignSession(tasks)
	_ = c.Warm(ctx) // it works without, slower
	if err := emptyDir(r.Dir); err != nil {
		return res, fmt.Errorf("dump pid %d: %w", r.PID, err)
	}
	where, names := r.PID, dumpNamespaces
	if r.InitPID != 0 {
		where, names = r.InitPID, allNamespaces
	}
	inner, err := innerPID(r.PID)
	if err != nil {
		return res, fmt.Errorf("dump pid %d: %w", r.PID, err)
	}
	s, err := startSwrk([]string{"/bin/sh", "-c", shield, "sh", c.Path}, where, names)
	if err != nil {
		return res, fmt.Errorf("dump pid %d: %w", r.PID, err)
	}
	s.spare()
	opts := commonOptions(r.Dir, dumpLog)
	opts.Pid = proto.Int32(int32(inner))
	opts.LeaveRunning = proto.Bool(!r.Stop)
	opts.ShellJob = proto.Bool(res.ShellJob)
	opts.TcpSkipInFlight = proto.Bool(true)
	var held time.Time
	err = s.run(ctx, rpc.CriuReqType_DUMP, opts, func(script string, _ int32) error {
		if script != "pre-dump" {
			return nil
		}
		held = time.Now()
		if r.Hold == nil {
			return nil
		}
		if err := r.Hold(); err != nil {
			return fmt.Errorf("hold packets: %w", err)
		}
		return nil
	})
	res.Pause = time.Since(held)
	if err != nil {
		if _, herr := heal(tasks); herr != nil {
			err = errors.Join(err, herr)
		}
		return DumpResult{}, newCriuError("dump", r.Dir, dumpLog, err)
	}
	if r.Stop {
		awaitGone(ctx, tasks)
	}
	return res, res.measure(r.Dir)
}

// awaitGone waits until the tree is ended and reaped, so that its process ids
// are free, but not for ever: its parent may not care to reap.
func awaitGone(ctx context.Context, tasks []Task) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, t := range tasks {
		for {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", t.PID)); err != nil {
				break
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}
}

// commonOptions are the options of dump and restore that were found to work
// together.
func commonOptions(dir, log string) *rpc.CriuOpts {
	return &rpc.CriuOpts{
		// By path: a descriptor cannot be handed across PID namespaces.
		ImagesDirFd: proto.Int32(-1),
		ImagesDir:   proto.String(dir),
		LogFile:     proto.String(log),
		LogLevel:    proto.Int32(logLevel),

		TcpEstablished: proto.Bool(true),
		// The caller holds packets; CRIU's own locks drop them, which costs the
		// client a retransmission timeout.
		NetworkLock: rpc.CriuNetworkLockMethod_SKIP.Enum(),

		ManageCgroups:     proto.Bool(true),
		ManageCgroupsMode: rpc.CriuCgMode_IGNORE.Enum(),
		ExtUnixSk:         proto.Bool(true),
		FileLocks:         proto.Bool(true),
		LinkRemap:         proto.Bool(true),
		GhostLimit:        proto.Uint32(ghostLimit),
	}
}

var (
	dumpNamespaces = map[string]bool{"net": true, "pid": true, "mnt": true}
	allNamespaces  = map[string]bool{"net": true, "pid": true, "mnt": true, "ipc": true, "uts": true, "cgroup": true}
)

// emptyDir makes dir, or checks that it is empty: CRIU would mix two images.
func emptyDir(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("make image directory: %q is not an absolute path", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make image directory: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open image directory: %w", err)
	}
	defer d.Close()
	if names, _ := d.Readdirnames(1); len(names) > 0 {
		return fmt.Errorf("make image directory: %s is not empty", dir)
	}
	return nil
}

// measure fills in what the image itself tells.
func (r *DumpResult) measure(dir string) error {
	st, err := decodeAll[stats.StatsEntry](dir, "stats-dump", magicStats)
	if err != nil {
		return err
	}
	if len(st) != 1 || st[0].GetDump() == nil {
		return errors.New("read stats-dump: no dump statistics")
	}
	d := st[0].GetDump()
	r.Frozen = time.Duration(d.GetFrozenTime()) * time.Microsecond
	r.Pages = int64(d.GetPagesWritten() + d.GetShpagesWritten())
	files, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list image: %w", err)
	}
	for _, f := range files {
		if info, err := f.Info(); err == nil {
			r.Bytes += info.Size()
		}
	}
	return nil
}
