/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What every other header stands on: the includes, the way out, and small words.
 *
 * There is one way out: a decision is an `exit`, an action and the verdict that names it, and hf_leave() counts it. No
 * function counts by itself, so that one packet is one count.
 */
#ifndef HF_BASE_H
#define HF_BASE_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "limits.h"
#include "types.h"
#include "maps.h"
#include "verdict.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "headers are written as little-endian words; build with -target bpf on (or bpfel for) a little-endian machine"
#endif

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Inlined into the steady path, or verified on its own and called (with ctx and scalars only). */
#define HF_INLINE static __always_inline
#define HF_COLD __noinline

/* Action (XDP_*) in bits 8.., verdict in bits 0-7: what cold functions return. */
#define HF_EXIT(ACTION, VERDICT) ((__u32)(ACTION) << 8 | (__u32)(VERDICT))
#define HF_DROP(VERDICT) HF_EXIT(XDP_DROP, VERDICT)
#define HF_PASS(VERDICT) HF_EXIT(XDP_PASS, VERDICT)
#define HF_EXIT_VERDICT(EXIT) ((EXIT)&0xff)
#define HF_EXIT_ACTION(EXIT) ((EXIT) >> 8)

#define HF_ETH_BYTES 14
#define HF_IP_BYTES 20
#define HF_TCP_BYTES 20
#define HF_UDP_BYTES 8
#define HF_ICMP_BYTES 8
#define HF_PROTOCOL_ICMP 1
#define HF_PROTOCOL_TCP 6
#define HF_PROTOCOL_UDP 17

#define HF_TCP_FIN 0x01
#define HF_TCP_SYN 0x02
#define HF_TCP_RST 0x04
#define HF_TCP_ACK 0x10

/* How a packet came to be decided here; handed to cold functions in one word. */
#define HF_ORIGIN_ROOM(ORIGIN) ((ORIGIN)&0x7f)	    /* bytes of outer headers before its own: 0, or an overhead */
#define HF_ORIGIN_HOPS(ORIGIN) ((ORIGIN) >> 7 & 3)  /* times that it has been relayed; HF_RELAY_HOPS_MAX: or more */
#define HF_ORIGIN_SET_HOPS(HOPS) ((__u32)(HOPS) << 7)
#define HF_ORIGIN_RELAY 0x200	  /* it came by RELAY */
#define HF_ORIGIN_CHAIN 0x400	  /* it came by CHAIN */
#define HF_ORIGIN_CLIENT_IP 0x800 /* its VIP has ClientIP affinity */
#define HF_ORIGIN_ICMP 0x1000	  /* it is an ICMP error about the flow */
_Static_assert(HF_RELAY_HOPS_MAX == 3, "hops have two bits");

/*
 * What a cold parser found, in one word: an exit, or a packet of a flow that is still to be decided. Handed back rather
 * than decided there, so that calls do not nest: stack is 512 bytes for all frames together.
 */
#define HF_FOUND_FLOW 0x8000u
#define HF_FOUND(HASH, VIP_ID, ORIGIN) ((__u64)(HASH) << 32 | (VIP_ID) << 16 | HF_FOUND_FLOW | (ORIGIN))
#define HF_FOUND_HASH(FOUND) ((__u32)((FOUND) >> 32))
#define HF_FOUND_VIP_ID(FOUND) ((__u32)(FOUND) >> 16)
#define HF_FOUND_ORIGIN(FOUND) ((__u32)(FOUND)&0x7fff)
_Static_assert(HF_VIPS_MAX <= 0x10000, "a VIP id has 16 bits there");

HF_INLINE void *hf_data(const struct xdp_md *ctx)
{
	return (void *)(long)ctx->data;
}

HF_INLINE void *hf_data_end(const struct xdp_md *ctx)
{
	return (void *)(long)ctx->data_end;
}

/* Reads and writes of words at any even address: packets may be read unaligned, and clang has to be told. */
#define HF_U8(P) (*(__u8 *)(P))
#define HF_U16(P) (*(__u16 *)(P))
#define HF_U32(P) (*(__u32 *)(P))
#define HF_U64(P) (*(__u64 *)(P))

/* IPv4 in 16 bytes, as two words: ::ffff:a.b.c.d */
#define HF_MAPPED_PREFIX 0xffff0000u
HF_INLINE void hf_mapped(__u8 *to, __be32 addr)
{
	HF_U64(to) = 0;
	HF_U64(to + 8) = (__u64)addr << 32 | HF_MAPPED_PREFIX;
}

HF_INLINE int hf_is_mapped(const __u8 *addr)
{
	return HF_U64(addr) == 0 && HF_U32(addr + 8) == HF_MAPPED_PREFIX;
}

HF_INLINE __be32 hf_unmapped(const __u8 *addr)
{
	return HF_U32(addr + 12);
}

HF_INLINE struct hf_config *hf_config(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

HF_INLINE void hf_count(__u32 verdict, __u32 bytes)
{
	struct hf_counter *counter = bpf_map_lookup_elem(&counters, &verdict);

	if (likely(counter)) {
		counter->packets += 1;
		counter->bytes += bytes;
	}
}

/* bytes: the frame's length as it arrived. */
HF_INLINE int hf_leave(__u32 exit, __u32 bytes)
{
	hf_count(HF_EXIT_VERDICT(exit), bytes);
	return HF_EXIT_ACTION(exit);
}

#endif
