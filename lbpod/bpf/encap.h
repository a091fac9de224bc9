/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Outer headers: Ethernet, IPv4, UDP, Geneve with one option (README.md, "On the wire").
 *
 * Written as whole words, because a byte costs as much as a word; with one helper call, because a call costs more than
 * all of the words. `room` is what the packet carries before its own IPv4 header already (0 from the router): the new
 * outer header takes its place.
 */
#ifndef HF_ENCAP_H
#define HF_ENCAP_H

#include "csum.h"

#define HF_GENEVE_AT (HF_ETH_BYTES + HF_IP_BYTES + HF_UDP_BYTES)
#define HF_OPTION_AT (HF_GENEVE_AT + 8)
#define HF_OPTION_CLASS 0xFF48
#define HF_OPTION_FORWARD 0x81
#define HF_OPTION_RELAY 0x82
#define HF_OPTION_CHAIN 0x83

/* Bytes from the outer IPv4 header to the inner one; the option is what is not 20 + 8 + 8 of them. */
#define HF_OPTION_BYTES(OVERHEAD) ((OVERHEAD) - HF_IP_BYTES - HF_UDP_BYTES - 8)
#define HF_OPTION_HEAD(TYPE, OVERHEAD) \
	bpf_htonl((__u32)HF_OPTION_CLASS << 16 | (TYPE) << 8 | (HF_OPTION_BYTES(OVERHEAD) - 4) / 4)
#define HF_GENEVE_HEAD(OVERHEAD) bpf_htonl((__u32)(HF_OPTION_BYTES(OVERHEAD) / 4) << 24 | 0x400000 | 0x0800)

/* Where the frame begins once there is room for `overhead` bytes of outer headers; NULL: no room. */
HF_INLINE void *hf_make_room(struct xdp_md *ctx, __u32 room, __u32 overhead)
{
	void *data;

	if (room != overhead && unlikely(bpf_xdp_adjust_head(ctx, (int)room - (int)overhead)))
		return NULL;
	data = hf_data(ctx);
	if (unlikely(data + HF_ETH_BYTES + overhead > hf_data_end(ctx)))
		return NULL;
	return data;
}

/* Everything but the option's data. tot_len: of the inner packet. overhead, type: constants. */
HF_INLINE void hf_write_outer(void *data, const struct hf_config *config, const struct hf_node *node, __u32 tot_len,
			      __u32 hash, __u32 overhead, __u32 type)
{
	void *ip = data + HF_ETH_BYTES, *udp = ip + HF_IP_BYTES;
	__u32 length_be = bpf_htons(tot_len + overhead);
	__u32 sum = node->csum + length_be;

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	HF_U32(data) = HF_U32(node->dst_mac);
	HF_U32(data + 4) = HF_U32(node->dst_mac + 4);
	HF_U32(data + 8) = HF_U32(node->src_mac + 2);
	HF_U16(data + 12) = bpf_htons(0x0800);
	HF_U32(ip) = 0x45 | length_be << 16;
	HF_U32(ip + 4) = bpf_htonl(0x4000);
	HF_U32(ip + 8) = 64 | HF_PROTOCOL_UDP << 8 | ~sum << 16;
	HF_U32(ip + 12) = hf_unmapped(config->node_addr);
	HF_U32(ip + 16) = hf_unmapped(node->addr);
	HF_U32(udp) = bpf_htons(0xc000 | (hash & 0x3fff)) | (__u32)bpf_htons(HF_GENEVE_PORT) << 16;
	HF_U32(udp + 4) = bpf_htons(tot_len + overhead - HF_IP_BYTES);
	HF_U32(udp + 8) = HF_GENEVE_HEAD(overhead);
	HF_U32(udp + 12) = bpf_htonl(config->vni << 8);
	HF_U32(udp + 16) = HF_OPTION_HEAD(type, overhead);
}

/* Out by the node's interface. */
HF_INLINE __u32 hf_transmit(struct xdp_md *ctx, const struct hf_node *node, __u32 verdict)
{
	if (likely(node->ifindex == ctx->ingress_ifindex))
		return HF_EXIT(XDP_TX, verdict);
	return HF_EXIT(bpf_redirect(node->ifindex, 0), verdict);
}

HF_INLINE int hf_fits(const struct hf_node *node, __u32 tot_len, __u32 overhead)
{
	return !node->mtu || tot_len + overhead <= node->mtu;
}

HF_INLINE __u32 hf_encap_forward(struct xdp_md *ctx, const struct hf_config *config, const struct hf_node *node,
				 const struct hf_backend *backend, __u32 tot_len, __u32 hash, __u32 room, __u32 verdict)
{
	void *data = hf_make_room(ctx, room, HF_FORWARD_OVERHEAD_BYTES), *option;

	if (unlikely(!data))
		return HF_DROP(HF_DROP_NO_HEADROOM);
	hf_write_outer(data, config, node, tot_len, hash, HF_FORWARD_OVERHEAD_BYTES, HF_OPTION_FORWARD);
	option = data + HF_OPTION_AT + 4;
	HF_U64(option) = HF_U64(backend->addr);
	HF_U64(option + 8) = HF_U64(backend->addr + 8);
	HF_U32(option + 16) = backend->port_be;
	return hf_transmit(ctx, node, verdict);
}

#endif
