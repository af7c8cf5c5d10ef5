package capsule

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const goodState = `{"version":2,"name":"svc","pid":77,"start_time":5,"boot_id":"b","pid_ns":"pid:[1]",
	"dev":"eth0","vip_dev":"vip0","pid_max":32768,"vips":["10.0.0.1/24"]}`

func TestDecodeState(t *testing.T) {
	s, err := decodeState([]byte(goodState), "svc")
	if err != nil || s.PID != 77 || fmt.Sprint(s.VIPs) != "[10.0.0.1/24]" || s.PIDMax != 32768 {
		t.Fatalf("%+v, %v", s, err)
	}
	for what, change := range map[string][2]string{
		"another version":        {`"version":2`, `"version":1`},
		"another name":           {`"svc"`, `"other"`},
		"no pid":                 {`"pid":77,`, ``},
		"the machine's own init": {`"pid":77`, `"pid":1`},
		"a negative pid":         {`"pid":77`, `"pid":-1`},
		"no start time":          {`"start_time":5,`, ``},
		"a path for a device":    {`"vip0"`, `"../x"`},
		"an unknown field":       {`"pid":77`, `"pid":77,"more":1`},
		"half a file":            {`"pid_max":32768,"vips":["10.0.0.1/24"]}`, ``},
	} {
		bad := strings.Replace(goodState, change[0], change[1], 1)
		if bad == goodState {
			t.Fatalf("%s: nothing changed", what)
		}
		if s, err := decodeState([]byte(bad), "svc"); err == nil {
			t.Errorf("%s: accepted as %+v", what, s)
		}
	}
}

// A file that proves nothing is no capsule, and cleaning up removes it.
func TestGarbageState(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "capsule-svc.json")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readState(path, "svc"); !errors.Is(err, ErrNoCapsule) {
		t.Errorf("read: %v", err)
	}
	if _, err := Adopt(dir, "svc"); !errors.Is(err, ErrNoCapsule) {
		t.Errorf("adopt: %v", err)
	}
	if err := CleanupStale(dir, "svc"); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
