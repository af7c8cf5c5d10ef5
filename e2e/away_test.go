package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/lab"
)

// stoppingCRIU is the real one, which is stopped in the middle of a restore for as
// long as a file says so.
const stoppingCRIU = `#!/bin/sh
[ "$1" = swrk ] && [ -e %[1]q ] || exec %[2]q "$@"
%[2]q "$@" &
sleep 0.03
kill -STOP $!
echo $! > %[1]q.stopped
while [ -e %[1]q ]; do sleep 0.02; done
kill -CONT $!
wait $!
`

// slowRestore makes the restores of daemons that are started from now on stop, until
// resume is called.
func (w *world) slowRestore() (stopped func() bool, resume func()) {
	w.Helper()
	criu, err := checkpoint.Locate(w.Context(), "")
	w.must(err)
	file, script := filepath.Join(w.dir, "restore-stops"), filepath.Join(w.dir, "stopping-criu")
	w.must(os.WriteFile(script, fmt.Appendf(nil, stoppingCRIU, file, criu.Path), 0o755))
	w.must(os.WriteFile(file, nil, 0o644))
	w.Setenv("FTCKPT_CRIU", script)
	stopped = func() bool {
		b, err := os.ReadFile(file + ".stopped")
		return err == nil && len(b) > 0
	}
	resume = func() {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			w.Error(err)
		}
	}
	w.Cleanup(resume)
	return stopped, resume
}

// outage is how long services are away: short in make test.
func outage(t *testing.T, short time.Duration) time.Duration {
	s := os.Getenv("FTCKPT_E2E_OUTAGE")
	if s == "" {
		return short
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("FTCKPT_E2E_OUTAGE: %v", err)
	}
	return d
}

// asker is a client of many small requests, whose answers it reads in the end.
type asker struct {
	*raw
	asked int
}

func (k *asker) ask() error {
	k.asked++
	return k.send(command("ECHO", fmt.Sprintf("%s %d", k.name(), k.asked)))
}

func (k *asker) answers() error {
	for i := range k.asked {
		if err := k.expect(bulk(fmt.Sprintf("%s %d", k.name(), i+1))); err != nil {
			return fmt.Errorf("answer %d of %d: %w", i+1, k.asked, err)
		}
	}
	return k.quiet()
}

// While a restore takes its time, clients' requests are logged and acknowledged: no
// retransmission timer backs off, and what was acknowledged is not lost even if
// that takeover dies in the middle and another node has to do it.
func TestAway(t *testing.T) {
	for _, c := range []struct {
		name string
		ends func(w *world, standby *agent, log *agent, resume func()) *lab.Host // answers who serves then
	}{
		{"slow-restore", func(w *world, _, _ *agent, resume func()) *lab.Host {
			resume()
			return w.standby
		}},
		{"host-dies", func(w *world, _, _ *agent, _ func()) *lab.Host {
			w.must(w.standby.Kill())
			return w.logHost
		}},
		{"agent-dies", func(w *world, standby, log *agent, _ func()) *lab.Host {
			standby.kill()
			w.Setenv("FTCKPT_CRIU", "")
			w.startStandby(w.standby, log.join)
			return w.standby
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			stall := outage(t, 6*time.Second)
			if c.name != "slow-restore" {
				stall = time.Second
			}
			log := w.startLog()
			redis := w.startRedis(w.primary)
			stopped, resume := w.slowRestore()
			standby := w.startStandby(w.standby, log.join)
			w.Setenv("FTCKPT_CRIU", "")
			w.protect(redis.PID(), log.join)
			idle, up := w.dial(), w.dial()
			var askers []*asker
			for range 4 {
				askers = append(askers, &asker{raw: w.dial()})
			}
			w.checkpoint(w.primary, w.standby)
			young := &asker{raw: w.dial()}
			askers = append(askers, young)
			value := noise(w.seed, 24<<20)
			uploading := up.upload("up", value, time.Second)
			w.reached(uploading, 4<<20)

			if c.name == "slow-restore" {
				redis.kill(w)
			} else {
				w.must(w.primary.Kill())
			}
			w.until("the restore is stopped", stopped)
			if c.name == "host-dies" { // the third node finds a takeover under way, and only follows
				w.startStandby(w.logHost, log.join)
			}
			moved := uploading.moved.Load()
			begin := time.Now()
			for time.Since(begin) < stall {
				for _, k := range askers {
					w.must(k.ask())
				}
				time.Sleep(50 * time.Millisecond)
				if time.Since(begin) < stall/2 {
					continue
				}
				for _, k := range askers {
					if s := w.tcpInfo(k.raw); s.Backoff > 1 || s.Retransmits > 1 {
						t.Fatalf("%s backs off while the server is away: %+v", k.name(), s)
					}
				}
			}
			for _, k := range askers {
				w.until("all that was asked is acknowledged", func() bool { return w.tcpInfo(k.raw).Unacked == 0 })
				s := w.tcpInfo(k.raw)
				t.Logf("%s after %v: acknowledged %d, timeout %v", k.name(), stall, s.Acked, s.Timeout)
				if s.Timeout > time.Second {
					t.Errorf("%s: timeout %v", k.name(), s.Timeout)
				}
			}
			s := w.tcpInfo(up)
			t.Logf("the upload: %d octets acknowledged, timeout %v; the program got rid of %d meanwhile", s.Acked, s.Timeout, uploading.moved.Load()-moved)
			if c.name == "host-dies" {
				w.untilStatus(w.logHost, "it follows", func(s control.Status) bool {
					return s.Role == control.RoleStandby && s.Epoch == 2 && s.Generation.ID > 0
				})
			}

			host := c.ends(w, standby, log, resume)
			w.takenOver(host, 0)
			for _, k := range askers {
				w.check(k.answers())
			}
			w.check(<-uploading.done, idle.quiet(), idle.ask("still here"))
			w.check(up.get("up", value))
		})
	}
}

