/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The host agent's way out: a pod's reply gets its VIP back and goes straight to the client.
 *
 * Checksums are left to the kernel's helpers, for a packet from a local stack may carry only half of one
 * (CHECKSUM_PARTIAL) and only they know.
 *
 * TC_ACT_UNSPEC, but for what would go round in circles: the frame may leave as far as we mind, and the next filter of
 * the hook has its say, about our own replies, too. TC_ACT_OK would end the walk, and we are first in it: a neighbour's
 * policy or rate limit behind us would see no packet of the node any more.
 */
#ifndef HF_REPLY_H
#define HF_REPLY_H

#include <linux/pkt_cls.h>
#include "nat.h"
#include "vip.h"

#define HF_TCP_OPTIONS_BYTES_MAX 40
#define HF_TCP_OPTION_MSS 2
#define HF_L4_AT (HF_ETH_BYTES + HF_IP_BYTES)

struct hf_reply {
	__u32 protocol;
	__be32 saddr;
	__be32 daddr;
	__u32 ports; /* as in struct hf_packet */
	__u32 tcp_flags;
	__u32 tcp_header; /* bytes */
};

/* 0 where the frame is an IPv4 TCP or UDP packet, without options and no fragment. Copies: the headers need not be in linear memory. */
HF_INLINE int hf_reply_parse(struct __sk_buff *skb, struct hf_reply *reply)
{
	__u8 ip[HF_IP_BYTES] __attribute__((aligned(4)));
	__u8 l4[HF_TCP_BYTES] __attribute__((aligned(4)));

	if (skb->protocol != bpf_htons(0x0800) || bpf_skb_load_bytes(skb, HF_ETH_BYTES, ip, sizeof(ip)))
		return -1;
	reply->protocol = ip[9];
	if (ip[0] != 0x45 || HF_U16(ip + 6) & bpf_htons(0x3fff))
		return -1;
	if (reply->protocol != HF_PROTOCOL_TCP && reply->protocol != HF_PROTOCOL_UDP)
		return -1;
	reply->saddr = HF_U32(ip + 12);
	reply->daddr = HF_U32(ip + 16);
	reply->tcp_flags = 0;
	if (bpf_skb_load_bytes(skb, HF_L4_AT, l4, HF_UDP_BYTES))
		return -1;
	reply->ports = HF_U32(l4);
	if (reply->protocol == HF_PROTOCOL_UDP)
		return 0;
	if (bpf_skb_load_bytes(skb, HF_L4_AT, l4, sizeof(l4)))
		return -1;
	reply->tcp_header = (l4[12] >> 4) * 4;
	reply->tcp_flags = l4[13];
	return 0;
}

/* An MSS that would not fit the tunnel is lowered; a missing one is left alone. */
HF_COLD int hf_clamp_mss(struct __sk_buff *skb, __u32 tcp_header, __u32 mss_max)
{
	__u8 options[HF_TCP_OPTIONS_BYTES_MAX] = {};
	__u32 length, at = 0;

	if (tcp_header <= HF_TCP_BYTES || tcp_header > HF_TCP_BYTES + HF_TCP_OPTIONS_BYTES_MAX)
		return 0;
	length = tcp_header - HF_TCP_BYTES;
	if (bpf_skb_load_bytes(skb, HF_L4_AT + HF_TCP_BYTES, options, length))
		return 0;
	for (int i = 0; i < HF_TCP_OPTIONS_BYTES_MAX; i++) {
		__u32 kind, size;

		if (at > HF_TCP_OPTIONS_BYTES_MAX - 4 || at + 4 > length)
			return 0;
		kind = options[at];
		size = options[at + 1];
		if (kind == HF_TCP_OPTION_MSS && size == 4)
			break;
		if (kind == 0 || (kind != 1 && size < 2))
			return 0;
		at += kind == 1 ? 1 : size;
	}
	if (at > HF_TCP_OPTIONS_BYTES_MAX - 4 || options[at] != HF_TCP_OPTION_MSS)
		return 0;
	__u32 old = options[at + 2] << 8 | options[at + 3];
	__be16 old_be = bpf_htons(old), new_be = bpf_htons(mss_max);

	if (old <= mss_max)
		return 0;
	bpf_skb_store_bytes(skb, HF_L4_AT + HF_TCP_BYTES + at + 2, &new_be, sizeof(new_be), 0);
	if (at & 1) { /* it straddles two words of the checksum */
		old_be = old_be << 8 | old_be >> 8;
		new_be = new_be << 8 | new_be >> 8;
	}
	return bpf_l4_csum_replace(skb, HF_L4_AT + 16, old_be, new_be, 2);
}

