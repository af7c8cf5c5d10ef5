// Package reqsk re-creates TCP connections that are younger than the
// checkpoint, with the numbers their clients know: the old server's initial
// sequence number, its timestamp clock, its window scale. Nothing has to be
// translated afterwards: for the rest of its life such a connection is an
// ordinary one.
//
// A BPF program at the ingress of lo (bpf_sk_assign_tcp_reqsk, kernel 6.9 and
// newer) makes TCP take one injected acknowledgement for a validated SYN
// cookie. For each connection, the caller
//
//  1. has its rules in place, so that nothing TCP says reaches the client;
//  2. calls Recreator.Want with what AttrsFrom finds in the log;
//  3. sends the packet of Attrs.ACK up, over lo (tcpwrap.Datapath.SendUp);
//  4. learns from Recreator.Result what the kernel said, and from
//     Recreator.State that there is a socket;
//  5. injects what the client sent, from ClientISN + 1 on.
//
// Connections stand in the accept queue in the order of their
// acknowledgements. Taking a packet over lo is as a rule, but not always, done
// when the send returns.
//
// TCP may still drop a connection after Result is nil, and says nothing: the
// accept queue is full, or there is no route to the client. State then answers
// 0. Want it again and send the ACK again when there is room.
//
// What cannot be done this way gives ErrUnsuitable: a client whose MSS is below
// 536 octets (IPv4) or 1220 (IPv6), link-local addresses, connections that
// negotiated MPTCP, TCP-MD5 or TCP-AO. A listener that is bound to a device
// (SO_BINDTODEVICE) is not found, because the packet comes over lo; an MPTCP
// listener is refused by the kernel with EINVAL, and that is what Go's net
// package makes unless net.mptcp.enabled is 0 in the namespace. A microsecond
// timestamp clock (a route with tcp_usec_ts) is not kept: it goes on in
// milliseconds.
//
// The BPF program is under the GPL 2.0, as the kernel wants it; its compiled
// form is part of this package, so that building it takes no C compiler.
package reqsk
