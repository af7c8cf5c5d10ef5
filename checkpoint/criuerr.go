package checkpoint

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// CriuError is a dump or restore that failed. Error says one line; %+v adds the
// lines of CRIU's log that matter.
type CriuError struct {
	Op  string   // "dump" or "restore"
	Err error    // what CRIU answered, or the context's error
	Log []string // errors and warnings of CRIU's log, oldest first, bounded
	Dir string   // the image directory, which holds the whole log
}

// Error is the cause as CRIU's log gives it, since its answer over RPC hides it.
func (e *CriuError) Error() string {
	if c := e.cause(); c != "" {
		return fmt.Sprintf("criu %s: %v: %s", e.Op, e.Err, c)
	}
	return fmt.Sprintf("criu %s: %v", e.Op, e.Err)
}

// Unwrap gives the context's error where that was the reason.
func (e *CriuError) Unwrap() error { return e.Err }

// Format implements fmt.Formatter.
func (e *CriuError) Format(s fmt.State, verb rune) {
	_, _ = io.WriteString(s, e.Error())
	if verb == 'v' && s.Flag('+') {
		for _, l := range e.Log {
			_, _ = io.WriteString(s, "\n\t"+l)
		}
	}
}

// cause is the first error of the log: the later ones are consequences.
func (e *CriuError) cause() string {
	for _, l := range e.Log {
		if i := strings.Index(l, "Error ("); i >= 0 {
			l = l[i+len("Error "):]
			if _, text, ok := strings.Cut(l, "): "); ok { // drop "(criu/file.c:123): "
				return text
			}
			return l
		}
	}
	return ""
}

const (
	maxLogRead  = 4 << 20
	maxLogLines = 40
	maxLogLine  = 400
)

// newCriuError reads what dir/logName says about err.
func newCriuError(op, dir, logName string, err error) *CriuError {
	e := &CriuError{Op: op, Err: err, Dir: dir}
	f, openErr := os.Open(filepath.Join(dir, logName))
	if openErr != nil {
		return e
	}
	defer f.Close()
	e.Log = logLines(io.LimitReader(f, maxLogRead))
	return e
}

// logLines keeps errors and warnings, and not the one about RLIMIT_NOFILE, which
// CRIU prints in every run where nr_open is above its own hard limit.
func logLines(r io.Reader) []string {
	var kept []string
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for sc.Scan() && len(kept) < maxLogLines {
		l := strings.TrimSpace(sc.Text())
		if !strings.Contains(l, "Error (") && !strings.Contains(l, "Warn ") {
			continue
		}
		if strings.Contains(l, "RLIMIT_NOFILE") {
			continue
		}
		if len(l) > maxLogLine {
			l = l[:maxLogLine] + "..."
		}
		kept = append(kept, l)
	}
	return kept
}
