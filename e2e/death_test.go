package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// busy is the load of the random failures: more than 10 connections, of all
// kinds.
var busy = loadgen.Config{
	Redis: 10, Upload: 1, Download: 1, Half: 2,
	PaceUS: 2000, TransferBytes: 2 << 20, TransferUS: 1_000_000,
}

// deaths are the two failures that everything must survive.
var deaths = []struct {
	name string
	do   func(w *world, redis *server)
}{
	{"process", func(w *world, redis *server) { redis.kill(w) }},
	{"host", func(w *world, _ *server) { w.must(w.primary.Kill()) }},
}

// pair is the usual set-up: redis, a standby with its own log, and protection.
func (w *world) pair() (redis *server, protect, standby *agent) {
	w.Helper()
	redis = w.startRedis(w.primary)
	standby = w.startStandby(w.standby, "")
	protect = w.protect(redis.PID(), standby.join)
	return redis, protect, standby
}

// The main job, at a random moment of a random load.
func TestDeathUnderLoad(t *testing.T) {
	for _, d := range deaths {
		for i := range runs(t) {
			t.Run(fmt.Sprintf("%s/%d", d.name, i), func(t *testing.T) {
				w := newWorld(t)
				redis, protect, _ := w.pair()
				l := w.startLoad(busy)
				idle := w.dial()
				w.checkpoint(w.primary, w.standby)
				w.somewhen(1500 * time.Millisecond)
				d.do(w, redis)
				died := time.Now()
				w.takenOver(w.standby, 0)
				l.past(died)
				w.check(idle.quiet(), idle.ask("still here"))
				l.finish()
				if d.name == "process" {
					protect.exits(exitcode.Failed)
				}
			})
		}
	}
}

// The same when the clients' link loses packets.
func TestDeathWithLoss(t *testing.T) {
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorld(t)
			redis, _, _ := w.pair()
			w.must(w.client.Loss(1))
			l := w.startLoad(busy)
			w.checkpoint(w.primary, w.standby)
			w.somewhen(time.Second)
			d.do(w, redis)
			died := time.Now()
			w.takenOver(w.standby, 0)
			l.past(died)
			w.must(w.client.Loss(0))
			l.finish()
		})
	}
}
