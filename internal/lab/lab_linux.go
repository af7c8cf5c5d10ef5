package lab

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"golang.org/x/sys/unix"
)

// Topology names the hosts of a lab.
type Topology struct {
	Hosts []HostSpec
}

// HostSpec is one host. Name is also its port at the switch and its host name:
// a letter, then letters, digits and dashes, 15 at most. Addr is the address of
// eth0 with its prefix length ("10.77.0.2/24"); empty for none.
type HostSpec struct {
	Name string
	Addr string
}

// Options are the optional parts of New.
type Options struct {
	// LogDir keeps logs and captures after Close. Empty: they are in Dir and
	// go with the lab.
	LogDir string
}

// Lab is a running network of hosts. Its methods may be called concurrently.
type Lab struct {
	dir    string
	logDir string
	sw     *space
	hosts  []*Host
	byName map[string]*Host

	closing sync.Once
	closed  error
}

var hostName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,14}$`)

// New builds a lab; ctx bounds the building, not the lab's life. It first
// removes what labs of dead owners left. It fails when not root, when a name or
// address is not usable, and when the kernel refuses a namespace or link; then
// nothing is left behind.
func New(ctx context.Context, topo Topology, opt Options) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("build lab: it needs root for its namespaces")
	}
	if err := CleanupStale(); err != nil {
		return nil, err
	}
	// What our own parent left open would pass to every process of every host:
	// CRIU refuses descriptors of a foreign mount namespace, and a reader of
	// our output would wait for a pipe that a host's process holds.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("build lab: keep descriptors from children: %w", err)
	}
	dir, err := makeDir()
	if err != nil {
		return nil, fmt.Errorf("build lab: %w", err)
	}
	l := &Lab{dir: dir, logDir: opt.LogDir, byName: map[string]*Host{}}
	if l.logDir == "" {
		l.logDir = filepath.Join(dir, "_log") // no host can have this name
	}
	if err := l.build(ctx, topo); err != nil {
		return nil, errors.Join(fmt.Errorf("build lab: %w", err), l.Close())
	}
	return l, nil
}

func (l *Lab) build(ctx context.Context, topo Topology) (err error) {
	if l.logDir, err = filepath.Abs(l.logDir); err != nil {
		return err
	}
	// Not for everybody: daemons print secrets (a join string) there.
	if err := os.MkdirAll(l.logDir, 0o700); err != nil {
		return err
	}
	if l.sw, err = newSpace(ctx, l.dir, "switch"); err != nil {
		return err
	}
	if err := buildSwitch(l.sw); err != nil {
		return err
	}
	for i, spec := range topo.Hosts {
		if !hostName.MatchString(spec.Name) || spec.Name == bridgeName || spec.Name == "switch" || spec.Name == "lo" {
			return fmt.Errorf("host name %q is not usable: want a letter, then letters, digits and dashes, 15 at most", spec.Name)
		}
		if l.byName[spec.Name] != nil {
			return fmt.Errorf("host name %q is used twice", spec.Name)
		}
		if err := l.addHost(ctx, i+1, spec); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) addHost(ctx context.Context, index int, spec HostSpec) error {
	h := &Host{lab: l, name: spec.Name, dir: filepath.Join(l.dir, spec.Name)}
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		return err
	}
	s, err := newSpace(ctx, l.dir, spec.Name)
	if err != nil {
		return err
	}
	h.space = s
	l.hosts = append(l.hosts, h)
	l.byName[h.name] = h
	if spec.Addr == "" {
		return plug(l.sw, s, spec.Name, index, nil)
	}
	a, err := parseAddr(spec.Addr)
	if err != nil {
		return err
	}
	h.addr = a.IP
	return plug(l.sw, s, spec.Name, index, a)
}

// Host returns the host of that name. It panics if the topology has none: that
// is a mistake in the caller's text, not a condition.
func (l *Lab) Host(name string) *Host {
	h := l.byName[name]
	if h == nil {
		panic("lab: no host " + name)
	}
	return h
}

// Dir is the lab's own directory on the shared file system; Close removes it.
func (l *Lab) Dir() string { return l.dir }

// LogDir is where logs and captures are written.
func (l *Lab) LogDir() string { return l.logDir }

// Close ends every process of every host and removes the lab: namespaces,
// links, directory. It may be called more than once and concurrently.
func (l *Lab) Close() error {
	l.closing.Do(func() {
		var errs []error
		// The links first, so that no host tells another of its end. A link
		// that cannot be cut was never plugged in; it ends with its host.
		for _, h := range l.hosts {
			if h.alive() {
				_ = h.CutLink()
			}
		}
		for _, h := range l.hosts {
			errs = append(errs, h.space.kill())
			h.waitAll()
		}
		if l.sw != nil {
			errs = append(errs, l.sw.kill())
		}
		errs = append(errs, os.RemoveAll(l.dir))
		l.closed = errors.Join(errs...)
	})
	return l.closed
}
