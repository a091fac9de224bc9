// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Baseline: consistent hashing and nothing else. Every packet goes where the table of the moment says; a flow whose slot
 * gets another backend goes there, too, and is reset.
 */
#include "steady.h"

HF_INLINE __u32 baseline_choose(const struct hf_vip *vip, const struct hf_packet *packet, __u32 current)
{
	return current;
}

#include "baseline.h"
