/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What both baselines share: Holdfast's own parser, VIPs, table, tunnel end and replies; only the choice of the backend is
 * theirs. So a comparison compares rules, not programs. They run under the same agents, from the same maps; phases, bases
 * and owners lie there unread.
 *
 * A baseline includes steady.h, defines baseline_choose(), and includes this file last.
 */
#ifndef HF_LAB_BASELINE_H
#define HF_LAB_BASELINE_H

#include "services.h"

HF_INLINE __u32 baseline_decide(struct xdp_md *ctx)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	const struct hf_config *config = hf_config();
	const struct hf_vip *vip;
	struct hf_packet packet;
	__u32 hash, backend;

	if (!config)
		return HF_PASS(HF_PASS_OTHER);
	if (!hf_parse_common(data, data_end, &packet))
		return hf_decide_found(ctx, config, hf_odd(ctx, config));
	if (HF_DPORT(&packet) == bpf_htons(HF_GENEVE_PORT) && hf_is_tunnel(data, data_end, config))
		return hf_decide_found(ctx, config, hf_tunnel(ctx));
	vip = hf_vip_find(packet.daddr, HF_DPORT(&packet), packet.protocol);
	if (!vip)
		return HF_PASS(HF_PASS_OTHER);
	hash = hf_flow_hash(config, vip, &packet);
	backend = baseline_choose(vip, &packet, hf_slot_word(vip->id, hash) & HF_SLOT_CURRENT_MASK);
	return hf_send_to(ctx, config, backend, packet.tot_len, hash, 0, HF_STEADY);
}

SEC("xdp")
int hf_xdp(struct xdp_md *ctx)
{
	__u32 bytes = ctx->data_end - ctx->data;

	return hf_leave(baseline_decide(ctx), bytes);
}

#endif
