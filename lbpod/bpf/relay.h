/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* On to whoever can decide: the packet travels to the owner of its slot, or to the backup. */
#ifndef HF_RELAY_H
#define HF_RELAY_H

#include "flow.h"
#include "send.h"

/* Node of the first of owner and backup with this flag that can be sent to, else NULL. */
HF_INLINE const struct hf_node *hf_first_node(const struct hf_config *config, __u32 owner, __u32 backup, __u32 flag)
{
	const struct hf_node *node = NULL;

	if (owner != config->self)
		node = hf_member_node_if(owner, flag);
	if (!node && backup != config->self)
		node = hf_member_node_if(backup, flag);
	return node;
}

/*
 * Node of the slot's owner where it is up, else that of its backup, else NULL. Where both are silent, one that is only
 * doubted: it may be up all the same, and whoever decides in its place decides wrongly; a packet that is lost is sent
 * again.
 */
HF_INLINE const struct hf_node *hf_owner_node(const struct hf_config *config, __u32 slot)
{
	__u32 *pair = bpf_map_lookup_elem(&own, &slot);
	const struct hf_node *node;
	__u32 owner, backup;

	if (!pair)
		return NULL;
	owner = *pair & 0xffff;
	backup = *pair >> 16;
	node = hf_first_node(config, owner, backup, HF_MEMBER_UP);
	return likely(node) ? node : hf_first_node(config, owner, backup, HF_MEMBER_DOUBTED);
}

/* The agent asks the owner about flows that it finds here. Looked up first: most packets are not a flow's first. */
HF_INLINE void hf_note_pending(const struct hf_flow *flow, __u32 slot)
{
	struct hf_pending *noted = bpf_map_lookup_elem(&pending, flow);
	struct hf_pending fresh = {.slot = slot, .seen_ns = bpf_ktime_get_coarse_ns()};

	if (noted) {
		noted->slot = slot;
		noted->seen_ns = fresh.seen_ns;
		return;
	}
	bpf_map_update_elem(&pending, flow, &fresh, BPF_ANY);
}

HF_INLINE __u32 hf_relay(struct xdp_md *ctx, const struct hf_config *config, const struct hf_node *node, __u32 tot_len,
			 __u32 hash, __u32 origin)
{
	__be16 first = bpf_htons(config->self); /* the LB that had it from the router */
	__u32 hops = HF_ORIGIN_HOPS(origin) + 1;
	void *data, *option;

	if (!hf_fits(node, tot_len, HF_RELAY_OVERHEAD_BYTES))
		return hf_too_big(ctx, node->mtu, origin);
	if (origin & HF_ORIGIN_RELAY) {
		option = hf_data(ctx) + HF_OPTION_AT + 4;
		if (option + 8 > hf_data_end(ctx))
			return HF_DROP(HF_DROP_GENEVE_MALFORMED);
		first = HF_U16(option + 6);
	}
	data = hf_make_room(ctx, HF_ORIGIN_ROOM(origin), HF_RELAY_OVERHEAD_BYTES);
	if (!data)
		return HF_DROP(HF_DROP_NO_HEADROOM);
	hf_write_outer(data, config, node, tot_len, hash, HF_RELAY_OVERHEAD_BYTES, HF_OPTION_RELAY);
	option = data + HF_OPTION_AT + 4;
	HF_U32(option) = bpf_htonl(config->epoch);
	HF_U32(option + 4) = hops | (__u32)first << 16;
	return hf_transmit(ctx, node, hf_verdict_of(origin, HF_RELAYED));
}

#endif
