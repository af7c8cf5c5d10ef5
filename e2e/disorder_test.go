package e2e

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
)

// Frames are duplicated and overtake each other, each way, before, during and
// after a takeover: no byte is wrong and no connection is lost.
func TestDeathWithDisorder(t *testing.T) {
	w := newWorld(t)
	redis, _, _ := w.pair()
	const size = 8 << 20
	value := noise(w.seed, size)
	up, down := w.dial(), w.dial()
	w.must(<-down.upload("down", value, 0).done)
	for _, h := range []*lab.Host{w.client, w.primary, w.standby} {
		w.must(h.Disorder(3))
	}
	l := w.startLoad(busy)
	w.checkpoint(w.primary, w.standby)
	uploading := up.upload("up", value, 2*time.Second)
	downloading := down.download("down", value, 2*time.Second, 0, nil)
	w.reached(uploading, size/4)
	w.reached(downloading, size/8)
	redis.kill(w)
	died := time.Now()
	w.takenOver(w.standby, 0)
	l.past(died)
	w.check(<-uploading.done, <-downloading.done)
	for _, h := range []*lab.Host{w.client, w.primary, w.standby} {
		w.must(h.Disorder(0))
	}
	w.check(up.get("up", value), down.ask("and on"))
	l.finish()
	early, again := w.counter(w.client, "TCPOFOQueue"), w.counter(w.client, "TCPDSACKOldSent")
	t.Logf("the client's TCP saw %d segments ahead of their turn and %d twice", early, again)
	if again == 0 { // how many are overtaken is up to how they come
		t.Error("there was no disorder")
	}
}

// counter reads one of a host's TCP counters.
func (w *world) counter(h *lab.Host, name string) (n int) {
	w.Helper()
	var b []byte
	w.must(h.Do(func() (err error) { b, err = os.ReadFile("/proc/thread-self/net/netstat"); return err }))
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "TcpExt:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i := range names {
			if names[i] == name {
				var err error
				n, err = strconv.Atoi(f[i])
				w.must(err)
				return n
			}
		}
	}
	w.Fatalf("no TCP counter %s", name)
	return 0
}
