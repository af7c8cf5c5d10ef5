package e2e

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// What scripts see: status before, during and after protection, and a
// checkpoint's one line.
func TestStatusAndCheckpoint(t *testing.T) {
	w := newWorld(t)
	if code, out, errs := w.cli(w.primary, "status"); code != exitcode.Failed || out != "" || !strings.Contains(errs, "no service runs") {
		t.Errorf("status of nothing: %d, %q, %q", code, out, errs)
	}
	log := w.startLog()
	redis := w.startRedis(w.primary)
	w.protect(redis.PID(), log.join, "--interval", "0", "--name", "shop")
	w.dial()

	code, out, _ := w.cli(w.primary, "status", "--json")
	if code != exitcode.Unprotected {
		t.Errorf("status without a standby: %d, want %d", code, exitcode.Unprotected)
	}
	var fields map[string]any
	w.must(json.Unmarshal([]byte(out), &fields))
	for _, key := range []string{
		"service", "role", "epoch", "protected", "protected_since", "reason", "connections",
		"log", "generation", "held", "queue_drops", "divergences", "standbys",
	} {
		if _, ok := fields[key]; !ok {
			t.Errorf("status --json has no %q", key)
		}
	}
	for key, parts := range map[string][]string{
		"log":        {"url", "durability", "stable", "lag_records", "lag_bytes", "lag_us", "state"},
		"generation": {"id", "age_seconds", "bytes", "pause_us"},
		"held":       {"packets", "p50_us", "p99_us"},
	} {
		m, _ := fields[key].(map[string]any)
		for _, p := range parts {
			if _, ok := m[p]; !ok {
				t.Errorf("status --json has no %q in %q", p, key)
			}
		}
	}
	if fields["service"] != "shop" || fields["protected"] != false || fields["protected_since"] != nil || fields["reason"] != "no standby" {
		t.Errorf("status: %s", out)
	}
	if strings.Contains(out, strings.Split(log.join, ".")[1]) {
		t.Error("status shows the log's secret")
	}

	w.startStandby(w.standby, log.join, "--name", "shop")
	s := w.untilStatus(w.primary, "it is protected", func(s control.Status) bool { return s.Protected })
	if s.ProtectedSince == nil || s.Role != control.RolePrimary || s.Epoch != 1 || s.PID != redis.PID() || s.Connections != 1 || len(s.Standbys) != 1 || s.Generation.ID == 0 {
		t.Errorf("status of the primary: %+v", s)
	}
	s = w.untilStatus(w.standby, "it stands by", func(s control.Status) bool { return s.Protected })
	if s.Role != control.RoleStandby || s.Service != "shop" || s.Connections != 1 {
		t.Errorf("status of the standby: %+v", s)
	}

	before := s.Generation.ID
	if r := w.checkpoint(w.primary, w.standby); r.ID != before+1 || r.Bytes < 100_000 || r.PauseUS < 1000 || r.PauseUS > 2_000_000 {
		t.Errorf("checkpoint: %+v after generation %d", r, before)
	}
	if code, out, errs := w.cli(w.standby, "checkpoint"); code != exitcode.Failed || out != "" || !strings.Contains(errs, "ask the primary") {
		t.Errorf("checkpoint on the standby: %d, %q, %q", code, out, errs)
	}
	if code, out, errs := w.cli(w.primary, "checkpoint", "--name", "shoe"); code != exitcode.Failed || out != "" || !strings.Contains(errs, "shoe") {
		t.Errorf("checkpoint of another service: %d, %q, %q", code, out, errs)
	}
	if code, out, _ := w.cli(w.primary, "status"); code != exitcode.OK || !strings.Contains(out, "yes, since") || !strings.Contains(out, "standby-") {
		t.Errorf("status for people: %d\n%s", code, out)
	}
}

// The check command on a host of the lab, and of a process there.
func TestCheck(t *testing.T) {
	w := newWorld(t)
	redis := w.startRedis(w.primary)
	code, out, errs := w.cli(w.primary, "check")
	if code != exitcode.OK {
		t.Errorf("check: %d\n%s%s", code, out, errs)
	}
	code, out, errs = w.cli(w.primary, "check", "--json", "--pid", strconv.Itoa(redis.PID()))
	if code != exitcode.OK || !json.Valid([]byte(out)) {
		t.Errorf("check --pid --json: %d\n%s%s", code, out, errs)
	}
	if code, out, _ := w.cli(w.primary, "check", "--pid", "29999"); code != exitcode.Unsuitable {
		t.Errorf("check --pid of nobody: %d\n%s", code, out)
	}
	w.unharmed(redis)
}
