// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Baseline: consistent hashing with a flow table at each LB, the way of Katran, Maglev and Cilium. A flow stays where this
 * LB has once sent it, and an LB that has never seen it asks the table of the moment. What no LB can know is where
 * another one has sent a flow.
 */
#include "steady.h"

HF_HASH(flow_table, BPF_MAP_TYPE_LRU_HASH, struct hf_flow, __u32, 262144);

HF_INLINE __u32 baseline_choose(const struct hf_vip *vip, const struct hf_packet *packet, __u32 current)
{
	struct hf_flow flow;
	__u32 *known;

	hf_flow_key(&flow, packet, vip->id, vip->flags & HF_VIP_CLIENT_IP ? HF_ORIGIN_CLIENT_IP : 0);
	known = hf_is_syn(packet->tcp_flags) ? NULL : bpf_map_lookup_elem(&flow_table, &flow);
	if (known && hf_backend_alive(*known))
		return *known;
	if (hf_backend_alive(current))
		bpf_map_update_elem(&flow_table, &flow, &current, BPF_ANY);
	return current;
}

#include "baseline.h"
