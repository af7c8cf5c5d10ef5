// Package north is the north side wrapper of US 7,673,038: what lies between a
// server and its TCP. Nothing is injected into the server. Recorder (Linux, BPF)
// tells what it takes from its connections, in the order in which it does; Order,
// which is pure, tells what of that a log has to say so that a replay can do the
// same again.
package north
