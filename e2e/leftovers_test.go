package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
)

// survey is what a host has: lines, by kind.
type survey map[string][]string

// surveyScript lists everything that an agent could leave behind. Processes
// come as "PID STATE TRACER COMMAND"; its own are left out by their session.
const surveyScript = `
for d in /proc/[0-9]*; do
	p=${d#/proc/}
	[ "$p" = 1 ] || [ "$p" = $$ ] || [ ! -r $d/status ] || [ "$(cut -d' ' -f6 $d/stat 2>/dev/null)" = $$ ] ||
		echo "process $p $(sed -n 's/^State:\t\(.\).*/\1/p; s/^TracerPid:\t/tracer=/p' $d/status 2>/dev/null | tr '\n' ' ') $(tr '\0' ' ' <$d/cmdline 2>/dev/null | cut -c1-200)"
done
for t in iptables-nft iptables-legacy ip6tables-nft ip6tables-legacy; do
	$t-save 2>/dev/null | sed -n "s/^-A/rule $t -A/p"
done
ip -o link | sed 's/^[0-9]*: \([^:@]*\).*/link \1/'
sed 's/^\([^ ]* \)\{4\}\([^ ]*\) .* - \([^ ]*\) .*/mount \2 \3/' /proc/self/mountinfo
find /run/ftckpt /dev/shm ! -type d ! -name "*.lock" 2>/dev/null | sed "s/^/file /"
`

// look surveys a host.
func (w *world) look(h *lab.Host) survey {
	w.Helper()
	out, err := h.Command("/bin/sh", "-c", surveyScript).Output()
	if err != nil {
		w.Fatalf("survey %s: %v", h.Name(), err)
	}
	s := survey{}
	for line := range strings.Lines(string(out)) {
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		s[kind] = append(s[kind], rest)
	}
	return s
}

// compare fails the test for what a host has more than before.
func (w *world) compare(h *lab.Host, was survey) {
	w.Helper()
	var more []string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		more = nil
		for kind, lines := range w.look(h) {
			for _, l := range lines {
				if !slices.Contains(was[kind], l) {
					more = append(more, kind+" "+l)
				}
			}
		}
		// A killed process takes a moment to go.
		if len(more) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, m := range more {
		w.Errorf("left behind on %s: %s", h.Name(), m)
	}
}

// rules are the packet rules of a host.
func (w *world) rules(h *lab.Host) []string {
	w.Helper()
	return w.look(h)["rule"]
}

// killRestored ends what was restored on hosts: the service lives on in its
// capsule when its agent is told to stop, and the test has no handle of it. The
// capsule's state file is then nobody's but the next agent's.
func (w *world) killRestored() {
	for h := range w.before {
		if !h.Alive() {
			continue
		}
		var pids []string
		for _, p := range w.look(h)["process"] {
			f := strings.Fields(p)
			// nginx calls its processes "nginx: ...".
			if len(f) >= 4 && slices.ContainsFunc(w.servers, func(s *server) bool { return strings.TrimSuffix(filepath.Base(f[3]), ":") == s.name }) {
				pids = append(pids, f[0])
			}
		}
		if len(pids) == 0 {
			continue
		}
		all := strings.Join(pids, " ")
		// Stopped first, or a master would replace the worker that is killed before it.
		out, err := h.Command("sh", "-c", "kill -STOP "+all+" && kill -9 "+all+" && rm -f /run/ftckpt/capsule-*.json").CombinedOutput()
		if err != nil {
			w.Errorf("end the restored server (%s): %v: %s", all, err, out)
		}
	}
}

// unharmed fails the test if a server does not live, or is stopped or traced.
func (w *world) unharmed(p *server) {
	w.Helper()
	var state, tracer string
	// The tracer of the moment may be a dump that is just beginning.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		select {
		case <-p.Done():
			w.Errorf("the server is dead: %v", p.Exit())
			return
		default:
		}
		if state, tracer = w.processState(p); strings.Trim(state, "RSD") == "" && tracer == "0" {
			return
		}
		if time.Now().After(deadline) {
			w.Errorf("the server was left in state %q, traced by %s", state, tracer)
			return
		}
	}
}

// stopped fails the test unless a server that was replaced stands still.
func (w *world) stopped(p *server) {
	w.Helper()
	w.until("the server that was replaced stands still", func() bool {
		state, _ := w.processState(p)
		return state == "T"
	})
}

// processState is the state letter of a server and the PID that traces it.
func (w *world) processState(p *server) (state, tracer string) {
	w.Helper()
	out, err := p.host.Command("cat", fmt.Sprintf("/proc/%d/status", p.PID())).Output()
	if err != nil {
		w.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		switch {
		case len(f) > 1 && f[0] == "State:":
			state = f[1]
		case len(f) > 1 && f[0] == "TracerPid:":
			tracer = f[1]
		}
	}
	return state, tracer
}

// noProcesses fails the test for a process of the program that survived the
// lab.
func (w *world) noProcesses() {
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		w.Fatal(err)
	}
	for _, e := range exes {
		target, err := os.Readlink(e)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) || strings.TrimSuffix(target, " (deleted)") != ftckpt {
			continue
		}
		cmd, _ := os.ReadFile(filepath.Join(filepath.Dir(e), "cmdline"))
		w.Errorf("left behind: process %s: %s", filepath.Base(filepath.Dir(e)), bytes.ReplaceAll(cmd, []byte{0}, []byte{' '}))
	}
}
