package control

import (
	"time"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// Role is what a daemon is to its service.
type Role string

// The roles.
const (
	RolePrimary    Role = "primary"
	RoleStandby    Role = "standby"
	RoleTakingOver Role = "taking-over"
	RoleFenced     Role = "fenced"
)

// Durability is what the log's acknowledgement survives.
type Durability string

// The durabilities.
const (
	DurableProcess Durability = "process" // death of the log server's process
	DurablePower   Durability = "power"   // loss of power of its host
)

// LogState is how the log is.
type LogState string

// The states of a log.
const (
	LogOK       LogState = "ok"
	LogLowSpace LogState = "low-space"
	LogFailed   LogState = "failed"
)

// Status is how a service stands, as one daemon sees it. Its JSON form is the
// contract of "ftckpt status --json": fields are added, never renamed. Times
// are in the unit their name ends in; points in time are RFC 3339, UTC.
type Status struct {
	Service string `json:"service"`
	Node    string `json:"node"`          // this host
	PID     int    `json:"pid,omitempty"` // of the server, where it runs here
	Role    Role   `json:"role"`
	Epoch   uint64 `json:"epoch"`

	Protected      bool       `json:"protected"`
	ProtectedSince *time.Time `json:"protected_since"` // null when not protected
	Reason         string     `json:"reason,omitempty"`

	VIPs        []string `json:"vips"`
	Ports       []uint16 `json:"ports"`
	ClientNets  []string `json:"client_nets"` // whose connections are protected; empty: all
	Connections int      `json:"connections"`

	// Outgoing is there when peers were named or the server has opened connections.
	Outgoing *Outgoing `json:"outgoing,omitempty"`

	Log         Log        `json:"log"`
	Generation  Generation `json:"generation"`
	Held        Held       `json:"held"`
	QueueDrops  uint64     `json:"queue_drops"`
	Divergences uint64     `json:"divergences"`
	Expired     uint64     `json:"expired"` // connections no longer protected for having been idle (--idle-expiry)

	// Recreate is how a takeover by this node makes connections again that are
	// younger than the newest generation: "bpf", "translate", or "none", which
	// resets them; empty where the daemon cannot take over.
	Recreate   string `json:"recreate,omitempty"`
	Translated int    `json:"translated"` // connections whose numbers are translated here

	Standbys  []Standby `json:"standbys"`
	Takeovers int       `json:"takeovers"`
	Takeover  *Takeover `json:"takeover,omitempty"` // the last one, when there was one
}

// Outgoing are the connections that the server had opened itself at the newest
// generation. Peers are those to which they are protected (--outgoing).
type Outgoing struct {
	Peers       []string      `json:"peers"`
	Connections int           `json:"connections"` // protected
	Others      int           `json:"others"`      // not protected: a takeover resets them
	Unprotected []Unprotected `json:"unprotected"` // of the others the first 32
}

// Unprotected is a connection that does not survive a takeover.
type Unprotected struct {
	Local  string `json:"local"`
	Remote string `json:"remote"`
	Remedy string `json:"remedy"` // what to do
}

// Log is the state of the stable log. Stable is the position up to which all
// is stable; the lag is what was logged behind it and how long it waited.
type Log struct {
	URL        string     `json:"url"` // without credentials
	Durability Durability `json:"durability"`
	Stable     uint64     `json:"stable"`
	LagRecords uint64     `json:"lag_records"`
	LagBytes   uint64     `json:"lag_bytes"`
	LagUS      int64      `json:"lag_us"`
	State      LogState   `json:"state"`
}

// Generation is the newest stable one; ID 0 means that there is none yet.
type Generation struct {
	ID         uint64  `json:"id"`
	AgeSeconds float64 `json:"age_seconds"`
	Bytes      uint64  `json:"bytes"`
	PauseUS    int64   `json:"pause_us"`
}

// Held is what the south side holds until it is stable: packets now, and how
// long the recent ones waited.
type Held struct {
	Packets int   `json:"packets"`
	P50US   int64 `json:"p50_us"`
	P99US   int64 `json:"p99_us"`
}

// Standby is one host that could take over, as far as this daemon knows.
type Standby struct {
	Node       string `json:"node"`
	Mode       string `json:"mode"`
	Generation uint64 `json:"generation"` // newest it has; 0 for none
	LagRecords uint64 `json:"lag_records"`
	SeenUS     int64  `json:"seen_us"` // since it was last heard of
}

// Takeover is how the last takeover went, in milliseconds for each step.
type Takeover struct {
	DetectMS    float64 `json:"detect_ms"`
	FenceMS     float64 `json:"fence_ms"`
	VIPMS       float64 `json:"vip_ms"`
	RestoreMS   float64 `json:"restore_ms"`
	ReplayMS    float64 `json:"replay_ms"`
	TotalMS     float64 `json:"total_ms"`
	Connections int     `json:"connections"` // carried over
	Resets      int     `json:"resets"`      // connections that could not be
}

// ExitCode is the status with which "ftckpt status" ends.
func (s Status) ExitCode() exitcode.Code {
	switch {
	case s.Role == RoleFenced:
		return exitcode.Fenced
	case !s.Protected:
		return exitcode.Unprotected
	default:
		return exitcode.OK
	}
}

// normal makes the JSON form the same whether a list is empty or nil, and
// whatever the handler's clock and zone.
func (s Status) normal() Status {
	if s.VIPs == nil {
		s.VIPs = []string{}
	}
	if s.ClientNets == nil {
		s.ClientNets = []string{}
	}
	if s.Ports == nil {
		s.Ports = []uint16{}
	}
	if s.Standbys == nil {
		s.Standbys = []Standby{}
	}
	if s.ProtectedSince != nil {
		t := s.ProtectedSince.UTC().Truncate(time.Second)
		s.ProtectedSince = &t
	}
	return s
}

// FailoverRequest asks for a planned move.
type FailoverRequest struct {
	DryRun bool   `json:"dry_run"`
	To     string `json:"to,omitempty"` // node; "" for the one that is furthest along
}

// FailoverResult is a planned move that was made, or with a dry run could be.
type FailoverResult struct {
	DryRun     bool   `json:"dry_run"`
	To         string `json:"to"`                 // the node that takes over
	Generation uint64 `json:"generation"`         // with which it begins; that of now in a dry run
	StallUS    int64  `json:"stall_us,omitempty"` // from holding clients here to being live there, as seen from here
}

// CheckpointResult is a generation that became stable on request.
type CheckpointResult struct {
	ID      uint64 `json:"id"`
	Bytes   uint64 `json:"bytes"`    // of its image, before compression and deduplication
	PauseUS int64  `json:"pause_us"` // how long the server stood still
}
