// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The fast path as a later release might have it, of the same layout: one verdict more (so `counters` is longer), one
 * map more, and an hf_xdp that counts every packet there. What becomes of a packet is as before.
 */
#define HF_VERDICT_COUNT HF_NEWER, HF_VERDICT_COUNT
#include "verdict.h"
#undef HF_VERDICT_COUNT

#include "steady.h"
#include "services.h"

HF_ARRAY(newer_packets, __u64, 1, 0);

SEC("xdp")
int hf_xdp(struct xdp_md *ctx)
{
	__u32 bytes = ctx->data_end - ctx->data, zero = 0;
	__u64 *packets = bpf_map_lookup_elem(&newer_packets, &zero);

	if (packets)
		__sync_fetch_and_add(packets, 1);
	hf_count(HF_NEWER, bytes);
	return hf_leave(hf_decide(ctx), bytes);
}
