// Package control is how the commands talk to a running daemon: one Unix
// socket for each service in the run directory, one JSON line each way.
//
// A request is {"v":1,"op":"status"}; an answer is {"v":1,"status":{...}},
// {"v":1,"checkpoint":{...}}, {"v":1,"failover":{...}} or {"v":1,"error":{"code":1,"message":"..."}},
// the code being the exit status for the command that asked. Then the server
// closes. The socket's mode is 0600: who may connect may do everything.
//
// Both sides bound what they read and how long they wait for a peer that says
// nothing, so a stuck client cannot harm a daemon nor a stuck daemon a script.
package control

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// Version of the protocol. Both sides refuse another one: after an upgrade the
// daemon has to be restarted, and says so instead of guessing.
const Version = 1

const (
	maxRequest = 4 << 10 // bytes in a line
	maxAnswer  = 1 << 20
	socketExt  = ".sock"
	lockExt    = ".lock"
	maxPath    = 107 // sun_path of unix(7), less its NUL
)

const (
	opStatus     = "status"
	opCheckpoint = "checkpoint"
	opFailover   = "failover"
)

type request struct {
	V  int    `json:"v"`
	Op string `json:"op"`

	Failover *FailoverRequest `json:"failover,omitempty"`
}

type answer struct {
	V          int               `json:"v"`
	Status     *Status           `json:"status,omitempty"`
	Checkpoint *CheckpointResult `json:"checkpoint,omitempty"`
	Failover   *FailoverResult   `json:"failover,omitempty"`
	Error      *remoteError      `json:"error,omitempty"`
}

// remoteError carries an error and its exit status over the socket.
type remoteError struct {
	Code    exitcode.Code `json:"code"`
	Message string        `json:"message"`
}

func failure(err error) answer {
	return answer{V: Version, Error: &remoteError{Code: exitcode.Of(err), Message: err.Error()}}
}

func socketPath(runDir, name string) string { return filepath.Join(runDir, name+socketExt) }
func lockPath(runDir, name string) string   { return filepath.Join(runDir, name+lockExt) }

// serviceOf is the inverse of socketPath for a directory entry.
func serviceOf(entry string) (name string, ok bool) {
	name, ok = strings.CutSuffix(entry, socketExt)
	return name, ok && name != "" && !strings.HasPrefix(name, ".")
}

var errTooLong = errors.New("line is too long")

// readLine reads one JSON line of at most limit bytes into v.
func readLine(r io.Reader, limit int, v any) error {
	br := bufio.NewReader(io.LimitReader(r, int64(limit)))
	line, err := br.ReadBytes('\n')
	switch {
	case errors.Is(err, io.EOF) && len(line) == limit:
		return errTooLong
	case errors.Is(err, io.EOF) && len(line) == 0:
		return io.ErrUnexpectedEOF
	case err != nil && !errors.Is(err, io.EOF):
		return err
	}
	if err := json.Unmarshal(line, v); err != nil {
		return fmt.Errorf("not a JSON object: %w", err)
	}
	return nil
}

func writeLine(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}
