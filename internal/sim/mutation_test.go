package sim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// mutation is a deliberate break of the product, kept as a text file: a piece of
// the source and what takes its place.
type mutation struct {
	name     string
	file     string // from the repository's root
	within   int    // schedules until the simulator has to have found it
	always   bool   // try it in every run of the tests; the others on demand
	old, new string
}

func readMutation(path string) (m mutation, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return m, err
	}
	m.name = strings.TrimSuffix(filepath.Base(path), ".txt")
	head, rest, ok := strings.Cut(string(b), "<<<<\n")
	if !ok {
		return m, fmt.Errorf("%s: no <<<<", path)
	}
	old, rest, ok := strings.Cut(rest, "====\n")
	if !ok {
		return m, fmt.Errorf("%s: no ====", path)
	}
	m.old = old
	if m.new, _, ok = strings.Cut(rest, ">>>>"); !ok {
		return m, fmt.Errorf("%s: no >>>>", path)
	}
	// Both end where the line does, unless more of that line follows in the source.
	m.old, m.new = strings.TrimSuffix(m.old, "\n"), strings.TrimSuffix(m.new, "\n")
	for _, line := range strings.Split(head, "\n") {
		switch verb, arg, _ := strings.Cut(line, " "); verb {
		case "file":
			m.file = arg
		case "always":
			m.always = true
		case "within":
			m.within, err = strconv.Atoi(arg)
		}
	}
	if m.file == "" || m.within == 0 || err != nil {
		return m, fmt.Errorf("%s: needs file and within (%v)", path, err)
	}
	return m, nil
}

// The simulator finds each of the breaks in testdata/mutations: a check that
// cannot fail is none. Run with -v to see after how many schedules. One for each
// promise is tried always, all with FTCKPT_SIM_MUTATIONS=all: each is a build.
func TestMutationsAreCaught(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	paths, err := filepath.Glob("testdata/mutations/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatal(paths, err)
	}
	for _, path := range paths {
		m, err := readMutation(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(m.name, func(t *testing.T) {
			if !m.always && os.Getenv("FTCKPT_SIM_MUTATIONS") != "all" {
				m.applies(t, root)
				return
			}
			t.Parallel()
			prog := m.build(t, root)
			out, err := exec.Command(prog, "-schedules", strconv.Itoa(m.within), "-seed", "1", "-shrink=false").CombinedOutput()
			lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
			var r struct{ Schedules, Violations int }
			if jerr := json.Unmarshal(lines[len(lines)-1], &r); jerr != nil {
				t.Fatalf("%v: %v\n%s", err, jerr, out)
			}
			if r.Violations == 0 {
				t.Fatalf("not caught within %d schedules", r.Schedules)
			}
			t.Logf("caught after %d schedules: %.160s", r.Schedules, lines[0])
		})
	}
}

// applies reads the source and sees to it that there is what is to be broken.
func (m *mutation) applies(t *testing.T, root string) (src string, b []byte) {
	t.Helper()
	src = filepath.Join(root, m.file)
	b, err := os.ReadFile(src)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(b), m.old); n != 1 {
		t.Fatalf("%s has the piece to be broken %d times: the source has moved on, and the mutation must follow", m.file, n)
	}
	return src, b
}

// build makes a simulator of the broken source.
func (m *mutation) build(t *testing.T, root string) string {
	t.Helper()
	src, b := m.applies(t, root)
	dir := t.TempDir()
	broken := filepath.Join(dir, filepath.Base(m.file))
	if err := os.WriteFile(broken, []byte(strings.Replace(string(b), m.old, m.new, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{src: broken}})
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(list, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	prog := filepath.Join(dir, "simulate")
	cmd := exec.Command("go", "build", "-overlay", list, "-ldflags", "-s -w", "-o", prog, "./internal/sim/simulate")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return prog
}
