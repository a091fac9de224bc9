/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The tunnel's way in: who may send, what a Geneve packet of ours looks like, and what its option asks for. */
#ifndef HF_TUNNEL_H
#define HF_TUNNEL_H

#include "deliver.h"
#include "encap.h"

/* For us as tunnel end? Looks at the frame itself, for the packet may be one that the common parser refused. */
HF_INLINE int hf_is_tunnel(void *data, void *data_end, const struct hf_config *config)
{
	void *ip = data + HF_ETH_BYTES, *udp = ip + HF_IP_BYTES;

	return udp + HF_UDP_BYTES <= data_end && HF_U16(data + 12) == bpf_htons(0x0800) && HF_U8(ip) == 0x45 &&
	       HF_U8(ip + 9) == HF_PROTOCOL_UDP && HF_U16(udp + 2) == bpf_htons(HF_GENEVE_PORT) &&
	       HF_U32(ip + 16) == hf_unmapped(config->node_addr) && !(HF_U16(ip + 6) & bpf_htons(0x3fff));
}

struct hf_geneve {
	__u32 type;	/* of the option */
	__u32 overhead; /* bytes from the outer to the inner IPv4 header */
	__u32 there;	/* bytes from the inner IPv4 header to the end of the UDP payload */
};

HF_INLINE __u32 hf_overhead_of(__u32 type)
{
	switch (type) {
	case HF_OPTION_FORWARD:
		return HF_FORWARD_OVERHEAD_BYTES;
	case HF_OPTION_RELAY:
		return HF_RELAY_OVERHEAD_BYTES;
	case HF_OPTION_CHAIN:
		return HF_CHAIN_OVERHEAD_BYTES;
	}
	return 0;
}

/* What an option says must make sense by itself: a pod has an IPv4 address, a chain no more members than places. */
HF_INLINE int hf_option_check(void *body, void *data_end, __u32 type)
{
	if (type == HF_OPTION_FORWARD)
		return body + 20 > data_end || !hf_is_mapped(body);
	if (type == HF_OPTION_CHAIN)
		return body + 24 > data_end || HF_U8(body + 8) + HF_U8(body + 9) > HF_REPLICAS_MAX;
	return 0;
}

/* 0 where the outer headers are sound, given IPv4 inside. Every length is compared with the one around it. */
HF_INLINE int hf_geneve_parse(void *data, void *data_end, struct hf_geneve *geneve)
{
	void *ip = data + HF_ETH_BYTES, *udp = ip + HF_IP_BYTES, *head = udp + HF_UDP_BYTES;
	__u32 tot_len;

	if (head + 8 + 4 > data_end)
		return -1;
	tot_len = bpf_ntohs(HF_U16(ip + 2));
	if (ip + tot_len > data_end || tot_len != bpf_ntohs(HF_U16(udp + 4)) + HF_IP_BYTES)
		return -1;
	geneve->type = HF_U8(head + 10);
	geneve->overhead = hf_overhead_of(geneve->type);
	if (!geneve->overhead || tot_len < geneve->overhead)
		return -1;
	geneve->there = tot_len - geneve->overhead;
	if (HF_U8(head) != HF_OPTION_BYTES(geneve->overhead) / 4 || HF_U8(head + 1) & 0x80)
		return -1;
	if (HF_U16(head + 8) != bpf_htons(HF_OPTION_CLASS) ||
	    (HF_U8(head + 11) & 0x1f) != (HF_OPTION_BYTES(geneve->overhead) - 4) / 4)
		return -1;
	return hf_option_check(head + 12, data_end, geneve->type);
}

/* The VIP whose flow the inner packet is of, or is an error about; NULL: neither. origin: its room is set. */
HF_INLINE const struct hf_vip *hf_inner_flow(struct xdp_md *ctx, const struct hf_geneve *geneve,
					     struct hf_packet *packet, __u32 *origin)
{
	enum hf_kind kind = hf_parse(ctx, geneve->overhead, geneve->there, packet);

	if (kind == HF_KIND_ICMP) {
		if (geneve->type == HF_OPTION_CHAIN || !hf_vip_addr(packet->daddr) ||
		    hf_quoted(hf_ip_at(ctx, *origin), hf_data_end(ctx), packet->tot_len, packet))
			return NULL;
		*origin |= HF_ORIGIN_ICMP;
	} else if (kind != HF_KIND_FLOW) {
		return NULL;
	}
	return hf_vip_find(packet->daddr, HF_DPORT(packet), packet->protocol);
}

/* What the option asks for: an exit, or a flow that is to be decided. The option's length has been checked. */
HF_INLINE __u64 hf_tunnel_open(struct xdp_md *ctx, const struct hf_config *config, __u32 type, const struct hf_vip *vip,
			       const struct hf_packet *packet, __u32 origin)
{
	void *option = hf_data(ctx) + HF_OPTION_AT + 4;
	__u32 hops;

	if (type == HF_OPTION_FORWARD) {
		if (option + 20 > hf_data_end(ctx))
			return HF_DROP(HF_DROP_GENEVE_MALFORMED);
		return hf_deliver(ctx, HF_U32(option + 12), HF_U16(option + 16), HF_FORWARD_OVERHEAD_BYTES,
				  HF_DELIVERED);
	}
	if (config->self == HF_MEMBER_NONE || option + 8 > hf_data_end(ctx))
		return HF_DROP(HF_DROP_GENEVE_INNER);
	if (type == HF_OPTION_CHAIN)
		return hf_found_flow(config, vip, packet, origin | HF_ORIGIN_CHAIN);
	hops = HF_U8(option + 4);
	if (hops > HF_RELAY_HOPS_MAX)
		hops = HF_RELAY_HOPS_MAX;
	return hf_found_flow(config, vip, packet, origin | HF_ORIGIN_RELAY | HF_ORIGIN_SET_HOPS(hops));
}

/*
 * To our end of the tunnel, its outer UDP header whole: step 8 of README.md. What was found: an exit, or a flow.
 *
 * The port is Geneve's, not ours: this node may be in other overlays, too, and what is theirs goes on as it came.
 */
HF_COLD __u64 hf_tunnel(struct xdp_md *ctx)
{
	void *data = hf_data(ctx), *data_end = hf_data_end(ctx), *head = data + HF_GENEVE_AT;
	const struct hf_config *config = hf_config();
	const struct hf_vip *vip;
	struct hf_geneve geneve;
	struct hf_packet packet;
	__u8 source[16];
	__u32 origin;
	int is_ours;

	if (!config || head + 8 > data_end || HF_U16(head + 2) != bpf_htons(0x0800))
		return HF_PASS(HF_PASS_OTHER);
	hf_mapped(source, HF_U32(data + HF_ETH_BYTES + 12));
	is_ours = bpf_ntohl(HF_U32(head + 4)) >> 8 == config->vni;
	if (!bpf_map_lookup_elem(&member_by_addr, source))
		return is_ours ? HF_DROP(HF_DROP_GENEVE_SOURCE) : HF_PASS(HF_PASS_OTHER);
	if (hf_geneve_parse(data, data_end, &geneve))
		return is_ours ? HF_DROP(HF_DROP_GENEVE_MALFORMED) : HF_PASS(HF_PASS_OTHER);
	if (!is_ours)
		return HF_DROP(HF_DROP_GENEVE_VNI);
	origin = geneve.overhead;
	vip = hf_inner_flow(ctx, &geneve, &packet, &origin);
	if (!vip)
		return HF_DROP(HF_DROP_GENEVE_INNER);
	return hf_tunnel_open(ctx, config, geneve.type, vip, &packet, origin);
}

#endif
