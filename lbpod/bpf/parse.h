/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * One parser contract: hf_parse() says what kind of packet lies at an offset, and fills in a struct hf_packet where it
 * is one that a flow can be read from. It drops nothing; what a kind means is decided by whoever asked.
 *
 * The steady path does not use it: hf_parse_common() accepts in a dozen instructions what nearly every packet is, and
 * leaves everything else (options, fragments, wrong lengths, other protocols) to the thorough one.
 */
#ifndef HF_PARSE_H
#define HF_PARSE_H

#include "base.h"

struct hf_packet {
	__be32 saddr;
	__be32 daddr;
	__u32 ports;	 /* source port in the low half, destination port in the high half, as they lie in memory */
	__u32 tot_len;	 /* of the IP packet */
	__u32 protocol;	 /* TCP or UDP (of the quoted packet in an ICMP error) */
	__u32 tcp_flags; /* 0 for UDP and ICMP errors */
};

enum hf_kind {
	HF_KIND_FLOW,	 /* a well-formed TCP or UDP packet: everything is filled in */
	HF_KIND_ICMP,	 /* saddr, daddr, tot_len are filled in */
	HF_KIND_OTHER,	 /* another protocol: likewise */
	HF_KIND_NOT_IP,	 /* no whole IPv4 header; nothing is filled in. For all below daddr is filled in. */
	HF_KIND_OPTIONS,
	HF_KIND_FRAGMENT,
	HF_KIND_MALFORMED,
};

#define HF_SPORT(PACKET) ((__be16)((PACKET)->ports))
#define HF_DPORT(PACKET) ((__be16)((PACKET)->ports >> 16))

/* Ethernet + IPv4 without options, whole, no later fragment, TCP or UDP with a sound header; 0: look closer. */
HF_INLINE int hf_parse_common(void *data, void *data_end, struct hf_packet *packet)
{
	void *ip = data + HF_ETH_BYTES, *l4 = ip + HF_IP_BYTES;

	if (unlikely(l4 + HF_UDP_BYTES > data_end))
		return 0;
	if (unlikely(HF_U16(data + 12) != bpf_htons(0x0800) || HF_U8(ip) != 0x45))
		return 0;
	packet->tot_len = bpf_ntohs(HF_U16(ip + 2));
	if (unlikely(HF_U16(ip + 6) & bpf_htons(0x1fff)))
		return 0;
	if (unlikely(ip + packet->tot_len > data_end))
		return 0;
	packet->protocol = HF_U8(ip + 9);
	packet->saddr = HF_U32(ip + 12);
	packet->daddr = HF_U32(ip + 16);
	packet->ports = HF_U32(l4);
	packet->tcp_flags = 0;
	if (likely(packet->protocol == HF_PROTOCOL_TCP)) {
		__u32 header;

		if (unlikely(l4 + HF_TCP_BYTES > data_end))
			return 0;
		header = (HF_U8(l4 + 12) >> 4) * 4;
		packet->tcp_flags = HF_U8(l4 + 13);
		return likely(header >= HF_TCP_BYTES && HF_IP_BYTES + header <= packet->tot_len);
	}
	return packet->protocol == HF_PROTOCOL_UDP && likely(packet->tot_len >= HF_IP_BYTES + HF_UDP_BYTES);
}

/*
 * The thorough one. room: bytes of outer headers between the Ethernet header and this packet. there: bytes that belong
 * to it from its IPv4 header on (end of the frame, or of the outer UDP payload).
 */
HF_INLINE enum hf_kind hf_parse(struct xdp_md *ctx, __u32 room, __u32 there, struct hf_packet *packet)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx);
	void *ip, *l4;
	__u32 header;

	if (room > HF_CHAIN_OVERHEAD_BYTES)
		return HF_KIND_NOT_IP;
	ip = data + HF_ETH_BYTES + room;
	l4 = ip + HF_IP_BYTES;
	if (l4 > data_end || there < HF_IP_BYTES || HF_U8(ip) >> 4 != 4)
		return HF_KIND_NOT_IP;
	packet->saddr = HF_U32(ip + 12);
	packet->daddr = HF_U32(ip + 16);
	packet->protocol = HF_U8(ip + 9);
	packet->tot_len = bpf_ntohs(HF_U16(ip + 2));
	packet->ports = 0;
	packet->tcp_flags = 0;
	header = (HF_U8(ip) & 0xf) * 4;
	if (header > HF_IP_BYTES)
		return HF_KIND_OPTIONS;
	if (header < HF_IP_BYTES || packet->tot_len < header || packet->tot_len > there)
		return HF_KIND_MALFORMED;
	if (HF_U16(ip + 6) & bpf_htons(0x1fff))
		return HF_KIND_FRAGMENT;
	if (packet->protocol == HF_PROTOCOL_ICMP)
		return HF_KIND_ICMP;
	if (packet->protocol != HF_PROTOCOL_TCP && packet->protocol != HF_PROTOCOL_UDP)
		return HF_KIND_OTHER;
	if (packet->tot_len < HF_IP_BYTES + HF_UDP_BYTES || l4 + HF_UDP_BYTES > data_end)
		return HF_KIND_MALFORMED;
	packet->ports = HF_U32(l4);
	if (packet->protocol == HF_PROTOCOL_UDP)
		return HF_KIND_FLOW;
	if (packet->tot_len < HF_IP_BYTES + HF_TCP_BYTES || l4 + HF_TCP_BYTES > data_end)
		return HF_KIND_MALFORMED;
	header = (HF_U8(l4 + 12) >> 4) * 4;
	packet->tcp_flags = HF_U8(l4 + 13);
	if (header < HF_TCP_BYTES || HF_IP_BYTES + header > packet->tot_len)
		return HF_KIND_MALFORMED;
	return HF_KIND_FLOW;
}

#endif
