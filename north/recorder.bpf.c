// SPDX-License-Identifier: GPL-2.0
//go:build ignore

/*
 * Tells user space, in the order in which it happens, what a server takes from
 * its connections: accepts, reads, and that it has closed one.
 *
 * Tracepoints only, where there is one: fentry is refused by kernels that are
 * locked down, and the arguments of tracepoints are stable. A socket that does
 * not match costs a few loads.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/types.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

char _license[] SEC("license") = "GPL";

#define RING_SIZE (4 << 20)
#define FAMILY_INET 2
#define FAMILY_INET6 10
#define RECEIVE_SHUTDOWN 1 /* RCV_SHUTDOWN, include/net/sock.h */
#define PEEK 2		   /* MSG_PEEK */

/* TCP states, include/net/tcp_states.h */
#define FIN_WAIT1 4
#define CLOSE 7
#define LAST_ACK 9

/* The kernel's own types, as far as they are used here. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct ns_common {
	unsigned int inum;
};
struct net {
	struct ns_common ns;
};
typedef struct {
	struct net *net;
} possible_net_t;
struct in6_addr___k {
	union {
		__u32 u6_addr32[4];
	} in6_u;
};
struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	possible_net_t skc_net;
	struct in6_addr___k skc_v6_daddr;
	struct in6_addr___k skc_v6_rcv_saddr;
};
struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
	__u8 sk_shutdown;
};
struct tcp_sock {
	__u32 copied_seq;
};
struct socket {
	struct sock *sk;
};
struct file {
	void *private_data;
};
struct fdtable {
	struct file **fd;
};
struct files_struct {
	struct fdtable *fdt;
};
struct task_struct {
	struct files_struct *files;
};
struct pt_regs {
	unsigned long orig_ax; /* x86 */
	int syscallno;	       /* arm64 */
};
#ifdef __TARGET_ARCH_arm64
#define CALL(regs) ((regs)->syscallno)
#define CALL_ACCEPT 202
#define CALL_ACCEPT4 242
#else
#define CALL(regs) ((regs)->orig_ax)
#define CALL_ACCEPT 43
#define CALL_ACCEPT4 288
#endif
#pragma clang attribute pop

enum what {
	READ = 1,
	ACCEPT,
	CLOSED,
};

struct taken {
	__u64 socket;	 /* which of several with the same addresses */
	__u32 local[4]; /* network order; of IPv4 the first word only */
	__u32 remote[4];
	__u16 local_port; /* host order */
	__u16 remote_port;
	__u32 copied; /* tp->copied_seq: the octet that the next read returns */
	__u16 family;
	__u16 what;
};
const struct taken *unused_taken __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_SIZE);
} events SEC(".maps");

const volatile __u32 netns;	  /* inode number */
volatile __u8 ports[65536 / 8];   /* bitmap of local ports, host order */
volatile __u64 wake;		  /* BPF_RB_NO_WAKEUP or BPF_RB_FORCE_WAKEUP */
__u64 lost;			  /* events that found the ring full */

static __always_inline bool ours(struct sock *sk, __u16 *port)
{
	*port = sk->__sk_common.skc_num;
	return ports[*port >> 3] & 1 << (*port & 7) && sk->__sk_common.skc_net.net->ns.inum == netns;
}

static __always_inline int emit(struct sock *sk, __u16 port, enum what what, __u32 copied)
{
	struct taken *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	e->socket = (__u64)sk;
	e->what = what;
	e->copied = copied;
	e->local_port = port;
	e->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	e->family = sk->__sk_common.skc_family;
	if (e->family == FAMILY_INET) {
		e->local[0] = sk->__sk_common.skc_rcv_saddr;
		e->remote[0] = sk->__sk_common.skc_daddr;
	} else {
		for (int i = 0; i < 4; i++) {
			e->local[i] = sk->__sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32[i];
			e->remote[i] = sk->__sk_common.skc_v6_daddr.in6_u.u6_addr32[i];
		}
	}
	bpf_ringbuf_submit(e, wake);
	return 0;
}

static __always_inline int emit_read(struct sock *sk, __u16 port)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	return tp ? emit(sk, port, READ, tp->copied_seq) : 0;
}

/* Whenever octets have left the receive queue, whatever system call took them;
 * the socket's lock is held and copied_seq has moved. */
SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(on_read, struct sock *sk)
{
	__u16 port;

	return ours(sk, &port) ? emit_read(sk, port) : 0;
}

/* The end of the stream, which the tracepoint above does not see. */
SEC("tp_btf/sock_recv_length")
int BPF_PROG(on_end, struct sock *sk, int ret, int flags)
{
	__u16 port;

	if (ret != 0 || flags & PEEK || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	return ours(sk, &port) ? emit_read(sk, port) : 0;
}

/* The server has closed a connection, so that nothing more of it is read. Its
 * shutdown of one direction does not look like that: it leaves RCV_SHUTDOWN as
 * it was. After the client's FIN there is nothing to be read but that. */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(on_state, struct sock *sk, int from, int to)
{
	__u16 port;

	if (to != FIN_WAIT1 && to != LAST_ACK && to != CLOSE)
		return 0;
	if (sk->sk_protocol != IPPROTO_TCP || !(sk->sk_shutdown & RECEIVE_SHUTDOWN) || !ours(sk, &port))
		return 0;
	return emit(sk, port, CLOSED, 0);
}

SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(on_destroy, struct sock *sk)
{
	__u16 port;

	return ours(sk, &port) ? emit(sk, port, CLOSED, 0) : 0;
}

/* No tracepoint tells of an accept but those of the system calls. The socket is
 * found by its file descriptor. */
SEC("tp_btf/sys_exit")
int BPF_PROG(on_accept, struct pt_regs *regs, long ret)
{
	unsigned long call = CALL(regs);
	struct task_struct *task;
	struct file **fds, *file;
	struct socket *socket;
	struct taken *e;
	struct sock *sk;
	__u16 port;

	if ((call != CALL_ACCEPT && call != CALL_ACCEPT4) || ret < 0)
		return 0;
	task = (struct task_struct *)bpf_get_current_task_btf();
	fds = BPF_CORE_READ(task, files, fdt, fd);
	if (bpf_probe_read_kernel(&file, sizeof(file), fds + ret) || !file)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	if (!sk || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	port = BPF_CORE_READ(sk, __sk_common.skc_num);
	if (!(ports[port >> 3] & 1 << (port & 7)) || BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum) != netns)
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	e->socket = (__u64)sk;
	e->what = ACCEPT;
	e->copied = BPF_CORE_READ((struct tcp_sock *)sk, copied_seq);
	e->local_port = port;
	e->remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	e->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	if (e->family == FAMILY_INET) {
		e->local[0] = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
		e->remote[0] = BPF_CORE_READ(sk, __sk_common.skc_daddr);
	} else {
		BPF_CORE_READ_INTO(&e->local, sk, __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32);
		BPF_CORE_READ_INTO(&e->remote, sk, __sk_common.skc_v6_daddr.in6_u.u6_addr32);
	}
	bpf_ringbuf_submit(e, wake);
	return 0;
}
