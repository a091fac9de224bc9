/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* To a backend, wherever it is: step 9 of README.md. */
#ifndef HF_SEND_H
#define HF_SEND_H

#include "deliver.h"
#include "encap.h"

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

/* Inlined where it must be quick. room: what the packet carries before its own IPv4 header. */
HF_INLINE __u32 hf_send_to(struct xdp_md *ctx, const struct hf_config *config, __u32 backend_id, __u32 tot_len,
			   __u32 hash, __u32 room, __u32 verdict)
{
	const struct hf_backend *backend = hf_backend_alive(backend_id);
	const struct hf_node *node;

	if (!backend)
		return HF_DROP(HF_DROP_NO_BACKEND);
	if (unlikely(backend->flags & HF_BACKEND_LOCAL))
		return hf_deliver(ctx, hf_unmapped(backend->addr), backend->port_be, room, HF_LOCAL);
	node = hf_node_reachable(backend->node);
	if (!node)
		return HF_DROP(HF_DROP_NO_ROUTE);
	if (unlikely(!hf_fits(node, tot_len, HF_FORWARD_OVERHEAD_BYTES)))
		return HF_DROP(HF_TOO_BIG);
	return hf_encap_forward(ctx, config, node, backend, tot_len, hash, room, verdict);
}

#endif
