package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"
)

// DefaultPrefix is where scripts/deps.sh puts a private CRIU.
const DefaultPrefix = "/var/lib/ftckpt/criu"

// MinVersion is the oldest CRIU that dumps sockets on the kernels we know: 4.1
// and older do not understand the vDSO or the socket options of Linux 6.x
// ("Can't get 1:16 opt: Operation not supported"), although "criu check"
// finds nothing wrong with them.
var MinVersion = Version{4, 2, 0}

// Version is a CRIU release.
type Version struct {
	Major, Minor, Patch int
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// Less reports whether v is older than w.
func (v Version) Less(w Version) bool {
	if v.Major != w.Major {
		return v.Major < w.Major
	}
	if v.Minor != w.Minor {
		return v.Minor < w.Minor
	}
	return v.Patch < w.Patch
}

// Criu is a CRIU program that was found and is new enough.
type Criu struct {
	Path    string
	Version Version
}

// ErrNoCriu says that no usable CRIU was found.
var ErrNoCriu = errors.New("no usable criu")

// Locate finds a CRIU. An explicit path, or else FTCKPT_CRIU, is the only one
// looked at when it is given; otherwise the private prefix (FTCKPT_CRIU_PREFIX or
// DefaultPrefix) comes before PATH, because deps.sh installs the former only
// where the latter does not work. Errors wrap ErrNoCriu and say what to do.
func Locate(ctx context.Context, explicit string) (Criu, error) {
	if explicit == "" {
		explicit = os.Getenv("FTCKPT_CRIU")
	}
	if explicit != "" {
		c, err := inspectCriu(ctx, explicit)
		if err != nil {
			return Criu{}, fmt.Errorf("%w: %s: %w", ErrNoCriu, explicit, err)
		}
		return c, nil
	}
	prefix := os.Getenv("FTCKPT_CRIU_PREFIX")
	if prefix == "" {
		prefix = DefaultPrefix
	}
	var why []error
	for _, name := range []string{filepath.Join(prefix, "bin", "criu"), "criu", "/usr/sbin/criu"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		c, err := inspectCriu(ctx, path)
		if err == nil {
			return c, nil
		}
		why = append(why, fmt.Errorf("%s: %w", path, err))
	}
	if len(why) == 0 {
		why = append(why, fmt.Errorf("none in %s nor in PATH", prefix))
	}
	return Criu{}, fmt.Errorf("%w: %w: run scripts/deps.sh criu, or set FTCKPT_CRIU to a criu >= %s", ErrNoCriu, errors.Join(why...), MinVersion)
}

func inspectCriu(ctx context.Context, path string) (Criu, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return Criu{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return Criu{}, fmt.Errorf("run --version: %w", err)
	}
	v, err := parseVersion(out)
	if err != nil {
		return Criu{}, err
	}
	if v.Less(MinVersion) {
		return Criu{}, fmt.Errorf("version %s is older than %s, which cannot dump sockets on this kernel", v, MinVersion)
	}
	return Criu{Path: path, Version: v}, nil
}

var versionLine = regexp.MustCompile(`(?m)^Version:\s*(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?`)

func parseVersion(out []byte) (Version, error) {
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return Version{}, fmt.Errorf("read version: %.60q is not what criu says", out)
	}
	var v Version
	for i, p := range []*int{&v.Major, &v.Minor, &v.Patch} {
		*p, _ = strconv.Atoi(string(m[i+1])) // an absent patch level is 0
	}
	return v, nil
}
