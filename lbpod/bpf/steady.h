/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where a packet from the wire is sorted, and the steady path: all that nearly every packet ever meets.
 *
 * The rule of this file: arrays, arithmetic, one helper call. Anything else is a call to a cold function.
 */
#ifndef HF_STEADY_H
#define HF_STEADY_H

#include "send.h"
#include "tunnel.h"

/* Neither IPv4 without surprises nor ours; only for a VIP's sake is it looked at any closer. */
HF_INLINE __u32 hf_odd(struct xdp_md *ctx, const struct hf_config *config)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);

	if (hf_is_tunnel(data, data_end, config))
		return hf_tunnel(ctx);
	return HF_PASS(HF_PASS_OTHER);
}

/* A well-formed packet of a VIP's flow, from the wire. */
HF_INLINE __u32 hf_serve(struct xdp_md *ctx, const struct hf_config *config, const struct hf_vip *vip,
			 const struct hf_packet *packet)
{
	__u32 ports = packet->ports, hash;
	__u64 word;

	if (vip->flags & HF_VIP_CLIENT_IP)
		ports &= 0xffff0000;
	hash = hf_murmur3(config->seed, packet->saddr, packet->daddr, ports, packet->protocol);
	word = hf_slot_word(vip->id, hash);
	return hf_send_to(ctx, config, word & HF_SLOT_CURRENT_MASK, packet->tot_len, hash, 0, HF_STEADY);
}

HF_INLINE __u32 hf_decide(struct xdp_md *ctx)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	const struct hf_config *config = hf_config();
	const struct hf_vip *vip;
	struct hf_packet packet;

	if (!config)
		return HF_PASS(HF_PASS_OTHER);
	if (unlikely(!hf_parse_common(data, data_end, &packet)))
		return hf_odd(ctx, config);
	if (unlikely(HF_DPORT(&packet) == bpf_htons(HF_GENEVE_PORT)) && hf_is_tunnel(data, data_end, config))
		return hf_tunnel(ctx);
	vip = hf_vip_find(packet.daddr, HF_DPORT(&packet), packet.protocol);
	if (!vip)
		return HF_PASS(HF_PASS_OTHER);
	return hf_serve(ctx, config, vip, &packet);
}

#endif
