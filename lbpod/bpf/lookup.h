/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Records by key, a desk of them at a time, looked up or dropped: BPF has no batch look-up by key, a batched deletion
 * ends at the first key that is not there, and one system call each costs five times as much. A plain bounded loop:
 * bpf_loop takes only a stack pointer as its context, and is younger than our oldest kernel.
 */
#ifndef HF_LOOKUP_H
#define HF_LOOKUP_H

#include "base.h"

#define HF_RECORD_MISSING 0xFFFFFFFFu /* round of a record that does not exist */
#define HF_RECORD_EMBRYONIC 0x01000000u /* in the round of one that was found in `embryonic` */

struct hf_lookup_args {
	__u32 count; /* keys on the desk */
};

/* One key. 0, or not 0 past the end of the desk. */
HF_INLINE int hf_lookup_one(__u32 index)
{
	struct hf_flow *key = bpf_map_lookup_elem(&lookup_keys, &index);
	struct hf_record *value = bpf_map_lookup_elem(&lookup_values, &index), *record;
	struct hf_flow flow;
	__u32 found = 0;

	if (!key || !value)
		return -1;
	flow = *key;
	record = bpf_map_lookup_elem(&records, &flow);
	if (!record) {
		record = bpf_map_lookup_elem(&embryonic, &flow);
		found = HF_RECORD_EMBRYONIC;
	}
	if (record) {
		value->backend = record->backend;
		value->round = record->round | found;
		value->seen_ns = record->seen_ns;
	} else {
		value->backend = 0;
		value->round = HF_RECORD_MISSING;
		value->seen_ns = 0;
	}
	return 0;
}

struct hf_drop_args {
	__u32 count; /* keys on the desk */
	__u32 full;  /* out of `records`, or where it is 0 out of `embryonic` */
};

/* One key out of one of the maps, if its record still is the one that lies on lookup_values; round HF_RECORD_MISSING there:
 * whatever it is. Choosing takes the agent milliseconds, and a five-tuple that is used again has a record of its own by
 * then. Few branches: a loop may not have more than 8,192 that the verifier has yet to follow. 0, or not 0 past the end
 * of the desk. */
HF_INLINE int hf_drop_one(void *map, __u32 index)
{
	struct hf_flow *key = bpf_map_lookup_elem(&lookup_keys, &index);
	struct hf_record *wanted = bpf_map_lookup_elem(&lookup_values, &index), *record;

	if (!key || !wanted)
		return -1;
	record = bpf_map_lookup_elem(map, key);
	if (record &&
	    (wanted->round == HF_RECORD_MISSING || !((record->backend ^ wanted->backend) | (record->round ^ wanted->round) |
						     (record->seen_ns ^ wanted->seen_ns))))
		bpf_map_delete_elem(map, key);
	return 0;
}

#endif
