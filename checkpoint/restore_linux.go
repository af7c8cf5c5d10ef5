package checkpoint

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// RestoreRequest says what to restore and where.
type RestoreRequest struct {
	// Dir is the image: an absolute path that names the same directory here and
	// in the namespaces of InitPID. CRIU writes its log there.
	Dir string
	// InitPID is PID 1 of the capsule, as this process sees it: a process that
	// reaps, with /proc of its PID namespace mounted. The tree is restored in all
	// of its namespaces and becomes its child. 0 restores in our own namespaces,
	// where every process id of the image has to be free.
	InitPID int
	// BeforeResume is called when everything is restored and nothing runs yet,
	// with the root's process id in its own PID namespace. May be nil.
	BeforeResume func(pid int) error
}

// Restored is a tree that runs again.
type Restored struct {
	PID      int           // of the root, as this process sees it
	InnerPID int           // of the root, in its own PID namespace
	Took     time.Duration // from the start of CRIU to the tree running
}

// Restore brings back an image, which stays as it is but for restore.log. CRIU
// refuses where a file of the image is missing or has another size; a file of the
// same size is believed, so check Manifest.Files first. After an error, or when
// ctx ended, give up the capsule: parts of the tree may be left in it.
func (c Criu) Restore(ctx context.Context, r RestoreRequest) (Restored, error) {
	var res Restored
	start := time.Now()
	if !filepath.IsAbs(r.Dir) {
		return res, fmt.Errorf("restore: image directory %q is not an absolute path", r.Dir)
	}
	tasks, err := ReadTree(r.Dir)
	if err != nil {
		return res, fmt.Errorf("restore: %w", err)
	}
	_ = os.Remove(filepath.Join(r.Dir, restoreLog)) // of an earlier try
	_ = c.Warm(ctx)                                 // it works without, slower
	argv := []string{c.Path}
	where := os.Getpid()
	if r.InitPID != 0 {
		where = r.InitPID
		// CRIU's own processes must not take the ids that it is to restore.
		// Only a process of the namespace can say where numbering goes on.
		argv = []string{"/bin/sh", "-c", `echo "$1" >/proc/sys/kernel/ns_last_pid; shift; exec "$@"`, "sh",
			fmt.Sprint(quietPIDs(tasks, quietRange)), c.Path}
	}
	s, err := startSwrk(argv, where, allNamespaces)
	if err != nil {
		return res, fmt.Errorf("restore: %w", err)
	}
	opts := commonOptions(r.Dir, restoreLog)
	opts.ShellJob = proto.Bool(foreignSession(tasks))
	err = s.run(ctx, rpc.CriuReqType_RESTORE, opts, func(script string, pid int32) error {
		if script != "post-restore" {
			return nil
		}
		res.InnerPID = int(pid)
		if r.BeforeResume == nil {
			return nil
		}
		return r.BeforeResume(int(pid))
	})
	if err != nil {
		return Restored{}, newCriuError("restore", r.Dir, restoreLog, err)
	}
	res.Took = time.Since(start)
	if res.InnerPID == 0 {
		res.InnerPID = tasks[0].PID
	}
	if res.PID, err = OuterPID(res.InnerPID, r.InitPID); err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	return res, nil
}

// quietRange is how many ids CRIU's own processes may need during a restore.
const quietRange = 64
