/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ICMP to a VIP: echo is answered, errors follow the flow that they quote, the rest is dropped. Step 7 of README.md. */
#ifndef HF_ICMP_H
#define HF_ICMP_H

#include "csum.h"
#include "flow.h"

/* In place: addresses and MACs swapped, type 0, TTL 64. The addresses' sum stays what it was. */
HF_INLINE __u32 hf_echo(void *data, void *data_end)
{
	void *ip = data + HF_ETH_BYTES, *icmp = ip + HF_IP_BYTES;
	__u32 dst_high, src_low;
	__u16 dst_low, old;
	__be32 client;
	__u32 src_high;

	if (icmp + HF_ICMP_BYTES > data_end)
		return HF_DROP(HF_DROP_ICMP);
	dst_high = HF_U32(data);
	dst_low = HF_U16(data + 4);
	src_high = HF_U32(data + 6);
	src_low = HF_U16(data + 10);
	HF_U32(data) = src_high;
	HF_U16(data + 4) = src_low;
	HF_U32(data + 6) = dst_high;
	HF_U16(data + 10) = dst_low;
	client = HF_U32(ip + 12);
	HF_U32(ip + 12) = HF_U32(ip + 16);
	HF_U32(ip + 16) = client;
	old = HF_U16(ip + 8);
	HF_U8(ip + 8) = 64;
	HF_U16(ip + 10) = hf_csum_update(HF_U16(ip + 10), hf_csum_diff16(old, HF_U16(ip + 8)));
	old = HF_U16(icmp);
	HF_U8(icmp) = 0;
	HF_U16(icmp + 2) = hf_csum_update(HF_U16(icmp + 2), hf_csum_diff16(old, HF_U16(icmp)));
	return HF_EXIT(XDP_TX, HF_ICMP_ECHO);
}

/* From the router, to a VIP's address; its own header is sound. What was found: an exit, or a flow. */
HF_INLINE __u64 hf_icmp(struct xdp_md *ctx, __u32 tot_len)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	void *ip = data + HF_ETH_BYTES;
	const struct hf_config *config = hf_config();
	const struct hf_vip *vip;
	struct hf_packet packet;

	if (!config || tot_len < HF_IP_BYTES + HF_ICMP_BYTES || ip + HF_IP_BYTES + HF_ICMP_BYTES > data_end)
		return HF_DROP(HF_DROP_ICMP);
	if (HF_U8(ip + HF_IP_BYTES) == 8)
		return hf_echo(data, data_end);
	if (hf_quoted(ip, data_end, tot_len, &packet))
		return HF_DROP(HF_DROP_ICMP);
	vip = hf_vip_find(packet.daddr, HF_DPORT(&packet), packet.protocol);
	if (!vip)
		return HF_DROP(HF_DROP_ICMP);
	return hf_found_flow(config, vip, &packet, HF_ORIGIN_ICMP);
}

#endif
