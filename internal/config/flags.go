package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/ftckpt/ftckpt/internal/remote"
)

// Flags adds the settings of every command to fs.
func (c *Common) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&c.RunDir, "run-dir", DefaultRunDir, "`DIR` of the control sockets and locks")
	fs.StringVar(&c.StateDir, "state-dir", DefaultStateDir, "`DIR` of images, logs and caches")
	fs.StringVar(&c.File, FileKey, "", "YAML `FILE` of settings; its keys are the names of the flags")
	fs.BoolVarP(&c.Verbose, "verbose", "v", false, "log more")
	c.LogFormat = LogFormatText
	fs.Var(&choice{dst: &c.LogFormat, now: []string{LogFormatText, LogFormatJSON}}, "log-format", "`text|json`, on standard error")
}

// Flags adds the settings of protect to fs.
func (p *Protect) Flags(fs *pflag.FlagSet) {
	nameFlag(fs, &p.Name)
	fs.IntVar(&p.PID, "pid", 0, "protect process `N` and its children")
	fs.Var(&prefixes{dst: &p.VIPs, want: "ADDR/LEN, as 192.0.2.10/24 or 2001:db8::10/64"}, "vip", "the service's `ADDR/LEN`, IPv4 or IPv6, which moves to the standby with it (repeat for several)")
	fs.StringVar(&p.Dev, "dev", "", "`IFACE` the address is on")
	fs.StringVar(&p.Join, "join", "", "log of a standby or a logserver: the `STRING` it printed (a secret: better in FTCKPT_JOIN)")
	fs.StringVar(&p.Log, "log", "", "log at the `URL` of a NATS server or cluster (nats://, tls://)")
	fs.Var(&ports{dst: &p.Ports}, "port", "protect TCP port `P` (repeat for several; default all it listens on)")
	fs.Var(&ranges{dst: &p.Outgoing}, "outgoing", "protect connections that the server opens from the VIP to `ADDR/LEN[:PORT]`, too (repeat for several)")
	fs.Var(&prefixes{dst: &p.Clients, want: "NET/LEN, as 192.0.2.0/24"}, "client-net", "protect only connections from `NET/LEN` (repeat for several; default all); others pass untouched")
	fs.DurationVar(&p.IdleExpiry, "idle-expiry", 0, "a connection idle for this `TIME` is no longer protected, and a takeover resets it; 0 for never")
	fs.DurationVar(&p.Interval, "interval", DefaultInterval, "`TIME` between generations; 0 for only when asked (ftckpt checkpoint)")
	p.Commit = CommitLog
	fs.Var(&choice{dst: &p.Commit, now: []string{CommitLog}, later: []string{"ack", "checkpoint"}}, "commit", "when output may leave: `log`, once all it depends on is stable")
	p.OnCrash = OnCrashFailover
	fs.Var(&choice{dst: &p.OnCrash, now: []string{OnCrashFailover, OnCrashLocal}}, "on-crash",
		"what follows the server's death on a living host: `failover|local`, to a standby or to a restored server on this host")
	p.Fenced = FencedStop
	fs.Var(&choice{dst: &p.Fenced, now: []string{FencedStop, FencedKill, FencedLeave}}, "fenced-server",
		"`stop|kill|leave` the server here once another node has taken the service over: SIGSTOP, SIGKILL, or nothing")
	fs.StringVar(&p.Schedule, "schedule", "", "cron `EXPRESSION` of generations, as \"30 2 * * *\", instead of --interval")
	fs.DurationVar(&p.MaxReplay, "max-replay", DefaultMaxReplay, "take a generation sooner when the log behind the newest would take this `TIME` to replay; 0 for never")
}

// Flags adds the settings of standby to fs.
func (s *Standby) Flags(fs *pflag.FlagSet) {
	nameFlag(fs, &s.Name)
	fs.StringVar(&s.Dev, "dev", "", "`IFACE` to put the service's address on")
	fs.StringVar(&s.Join, "join", "", "log of a logserver or another standby: the `STRING` it printed (a secret: better in FTCKPT_JOIN)")
	fs.StringVar(&s.Log, "log", DefaultEmbed, "log at this `URL` (nats://, tls://), or in this process (embed://ADDR:PORT)")
	s.Mode = ModeWarm
	fs.Var(&choice{dst: &s.Mode, now: []string{ModeCold, ModeWarm}, later: []string{"hot"}}, "mode", "`cold|warm`: newest image left in the log, or kept here and ready")
	s.Recreate = RecreateAuto
	fs.Var(&choice{dst: &s.Recreate, now: []string{RecreateAuto, RecreateBPF, RecreateNumbers}}, "recreate",
		"how connections younger than the newest generation are made again: `auto|bpf|translate`, with their old numbers by BPF (Linux 6.9), or by translating new ones; auto takes the first that works")
	fs.DurationVar(&s.Detect, "detect", DefaultDetect, "suspect the primary after this `TIME` of silence")
}

// Flags adds the settings of logserver to fs.
func (l *LogServer) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&l.Listen, "listen", "", "`ADDR:PORT` to listen on")
	fs.StringVar(&l.Store, "store", "", "`DIR` of the log (default logserver in --state-dir)")
	l.Sync = SyncAlways
	fs.Var(&choice{dst: &l.Sync, now: []string{SyncAlways, SyncInterval}}, "sync",
		"`always|interval`: each record survives power loss of this host, or only its process's death")
}

