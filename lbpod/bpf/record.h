/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What replicas remember: records, embryonic ones, and the stamps that settling waits for. */
#ifndef HF_RECORD_H
#define HF_RECORD_H

#include "flow.h"
#include "send.h"

/* Backend of a tracking slot's unrecorded flows; 0: none. */
HF_INLINE __u32 hf_base(__u64 word)
{
	return word >> HF_SLOT_BASE_SHIFT & HF_SLOT_CURRENT_MASK;
}

/* A record whose backend is dead is as no record; so is one of before the slot was last steady: its flow is over, or
 * belongs to what is base now; and one of another backend than the one that this LB, as backup, has agreed all live flows
 * to belong to. word: the slot's. */
HF_INLINE struct hf_record *hf_live(struct hf_record *record, __u64 word)
{
	if (!record || (record->round ^ word) & HF_SLOT_ROUND_MASK)
		return NULL;
	if (word & HF_SLOT_AGREED && record->backend != (word & HF_SLOT_CURRENT_MASK))
		return NULL;
	return hf_backend_alive(record->backend) ? record : NULL;
}

/* 0: recorded. A full record takes the place of an embryonic one; an embryonic one is made only where no live full
 * record is, and takes a dead one's place. chained: how often its packets are taken to have travelled the chain again. */
HF_INLINE int hf_record(const struct hf_flow *flow, __u32 backend, __u32 full, __u64 word, __u32 chained, __u64 now)
{
	struct hf_record record = {
		.backend = backend, .round = (word & HF_SLOT_ROUND_MASK) | chained, .seen_ns = now};

	if (full) {
		if (bpf_map_update_elem(&records, flow, &record, BPF_ANY))
			return -1;
		bpf_map_delete_elem(&embryonic, flow);
		return 0;
	}
	if (bpf_map_update_elem(&embryonic, flow, &record, BPF_ANY))
		return -1;
	bpf_map_delete_elem(&records, flow);
	return 0;
}

/* A replica sends a packet of this slot elsewhere than to `current`. */
HF_INLINE void hf_stamp(__u32 vip_id, __u32 hash, __u64 now)
{
	void *inner = bpf_map_lookup_elem(&other_seen, &vip_id);
	__u32 slot = hash >> 16;
	volatile __u64 *seen;

	if (!inner)
		return;
	seen = bpf_map_lookup_elem(inner, &slot);
	if (seen)
		*seen = now;
}

HF_INLINE void hf_note_unrecorded(__u32 vip_id, __u64 now)
{
	struct hf_vip_stat *stat = bpf_map_lookup_elem(&vip_stats, &vip_id);

	if (stat)
		stat->unrecorded_ns = now;
}

#endif
