package nsthread

import (
	"errors"
	"net"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func netns(t *testing.T, path string) string {
	t.Helper()
	ns, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func TestNewNetAndBack(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	own := netns(t, "/proc/self/ns/net")
	err := RunInNewNet(func() error {
		if unix.Gettid() == unix.Getpid() {
			t.Error("on the main thread")
		}
		lo, err := net.InterfaceByName("lo")
		if err != nil {
			return err
		}
		if lo.Flags&net.FlagUp == 0 {
			t.Error("lo is down")
		}
		here, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer here.Close()
		inside := netns(t, "/proc/thread-self/ns/net")
		if inside == own {
			t.Error("not in a namespace of its own")
		}
		return Run(func() error { // a thread that inherits nothing but ours
			return InNet(here, func() error {
				if got := netns(t, "/proc/thread-self/ns/net"); got != inside {
					t.Errorf("in %s, want %s", got, inside)
				}
				return nil
			})
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	if now := netns(t, "/proc/self/ns/net"); now != own {
		t.Errorf("the process is in %s now, was in %s", now, own)
	}
}

func TestWhatTheFunctionSays(t *testing.T) {
	own, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	runs := map[string]func(func() error) error{"Run": Run}
	if os.Geteuid() == 0 {
		runs["InNet"] = func(f func() error) error { return InNet(own, f) }
	}
	for name, run := range runs {
		own := errors.New("its own")
		if err := run(func() error { return own }); !errors.Is(err, own) {
			t.Errorf("%s: %v", name, err)
		}
		if err := run(func() error { runtime.Goexit(); return nil }); !errors.Is(err, errLeft) {
			t.Errorf("%s of a function that left: %v", name, err)
		}
	}
}
