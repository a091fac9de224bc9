// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A program that no verifier may accept: it reads a packet without looking where the packet ends. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("xdp")
int hf_xdp(struct xdp_md *ctx)
{
	return *(volatile int *)(unsigned long)ctx->data;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