// Flags adds the settings of demo to fs.
func (d *Demo) Flags(fs *pflag.FlagSet) {
	fs.BoolVar(&d.JSON, "json", false, "end with one summary object")
	fs.StringVar(&d.Report, "report", "", "write a page of the run to `FILE.html`")
	d.Fault = FaultHost
	fs.Var(&choice{dst: &d.Fault, now: []string{FaultProcess, FaultHost, FaultLink}}, "fault",
		"`process|host|link`: kill the server, kill its host, or cut its host off while it runs on")
	d.LogAt = LogAtStandby
	fs.Var(&choice{dst: &d.LogAt, now: []string{LogAtStandby, LogAtLogHost}}, "log-at", "the log is on the `standby|log` host")
	fs.IntVar(&d.Connections, "connections", 10, "`N` long-lived client connections")
	fs.DurationVar(&d.Duration, "duration", 20*time.Second, "`TIME` the load lasts, the fault being within it")
	fs.Uint64Var(&d.Seed, "seed", 0, "`N` to repeat a run's random choices (default one at random, which is printed)")
}

func nameFlag(fs *pflag.FlagSet, dst *string) {
	fs.StringVar(dst, "name", DefaultName, "`NAME` of the service")
}

// choice is a flag with a few values. Those in later are the contract's but
// not this version's: they are refused by name, not as unknown.
type choice struct {
	dst        *string
	now, later []string
}

func (c *choice) String() string {
	if c.dst == nil {
		return ""
	}
	return *c.dst
}
func (c *choice) Type() string { return "string" }
func (c *choice) Set(s string) error {
	switch {
	case slices.Contains(c.now, s):
		*c.dst = s
		return nil
	case slices.Contains(c.later, s):
		return fmt.Errorf("not in this version yet; it has %s", strings.Join(c.now, ", "))
	default:
		return fmt.Errorf("want %s", strings.Join(c.now, " or "))
	}
}

// prefixes is a list of addresses with the lengths of their networks, given one
// by one or with commas between.
type prefixes struct {
	dst  *[]netip.Prefix
	want string
	set  bool // the default is gone
}

func (p *prefixes) String() string {
	if p.dst == nil {
		return ""
	}
	return strings.Join(p.GetSlice(), ",")
}
func (p *prefixes) Type() string { return "prefix" }
func (p *prefixes) Set(s string) error {
	if !p.set {
		*p.dst, p.set = nil, true
	}
	for f := range strings.SplitSeq(s, ",") {
		if err := p.Append(f); err != nil {
			return err
		}
	}
	return nil
}

// Append implements pflag.SliceValue.
func (p *prefixes) Append(s string) error {
	v, err := netip.ParsePrefix(strings.TrimSpace(s))
	if err != nil {
		return errors.New("want " + p.want)
	}
	*p.dst = append(*p.dst, v)
	return nil
}

// Replace implements pflag.SliceValue.
func (p *prefixes) Replace(list []string) error {
	*p.dst, p.set = nil, true
	for _, s := range list {
		if err := p.Append(s); err != nil {
			return err
		}
	}
	return nil
}

// GetSlice implements pflag.SliceValue.
func (p *prefixes) GetSlice() []string {
	list := make([]string, 0, len(*p.dst))
	for _, v := range *p.dst {
		list = append(list, v.String())
	}
	return list
}

// ports is a list of TCP ports, given one by one or with commas between.
type ports struct {
	dst *[]uint16
	set bool // the default is gone
}

func (p *ports) String() string {
	if p.dst == nil {
		return ""
	}
	return strings.Join(p.GetSlice(), ",")
}
func (p *ports) Type() string { return "port" }
func (p *ports) Set(s string) error {
	if !p.set {
		*p.dst, p.set = nil, true
	}
	for f := range strings.SplitSeq(s, ",") {
		if err := p.Append(f); err != nil {
			return err
		}
	}
	return nil
}

// Append implements pflag.SliceValue.
func (p *ports) Append(s string) error {
	n, err := parsePort(strings.TrimSpace(s))
	if err != nil {
		return err
	}
	*p.dst = append(*p.dst, n)
	return nil
}

// Replace implements pflag.SliceValue.
func (p *ports) Replace(list []string) error {
	*p.dst, p.set = nil, true
	for _, s := range list {
		if err := p.Append(s); err != nil {
			return err
		}
	}
	return nil
}

// GetSlice implements pflag.SliceValue.
func (p *ports) GetSlice() []string {
	list := make([]string, 0, len(*p.dst))
	for _, n := range *p.dst {
		list = append(list, strconv.Itoa(int(n)))
	}
	return list
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, errors.New("want a port from 1 to 65535")
	}
	return uint16(n), nil
}

// ranges is a list of networks of peers, given one by one or with commas
// between.
type ranges struct {
	dst *[]remote.Range
	set bool // the default is gone
}

func (r *ranges) String() string {
	if r.dst == nil {
		return ""
	}
	return strings.Join(r.GetSlice(), ",")
}
func (r *ranges) Type() string { return "peers" }
func (r *ranges) Set(s string) error {
	if !r.set {
		*r.dst, r.set = nil, true
	}
	for f := range strings.SplitSeq(s, ",") {
		if err := r.Append(f); err != nil {
			return err
		}
	}
	return nil
}

// Append implements pflag.SliceValue.
func (r *ranges) Append(s string) error {
	v, err := remote.Parse(strings.TrimSpace(s))
	if err != nil {
		return err
	}
	*r.dst = append(*r.dst, v)
	return nil
}

// Replace implements pflag.SliceValue.
func (r *ranges) Replace(list []string) error {
	*r.dst, r.set = nil, true
	for _, s := range list {
		if err := r.Append(s); err != nil {
			return err
		}
	}
	return nil
}

// GetSlice implements pflag.SliceValue.
func (r *ranges) GetSlice() []string {
	list := make([]string, 0, len(*r.dst))
	for _, v := range *r.dst {
		list = append(list, v.String())
	}
	return list
}
