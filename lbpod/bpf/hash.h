/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The two hashes: murmur3-32 of a flow (slot and outer source port), and the small one that finds a VIP. */
#ifndef HF_HASH_H
#define HF_HASH_H

#include "base.h"

HF_INLINE __u32 hf_rotl(__u32 x, int bits)
{
	return x << bits | x >> (32 - bits);
}

HF_INLINE __u32 hf_murmur3_block(__u32 h, __u32 k)
{
	k *= 0xcc9e2d51;
	k = hf_rotl(k, 15);
	k *= 0x1b873593;
	h ^= k;
	h = hf_rotl(h, 13);
	return h * 5 + 0xe6546b64;
}

/*
 * MurmurHash3_x86_32 (A. Appleby) of 16 bytes: addresses and ports as on the wire, protocol as a little-endian word.
 * ports: source port in the low half (as it lies in memory), 0 there with ClientIP affinity.
 */
HF_INLINE __u32 hf_murmur3(__u32 seed, __be32 saddr, __be32 daddr, __u32 ports, __u32 protocol)
{
	__u32 h = seed;

	h = hf_murmur3_block(h, saddr);
	h = hf_murmur3_block(h, daddr);
	h = hf_murmur3_block(h, ports);
	h = hf_murmur3_block(h, protocol);
	h ^= 16; /* the length */
	h ^= h >> 16;
	h *= 0x85ebca6b;
	h ^= h >> 13;
	h *= 0xc2b2ae35;
	h ^= h >> 16;
	return h;
}

/* Multiplicative hashing; the same arithmetic as vip_index in lbpod/core/layout.py. 0 .. HF_VIPS_MAX-1. */
HF_INLINE __u32 hf_vip_index(__be32 addr, __be16 port_be, __u32 protocol)
{
	__u32 port = bpf_ntohs(port_be);

	return ((bpf_ntohl(addr) ^ (port << 16 | port) ^ protocol * 0x0101) * 0x9E3779B1u) >> 20;
}

#endif
