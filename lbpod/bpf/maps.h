/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The maps, shared by every program that is built with these headers. Their names are the names of the pins.
 * The agent sizes and creates them (lbpod/datapath/kernel.py); the figures here are the defaults of limits.h.
 */
#ifndef HF_MAPS_H
#define HF_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "types.h"
#include "verdict.h"

#define HF_ARRAY(NAME, TYPE, COUNT, FLAGS)            \
	struct {                                      \
		__uint(type, BPF_MAP_TYPE_ARRAY);     \
		__uint(max_entries, COUNT);           \
		__uint(map_flags, FLAGS);             \
		__type(key, __u32);                   \
		__type(value, TYPE);                  \
	} NAME SEC(".maps")

#define HF_HASH(NAME, KIND, KEY, VALUE, COUNT)        \
	struct {                                      \
		__uint(type, KIND);                   \
		__uint(max_entries, COUNT);           \
		__type(key, KEY);                     \
		__type(value, VALUE);                 \
	} NAME SEC(".maps")

/* One inner array per VIP, index = VIP id; the agent creates the inner ones on demand. */
#define HF_PER_VIP(NAME, TYPE)                                      \
	struct NAME##_inner {                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY);                   \
		__uint(max_entries, HF_SLOT_COUNT);                 \
		__uint(map_flags, BPF_F_MMAPABLE);                  \
		__type(key, __u32);                                 \
		__type(value, TYPE);                                \
	};                                                          \
	struct {                                                    \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);           \
		__uint(max_entries, HF_VIPS_MAX);                   \
		__type(key, __u32);                                 \
		__array(values, struct NAME##_inner);               \
	} NAME SEC(".maps")

HF_ARRAY(vips, struct hf_vip, HF_VIP_INDEX_COUNT, BPF_F_MMAPABLE);
HF_PER_VIP(slots, __u64); /* a word per slot: HF_SLOT_* in types.h */
HF_PER_VIP(other_seen, __u64); /* ns of the last packet that a replica sent elsewhere than to `current` */
HF_ARRAY(backends, struct hf_backend, HF_BACKEND_IDS_MAX, BPF_F_MMAPABLE);
HF_ARRAY(nodes, struct hf_node, HF_NODES_MAX, BPF_F_MMAPABLE);
HF_ARRAY(members, struct hf_member, HF_MEMBERS_MAX, BPF_F_MMAPABLE);
HF_ARRAY(own, __u32, HF_SLOT_COUNT, BPF_F_MMAPABLE);
HF_ARRAY(next, __u32, HF_SLOT_COUNT, BPF_F_MMAPABLE);
HF_ARRAY(prev, __u32, HF_SLOT_COUNT, BPF_F_MMAPABLE);
HF_ARRAY(vip_stats, struct hf_vip_stat, HF_VIPS_MAX, BPF_F_MMAPABLE);

HF_HASH(cache, BPF_MAP_TYPE_LRU_HASH, struct hf_flow, struct hf_lease, HF_CACHE_MAX);
HF_HASH(embryonic, BPF_MAP_TYPE_LRU_HASH, struct hf_flow, struct hf_record, HF_EMBRYONIC_MAX);
HF_HASH(pending, BPF_MAP_TYPE_LRU_HASH, struct hf_flow, struct hf_pending, HF_PENDING_MAX);
HF_HASH(nat, BPF_MAP_TYPE_LRU_HASH, struct hf_nat_key, struct hf_nat, HF_NAT_MAX);
HF_HASH(unassured, BPF_MAP_TYPE_LRU_HASH, struct hf_nat_key, struct hf_nat, HF_UNASSURED_MAX);
/* outer source address -> member id; the tunnel's door */
HF_HASH(member_by_addr, BPF_MAP_TYPE_HASH, __u8[16], __u32, HF_MEMBERS_MAX);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HF_RECORDS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct hf_flow);
	__type(value, struct hf_record);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HF_VERDICT_COUNT);
	__type(key, __u32);
	__type(value, struct hf_counter);
} counters SEC(".maps");

/* The look-up program's desk: keys in, values out (flags = 0xFFFFFFFF where there is no record). */
HF_ARRAY(lookup_keys, struct hf_flow, HF_LOOKUP_BATCH_MAX, BPF_F_MMAPABLE);
HF_ARRAY(lookup_values, struct hf_record, HF_LOOKUP_BATCH_MAX, BPF_F_MMAPABLE);

/* The desk of hf_forget: nat keys, and their seen_ns as it was when they were chosen. */
HF_ARRAY(stale_keys, struct hf_nat_key, HF_LOOKUP_BATCH_MAX, BPF_F_MMAPABLE);
HF_ARRAY(stale_stamps, __u64, HF_LOOKUP_BATCH_MAX, BPF_F_MMAPABLE);

/* The programs' view of the agent's settings: an array of one, so that it can be pinned, mapped and kept over a reload. */
HF_ARRAY(config, struct hf_config, 1, BPF_F_MMAPABLE);

#endif
