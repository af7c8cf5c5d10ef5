package main

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/ftckpt/ftckpt/checkpoint/check"
)

func TestCheckReport(t *testing.T) {
	r := checkReport{
		Requirements: []check.Requirement{
			{Name: "criu", State: check.Works, Detail: "4.2.1"},
			{Name: "macvlan", State: check.Missing, Detail: "unknown device type", Remedy: "load the macvlan module"},
			{Name: "/dev/shm", State: check.Unknown, Detail: "no", Remedy: "mount it", Optional: true},
		},
		Target: &check.TargetReport{
			PID: 42, Exe: "/usr/bin/x", Processes: 2,
			Listeners: []check.Listener{{Addr: netip.MustParseAddrPort("192.0.2.1:80"), PID: 42, FD: 3}},
			Problems:  []check.Problem{{Kind: "io_uring", PID: 42, FD: 7, Detail: "a ring", Remedy: "turn it off"}},
		},
	}
	var out bytes.Buffer
	if err := r.write(&out); err != nil {
		t.Fatal(err)
	}
	want := `criu      works                   4.2.1
macvlan   missing                 unknown device type
                                  to do: load the macvlan module
/dev/shm  cannot tell (optional)  no
                                  to do: mount it

this host can protect: NO
pid 42 can be protected: NO (/usr/bin/x, 2 processes)
  listens     192.0.2.1:80
  in the way  io_uring (pid 42 fd 7: a ring): turn it off
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

// The host's answers are the check package's own tests' business; here it is
// that they, the ready field and the exit status agree.
func TestCheckProcess(t *testing.T) {
	// In a process of its own: the probe runs the program again.
	out, err := program(t, "check", "--json").Output()
	var r struct {
		Ready        bool `json:"ready"`
		Requirements []struct {
			Name, State, Detail, Remedy string
			Optional                    bool
		} `json:"requirements"`
	}
	decode(t, string(out), &r)
	if len(r.Requirements) < 5 {
		t.Errorf("only %d requirements", len(r.Requirements))
	}
	ready := true
	for _, q := range r.Requirements {
		t.Logf("%s: %s (%s)", q.Name, q.State, q.Detail)
		ready = ready && (q.State == "works" || q.Optional)
		if q.State != "works" && q.Remedy == "" {
			t.Errorf("%s: %s, and no remedy", q.Name, q.State)
		}
	}
	if r.Ready != ready {
		t.Errorf("ready is %t, but the requirements say %t", r.Ready, ready)
	}
	if code := status(err); (code == 0) != ready || (code != 0 && code != 4) {
		t.Errorf("exit status %d with ready %t", code, ready)
	}
}

func TestCheckTarget(t *testing.T) {
	sleep := exec.Command("sleep", "600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sleep.Process.Kill(); _ = sleep.Wait() }()
	tests := []struct{ name, pid, want string }{
		{"nobody", strconv.Itoa(1 << 30), "this process can be protected: NO: inspect pid 1073741824: "},
		{"not a server", strconv.Itoa(sleep.Process.Pid), "in the way  no listener (pid "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, err := program(t, "check", "--pid", tt.pid).Output()
			if code := status(err); code != 4 {
				t.Errorf("exit status %d, want 4", code)
			}
			if !strings.Contains(string(out), tt.want) {
				t.Errorf("want %q in\n%s", tt.want, out)
			}
		})
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(sleep.Process.Pid)); err != nil {
		t.Errorf("the process was harmed: %v", err)
	}
}
