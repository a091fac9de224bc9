/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where a packet from the wire is sorted, and the steady path: all that nearly every packet ever meets.
 *
 * The rule of this file: arrays, arithmetic, one helper call. Anything else is a call to a cold function.
 */
#ifndef HF_STEADY_H
#define HF_STEADY_H

#include "icmp.h"
#include "track.h"
#include "tunnel.h"

/* A packet to a VIP's address that the common parser refused: step 3 of README.md. What was found: an exit, or a flow. */
HF_COLD __u64 hf_odd_vip(struct xdp_md *ctx)
{
	struct hf_packet packet;
	__u32 there = ctx->data_end - ctx->data - HF_ETH_BYTES;

	switch (hf_parse(ctx, 0, there, &packet)) {
	case HF_KIND_OPTIONS:
		return HF_DROP(HF_DROP_IP_OPTIONS);
	case HF_KIND_FRAGMENT:
		return HF_DROP(HF_DROP_FRAGMENT);
	case HF_KIND_ICMP:
		return hf_icmp(ctx, packet.tot_len);
	case HF_KIND_OTHER:
	case HF_KIND_NOT_IP:
		return HF_PASS(HF_PASS_OTHER);
	default: /* a flow would have been served already */
		return HF_DROP(HF_DROP_MALFORMED);
	}
}

/* One tag deep, an IPv4 packet to a VIP inside. */
HF_INLINE int hf_is_tagged_vip(void *data, void *data_end)
{
	void *ip = data + HF_ETH_BYTES + 4;
	__be16 type = HF_U16(data + 12);

	if (type != bpf_htons(0x8100) && type != bpf_htons(0x88a8))
		return 0;
	return ip + HF_IP_BYTES <= data_end && HF_U16(data + 16) == bpf_htons(0x0800) && HF_U8(ip) >> 4 == 4 &&
	       hf_vip_addr(HF_U32(ip + 16));
}

/* A tracking slot: ours to decide, or not. */
HF_INLINE __u32 hf_tracking(struct xdp_md *ctx, const struct hf_config *config, __u32 hash, __u32 vip_id, __u64 word,
			    __u32 origin)
{
	if (hf_decides(config, hash >> 16, origin))
		return hf_replica(ctx, hash, vip_id, word, origin);
	return hf_track(ctx, hash, vip_id, word, origin);
}

/* What a cold parser found: steps 4 to 6 for it, if it is a flow. */
HF_INLINE __u32 hf_decide_found(struct xdp_md *ctx, const struct hf_config *config, __u64 found)
{
	__u32 hash = HF_FOUND_HASH(found), vip_id = HF_FOUND_VIP_ID(found), origin = HF_FOUND_ORIGIN(found);
	__u64 word;

	if (!(found & HF_FOUND_FLOW))
		return found;
	word = hf_slot_word(vip_id, hash);
	if (origin & HF_ORIGIN_CHAIN)
		return hf_chain_link(ctx, hash, vip_id, word, origin);
	if (word & HF_SLOT_TRACKING)
		return hf_tracking(ctx, config, hash, vip_id, word, origin);
	return hf_send(ctx, word & HF_SLOT_CURRENT_MASK, hash, origin, HF_STEADY);
}

/* Whatever the common parser refused: for us as tunnel end, a VIP's, or somebody else's (and then quickly on). */
HF_INLINE __u64 hf_odd(struct xdp_md *ctx, const struct hf_config *config)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	void *ip = data + HF_ETH_BYTES;

	if (ip + HF_IP_BYTES > data_end)
		return HF_PASS(HF_PASS_OTHER);
	if (HF_U16(data + 12) != bpf_htons(0x0800))
		return HF_PASS(hf_is_tagged_vip(data, data_end) ? HF_PASS_VLAN : HF_PASS_OTHER);
	if (HF_U8(ip) >> 4 != 4)
		return HF_PASS(HF_PASS_OTHER);
	if (hf_is_tunnel(data, data_end, config))
		return hf_tunnel(ctx);
	if (!hf_vip_addr(HF_U32(ip + 16)))
		return HF_PASS(HF_PASS_OTHER);
	return hf_odd_vip(ctx);
}

HF_INLINE __u32 hf_decide(struct xdp_md *ctx)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	const struct hf_config *config = hf_config();
	const struct hf_vip *vip;
	struct hf_packet packet;
	__u64 word;
	__u32 hash;

	if (!config)
		return HF_PASS(HF_PASS_OTHER);
	if (unlikely(!hf_parse_common(data, data_end, &packet)))
		return hf_decide_found(ctx, config, hf_odd(ctx, config));
	if (unlikely(HF_DPORT(&packet) == bpf_htons(HF_GENEVE_PORT)) && hf_is_tunnel(data, data_end, config))
		return hf_decide_found(ctx, config, hf_tunnel(ctx));
	vip = hf_vip_find(packet.daddr, HF_DPORT(&packet), packet.protocol);
	if (!vip)
		return HF_PASS(HF_PASS_OTHER);
	hash = hf_flow_hash(config, vip, &packet);
	word = hf_slot_word(vip->id, hash);
	if (unlikely(word & HF_SLOT_TRACKING))
		return hf_tracking(ctx, config, hash, vip->id, word,
				   vip->flags & HF_VIP_CLIENT_IP ? HF_ORIGIN_CLIENT_IP : 0);
	return hf_send_to(ctx, config, word & HF_SLOT_CURRENT_MASK, packet.tot_len, hash, 0, HF_STEADY);
}

#endif
