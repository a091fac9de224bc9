/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Entries of `nat` or `unassured` that are over, taken out a desk at a time, each only if no packet has refreshed it since
 * it was chosen.
 *
 * Why a program: choosing takes the agent milliseconds, and a system call that deletes by key does not ask what it
 * deletes. Here nothing but a few instructions lie between the last look and the deletion.
 */
#ifndef HF_FORGET_H
#define HF_FORGET_H

#include "base.h"

struct hf_forget_args {
	__u32 count;   /* keys on the desk */
	__u32 deleted; /* answer */
	__u32 assured; /* out of `nat`, or where it is 0 out of `unassured` */
};

/* One key. 0: it is not there, or has been seen since; 1: deleted; negative: past the end of the desk. */
HF_INLINE int hf_forget_one(void *map, __u32 index)
{
	struct hf_nat_key *wanted = bpf_map_lookup_elem(&stale_keys, &index), key;
	__u64 *seen_ns = bpf_map_lookup_elem(&stale_stamps, &index);
	struct hf_nat *entry;

	if (!wanted || !seen_ns)
		return -1;
	key = *wanted;
	entry = bpf_map_lookup_elem(map, &key);
	if (!entry || entry->seen_ns != *seen_ns)
		return 0;
	return bpf_map_delete_elem(map, &key) == 0;
}

#endif
