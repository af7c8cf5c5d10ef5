package node

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	// mercy is how long the FIN and RST of a process of the tree wait that was
	// killed while the root lives: who kills a whole tree kills its processes one
	// after the other, and the root may be the last.
	mercy = 100 * time.Millisecond
	// treeAge is how old a list of the tree's processes may be.
	treeAge = time.Second
	// mourning is how long a process that nobody waits for counts as just killed.
	mourning = time.Second
)

// tree looks after the processes below a service's root: an nginx has workers. It
// is not safe for concurrent use.
type tree struct {
	root   int
	below  []int
	listed time.Time
	died   map[int]time.Time // when a process was first seen dead
}

func newTree(root int) *tree { return &tree{root: root, died: map[int]time.Time{}} }

// killed reports whether a process below the root was killed a moment ago. One
// that ends by itself is not meant: what its kernel says to clients is the
// application's doing.
func (t *tree) killed(now time.Time) bool {
	if now.Sub(t.listed) > treeAge {
		t.below, t.listed = descendants(t.root, nil), now
	}
	yes := false
	dead := map[int]time.Time{}
	for _, pid := range t.below {
		// Gone means that its parent has waited for it: that one was not killed.
		if life, there := tcpwrap.LifeOf(pid); !there || life != tcpwrap.Died {
			continue
		}
		since, known := t.died[pid]
		if !known {
			since = now
		}
		dead[pid] = since
		yes = yes || now.Sub(since) < mourning
	}
	t.died = dead
	return yes
}

// maxTree bounds what is looked at for each FIN.
const maxTree = 1024

// descendants lists the processes below pid, without a look at all others of the
// host (procfs.Tree): packets wait meanwhile.
func descendants(pid int, to []int) []int {
	lists, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/[0-9]*/children")
	if err != nil {
		return to
	}
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			continue // it has ended
		}
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil && len(to) < maxTree {
				to = descendants(n, append(to, n))
			}
		}
	}
	return to
}

// farewell is a FIN or RST of a process that was killed while its root lived.
type farewell struct {
	id    tcpwrap.PacketID
	seg   tcpwrap.Segment
	until time.Time
}

// defers keeps a FIN or RST back for a moment when a process of the tree was just
// killed, and perhaps all of it: clients of a service that is going to be taken
// over must not hear of its end. The caller holds mu.
func (d *driver) defers(now time.Time, id tcpwrap.PacketID, s *tcpwrap.Segment) bool {
	if d.tree == nil || len(d.farewells) >= maxFarewells || !d.tree.killed(now) {
		return false
	}
	f := farewell{id, *s, now.Add(mercy)}
	f.seg.Payload = append([]byte(nil), s.Payload...)
	f.seg.RawOptions = append([]byte(nil), s.RawOptions...)
	d.farewells = append(d.farewells, f)
	return true
}

// maxFarewells bounds the packets kept back; each is less than 64 KiB.
const maxFarewells = 4096

// settleFarewells judges those whose time has come: with the root alive, the death
// of one process was the application's affair. The caller holds mu.
func (d *driver) settleFarewells(now time.Time) {
	if len(d.farewells) == 0 {
		return
	}
	dying := d.dying()
	rest := d.farewells[:0]
	for i := range d.farewells {
		f := &d.farewells[i]
		if !dying && now.Before(f.until) {
			rest = append(rest, *f)
			continue
		}
		d.machine.Packet(now, f.id, &f.seg, dying)
	}
	clear(d.farewells[len(rest):])
	d.farewells = rest
}
