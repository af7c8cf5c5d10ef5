package reqsk

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("BPF programs and network namespaces need root")
	}
}

// has69 reports whether the kernel is 6.9 or newer: it must have the kfunc
// then.
func has69(t testing.TB) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	major, minor, dots := 0, 0, 0
	for _, c := range u.Release {
		switch {
		case c >= '0' && c <= '9' && dots == 0:
			major = 10*major + int(c-'0')
		case c >= '0' && c <= '9' && dots == 1:
			minor = 10*minor + int(c-'0')
		case c == '.' && dots == 0:
			dots++
		default:
			return major > 6 || major == 6 && minor >= 9
		}
	}
	return false
}

// needKernel is for tests that re-create connections: where the kernel should
// be able to, they run, and fail if it is not.
func needKernel(t testing.TB) {
	t.Helper()
	needRoot(t)
	if !has69(t) {
		t.Skip("bpf_sk_assign_tcp_reqsk came with kernel 6.9")
	}
}

func TestProbe(t *testing.T) {
	needRoot(t)
	got, err := Probe()
	want := No
	if has69(t) {
		want = Yes
	}
	if got != want || (err == nil) != (want == Yes) {
		t.Fatalf("%v (%v), want %v", got, err, want)
	}
}

func TestProbeWithoutPrivileges(t *testing.T) {
	needRoot(t)
	type answer struct {
		s   Support
		err error
	}
	done := make(chan answer, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends without its capabilities
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			done <- answer{err: err}
			return
		}
		// Probe works on a thread of its own, which begins with the capabilities
		// of the process: what it does is called here instead.
		err := probeHere()
		done <- answer{verdict(err), err}
	}()
	if a := <-done; a.s != CannotTell || !errors.Is(a.err, unix.EPERM) {
		t.Fatalf("%v (%v), want cannot tell for want of privileges", a.s, a.err)
	}
}
