/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* To a backend, wherever it is: step 9 of README.md. And the arrays that say where and whether it is. */
#ifndef HF_SEND_H
#define HF_SEND_H

#include "deliver.h"
#include "encap.h"
#include "too_big.h"

/* The slot of a hash, in one load; 0 (no backend) where the VIP has no slots. */
HF_INLINE __u64 hf_slot_word(__u32 vip_id, __u32 hash)
{
	__u32 slot = hash >> 16;
	void *inner = bpf_map_lookup_elem(&slots, &vip_id);
	volatile __u64 *word;

	if (!inner)
		return 0;
	word = bpf_map_lookup_elem(inner, &slot);
	return word ? *word : 0;
}

HF_INLINE const struct hf_backend *hf_backend_alive(__u32 id)
{
	const struct hf_backend *backend = bpf_map_lookup_elem(&backends, &id);

	return likely(id && backend && backend->flags & HF_BACKEND_ALIVE) ? backend : NULL;
}

HF_INLINE const struct hf_node *hf_node_reachable(__u32 id)
{
	const struct hf_node *node = bpf_map_lookup_elem(&nodes, &id);

	return likely(node && node->flags & HF_NODE_REACHABLE) ? node : NULL;
}

/* Node of a member that is PRESENT, has this flag, and can be reached. HF_MEMBER_NONE lies outside the array. */
HF_INLINE const struct hf_node *hf_member_node_if(__u32 id, __u32 flag)
{
	const struct hf_member *member = bpf_map_lookup_elem(&members, &id);

	if (!member || (~member->flags & (HF_MEMBER_PRESENT | flag)))
		return NULL;
	return hf_node_reachable(member->node);
}

/* Node of a member that is believed to be up, and can be sent to. */
HF_INLINE const struct hf_node *hf_member_node(__u32 id)
{
	return hf_member_node_if(id, HF_MEMBER_UP);
}

/* Inlined where it must be quick. */
HF_INLINE __u32 hf_send_to(struct xdp_md *ctx, const struct hf_config *config, __u32 backend_id, __u32 tot_len,
			   __u32 hash, __u32 origin, __u32 verdict)
{
	const struct hf_backend *backend = hf_backend_alive(backend_id);
	__u32 room = HF_ORIGIN_ROOM(origin);
	const struct hf_node *node;

	if (!backend)
		return HF_DROP(HF_DROP_NO_BACKEND);
	if (unlikely(backend->flags & HF_BACKEND_LOCAL))
		return hf_deliver(ctx, hf_unmapped(backend->addr), backend->port_be, room, HF_LOCAL);
	node = hf_node_reachable(backend->node);
	if (!node)
		return HF_DROP(HF_DROP_NO_ROUTE);
	if (unlikely(!hf_fits(node, tot_len, HF_FORWARD_OVERHEAD_BYTES)))
		return hf_too_big(ctx, node->mtu, origin);
	return hf_encap_forward(ctx, config, node, backend, tot_len, hash, room, verdict);
}

/* An ICMP error is counted as one, by whichever rule it was sent. */
HF_INLINE __u32 hf_verdict_of(__u32 origin, __u32 verdict)
{
	return unlikely(origin & HF_ORIGIN_ICMP) ? (__u32)HF_ICMP_ERROR : verdict;
}

/* The same, a call away. */
HF_COLD __u32 hf_send(struct xdp_md *ctx, __u32 backend_id, __u32 hash, __u32 origin, __u32 verdict)
{
	const struct hf_config *config = hf_config();
	void *ip = hf_data(ctx) + HF_ETH_BYTES + HF_ORIGIN_ROOM(origin);

	if (!config || ip + HF_IP_BYTES > hf_data_end(ctx))
		return HF_DROP(HF_DROP_MALFORMED);
	return hf_send_to(ctx, config, backend_id, bpf_ntohs(HF_U16(ip + 2)), hash, origin,
			  hf_verdict_of(origin, verdict));
}

#endif
