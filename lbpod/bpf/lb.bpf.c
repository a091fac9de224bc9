// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Holdfast's fast path: a table of contents. What a packet gets is README.md's; each rule lives in the header named.
 *
 *   hf_xdp     uplink, on the way in:  mux and tunnel end
 *   hf_tc      uplink, on the way out: replies get their VIP back
 *   hf_lookup  for the agent:          a batch of records by key
 *   hf_drop    for the agent:          a batch of records out, by key, unless they have been seen since
 *   hf_forget  for the agent:          a batch of translated flows out, unless they have been seen since
 *
 * The steady path is all inlined into hf_xdp: arrays and one helper call. Whatever is not steady is a call away, in
 * functions that the verifier looks at one by one.
 */
#include "steady.h"
#include "services.h"

SEC("xdp")
int hf_xdp(struct xdp_md *ctx)
{
	__u32 bytes = ctx->data_end - ctx->data;

	return hf_leave(hf_decide(ctx), bytes);
}
