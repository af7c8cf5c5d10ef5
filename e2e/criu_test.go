package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// fakeCRIUScript is the real one, which does what its mode file says when it is to
// dump.
const fakeCRIUScript = `#!/bin/sh
mode=$(cat %[1]q)
[ "$1" = swrk ] || mode=work
case $mode in
work) exec %[2]q "$@" ;;
refuse) echo "not today" >&2; exit 1 ;;
half) ulimit -f 64; exec %[2]q "$@" ;; # the first large image file fails
killed | told)
	[ $mode = told ] && sig=TERM || sig=KILL
	%[2]q "$@" &
	sleep 0.0$(($(od -An -N1 -tu1 /dev/urandom) %% 10 * 5 + 10))
	kill -$sig $!
	wait $! ;;
esac
`

// fakeCRIU puts one in the place of the real one for all daemons started from
// now on, and answers how to set its mode.
func (w *world) fakeCRIU() (set func(mode string)) {
	w.Helper()
	real, err := checkpoint.Locate(w.Context(), "")
	w.must(err)
	modeFile, fake := filepath.Join(w.dir, "criu-mode"), filepath.Join(w.dir, "criu")
	set = func(mode string) { w.must(os.WriteFile(modeFile, []byte(mode), 0o644)) }
	set("work")
	w.must(os.WriteFile(fake, fmt.Appendf(nil, fakeCRIUScript, modeFile, real.Path), 0o755))
	w.Setenv("FTCKPT_CRIU", fake)
	return set
}

// A CRIU that fails, in whatever way, costs a generation and nothing else.
func TestCRIUFails(t *testing.T) {
	for _, mode := range []string{"refuse", "half", "told", "killed"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorld(t)
			set := w.fakeCRIU()
			redis := w.startRedis(w.primary)
			standby := w.startStandby(w.standby, "")
			if mode == "refuse" { // from the very beginning: there is no generation yet
				set(mode)
				w.tryProtect(redis.PID(), standby.join)
				s := w.untilStatus(w.primary, "why there is no generation", func(s control.Status) bool { return strings.Contains(s.Reason, "no generation yet: ") })
				if s.Protected {
					t.Error("protected without a generation")
				}
				set("work")
				w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected })
			} else {
				w.protect(redis.PID(), standby.join)
			}
			l := w.startLoad(loadgen.Config{Redis: 7, Half: 1, PaceUS: 2000})
			good := w.checkpoint(w.primary, w.standby)

			set(mode)
			gone := false
			for range 3 {
				code, out, errs := w.cli(w.primary, "checkpoint")
				switch {
				case code == exitcode.OK && (mode == "told" || mode == "killed"): // too late for it
				case code != exitcode.Failed || out != "" || strings.Count(errs, "\n") != 1:
					t.Errorf("checkpoint: status %d, %q, %q", code, out, errs)
				}
				l.past(time.Now())
				// Foreign code in a server whose tracer was killed may end it, and
				// no agent can prevent that; to clients it is a death like others.
				select {
				case <-redis.Done():
					gone = mode == "killed"
				default:
				}
				if gone {
					break
				}
				w.unharmed(redis)
			}
			if gone {
				t.Logf("the server died: %v", redis.Exit())
				w.takenOver(w.standby, 0)
				l.finish()
				return
			}
			s, _ := w.status(w.primary)
			if mode != "told" && mode != "killed" && (!s.Protected || s.Generation.ID < good.ID) {
				t.Errorf("after failed generations: protected %v by generation %d (%s), want it by %d or later", s.Protected, s.Generation.ID, s.Reason, good.ID)
			}
			set("work")
			if again := w.checkpoint(w.primary, w.standby); again.ID <= good.ID {
				t.Errorf("generation %d came after %d", again.ID, good.ID)
			}
			redis.kill(w)
			died := time.Now()
			w.takenOver(w.standby, 0)
			l.past(died)
			l.finish()
		})
	}
}
