// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Runs a program again and again on fresh packets: BPF_PROG_TEST_RUN with repeat does not restore the packet, so an
 * encapsulating program alone would be measured on its own output from the second round on.
 *
 * Before each run the frame gets its length, its headers and the next flow's address and port; then the program under
 * test is tail-called. All of that costs the same whatever the program: the figure for the empty one is subtracted.
 * Nothing keeps the processor from beginning the next packet before this one is finished, as nothing does in a network
 * driver. (Tried: an atomic flow counter, which does. Steady at one flow came out 2 ns lower, at many 2 ns higher.)
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/*
 * Ethernet, IPv4 and TCP header, 54 bytes, as seven words that lie at these offsets (two overlap by two bytes). So every
 * field that a parser loads lies within one store: loads that span two recent stores stall, which a packet from a
 * network card never does. (Tried: words at multiples of 8. Parsing alone then cost 30 ns.)
 */
#define WORDS 7
#define WORD_AT(I) ((I) < 2 ? 6 * (I) : 14 + 8 * ((I)-2))
#define SADDR_WORD 3 /* bytes 22-29; the address is the upper half of it */
#define SPORT_WORD 4 /* bytes 30-37; the port is bytes 4 and 5 of it */

/* Python's half is in fastpath_world.py. */
struct bench_state {
	__u64 index; /* of the next flow, < flows */
	__u64 flows; /* met in turn */
	__u64 frame_bytes;
	__u64 words[WORDS]; /* the changing fields are 0 */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct bench_state);
} bench_state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} under_test SEC(".maps");

SEC("xdp")
int driver(struct xdp_md *ctx)
{
	__u32 zero = 0, scrambled;
	struct bench_state *state = bpf_map_lookup_elem(&bench_state, &zero);
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	long bytes = data_end - data;

	asm volatile("" : "+r"(bytes)); /* pointers are subtracted as such, not as part of a sum */
	if (!state)
		return XDP_ABORTED;
	if (bpf_xdp_adjust_head(ctx, (int)bytes - (int)state->frame_bytes))
		return XDP_ABORTED;
	data = (void *)(long)ctx->data;
	data_end = (void *)(long)ctx->data_end;
	if (data + WORD_AT(WORDS - 1) + 8 > data_end)
		return XDP_ABORTED;
	/* A bijection of 32 bits: as many different flows as wanted, in no order that a cache could guess. */
	scrambled = (__u32)state->index * 2654435761u;
	for (int i = 0; i < WORDS; i++) {
		__u64 word = state->words[i];

		if (i == SADDR_WORD)
			word |= (__u64)(scrambled >> 16) << 48;
		if (i == SPORT_WORD)
			word |= (__u64)(scrambled & 0xffff) << 32;
		*(__u64 *)(data + WORD_AT(i)) = word;
	}
	state->index++;
	if (state->index >= state->flows)
		state->index = 0;
	bpf_tail_call_static(ctx, &under_test, 0);
	return XDP_ABORTED;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
