/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From (address, port, protocol) to a VIP: one array read where nothing collides. */
#ifndef HF_VIP_H
#define HF_VIP_H

#include "hash.h"

HF_INLINE int hf_vip_is(const struct hf_vip *vip, __be32 addr, __be16 port_be, __u32 protocol)
{
	__u64 low = (__u64)addr << 32 | HF_MAPPED_PREFIX;
	__u32 key = protocol << 16 | port_be;

	return HF_U64(vip->addr + 8) == low && (HF_U32(&vip->port_be) & 0xffffff) == key && vip->used &&
	       HF_U64(vip->addr) == 0;
}

/* NULL where there is none. Collisions are chained through `next`, HF_VIP_CHAIN_MAX entries at most. */
HF_INLINE const struct hf_vip *hf_vip_find(__be32 addr, __be16 port_be, __u32 protocol)
{
	__u32 index = hf_vip_index(addr, port_be, protocol);

	for (int i = 0; i < HF_VIP_CHAIN_MAX; i++) {
		const struct hf_vip *vip = bpf_map_lookup_elem(&vips, &index);

		if (!vip)
			return NULL;
		if (likely(hf_vip_is(vip, addr, port_be, protocol)))
			return vip;
		index = vip->next;
		if (!index)
			return NULL;
	}
	return NULL;
}

/* Is this address a VIP, whatever the port? Asked only about packets that are odd. */
HF_INLINE int hf_vip_addr(__be32 addr)
{
	return hf_vip_find(addr, 0, HF_PROTOCOL_ICMP) != NULL;
}

#endif
