package check

import (
	"context"
	"fmt"
)

// State is the answer of a probe.
type State uint8

// Answers.
const (
	Works   State = iota + 1
	Missing       // certainly not there
	Unknown       // the probe itself could not be made
)

func (s State) String() string {
	switch s {
	case Works:
		return "works"
	case Missing:
		return "missing"
	case Unknown:
		return "cannot tell"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Requirement is one thing that ftckpt wants of a host.
type Requirement struct {
	Name   string `json:"name"`
	State  State  `json:"state"`
	Detail string `json:"detail,omitempty"` // what was found
	Remedy string `json:"remedy,omitempty"` // what to do, when it does not work
	// Optional says that ftckpt runs without, with less.
	Optional bool `json:"optional,omitempty"`
}

// Options says what to check for.
type Options struct {
	Criu     string // an explicit path, or "" for checkpoint.Locate's search
	StateDir string // where generations are kept
}

// Host checks this host and returns a Requirement for every probe, in a fixed
// order. It takes about a second. A context that ends makes the rest Unknown.
func Host(ctx context.Context, o Options) []Requirement {
	var all []Requirement
	for _, p := range probes {
		r := Requirement{Name: p.name, Optional: p.optional}
		if ctx.Err() != nil {
			r.State, r.Detail = Unknown, "not tried: "+context.Cause(ctx).Error()
		} else {
			r.State, r.Detail = p.run(ctx, o)
		}
		if r.State != Works {
			r.Remedy = p.remedy
		}
		all = append(all, r)
	}
	return all
}

// Ready reports whether everything that is not optional works.
func Ready(all []Requirement) bool {
	for _, r := range all {
		if r.State != Works && !r.Optional {
			return false
		}
	}
	return true
}

// probe answers one question.
type probe struct {
	name     string
	remedy   string
	optional bool
	run      func(ctx context.Context, o Options) (State, string)
}

// probes are in the order in which a person would mend what is missing.
var probes = []probe{
	{"privileges", "run ftckpt as root, or give it CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_NET_ADMIN and CAP_NET_RAW", false, probePrivileges},
	{"criu", "run scripts/deps.sh criu", false, probeCriu},
	{"namespaces", "use a kernel with CONFIG_NET_NS, CONFIG_PID_NS and mount namespaces, outside of a restricted container", false, probeNamespaces},
	{"dump and restore", "run scripts/deps.sh criu for a newer criu; outside of a container, with CONFIG_CHECKPOINT_RESTORE in the kernel", false, probeDumpRestore},
	{"iptables NFQUEUE", "install iptables, and use a kernel with CONFIG_NETFILTER_XT_TARGET_NFQUEUE and CONFIG_NETFILTER_NETLINK_QUEUE", false, probeNFQueue},
	{"raw socket", "run with CAP_NET_RAW, outside of a restricted container", false, probeRawSocket},
	{"packet socket", "run with CAP_NET_RAW on a kernel with CONFIG_PACKET", false, probePacketSocket},
	{"macvlan", "load the macvlan module, or use a kernel with CONFIG_MACVLAN", false, probeMacvlan},
	{"socket destroy", "use a kernel with CONFIG_INET_DIAG_DESTROY", true, probeSockDestroy},
	{"tcp timestamps", "sysctl -w net.ipv4.tcp_timestamps=1", true, probeTimestamps},
	{"tcp syncookies", "sysctl -w net.ipv4.tcp_syncookies=1", true, probeSyncookies},
	{"image space", "free at least 1 GiB where --state-dir is, or point it elsewhere", false, probeSpace},
	{"/dev/shm", "mount a tmpfs on /dev/shm: images are dumped there, a slower place makes longer pauses", true, probeShm},
}
