package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/lab"
)

// failover moves the service away from a host, planned.
func (w *world) failover(from *lab.Host, args ...string) control.FailoverResult {
	w.Helper()
	code, out, errs := w.cli(from, append([]string{"failover", "--json"}, args...)...)
	var res control.FailoverResult
	if err := json.Unmarshal([]byte(out), &res); code != exitcode.OK || err != nil {
		w.Fatalf("failover: status %d, %q %q", code, out, errs)
	}
	return res
}

// A service moves to and fro under load and nobody notices but for a moment's
// wait: each host that gave it away stands by for the other.
func TestFailover(t *testing.T) {
	w := newWorld(t)
	redis, protect, standby, log := w.trio()
	l := w.startLoad(busy)
	idle := w.dial()
	w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected })

	if code, _, errs := w.cli(w.standby, "failover"); code != exitcode.Failed || !strings.Contains(errs, "this node is a standby: ask the primary") {
		t.Errorf("failover of a standby: status %d, %q", code, errs)
	}
	if res := w.failover(w.primary, "--dry-run"); !res.DryRun || res.To == "" || res.Generation == 0 {
		t.Errorf("dry run: %+v", res)
	}
	if s, ok := w.status(w.primary); !ok || s.Role != control.RolePrimary || s.Epoch != 1 {
		t.Errorf("after a dry run: %+v", s)
	}

	from, to := w.primary, w.standby
	agent, next := protect, standby
	for hop := range 3 {
		w.somewhen(300 * time.Millisecond)
		asked := time.Now()
		res := w.failover(from)
		t.Logf("hop %d: clients held for %.0f ms", hop+1, float64(res.StallUS)/1000)
		if s := w.takenOver(to, 0); s.Epoch != uint64(hop+2) || s.Node != res.To {
			t.Errorf("hop %d: epoch %d on %s, not on %s", hop+1, s.Epoch, s.Node, res.To)
		}
		agent.exits(exitcode.OK)
		w.gone(from)
		if hop == 0 {
			w.stopped(redis)
		}
		w.check(idle.quiet(), idle.ask(fmt.Sprintf("hop %d", hop+1)))
		l.past(asked)

		agent, next = next, w.startStandby(from, log.join)
		from, to = to, from
		w.untilStatus(from, "the new primary is protected", func(s control.Status) bool { return s.Protected })
	}
	if r := l.finish(); r.StallUS > 5_000_000 {
		t.Errorf("a client waited %d ms for a planned move", r.StallUS/1000)
	}
}

// The standby that is to take over does not: the clients go on where they are.
func TestFailoverNotTakenUp(t *testing.T) {
	w := newWorld(t)
	log := w.startLog()
	redis := w.startRedis(w.primary)
	w.protect(redis.PID(), log.join)
	l := w.startLoad(busy)
	w.protectedOnly(log.join)

	code, out, errs := w.cli(w.primary, "failover", "--to", "ghost")
	if code != exitcode.Failed || out != "" || !strings.Contains(errs, "the service stays here: standby ghost has not taken over") {
		t.Errorf("failover to a ghost: status %d, %q %q", code, out, errs)
	}
	back := time.Now()
	l.past(back)
	if s, ok := w.status(w.primary); !ok || s.Role != control.RolePrimary || s.Epoch != 1 {
		t.Errorf("after a failover that did not happen: %+v", s)
	}
	code, _, errs = w.cli(w.primary, "failover", "--to", "nobody")
	if want := `ftckpt: default: cannot move the service: no standby "nobody"; there is ghost` + "\n"; code != exitcode.Failed || errs != want {
		t.Errorf("failover to nobody: status %d, %q", code, errs)
	}
	w.startStandby(w.standby, log.join)
	w.checkpoint(w.primary, w.standby)
	redis.kill(w)
	died := time.Now()
	w.takenOver(w.standby, 0) // the offer to the ghost is no offer any more, and no obstacle
	l.past(died)
	l.finish()
}

// protectedOnly starts a standby that is none (see ghost) and waits until the
// primary believes in it.
func (w *world) protectedOnly(join string) {
	w.Helper()
	self, err := os.Executable()
	w.must(err)
	g, err := w.standby.Start(lab.Service{Name: "ghost", Args: []string{self, ghostArg, "ghost"}, Env: []string{"FTCKPT_JOIN=" + join}})
	w.must(err)
	w.Cleanup(func() {
		_ = g.Signal(syscall.SIGKILL)
		<-g.Done()
	})
	w.untilStatus(w.primary, "it has a standby", func(s control.Status) bool { return len(s.Standbys) == 1 })
}

// What becomes of the server that was replaced is the user's choice.
func TestFencedServer(t *testing.T) {
	for _, choice := range []string{"kill", "leave"} {
		t.Run(choice, func(t *testing.T) {
			w := newWorld(t)
			log := w.startLog()
			redis := w.startRedis(w.primary)
			w.startStandby(w.standby, log.join)
			protect := w.protect(redis.PID(), log.join, "--fenced-server", choice)
			w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected })
			idle := w.dial()
			w.failover(w.primary)
			protect.exits(exitcode.OK)
			w.check(idle.ask("moved"))
			if choice == "leave" {
				w.unharmed(redis)
				return
			}
			<-redis.Done()
			if code := statusOf(redis.Exit()); code != -1 || !strings.Contains(fmt.Sprint(redis.Exit()), syscall.SIGKILL.String()) {
				t.Errorf("the server ended with %v", redis.Exit())
			}
		})
	}
}
