package e2e

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
)

// With --idle-expiry a connection that is idle leaves protection, loudly: a
// takeover resets it, also from an image that has it. One that speaks again is
// protected again, and one that keeps speaking always was.
func TestIdleExpiry(t *testing.T) {
	w := newWorld(t)
	redis := w.startRedis(w.primary)
	standby := w.startStandby(w.standby, "")
	protect := w.protect(redis.PID(), standby.join, "--interval", "1h", "--idle-expiry", "1s")
	idle, back, busy := w.dial(), w.dial(), w.dial()
	n := 0
	ask := func() {
		n++
		w.must(busy.ask(fmt.Sprint("busy ", n)))
	}
	w.untilStatus(w.primary, "two connections have expired", func(s control.Status) bool {
		ask()
		return s.Expired == 2
	})
	w.until("two lines say so", func() bool { return strings.Count(protect.said(), `"event":"expired"`) == 2 })
	w.must(back.ask("here again")) // once a generation has it
	w.checkpoint(w.primary, w.standby)
	ask()
	w.must(w.primary.Kill())
	w.takenOver(w.standby, 1)
	w.check(busy.ask("after"), back.ask("after"))
	if err := idle.quiet(); !errors.Is(err, syscall.ECONNRESET) {
		_ = idle.c.SetReadDeadline(time.Now().Add(patience))
		if _, err := idle.r.Peek(1); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the idle connection: %v, want a reset", err)
		}
	}
	if strings.Count(standby.said(), "no longer protected") != 1 {
		t.Error("the standby does not say why it has reset a connection")
	}
}
