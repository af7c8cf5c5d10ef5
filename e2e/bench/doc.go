// Command bench measures what protection costs: one redis-server in a lab of
// hosts, without and with protection in turn, in one run.
//
//	client              primary                    standby            [log]
//	redis-benchmark --> redis-server + protect --> standby with log   [logserver]
//
// All hosts are namespaces of this machine, so server, agent, log and client
// share its processors, and other load on it moves every number. Therefore the
// result is the ratio of two neighbours in time, and of several such pairs the
// smallest, the median and the largest; an absolute number says little.
//
// CPU time is what the processes were charged (all threads, user and system).
// Packets that the kernel handles in a softirq are charged to whoever was
// interrupted, or to nobody.
//
// It also measures how long a generation holds the server's packets, as the
// agent says and as a client sees it, and how long a takeover makes a client
// wait. It checks every reply of the clients that see these, and asserts
// nothing about speed.
package main
