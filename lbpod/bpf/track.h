/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whether a tracking slot is ours to decide, and what is not: known by a lease, or on to the owner. Step 6 of README.md. */
#ifndef HF_TRACK_H
#define HF_TRACK_H

#include "relay.h"
#include "replica.h"

HF_INLINE int hf_owns(const __u32 *pair, __u32 self)
{
	return pair && ((*pair & 0xffff) == self || *pair >> 16 == self);
}

/*
 * Ours to decide. In next or prev alone, only what came by RELAY is: nobody relays to a next LB before having switched,
 * that is after the handover, and a prev LB still has everything. The router may give a next LB packets before it has
 * base and records.
 */
HF_INLINE int hf_decides(const struct hf_config *config, __u32 slot, __u32 origin)
{
	if (config->self == HF_MEMBER_NONE)
		return 0;
	if (hf_owns(bpf_map_lookup_elem(&own, &slot), config->self))
		return 1;
	if (likely(!(origin & HF_ORIGIN_RELAY) || !config->ring_change))
		return 0;
	return hf_owns(bpf_map_lookup_elem(&next, &slot), config->self) ||
	       hf_owns(bpf_map_lookup_elem(&prev, &slot), config->self);
}

/* Backend of a lease that has not ended, nor was given before the slot was last steady; 0: none. A SYN ends the lease, a
 * FIN or RST uses it for the last time. */
HF_INLINE __u32 hf_leased(const struct hf_flow *flow, __u64 word, __u32 tcp_flags)
{
	struct hf_lease *lease;
	__u32 backend;

	if (hf_is_syn(tcp_flags)) {
		bpf_map_delete_elem(&cache, flow);
		return 0;
	}
	lease = bpf_map_lookup_elem(&cache, flow);
	if (!lease || lease->round != (word & HF_SLOT_ROUND_MASK) || lease->until_ns <= bpf_ktime_get_coarse_ns() ||
	    !hf_backend_alive(lease->backend))
		return 0;
	backend = lease->backend;
	if (tcp_flags & (HF_TCP_FIN | HF_TCP_RST))
		bpf_map_delete_elem(&cache, flow);
	return backend;
}

/* The agent is to ask about the flow of this packet, which is relayed. Not about one that closes: what the owner says of it
 * now would be met by the next connection with this five-tuple, which a client whose connection was reset opens within
 * seconds. Nor about a first one: the owner records it. */
HF_INLINE void hf_want_lease(struct xdp_md *ctx, const struct hf_flow *flow, __u32 slot, const struct hf_packet *packet,
			     __u32 origin)
{
	if (packet->tcp_flags & (HF_TCP_FIN | HF_TCP_RST))
		bpf_map_delete_elem(&pending, flow);
	else if (!hf_is_syn(packet->tcp_flags) && !hf_is_quic_initial(ctx, origin, packet))
		hf_note_pending(flow, slot);
}

HF_COLD __u32 hf_track(struct xdp_md *ctx, __u32 hash, __u32 vip_id, __u64 word, __u32 origin)
{
	const struct hf_config *config = hf_config();
	const struct hf_node *node;
	struct hf_packet packet;
	struct hf_flow flow;
	__u32 backend;

	if (!config || hf_packet_again(ctx, origin, &packet))
		return HF_DROP(HF_DROP_MALFORMED);
	hf_flow_key(&flow, &packet, vip_id, origin);
	backend = hf_leased(&flow, word, packet.tcp_flags);
	if (likely(backend))
		return hf_send_to(ctx, config, backend, packet.tot_len, hash, origin,
				  hf_verdict_of(origin, HF_CACHE_HIT));
	node = hf_owner_node(config, hash >> 16);
	if (likely(node && HF_ORIGIN_HOPS(origin) < HF_RELAY_HOPS_MAX)) {
		if (!(origin & (HF_ORIGIN_RELAY | HF_ORIGIN_ICMP)))
			hf_want_lease(ctx, &flow, hash >> 16, &packet, origin);
		return hf_relay(ctx, config, node, packet.tot_len, hash, origin);
	}
	/* A first packet, too: nobody records it, so it has to go where its next packets will go. */
	return hf_send(ctx, hf_base_or_current(word), hash, origin, HF_DECIDED_ALONE);
}

#endif
