// Package e2e tries the whole of ftckpt on real parts: the program as users
// start it, a real server, the kernel's own TCP in every client, and hosts that
// really die. It has tests only.
//
// Every test builds a lab of its own (internal/lab: hosts are network, PID,
// mount and UTS namespaces):
//
//	  client          primary             standby             log
//	+-----------+   +----------------+  +-----------------+  +------------------+
//	| loadgen   |   | redis-server   |  | ftckpt standby  |  | ftckpt logserver |
//	| raw       |   | ftckpt protect |  |  the log        |  |  where a test    |
//	| sockets   |   |                |  |  a capsule      |  |  has one         |
//	| 10.77.0.2 |   | 10.77.0.3      |  | 10.77.0.4       |  | 10.77.0.5        |
//	|           |   | 10.77.0.100    |  |  (10.77.0.100   |  |                  |
//	|           |   |  the VIP       |  |   afterwards)   |  |                  |
//	+-----|-----+   +-------|--------+  +--------|--------+  +--------|---------+
//	      +-----------------+------ a switch ----+--------------------+
//
// What a client must see is known byte for byte (internal/loadgen, and the raw
// clients here), so "survived" means: every reply right, no reset, on the very
// socket that was there before the failure.
//
// Each test prints its seed; FTCKPT_E2E_SEED repeats it. A failed test keeps
// captures of both hosts and all output of all daemons and prints where. At its
// end each test looks for what must not be left: processes, packet rules,
// mounts, links, frozen or traced servers.
//
//	FTCKPT_E2E_RUNS=20   runs of each random failure (default 2)
//	FTCKPT_E2E_SEED=7    seed instead of a random one
//	FTCKPT_E2E_RACE=1    build the daemons with the race detector too
//	FTCKPT_E2E_BIN=FILE  use this program instead of building one
//	FTCKPT_E2E_KEEP=1    keep captures and output of tests that pass as well
package e2e
