/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Internet checksums, updated rather than computed (RFC 1624, eqn. 3: HC' = ~(~HC + ~m + m')).
 *
 * Sums are of 16-bit words as they lie in memory; one's complement sums do not mind the byte order. 32-bit words may be
 * added whole, for 2^16 = 1 (mod 2^16 - 1).
 */
#ifndef HF_CSUM_H
#define HF_CSUM_H

#include "base.h"

/* Sum to 16 bits; good for sums below 2^48. */
HF_INLINE __u16 hf_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* The difference that replacing `from` by `to` makes; differences may be added. */
HF_INLINE __u64 hf_csum_diff(__u32 from, __u32 to)
{
	return (__u64)(__u32)~from + to;
}

/* The same for a 16-bit word. */
HF_INLINE __u64 hf_csum_diff16(__u16 from, __u16 to)
{
	return (__u64)(__u16)~from + to;
}

HF_INLINE __u16 hf_csum_update(__u16 csum, __u64 diff)
{
	return ~hf_fold((__u64)(__u16)~csum + diff);
}

#endif
