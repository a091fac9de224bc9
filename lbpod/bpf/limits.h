/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The bounds that the programs share with lbpod/core/limits.py (there without the prefix). A tidy test keeps them equal. */
#ifndef HF_LIMITS_H
#define HF_LIMITS_H

#define HF_SLOT_COUNT 65536
#define HF_VIPS_MAX 4096
#define HF_VIP_INDEX_COUNT 28672
#define HF_VIP_CHAIN_MAX 8
#define HF_BACKEND_IDS_MAX 131072
#define HF_NODES_MAX 4096
#define HF_MEMBERS_MAX 1024
#define HF_MEMBER_NONE 0xFFFF
#define HF_REPLICAS_MAX 6
#define HF_RELAY_HOPS_MAX 3
#define HF_CACHE_MAX 262144
#define HF_RECORDS_MAX 1048576
#define HF_EMBRYONIC_MAX 65536
#define HF_PENDING_MAX 65536
#define HF_NAT_MAX 1048576
#define HF_UNASSURED_MAX 524288
#define HF_LOOKUP_BATCH_MAX 1024
#define HF_CHAIN_SURE_NS 900000000
#define HF_REUSE_NS 1500000000
#define HF_CHAIN_AGAIN_MAX 3
#define HF_NAT_TAKEN_NS 3600000000000
#define HF_NAT_TAKEN_BRIEFLY_NS 60000000000
#define HF_GENEVE_PORT 6081
#define HF_FORWARD_OVERHEAD_BYTES 60
#define HF_RELAY_OVERHEAD_BYTES 48
#define HF_CHAIN_OVERHEAD_BYTES 64

#endif
