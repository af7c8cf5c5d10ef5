package capsule

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
)

// ErrNoCapsule says that there is no living capsule of that name.
var ErrNoCapsule = errors.New("no capsule of that name")

// ErrExists says that a capsule of that name lives already: Adopt it or
// CleanupStale it.
var ErrExists = errors.New("a capsule of that name lives already")

// identity is what proves a process to be a certain PID 1 of ours. A PID alone
// is reused; with its start time it is unique for one boot.
type identity struct {
	PID int `json:"pid"` // in the PID namespace of the agent
	// StartTime is in clock ticks since boot (field 22 of /proc/PID/stat).
	StartTime uint64 `json:"start_time"`
	BootID    string `json:"boot_id"`
	// PIDNS is the capsule's own PID namespace, as in readlink /proc/PID/ns/pid.
	PIDNS string `json:"pid_ns"`
}

// state is the state file: who PID 1 is, and what Adopt needs to go on.
type state struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	identity
	Dev    string         `json:"dev,omitempty"`
	VIPDev string         `json:"vip_dev"`
	PIDMax int            `json:"pid_max"`        // inside
	VIPs   []netip.Prefix `json:"vips,omitempty"` // set once PrepareVIPs has begun
}

const (
	stateVersion = 2
	maxState     = 16 << 10
)

var (
	validName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)
	// IFNAMSIZ is 16 with the terminating zero; dev_valid_name in net/core/dev.c
	// refuses '/', ':' and white space.
	validDev = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}$`)
)

func statePath(runDir, name string) (string, error) {
	if !validName.MatchString(name) {
		return "", fmt.Errorf("capsule name %q: want 1 to 64 letters, digits and _.-", name)
	}
	return filepath.Join(runDir, "capsule-"+name+".json"), nil
}

// decodeState reads a state file's content without trust.
func decodeState(b []byte, name string) (state, error) {
	var s state
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return state{}, err
	}
	switch {
	case s.Version != stateVersion:
		return state{}, fmt.Errorf("version %d, this program knows %d", s.Version, stateVersion)
	case s.Name != name:
		return state{}, fmt.Errorf("it is of capsule %q", s.Name)
	case s.PID <= 1 || s.StartTime == 0 || s.BootID == "" || s.PIDNS == "":
		return state{}, errors.New("it does not identify a process")
	case !validDev.MatchString(s.VIPDev):
		return state{}, fmt.Errorf("device name %q", s.VIPDev)
	}
	return s, nil
}

// readState answers ErrNoCapsule when there is no file or when what it holds
// proves nothing.
func readState(path, name string) (state, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, ErrNoCapsule
	}
	if err != nil {
		return state{}, fmt.Errorf("read capsule state: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxState))
	if err != nil {
		return state{}, fmt.Errorf("read capsule state: %w", err)
	}
	s, err := decodeState(b, name)
	if err != nil {
		return state{}, fmt.Errorf("read capsule state %s: %w: %w", path, ErrNoCapsule, err)
	}
	return s, nil
}

// write replaces the state file at once or not at all.
func (s state) write(path string) error {
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return fmt.Errorf("write capsule state: %w", err)
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write capsule state: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write capsule state: %w", err)
	}
	return nil
}