HF_INLINE void hf_snat(struct __sk_buff *skb, const struct hf_reply *reply, __be32 vip, __be16 port_be)
{
	__be32 addr = vip;
	__be16 port = port_be;
	__u32 mangled = 0, csum_at = HF_L4_AT + 16;

	if (reply->protocol == HF_PROTOCOL_UDP) {
		csum_at = HF_L4_AT + 6;
		mangled = BPF_F_MARK_MANGLED_0;
	}
	bpf_l4_csum_replace(skb, csum_at, reply->saddr, vip, BPF_F_PSEUDO_HDR | mangled | 4);
	bpf_l4_csum_replace(skb, csum_at, (__u16)reply->ports, port_be, mangled | 2);
	bpf_l3_csum_replace(skb, HF_ETH_BYTES + 10, reply->saddr, vip, 4);
	bpf_skb_store_bytes(skb, HF_ETH_BYTES + 12, &addr, sizeof(addr), 0);
	bpf_skb_store_bytes(skb, HF_L4_AT, &port, sizeof(port), 0);
}

/* A packet to a VIP's address that no VIP serves, and that hf_xdp has passed on, leaves the interface that it came in by:
 * the node forwards it to where the route to the VIP leads, which is the router, and that one sends it to a load balancer
 * again, until its TTL is used up. What starts on this node or in its pods has come in by no uplink. */
HF_COLD int hf_goes_round(struct __sk_buff *skb)
{
	__be32 addr;

	if (skb->protocol != bpf_htons(0x0800) || bpf_skb_load_bytes(skb, HF_ETH_BYTES + 16, &addr, sizeof(addr)))
		return 0;
	return hf_vip_addr(addr);
}

HF_INLINE int hf_reply(struct __sk_buff *skb)
{
	const struct hf_config *config = hf_config();
	__u32 bytes = skb->len, flags = 0;
	struct hf_nat_key key;
	struct hf_reply reply;
	struct hf_nat *entry;
	int assured;

	if (unlikely(skb->ingress_ifindex == skb->ifindex) && hf_goes_round(skb)) {
		hf_count(HF_DROP_UNSERVED, bytes);
		return TC_ACT_SHOT;
	}
	if (!config || hf_reply_parse(skb, &reply))
		return TC_ACT_UNSPEC;
	hf_nat_key(&key, reply.daddr, reply.saddr, reply.ports >> 16, reply.ports, reply.protocol);
	entry = bpf_map_lookup_elem(&nat, &key);
	assured = entry != NULL;
	if (!assured)
		entry = bpf_map_lookup_elem(&unassured, &key);
	if (!entry)
		return TC_ACT_UNSPEC;
	entry->seen_ns = bpf_ktime_get_coarse_ns();
	if (reply.tcp_flags & HF_TCP_FIN)
		flags |= HF_NAT_FIN_OUT;
	if (reply.tcp_flags & HF_TCP_RST)
		flags |= HF_NAT_RST;
	if ((entry->flags & flags) != flags)
		entry->flags |= flags;
	if (!assured)
		hf_nat_answered(&key, entry, reply.protocol);
	hf_snat(skb, &reply, hf_unmapped(entry->vip), entry->vip_port_be);
	if ((reply.tcp_flags & (HF_TCP_SYN | HF_TCP_ACK)) == (HF_TCP_SYN | HF_TCP_ACK) && config->mss_max)
		hf_clamp_mss(skb, reply.tcp_header, config->mss_max);
	hf_count(HF_REPLY, bytes);
	return TC_ACT_UNSPEC;
}

#endif
