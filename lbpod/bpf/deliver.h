/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Into this node's own stack: outer headers off, VIP:port becomes pod:port. For FORWARD and for local backends alike. */
#ifndef HF_DELIVER_H
#define HF_DELIVER_H

#include "csum.h"
#include "flow.h"

/* Takes `room` bytes of outer headers off; the Ethernet header moves up. 0, or not 0 where it cannot be. */
HF_INLINE int hf_strip(struct xdp_md *ctx, __u32 room)
{
	void *data = hf_data(ctx), *to;

	if (!room)
		return 0;
	if (room > HF_CHAIN_OVERHEAD_BYTES || room < HF_RELAY_OVERHEAD_BYTES)
		return -1;
	to = data + room;
	if (to + HF_ETH_BYTES > hf_data_end(ctx) || data + HF_ETH_BYTES > hf_data_end(ctx))
		return -1;
	HF_U32(to) = HF_U32(data);
	HF_U32(to + 4) = HF_U32(data + 4);
	HF_U32(to + 8) = HF_U32(data + 8);
	HF_U16(to + 12) = HF_U16(data + 12);
	return bpf_xdp_adjust_head(ctx, (int)room);
}

/* New destination address in the IPv4 header at ip; the difference is what L4 checksums must know. */
HF_INLINE __u64 hf_dnat_ip(void *ip, __be32 pod)
{
	__u64 diff = hf_csum_diff(HF_U32(ip + 16), pod);

	HF_U16(ip + 10) = hf_csum_update(HF_U16(ip + 10), diff);
	HF_U32(ip + 16) = pod;
	return diff;
}

HF_INLINE int hf_dnat_flow(struct xdp_md *ctx, __u32 protocol, __be32 pod, __be16 port_be)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	void *ip = data + HF_ETH_BYTES, *l4 = ip + HF_IP_BYTES;
	__u64 diff;

	if (l4 + HF_UDP_BYTES > data_end)
		return -1;
	diff = hf_dnat_ip(ip, pod) + hf_csum_diff16(HF_U16(l4 + 2), port_be);
	HF_U16(l4 + 2) = port_be;
	if (protocol == HF_PROTOCOL_UDP) {
		__u16 csum = HF_U16(l4 + 6);

		if (csum) {
			csum = hf_csum_update(csum, diff);
			HF_U16(l4 + 6) = csum ? csum : 0xffff;
		}
		return 0;
	}
	if (l4 + HF_TCP_BYTES > data_end)
		return -1;
	HF_U16(l4 + 16) = hf_csum_update(HF_U16(l4 + 16), diff);
	return 0;
}

/* An ICMP error: the pod must recognise its own packet in what is quoted, so the quoted source becomes the pod, too. */
HF_INLINE int hf_dnat_icmp(struct xdp_md *ctx, __be32 pod, __be16 port_be)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	void *ip = data + HF_ETH_BYTES, *icmp = ip + HF_IP_BYTES, *quoted = icmp + HF_ICMP_BYTES, *l4;
	__u16 quoted_csum;
	__u64 diff;

	if (quoted + HF_IP_BYTES > data_end)
		return -1;
	l4 = quoted + (HF_U8(quoted) & 0xf) * 4;
	if (l4 + 8 > data_end)
		return -1;
	hf_dnat_ip(ip, pod);
	diff = hf_csum_diff(HF_U32(quoted + 12), pod);
	quoted_csum = hf_csum_update(HF_U16(quoted + 10), diff);
	diff += hf_csum_diff16(HF_U16(quoted + 10), quoted_csum) + hf_csum_diff16(HF_U16(l4), port_be);
	HF_U16(l4) = port_be;
	HF_U16(quoted + 10) = quoted_csum;
	HF_U32(quoted + 12) = pod;
	HF_U16(icmp + 2) = hf_csum_update(HF_U16(icmp + 2), diff);
	return 0;
}

/* The packet has been found sound by whoever calls. pod, port_be: as on the wire. verdict: LOCAL or DELIVERED. */
HF_COLD __u32 hf_deliver(struct xdp_md *ctx, __u32 pod, __u32 port_be, __u32 room, __u32 verdict)
{
	struct hf_packet packet;
	int failed;

	if (hf_strip(ctx, room) || hf_packet_again(ctx, 0, &packet))
		return HF_DROP(HF_DROP_MALFORMED);
	if (packet.protocol == HF_PROTOCOL_ICMP) {
		failed = hf_dnat_icmp(ctx, pod, port_be);
	} else {
		if (hf_nat_inbound(&packet, pod, port_be))
			return HF_DROP(HF_DROP_NAT_TAKEN);
		failed = hf_dnat_flow(ctx, packet.protocol, pod, port_be);
	}
	return failed ? HF_DROP(HF_DROP_MALFORMED) : HF_PASS(verdict);
}

#endif
