// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Built from other headers than ours: two fields of a flow have changed places, and a node is longer. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct hf_flow {
	__u8 addr[16];
	__u16 pad;
	__u16 port_be;
	__u32 vip;
};

struct hf_record {
	__u32 backend;
	__u32 round;
	__u64 seen_ns;
};

struct hf_node {
	__u8 addr[16];
	__u64 more[5];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct hf_flow);
	__type(value, struct hf_record);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hf_node);
} nodes SEC(".maps");

SEC("xdp")
int hf_xdp(struct xdp_md *ctx)
{
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
