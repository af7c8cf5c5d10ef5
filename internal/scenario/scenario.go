// Package scenario runs tests that are written as text, in the manner of
// etcd-io/raft's testdata: directives, each with the output it must have.
//
//	# a comment
//	verb word key=value
//	----
//	what it must answer
//
// An empty line ends the output. Directives of one file share their state: a
// file is a story. go test -rewrite writes what the directives answer now.
package scenario

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the output of scenarios into their files")

// Directive is one step of a scenario.
type Directive struct {
	T     testing.TB // tells file and line when it fails
	Verb  string
	Words []string // the arguments that are no key=value
	args  map[string]string
	place string
}

// Fatalf ends the test at the directive.
func (d *Directive) Fatalf(format string, args ...any) {
	d.T.Helper()
	d.T.Fatalf("%s: %s: %s", d.place, d.Verb, fmt.Sprintf(format, args...))
}

// Has reports whether there is an argument key=value.
func (d *Directive) Has(key string) bool { _, yes := d.args[key]; return yes }

// Text is the value of key, or otherwise when there is none.
func (d *Directive) Text(key, otherwise string) string {
	if v, ok := d.args[key]; ok {
		return v
	}
	return otherwise
}

// Number is the value of key as a number, or otherwise when there is none.
func (d *Directive) Number(key string, otherwise int) int {
	v, ok := d.args[key]
	if !ok {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		d.Fatalf("%s: %v", key, err)
	}
	return n
}

// Word is the i-th argument that is no key=value.
func (d *Directive) Word(i int) string {
	if i >= len(d.Words) {
		d.Fatalf("wants %d words", i+1)
	}
	return d.Words[i]
}

// RunAll runs every scenario that matches pattern as a subtest. begin makes the
// handler of one file.
func RunAll(t *testing.T, pattern string, begin func(t *testing.T) func(d *Directive) string) {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenario matches %s (%v)", pattern, err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) { run(t, f, begin(t)) })
	}
}

func run(t *testing.T, file string, handle func(d *Directive) string) {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	lines := strings.Split(string(b), "\n")
	for i := 0; i < len(lines); {
		text := strings.TrimSpace(lines[i])
		if text == "" || strings.HasPrefix(text, "#") {
			if i < len(lines)-1 {
				out.WriteString(lines[i] + "\n")
			}
			i++
			continue
		}
		d := &Directive{T: t, args: map[string]string{}, place: fmt.Sprintf("%s:%d", file, i+1)}
		for j, w := range strings.Fields(text) {
			k, v, pair := strings.Cut(w, "=")
			switch {
			case j == 0:
				d.Verb = w
			case pair:
				d.args[k] = v
			default:
				d.Words = append(d.Words, w)
			}
		}
		out.WriteString(lines[i] + "\n----\n")
		i++
		if i < len(lines) && strings.TrimSpace(lines[i]) == "----" {
			i++
		}
		var want []string
		for ; i < len(lines) && strings.TrimSpace(lines[i]) != ""; i++ {
			want = append(want, strings.TrimSpace(lines[i]))
		}
		got := strings.TrimSpace(handle(d))
		if got == "" {
			got = "nothing"
		}
		out.WriteString(got + "\n")
		if w := strings.Join(want, "\n"); !*rewrite && got != w {
			t.Errorf("%s: %s\ngot:\n%s\nwant:\n%s", d.place, text, got, w)
		}
	}
	if *rewrite {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
