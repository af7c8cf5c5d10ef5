package reap

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEnded(t *testing.T) {
	living := exec.Command("sleep", "1000")
	if err := living.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = living.Process.Kill(); _ = living.Wait() }()
	var ended []int
	for range 3 {
		c := exec.Command("/bin/true") // nobody else waits for it
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Waitid(unix.P_PID, c.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
			t.Fatal(err)
		}
		ended = append(ended, c.Process.Pid)
	}
	Ended()
	for _, pid := range ended {
		if _, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
			t.Errorf("process %d is left: %v", pid, err)
		}
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(living.Process.Pid)); err != nil {
		t.Errorf("the living child: %v", err)
	}
}
