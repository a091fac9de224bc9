/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The programs beside hf_xdp: what every object brings along, whichever way its hf_xdp chooses backends (the lab's
 * baselines choose otherwise, and are loaded by the same agent).
 */
#ifndef HF_SERVICES_H
#define HF_SERVICES_H

#include "reply.h"
#include "lookup.h"
#include "forget.h"

SEC("tc")
int hf_tc(struct __sk_buff *skb)
{
	return hf_reply(skb);
}

SEC("syscall")
int hf_lookup(struct hf_lookup_args *args)
{
	for (__u32 i = 0; i < HF_LOOKUP_BATCH_MAX && i < args->count; i++)
		if (hf_lookup_one(i))
			break;
	return 0;
}

SEC("syscall")
int hf_drop(struct hf_drop_args *args)
{
	void *map = args->full ? (void *)&records : (void *)&embryonic;

	for (__u32 i = 0; i < HF_LOOKUP_BATCH_MAX && i < args->count; i++)
		if (hf_drop_one(map, i))
			break;
	return 0;
}

SEC("syscall")
int hf_forget(struct hf_forget_args *args)
{
	void *map = args->assured ? (void *)&nat : (void *)&unassured;
	__u32 deleted = 0;

	for (__u32 i = 0; i < HF_LOOKUP_BATCH_MAX && i < args->count; i++) {
		int one = hf_forget_one(map, i);

		if (one < 0)
			break;
		deleted += one;
	}
	args->deleted = deleted;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#endif
