package procfs

import (
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestOwnProcess(t *testing.T) {
	st, err := Stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if ppid := strconv.Itoa(os.Getppid()); st[PPID] != ppid {
		t.Errorf("parent %s, want %s", st[PPID], ppid)
	}
	if start, err := strconv.ParseUint(st[StartTime], 10, 64); err != nil || start == 0 {
		t.Errorf("start time %q", st[StartTime])
	}
	status, err := Status(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if status["Pid"] != strconv.Itoa(os.Getpid()) || !strings.HasPrefix(status["State"], st[State]) && st[State] != "R" {
		t.Errorf("status %v", status)
	}
	if pid, err := InnerPID(os.Getpid()); err != nil || pid != os.Getpid() {
		t.Errorf("inner PID %d, %v", pid, err)
	}
}

func TestGone(t *testing.T) {
	cmd := exec.Command("/bin/true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	_, err := Stat(cmd.Process.Pid)
	_, err2 := Status(cmd.Process.Pid)
	_, err3 := InnerPID(cmd.Process.Pid)
	if !Gone(err) || !Gone(err2) || !Gone(err3) {
		t.Errorf("%v, %v, %v", err, err2, err3)
	}
}

func TestStatFields(t *testing.T) {
	rest := strings.Fields("S 1 2 3 " + strings.Repeat("0 ", 15) + "777 9")
	for _, name := range []string{"a", "a b", "a) R 9 (", "(", ")"} {
		f, ok := statFields("42 (" + name + ") " + strings.Join(rest, " "))
		if !ok || !slices.Equal(f, rest) || f[SID] != "3" || f[PGID] != "2" || f[StartTime] != "777" {
			t.Errorf("name %q: %v %v", name, f, ok)
		}
	}
	for _, cut := range []string{"", "42 (a", "42 (a) S 1 2 3"} {
		if _, ok := statFields(cut); ok {
			t.Errorf("%q was taken", cut)
		}
	}
}
