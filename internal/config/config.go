// Package config holds the settings of every command and the one place that
// fills them: command line, then FTCKPT_ environment, then --config file, then
// default. A setting is a flag; its key in the file is the flag's name and its
// environment variable is EnvName of it.
//
// Load is about where a value comes from and whether it can be read at all;
// the Validate methods are about whether it can work. Neither touches the
// network nor asks about processes: that is for the daemons to find out.
package config

import (
	"net/netip"
	"time"

	"github.com/ftckpt/ftckpt/internal/remote"
)

// Defaults and bounds of the settings.
const (
	DefaultRunDir   = "/run/ftckpt"
	DefaultStateDir = "/var/lib/ftckpt"
	DefaultName     = "default"

	DefaultInterval  = 10 * time.Second
	DefaultMaxReplay = 10 * time.Second
	MaxSchedule      = 256                    // octets
	MinInterval      = 100 * time.Millisecond // a generation freezes the server for about 10 ms at best
	MaxInterval      = 24 * time.Hour

	MinIdleExpiry = time.Second
	MaxIdleExpiry = 30 * 24 * time.Hour

	DefaultDetect = 200 * time.Millisecond
	MinDetect     = 50 * time.Millisecond // below it a busy two-core host gives false alarms
	MaxDetect     = time.Minute

	MaxPorts      = 64
	MaxOutgoing   = 64
	MaxVIPs       = 8
	MaxClientNets = 16
	MaxName       = 32

	// DefaultEmbed is where a standby's own log listens.
	DefaultEmbed = "embed://:4222"

	MaxDemoConnections = 1000
	MinDemoDuration    = 5 * time.Second
	MaxDemoDuration    = time.Hour
)

// Values of the settings that are a choice.
const (
	CommitLog        = "log"
	FencedStop       = "stop"
	FencedKill       = "kill"
	FencedLeave      = "leave"
	OnCrashFailover  = "failover"
	OnCrashLocal     = "local"
	ModeCold         = "cold"
	ModeWarm         = "warm"
	RecreateAuto     = "auto"
	RecreateBPF      = "bpf"
	RecreateNumbers  = "translate"
	SyncAlways       = "always"
	SyncInterval     = "interval"
	FaultProcess     = "process"
	FaultHost        = "host"
	FaultLink        = "link"
	LogAtStandby     = "standby"
	LogAtLogHost     = "log"
	LogFormatText    = "text"
	LogFormatJSON    = "json"
	schemeNATS       = "nats"
	schemeTLS        = "tls"
	schemeEmbed      = "embed"
	linuxIfNameLimit = 15 // IFNAMSIZ less its NUL
	maxLogURL        = 4096
)

// Common are the settings of every command.
type Common struct {
	RunDir    string // control sockets and locks, one set for each service
	StateDir  string // images, embedded log, caches
	File      string // the --config file, "" when there is none
	Verbose   bool   // log at debug level
	LogFormat string // text or json
}

// Protect are the settings of ftckpt protect.
type Protect struct {
	Common
	Name     string         // of the service
	PID      int            // root of the process tree to protect
	VIPs     []netip.Prefix // the service's addresses, with the lengths of their networks
	Dev      string         // interface the VIPs are on
	Join     string         // what standby or logserver printed; exclusive with Log
	Log      string         // nats:// or tls:// URL of a log of the user's own
	Ports    []uint16       // to protect; empty: all the process listens on
	Clients  []netip.Prefix // networks whose connections to protect; empty: all
	Outgoing []remote.Range // peers to which connections that the server opens from a VIP are protected
	Interval time.Duration  // between generations; 0: only when asked (ftckpt checkpoint)
	// IdleExpiry is how long a connection may be idle and stay protected; 0: for
	// ever.
	IdleExpiry time.Duration
	Schedule   string        // cron expression of generations, instead of Interval; "": none
	MaxReplay  time.Duration // take a generation when the log would take longer to replay; 0: however long
	Commit     string        // CommitLog
	OnCrash    string        // OnCrashFailover or OnCrashLocal
	Fenced     string        // FencedStop, FencedKill or FencedLeave: what becomes of a server that was replaced
}

// Standby are the settings of ftckpt standby.
type Standby struct {
	Common
	Name string // of the service
	Dev  string // interface to put the VIP on
	Join string // what a logserver or another standby printed; "" when Log says where the log is
	Log  string // nats://, tls:// or embed:// URL; "" when Join is set
	Mode string // ModeCold or ModeWarm
	// Recreate is how connections that are younger than the newest generation are
	// made again: RecreateAuto, RecreateBPF or RecreateNumbers.
	Recreate string
	Detect   time.Duration // silence after which the primary is suspected
}

// LogServer are the settings of ftckpt logserver.
type LogServer struct {
	Common
	Listen string // host:port
	Store  string // directory; "": a folder of StateDir
	Sync   string // SyncAlways or SyncInterval
}

// Demo are the settings of ftckpt demo.
type Demo struct {
	Common
	JSON        bool          // end with one summary object on standard output
	Report      string        // file for the HTML page, "" for none
	Fault       string        // FaultProcess, FaultHost or FaultLink
	LogAt       string        // LogAtStandby or LogAtLogHost
	Connections int           // long-lived client connections
	Duration    time.Duration // of the load, the fault being in its middle
	Seed        uint64        // of everything random; 0: choose one and print it
}
