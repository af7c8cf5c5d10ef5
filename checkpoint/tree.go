package checkpoint

import (
	"fmt"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
)

// Task is one process of an image, with the ids it has in its own PID namespace.
type Task struct {
	PID     int   `json:"pid"`
	PPID    int   `json:"ppid"` // 0 for the root
	PGID    int   `json:"pgid"`
	SID     int   `json:"sid"`
	Threads []int `json:"threads"` // ids of all threads, the leader's included
}

// ReadTree reads the process tree of an image; the root comes first.
func ReadTree(dir string) ([]Task, error) {
	entries, err := decodeAll[pstree.PstreeEntry](dir, "pstree.img", magicPstree)
	if err != nil {
		return nil, err
	}
	tasks := make([]Task, 0, len(entries))
	for _, e := range entries {
		t := Task{PID: int(e.GetPid()), PPID: int(e.GetPpid()), PGID: int(e.GetPgid()), SID: int(e.GetSid())}
		for _, th := range e.GetThreads() {
			t.Threads = append(t.Threads, int(th))
		}
		tasks = append(tasks, t)
	}
	if len(tasks) == 0 {
		return nil, fmt.Errorf("read pstree.img: %w: no process", errImage)
	}
	return tasks, nil
}

// foreignSession reports whether a process of the tree belongs to a session or a
// group whose leader is not in the tree, which CRIU calls a shell job: it then
// gives the restored tree its own session instead.
func foreignSession(tasks []Task) bool {
	in := make(map[int]bool, len(tasks))
	for _, t := range tasks {
		in[t.PID] = true
	}
	for _, t := range tasks {
		if !in[t.SID] || !in[t.PGID] {
			return true
		}
	}
	return false
}

// quietPIDs returns a process id after which n ids are free of those in the
// image, so that CRIU, told to number its own processes from there, does not
// take one that it has to restore.
func quietPIDs(tasks []Task, n int) int {
	taken := make(map[int]bool)
	for _, t := range tasks {
		taken[t.PID], taken[t.PGID], taken[t.SID] = true, true, true
		for _, th := range t.Threads {
			taken[th] = true
		}
	}
	start, free := 100, 0
	for id := start + 1; free < n; id++ {
		if taken[id] {
			start, free = id, 0
			continue
		}
		free++
	}
	return start
}
