// Package capsule makes the private place in which a standby restores a
// service: a network, a PID and a mount namespace, held by a PID 1 of ours.
//
// # What it promises
//
//   - PIDs are free for the image: the namespace is new, the threads of PID 1
//     are moved to the top of the PID range, and ReservePIDs keeps helpers
//     (CRIU, nsenter's children) off the PIDs an image needs.
//   - Nothing of what happens inside reaches the network before TakeVIP: the
//     only interface besides lo is the macvlan that carries the service's
//     address, and it is down. Sockets can be bound, listened on and restored
//     with that address all the same (IPv4; see PrepareVIPs).
//   - It outlives its agent for as long as a process lives inside, so that a
//     killed agent never takes the server along. An empty capsule ends by
//     itself when its agent is gone. When PID 1 ends, all inside ends.
//   - What an agent left behind is found by a state file (RunDir, 0600) and is
//     killed only if boot, PID, start time and PID namespace prove it ours.
//
// # What the caller must do
//
//   - main and TestMain call RunInit first: Start executes the program itself
//     again as PID 1.
//   - Root, a /proc of the caller's own PID namespace, and nsenter (util-linux).
//   - One agent at a time per RunDir and name; the package does not lock.
//   - Probe the address (internal/l2) before TakeVIP, and fence its old owner.
//   - Under systemd: KillMode=process, or stopping the agent's unit also kills
//     the capsule, which lives in the unit's control group.
//
// # Limits
//
// A macvlan and the interface it stands on do not hear each other: the standby
// host itself cannot reach the service while it is in the capsule (other hosts
// can), and a client on the standby host needs a macvlan of its own. Networks
// that allow one hardware address per port (Wi-Fi, most clouds) drop macvlans.
//
// Mounts are slaves of the host's: a file system the host mounts or unmounts
// later is seen inside, nothing that is mounted inside is seen outside. /sys is
// the host's. IPC, UTS, user and cgroup namespaces are the host's.
//
// Methods of a Capsule may be called from any goroutine; those that change the
// address exclude one another.
package capsule
