/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet that does not fit the path: "fragmentation needed" (RFC 1191) to its sender, where that can be said. */
#ifndef HF_TOO_BIG_H
#define HF_TOO_BIG_H

#include "csum.h"
#include "encap.h"
#include "parse.h"

#define HF_TOO_BIG_GROWTH (HF_IP_BYTES + HF_ICMP_BYTES)
#define HF_TOO_BIG_FRAME (HF_ETH_BYTES + 2 * HF_IP_BYTES + 2 * HF_ICMP_BYTES)

/* Ethernet, IPv4 and ICMP in front of the packet that is quoted, whose header lies at `quoted` already. */
HF_INLINE void hf_write_too_big(void *data, const __u32 *macs, __u32 mtu)
{
	void *ip = data + HF_ETH_BYTES, *icmp = ip + HF_IP_BYTES, *quoted = icmp + HF_ICMP_BYTES;
	__u32 length_be = bpf_htons(HF_TOO_BIG_FRAME - HF_ETH_BYTES), mtu_be = bpf_htonl(mtu);
	__be32 client = HF_U32(quoted + 12), vip = HF_U32(quoted + 16);
	__u64 sum = (0x45 | length_be << 16) + (__u64)bpf_htonl(0x4000) + (64 | HF_PROTOCOL_ICMP << 8) + client + vip;

	/* destination <- source, source <- destination */
	HF_U32(data) = macs[1] >> 16 | macs[2] << 16;
	HF_U16(data + 4) = macs[2] >> 16;
	HF_U32(data + 6) = macs[0];
	HF_U16(data + 10) = macs[1];
	HF_U16(data + 12) = bpf_htons(0x0800);
	HF_U32(ip) = 0x45 | length_be << 16;
	HF_U32(ip + 4) = bpf_htonl(0x4000);
	HF_U32(ip + 8) = 64 | HF_PROTOCOL_ICMP << 8 | (__u32)(__u16)~hf_fold(sum) << 16;
	HF_U32(ip + 12) = vip;
	HF_U32(ip + 16) = client;
	sum = (__u64)bpf_htonl(0x03040000) + mtu_be;
	for (int i = 0; i < HF_TOO_BIG_GROWTH; i += 4)
		sum += HF_U32(quoted + i);
	HF_U32(icmp) = bpf_htons(0x0304) | (__u32)(__u16)~hf_fold(sum) << 16;
	HF_U32(icmp + 4) = mtu_be;
}

/* mtu: of the node's path. Answered only where the sender can be reached the way it came and wants to be told. */
HF_COLD __u32 hf_too_big(struct xdp_md *ctx, __u32 mtu, __u32 origin)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	__u32 macs[3];

	if (HF_ORIGIN_ROOM(origin) || origin & HF_ORIGIN_ICMP || data + HF_ETH_BYTES + HF_IP_BYTES > data_end)
		return HF_DROP(HF_TOO_BIG);
	if (!(HF_U16(data + HF_ETH_BYTES + 6) & bpf_htons(0x4000)))
		return HF_DROP(HF_TOO_BIG);
	macs[0] = HF_U32(data);
	macs[1] = HF_U32(data + 4);
	macs[2] = HF_U32(data + 8);
	if (bpf_xdp_adjust_head(ctx, -HF_TOO_BIG_GROWTH))
		return HF_DROP(HF_DROP_NO_HEADROOM);
	data = hf_data(ctx);
	data_end = hf_data_end(ctx);
	if (data + HF_TOO_BIG_FRAME > data_end)
		return HF_DROP(HF_TOO_BIG);
	hf_write_too_big(data, macs, mtu > HF_CHAIN_OVERHEAD_BYTES ? mtu - HF_CHAIN_OVERHEAD_BYTES : 0);
	if (bpf_xdp_adjust_tail(ctx, HF_TOO_BIG_FRAME - (int)(data_end - data)))
		return HF_DROP(HF_TOO_BIG);
	return HF_EXIT(XDP_TX, HF_TOO_BIG);
}

#endif
