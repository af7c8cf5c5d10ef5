// Package sim runs the protocol's pure parts (tcpwrap.Machine, the log's writer,
// claim and follower, replay.Ledger and Engine, roles.Judge, checkpoint.Retain) in
// one deterministic simulator: several nodes, a log, a network and clients, none of
// them real, with faults at every step. One seed is one schedule. After each step
// the five promises of docs/ARCHITECTURE.md are checked against what the log's
// model really holds.
//
// What a node does with the machines (internal/node) is modelled here call for
// call; what is pure there is used, not copied. A change of the order of things in
// internal/node belongs here, too.
package sim

import "fmt"

// dice is a small source of chance: splitmix64. Each step of a schedule has its
// own, so that dropping one leaves the others as they were.
type dice struct{ s uint64 }

func (d *dice) next() uint64 {
	d.s += 0x9e3779b97f4a7c15
	z := d.s
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// n draws from [0, k).
func (d *dice) n(k int) int { return int(d.next() >> 33 % uint64(k)) }

// between draws evenly from low to high, both included.
func (d *dice) between(low, high int) int { return low + d.n(high-low+1) }

// chance is true once in so many times.
func (d *dice) chance(in int) bool { return in > 0 && d.n(in) == 0 }

// Violation is a promise that was broken.
type Violation struct {
	Promise int // 1 to 5; 6: a service that could have gone on did not; 0: a panic
	What    string
	Step    int // of the schedule; past its end: while the clients finished
}

func (v *Violation) String() string {
	return fmt.Sprintf("step %d, promise %d: %s", v.Step, v.Promise, v.What)
}
