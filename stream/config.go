package stream

import "crypto/tls"

// Config says where a service's log is and how it is kept.
//
// Exactly one of Server, Join and URL must be set.
type Config struct {
	// Service names the log: 1 to 32 of a-z, 0-9, '-' and '_', beginning with a
	// letter or digit.
	Service string

	// Server is an embedded server of this process.
	Server *Server
	// Join is the string of a server that StartServer runs on another host.
	Join string
	// URL is a NATS server or cluster of the user's own: nats:// or tls://,
	// several separated by commas.
	URL string

	// For URL only; at most one way of authentication.
	User, Password, Token, CredsFile string
	TLS                              *tls.Config // for tls://, nil: the system's roots

	// Replicas of the streams when they have to be created: 1, 3 or 5; 0 means 3
	// on a cluster, so that a log there survives the loss of one of its hosts, and
	// 1 on a server alone.
	Replicas int
	// LogBytes is the size at which the log is full, when it has to be created; 0: 2 GiB.
	LogBytes int64
	// StoreBytes is the same for the checkpoint store; 0: no limit.
	StoreBytes int64
	// MaxBacklog bounds a Writer's memory, in octets that are not stable; 0: 256 MiB.
	MaxBacklog int
}