// Nobody is there: the primary's host is dead and no standby lives, for as long as
// FTCKPT_E2E_OUTAGE says (a minute, say). Clients' retransmission timers back off
// all the while; when a standby begins at last no connection is lost, and none sits
// its timer out.
func TestNobodyThere(t *testing.T) {
	if os.Getenv("FTCKPT_E2E_OUTAGE") == "" {
		t.Skip("FTCKPT_E2E_OUTAGE=60s runs it")
	}
	w := newWorld(t)
	log := w.startLog()
	redis := w.startRedis(w.primary)
	standby := w.startStandby(w.standby, log.join)
	w.protect(redis.PID(), log.join)
	idle, half, up, down := w.dial(), w.dial(), w.dial(), w.dial()
	for _, k := range []*raw{idle, half, up, down} {
		k.longer = outage(t, 0)
	}
	value := noise(w.seed, 24<<20)
	if err := <-down.upload("down", value, 0).done; err != nil {
		t.Fatal(err)
	}
	w.checkpoint(w.primary, w.standby)
	standby.stop()
	w.must(half.send([]byte("*2\r\n$4\r\nECHO\r\n$4\r\nha")))
	uploading := up.upload("up", value, 2*time.Second)
	downloading := down.download("down", value, 2*time.Second, 0, nil)
	w.reached(uploading, 4<<20)
	w.reached(downloading, 1<<20)
	w.must(w.primary.Kill())
	w.must(half.send([]byte("lf\r\n")))
	time.Sleep(outage(t, 0))
	before := map[string]tcpInfo{"half a request": w.tcpInfo(half), "upload": w.tcpInfo(up)}
	sent, got := w.tcpInfo(up).Acked, downloading.moved.Load()
	begin := time.Now()
	w.startStandby(w.standby, log.join)
	proceeds := map[string]time.Duration{}
	live := time.Duration(0)
	answered := make(chan error, 1)
	go func() { answered <- half.expect(bulk("half")) }()
	w.until("all of them go on", func() bool {
		at := time.Since(begin)
		note := func(what string, yes bool) {
			if _, known := proceeds[what]; yes && !known {
				proceeds[what] = at
			}
		}
		if s, ok := w.status(w.standby); ok && s.Role == control.RolePrimary && live == 0 {
			live = at
		}
		select {
		case err := <-answered:
			w.must(err)
			note("half a request", true)
		default:
		}
		note("upload", w.tcpInfo(up).Acked > sent)
		note("download", downloading.moved.Load() > got)
		return live > 0 && len(proceeds) == 3
	})
	for what, at := range proceeds {
		t.Logf("%s: backed off to %v (%d times), and goes on %v after live", what, before[what].Timeout, before[what].Backoff, (at - live).Round(time.Millisecond))
		if at-live > 3*time.Second {
			t.Errorf("%s goes on %v after live", what, at-live)
		}
	}
	w.takenOver(w.standby, 0)
	w.check(idle.quiet(), idle.ask("still here"), <-uploading.done, <-downloading.done)
	w.check(up.get("up", value))
}
