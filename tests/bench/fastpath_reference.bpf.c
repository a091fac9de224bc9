// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the steady path is measured against: nothing, one helper call, our parser alone, and our parser with our
 * encapsulation towards one fixed place. They share the fast path's headers, so that what differs is the deciding.
 */
#include "encap.h"
#include "parse.h"

SEC("xdp")
int null(struct xdp_md *ctx)
{
	return XDP_PASS;
}

/* What a call costs differs by a factor of ten between machines and mitigations, and with it every ratio. */
SEC("xdp")
int one_call(struct xdp_md *ctx)
{
	return bpf_xdp_adjust_head(ctx, -HF_FORWARD_OVERHEAD_BYTES) ? XDP_DROP : XDP_TX;
}

/* The condition keeps the compiler from dropping what is parsed. */
SEC("xdp")
int parse_only(struct xdp_md *ctx)
{
	struct hf_packet packet;

	if (!hf_parse_common(hf_data(ctx), hf_data_end(ctx), &packet))
		return XDP_PASS;
	return (packet.saddr ^ packet.daddr ^ packet.ports ^ packet.protocol) == 0x12345678 ? XDP_DROP : XDP_TX;
}

static const struct hf_config here = {.node_addr = {[10] = 0xff, 0xff, 10, 0, 0, 1}, .vni = 4711};
static const struct hf_node there = {
	.addr = {[10] = 0xff, 0xff, 10, 0, 0, 2},
	.dst_mac = {2, 0, 0, 0, 0, 2},
	.src_mac = {2, 0, 0, 0, 0, 1},
	.csum = 0x1234,
};
static const struct hf_backend pod = {.addr = {[10] = 0xff, 0xff, 10, 244, 0, 1}, .port_be = 0x901f};

SEC("xdp")
int fixed_encap(struct xdp_md *ctx)
{
	void *data, *option;
	struct hf_packet packet;

	if (!hf_parse_common(hf_data(ctx), hf_data_end(ctx), &packet))
		return XDP_PASS;
	data = hf_make_room(ctx, 0, HF_FORWARD_OVERHEAD_BYTES);
	if (!data)
		return XDP_DROP;
	hf_write_outer(data, &here, &there, packet.tot_len, packet.saddr ^ packet.ports, HF_FORWARD_OVERHEAD_BYTES,
		       HF_OPTION_FORWARD);
	option = data + HF_OPTION_AT + 4;
	HF_U64(option) = HF_U64(pod.addr);
	HF_U64(option + 8) = HF_U64(pod.addr + 8);
	HF_U32(option + 16) = pod.port_be;
	return XDP_TX;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
