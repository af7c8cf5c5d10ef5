// SPDX-License-Identifier: GPL-2.0
//go:build ignore

/*
 * Re-creates a TCP connection from one injected acknowledgement.
 *
 * At the ingress of lo, the ACK that ends a handshake (seq = the client's ISN
 * + 1, ack = the server's old ISN + 1) is given a request socket with what was
 * negotiated back then. TCP takes it for a validated SYN cookie, and puts the
 * connection into the listener's accept queue: bpf_sk_assign_tcp_reqsk, kernel
 * 6.9 and newer. Only what user space has put into the map is touched.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char _license[] SEC("license") = "GPL";

#define MAX_WANTED 65536
#define IP_FRAGMENT 0x3fff /* MF and the offset */
#define IPV6_VERSION 6
#define NS_PER_MS 1000000

/* The kernel's own types, as far as they are used here. */
struct sock {
	int unused;
} __attribute__((preserve_access_index));

/* include/net/tcp.h; its fields are part of the kfunc's contract. */
struct bpf_tcp_req_attrs {
	__u32 rcv_tsval;
	__u32 rcv_tsecr;
	__u16 mss;
	__u8 rcv_wscale;
	__u8 snd_wscale;
	__u8 ecn_ok;
	__u8 wscale_ok;
	__u8 sack_ok;
	__u8 tstamp_ok;
	__u8 usec_ts_ok;
	__u8 reserved[3];
};

extern int bpf_sk_assign_tcp_reqsk(struct __sk_buff *skb, struct sock *sk,
				   struct bpf_tcp_req_attrs *attrs, int attrs__sz) __ksym;

enum state {
	WAITING = 0, /* no ACK has come */
	ASSIGNED,    /* TCP has been given the request socket */
	NO_LISTENER,
	TAKEN,	     /* another socket has the addresses; detail: its state */
	REFUSED,     /* by the kernel; detail: its error number, negative */
};

/* IPv4 addresses are IPv4-mapped; all in network order. */
struct conn_key {
	__u8 client[16];
	__u8 server[16];
	__be16 client_port;
	__be16 server_port;
};

struct conn_want {
	__u64 since; /* when the server's clock showed rcv_tsecr: CLOCK_MONOTONIC, ns */
	struct bpf_tcp_req_attrs attrs;
	__u32 seq; /* of the ACK, host order */
	__u32 ack;
	__u32 state;
	__s32 detail;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_WANTED);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct conn_key);
	__type(value, struct conn_want);
} want SEC(".maps");

/* How often each state was reached. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, REFUSED + 1);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline void settle(struct conn_want *w, __u32 state, __s32 detail)
{
	__u64 *n = bpf_map_lookup_elem(&counts, &state);

	w->detail = detail;
	w->state = state;
	if (n)
		__sync_fetch_and_add(n, 1);
}

/* What became of an attempt decides over the packet: one that failed must not
 * reach TCP, which would answer the client with a reset. */
static __always_inline int attempt(struct __sk_buff *skb, struct conn_want *w,
				   struct bpf_sock_tuple *tuple, __u32 tuple_size)
{
	struct bpf_tcp_req_attrs attrs = w->attrs;
	struct bpf_sock *skc;
	struct sock *sk;
	int err;

	skc = bpf_skc_lookup_tcp(skb, tuple, tuple_size, BPF_F_CURRENT_NETNS, 0);
	if (!skc) {
		settle(w, NO_LISTENER, 0);
		return TC_ACT_SHOT;
	}
	if (skc->state != BPF_TCP_LISTEN) {
		settle(w, TAKEN, skc->state);
		bpf_sk_release(skc);
		return TC_ACT_SHOT;
	}
	sk = (struct sock *)bpf_skc_to_tcp_sock(skc);
	if (!sk) {
		settle(w, NO_LISTENER, 0);
		bpf_sk_release(skc);
		return TC_ACT_SHOT;
	}
	attrs.rcv_tsecr += (bpf_ktime_get_ns() - w->since) / NS_PER_MS;
	err = bpf_sk_assign_tcp_reqsk(skb, sk, &attrs, sizeof(attrs));
	bpf_sk_release(skc);
	if (err) {
		settle(w, REFUSED, err);
		return TC_ACT_SHOT;
	}
	settle(w, ASSIGNED, 0);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int recreate(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct bpf_sock_tuple tuple = {};
	struct ethhdr *eth = data;
	struct conn_key key = {};
	__u32 tuple_size, length;
	struct conn_want *w;
	struct tcphdr *th;

	if ((void *)(eth + 1) > end)
		return TC_ACT_UNSPEC;

	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl != 5 ||
		    ip->protocol != IPPROTO_TCP || ip->frag_off & bpf_htons(IP_FRAGMENT))
			return TC_ACT_UNSPEC;
		key.client[10] = key.client[11] = key.server[10] = key.server[11] = 0xff;
		__builtin_memcpy(key.client + 12, &ip->saddr, 4);
		__builtin_memcpy(key.server + 12, &ip->daddr, 4);
		tuple.ipv4.saddr = ip->saddr;
		tuple.ipv4.daddr = ip->daddr;
		tuple_size = sizeof(tuple.ipv4);
		length = bpf_ntohs(ip->tot_len) - sizeof(*ip);
		th = (void *)(ip + 1);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip6 = (void *)(eth + 1);

		if ((void *)(ip6 + 1) > end || ip6->version != IPV6_VERSION ||
		    ip6->nexthdr != IPPROTO_TCP)
			return TC_ACT_UNSPEC;
		__builtin_memcpy(key.client, &ip6->saddr, 16);
		__builtin_memcpy(key.server, &ip6->daddr, 16);
		__builtin_memcpy(tuple.ipv6.saddr, &ip6->saddr, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &ip6->daddr, 16);
		tuple_size = sizeof(tuple.ipv6);
		length = bpf_ntohs(ip6->payload_len);
		th = (void *)(ip6 + 1);
	} else {
		return TC_ACT_UNSPEC;
	}

	if ((void *)(th + 1) > end || !th->ack || th->syn || th->rst || th->fin ||
	    length != th->doff * 4)
		return TC_ACT_UNSPEC;
	key.client_port = th->source;
	key.server_port = th->dest;
	w = bpf_map_lookup_elem(&want, &key);
	if (!w || w->state == ASSIGNED || bpf_ntohl(th->seq) != w->seq || bpf_ntohl(th->ack_seq) != w->ack)
		return TC_ACT_UNSPEC;

	if (tuple_size == sizeof(tuple.ipv4)) {
		tuple.ipv4.sport = th->source;
		tuple.ipv4.dport = th->dest;
		return attempt(skb, w, &tuple, sizeof(tuple.ipv4));
	}
	tuple.ipv6.sport = th->source;
	tuple.ipv6.dport = th->dest;
	return attempt(skb, w, &tuple, sizeof(tuple.ipv6));
}
