package main

import (
	"bufio"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
	"github.com/ftckpt/ftckpt/internal/loadgen"
	"github.com/ftckpt/ftckpt/replay/capsule"
)

// beMain makes the test binary be ftckpt.
const beMain = "FTCKPT_TEST_BE_MAIN"

func TestMain(m *testing.M) {
	becomeHelper() // helpers are not given our environment
	if os.Getenv(beMain) != "" {
		main()
	}
	os.Exit(m.Run())
}

// program is ftckpt as a process, killed at the test's end if it still lives.
func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), beMain+"=1")
	return cmd
}

// What systemd and a shell see of a daemon: one line, READY=1 without the
// secret in it, life after its reader has gone, status 0 after SIGTERM.
func TestDaemonProcess(t *testing.T) {
	dir := t.TempDir()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	if err := notify.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}

	cmd := program(t, "logserver", "--listen", "127.0.0.1:0", "--state-dir", dir, "-v")
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var join string
	for in := bufio.NewScanner(r); in.Scan(); {
		var ok bool
		if join, ok = strings.CutPrefix(in.Text(), "join: "); ok {
			break
		}
	}
	r.Close() // from here on, every write of the daemon fails
	if join == "" {
		t.Errorf("no join line")
	}

	state := datagram(t, notify)
	if !strings.HasPrefix(state, "READY=1\nSTATUS=listening on 127.0.0.1:") || (join != "" && strings.Contains(state, join)) {
		t.Errorf("told systemd %q", state)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if state := datagram(t, notify); state != "STOPPING=1" {
		t.Errorf("told systemd %q, want STOPPING=1", state)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v, want exit status 0", err)
	}
}

func datagram(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// The helpers come before the command line, and refuse a person.
func TestHelperProcesses(t *testing.T) {
	for _, arg := range []string{lab.InitArg, loadgen.Arg, capsule.InitArg} {
		out, err := program(t, arg, "x").CombinedOutput()
		ee, ok := errors.AsType[*exec.ExitError](err)
		if !ok || ee.ExitCode() != 2 || !strings.Contains(string(out), "internal") {
			t.Errorf("%s: %v, %q; want exit status 2 and that it is internal", arg, err, out)
		}
	}
}

// status is the exit status of a finished process, -1 when it had none.
func status(err error) int {
	if err == nil {
		return 0
	}
	if ee, ok := errors.AsType[*exec.ExitError](err); ok {
		return ee.ExitCode()
	}
	return -1
}
