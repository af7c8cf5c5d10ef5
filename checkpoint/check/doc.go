// Package check finds out what a host can do and whether a process can be
// protected. Every answer is one of three, as in cilium/ebpf's feature probes:
// it works, it is missing, or it could not be told. A probe really does what it
// asks about, in namespaces of its own, and leaves nothing behind.
package check
