/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The whole agreement between the kernel side and the user side: what lies in the maps.
 *
 * Python's half is lbpod/core/layout.py; a test compares both with the BTF of the object file. Addresses are 16 bytes
 * (IPv4 as ::ffff:a.b.c.d); fields named *_be are in network order, everything else is in host order. All structs are
 * free of hidden padding.
 */
#ifndef HF_TYPES_H
#define HF_TYPES_H

#include <linux/types.h>
#include "limits.h"

/* A slot is one aligned 64-bit word, read and written whole: current | flags | round | base << 32. All zero: no backend. */
#define HF_SLOT_CURRENT_MASK 0x00FFFFFFu
#define HF_SLOT_TRACKING 0x01000000u /* clear: steady, use current and look no further */
#define HF_SLOT_SETTLING 0x02000000u /* an answer to a settle is outstanding */
#define HF_SLOT_ROUND_MASK 0xFC000000u /* counts how often the slot has begun to track: what was noted before is void */
#define HF_SLOT_ROUND_ONE 0x04000000u
#define HF_SLOT_BASE_SHIFT 32
#define HF_SLOT_AGREED (1ull << 63) /* above base. Records of other backends than current are void, too */

/* struct hf_vip.flags */
#define HF_VIP_CLIENT_IP 0x01 /* affinity: the client's port is not part of the flow */
/* Direct-mapped: index = hf_vip_index(address, port, protocol) < VIPS_MAX; collisions through `next` (0: end), which
 * points past those. An entry with protocol ICMP, port 0 and id 0 says "this address is a VIP". */
struct hf_vip {
	__u8 addr[16];
	__be16 port_be;
	__u8 protocol;
	__u8 flags;
	__u32 id; /* 1..VIPS_MAX-1; index into slots and other_seen */
	__u32 next;
	__u32 used; /* 0: free entry */
};

#define HF_BACKEND_ALIVE 0x01
#define HF_BACKEND_LOCAL 0x02 /* on this very node: into the stack instead of into the tunnel */
struct hf_backend {
	__u8 addr[16];
	__be16 port_be;
	__u8 flags;
	__u8 pad;
	__u32 node; /* index into nodes */
	__u32 vip;  /* id of the VIP that it serves */
	__u32 pad2;
};

#define HF_NODE_REACHABLE 0x01 /* next hop known */
struct hf_node {
	__u8 addr[16];
	__u8 dst_mac[6]; /* of the next hop */
	__u8 src_mac[6]; /* of the interface that leads there */
	__u32 ifindex;	 /* that interface; the one that a packet came in by: XDP_TX, another: redirect */
	__u32 csum;	 /* sum of the outer IPv4 header's 16-bit words without total length, as read in memory */
	__u16 mtu;	 /* of the path there, 0: unknown */
	__u16 flags;
	__u32 pad[2];
};

#define HF_MEMBER_PRESENT 0x01
#define HF_MEMBER_UP 0x02	/* believed to be up; a wrong belief is harmless */
#define HF_MEMBER_DOUBTED 0x04	/* silent, for not long: sent to where nobody who is up could decide */
struct hf_member {
	__u8 addr[16];
	__u32 node;
	__u32 flags;
};

/* Ownership arrays (own, next, prev): owner in the low 16 bits, backup in the high 16 bits, HF_MEMBER_NONE for none. */
#define HF_NOBODY 0xFFFFFFFFu

/* A flow; with ClientIP affinity the port is 0. */
struct hf_flow {
	__u8 addr[16]; /* client */
	__be16 port_be;
	__u16 pad;
	__u32 vip;
};

struct hf_record {
	__u32 backend;
	__u32 round; /* of the slot, when it was made: HF_SLOT_ROUND_MASK; below it HF_CHAIN_AGAIN_MAX at most: see replica.h */
	__u64 seen_ns; /* coarse monotonic clock */
};

struct hf_lease {
	__u32 backend;
	__u32 round; /* of the slot, when it was asked for */
	__u64 until_ns; /* coarse monotonic clock */
};

struct hf_pending {
	__u32 slot;
	__u32 pad;
	__u64 seen_ns;
};

struct hf_nat_key {
	__u8 client[16];
	__u8 pod[16];
	__be16 client_port_be;
	__be16 pod_port_be;
	__u8 protocol;
	__u8 pad[3];
};

#define HF_NAT_FIN_IN 0x01
#define HF_NAT_FIN_OUT 0x02
#define HF_NAT_RST 0x04 /* closing: RST, or both FINs */
/* In `unassured` alone */
#define HF_NAT_SYN 0x08	     /* TCP: began with a SYN, and the client has sent nothing else since */
#define HF_NAT_ANSWERED 0x10 /* the pod has answered, and not with RST */
#define HF_NAT_ASSURED 0x20  /* has been put into `nat`; a sweep takes it away */
struct hf_nat {
	__u8 vip[16];
	__be16 vip_port_be;
	__u8 flags;
	__u8 pad;
	__u32 pad2;
	__u64 seen_ns;
};

/* Written by the agent, read by the programs; one per node, in the array `config` (one entry). */
struct hf_config {
	__u8 node_addr[16]; /* outer source, and the outer destination that is ours */
	__u8 mac[6];	    /* of the uplink */
	__u16 self;	    /* member id, HF_MEMBER_NONE where this node takes no part in the ring */
	__u32 vni;
	__u32 seed;
	__u32 epoch; /* low 32 bits of the committed generation, for the RELAY and CHAIN options */
	__u32 ifindex;
	__u16 ring_change; /* not 0: next and prev count as well */
	__u16 mss_max;	   /* MSS that a SYN-ACK may offer, 0: leave it */
	__u32 version;	   /* layout of the maps */
};
#define HF_LAYOUT_VERSION 4

struct hf_counter {
	__u64 packets;
	__u64 bytes;
};

/* Per VIP, mmapped: the last time that a flow could not be recorded. [0], no VIP's: when nat may last have evicted. */
struct hf_vip_stat {
	__u64 unrecorded_ns;
	__u64 pad;
};

_Static_assert(sizeof(struct hf_vip) == 32, "vip");
_Static_assert(sizeof(struct hf_backend) == 32, "backend");
_Static_assert(sizeof(struct hf_node) == 48, "node");
_Static_assert(sizeof(struct hf_member) == 24, "member");
_Static_assert(sizeof(struct hf_flow) == 24, "flow");
_Static_assert(sizeof(struct hf_record) == 16, "record");
_Static_assert(sizeof(struct hf_lease) == 16, "lease");
_Static_assert(sizeof(struct hf_pending) == 16, "pending");
_Static_assert(sizeof(struct hf_nat_key) == 40, "nat key");
_Static_assert(sizeof(struct hf_nat) == 32, "nat");
_Static_assert(sizeof(struct hf_config) == 48, "config");
_Static_assert(sizeof(struct hf_counter) == 16, "counter");

#endif
