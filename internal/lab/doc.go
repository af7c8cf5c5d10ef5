// Package lab builds a small network of hosts out of Linux namespaces, so that
// the death of a host can be tried on one machine.
//
//	 host "client"       host "primary"      host "standby"
//	+--------------+    +--------------+    +--------------+
//	| init (pid 1) |    | init (pid 1) |    | init (pid 1) |
//	| eth0         |    | eth0         |    | eth0         |
//	+--|-----------+    +--|-----------+    +--|-----------+
//	   |  veth            |  veth             |  veth
//	+--|------------------|-------------------|--+
//	| client           primary             standby |
//	|        br0 (no STP, no bridge netfilter)     |
//	+-------------- the switch --------------------+
//
// A host has its own network, PID, mount and UTS namespaces, and its own /proc,
// /sys, /run and /dev/shm; the rest of the file system is the machine's, so
// that programs, libraries and data files have the same path on all hosts. The
// switch is a set of namespaces as well: nothing of the machine's own network
// is ever touched, and no namespace, link or rule has a name outside.
//
// # What holds it together
//
// PID 1 of each host is this program again (see Hook), reading a pipe whose
// other end only the lab's owner has. When the owner goes, however it goes, the
// pipe ends, PID 1 exits, and the kernel ends every process of the host and
// then its namespaces. So an owner that died of SIGKILL leaves a directory of
// logs and nothing else; New removes the directories of dead owners.
//
// # What a caller must do
//
// Be root; call Hook first thing in main or TestMain; Close the lab. Wait on
// every Cmd it starts: a dead child that was not waited for keeps its host's PID
// namespace from ending.
//
// # Death of a host
//
// Host.Kill first takes the link down at the switch and then kills PID 1. The
// order is the point: the kernel closes the sockets of dying processes, and the
// FIN or RST of that must reach nobody, as with a machine that lost its power.
package lab
