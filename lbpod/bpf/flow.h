/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A packet as one of a flow: what the rules for tracking slots ask about.
 *
 * Cold functions get ctx and scalars only, so each reads the few words that it needs from the packet once more; that
 * is cheaper than a second verification of everything that could have called it. An ICMP error is a packet of the flow
 * that it quotes, seen from the client's side.
 */
#ifndef HF_FLOW_H
#define HF_FLOW_H

#include "nat.h"
#include "vip.h"

#define HF_QUIC_INITIAL_BYTES 7 /* of UDP payload, to be called one */

/* Where a packet's own IPv4 header is. */
HF_INLINE void *hf_ip_at(struct xdp_md *ctx, __u32 origin)
{
	return hf_data(ctx) + HF_ETH_BYTES + HF_ORIGIN_ROOM(origin);
}

/*
 * The flow that an ICMP error at ip quotes, as the client's packet would show it: saddr is the client. 0, or not 0
 * where it is no error or quotes too little. ip: 20 bytes are there. tot_len: of the ICMP packet, checked.
 */
HF_INLINE int hf_quoted(void *ip, void *data_end, __u32 tot_len, struct hf_packet *packet)
{
	void *icmp = ip + HF_IP_BYTES, *quoted = icmp + HF_ICMP_BYTES, *l4;
	__u32 header, type;

	if (quoted + HF_IP_BYTES > data_end || tot_len < HF_IP_BYTES + HF_ICMP_BYTES + HF_IP_BYTES)
		return -1;
	type = HF_U8(icmp);
	if (type != 3 && type != 11 && type != 12)
		return -1;
	header = (HF_U8(quoted) & 0xf) * 4;
	if (HF_U8(quoted) >> 4 != 4 || header < HF_IP_BYTES || HF_U16(quoted + 6) & bpf_htons(0x1fff))
		return -1;
	if (tot_len < HF_IP_BYTES + HF_ICMP_BYTES + header + 8)
		return -1;
	l4 = quoted + header;
	if (l4 + 8 > data_end)
		return -1;
	packet->saddr = HF_U32(quoted + 16);
	packet->daddr = HF_U32(quoted + 12);
	packet->ports = HF_U32(l4) >> 16 | HF_U32(l4) << 16;
	packet->protocol = HF_U8(quoted + 9);
	packet->tot_len = tot_len;
	packet->tcp_flags = 0;
	return packet->protocol != HF_PROTOCOL_TCP && packet->protocol != HF_PROTOCOL_UDP;
}

/*
 * What hf_parse() has found sound already, read again. 0, or not 0 where the verifier has to be told. With ClientIP
 * affinity the TCP flags say nothing about the flow (a client's second SYN does not begin it, nor does a FIN end it): 0.
 */
HF_INLINE int hf_packet_again(struct xdp_md *ctx, __u32 origin, struct hf_packet *packet)
{
	void *ip = hf_ip_at(ctx, origin), *data_end = hf_data_end(ctx), *l4 = ip + HF_IP_BYTES;

	if (l4 + HF_UDP_BYTES > data_end)
		return -1;
	packet->tot_len = bpf_ntohs(HF_U16(ip + 2));
	if (unlikely(origin & HF_ORIGIN_ICMP))
		return hf_quoted(ip, data_end, packet->tot_len, packet);
	packet->protocol = HF_U8(ip + 9);
	packet->saddr = HF_U32(ip + 12);
	packet->daddr = HF_U32(ip + 16);
	packet->ports = HF_U32(l4);
	packet->tcp_flags = 0;
	if (packet->protocol == HF_PROTOCOL_UDP || origin & HF_ORIGIN_CLIENT_IP)
		return 0;
	if (l4 + HF_TCP_BYTES > data_end)
		return -1;
	packet->tcp_flags = HF_U8(l4 + 13);
	return 0;
}

/* Nobody can tell by a packet of this flow whether it is the first. */
HF_INLINE int hf_is_unannounced(const struct hf_packet *packet, __u32 origin)
{
	return packet->protocol == HF_PROTOCOL_UDP || origin & HF_ORIGIN_CLIENT_IP;
}

HF_INLINE void hf_flow_key(struct hf_flow *flow, const struct hf_packet *packet, __u32 vip_id, __u32 origin)
{
	hf_mapped(flow->addr, packet->saddr);
	flow->port_be = origin & HF_ORIGIN_CLIENT_IP ? 0 : HF_SPORT(packet);
	flow->pad = 0;
	flow->vip = vip_id;
}

/* With ClientIP affinity the client's port is no part of the flow. */
HF_INLINE __u32 hf_flow_hash(const struct hf_config *config, const struct hf_vip *vip, const struct hf_packet *packet)
{
	__u32 ports = packet->ports;

	if (vip->flags & HF_VIP_CLIENT_IP)
		ports &= 0xffff0000;
	return hf_murmur3(config->seed, packet->saddr, packet->daddr, ports, packet->protocol);
}

/* For the one who decides. origin: how it came; its VIP's affinity is added here. */
HF_INLINE __u64 hf_found_flow(const struct hf_config *config, const struct hf_vip *vip, const struct hf_packet *packet,
			      __u32 origin)
{
	if (vip->flags & HF_VIP_CLIENT_IP)
		origin |= HF_ORIGIN_CLIENT_IP;
	return HF_FOUND(hf_flow_hash(config, vip, packet), (vip->id & 0xffff), origin);
}

/* RFC 9000, sec. 17.2.2: long header, fixed bit, type Initial, version 1. */
HF_INLINE int hf_is_quic_initial(struct xdp_md *ctx, __u32 origin, const struct hf_packet *packet)
{
	void *payload = hf_ip_at(ctx, origin) + HF_IP_BYTES + HF_UDP_BYTES;

	if (packet->protocol != HF_PROTOCOL_UDP || origin & (HF_ORIGIN_ICMP | HF_ORIGIN_CLIENT_IP))
		return 0;
	if (packet->tot_len < HF_IP_BYTES + HF_UDP_BYTES + HF_QUIC_INITIAL_BYTES)
		return 0;
	if (payload + HF_QUIC_INITIAL_BYTES > hf_data_end(ctx))
		return 0;
	return (HF_U8(payload) & 0xf0) == 0xc0 && HF_U32(payload + 1) == bpf_htonl(1);
}

#endif
