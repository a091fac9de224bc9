// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Notes every numbered datagram that reaches a pod, and answers some: in generic XDP on the pod's own interface, after
 * the last hop. In soft interrupt, because a server in user space that is not given time drops what finds no room in its
 * socket, and then a harness has lost what the network had not.
 *
 * What a stack would not take, a wrong checksum above all, is not noted. Python's half is numbered.py.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define NUMBERS 8388608 /* a power of two; a number's place is its remainder */
#define PORT 8080
#define ANSWER_EVERY 3 /* no power of two, so that flows (number modulo 256) are all answered now and then */

#define IP_AT 14
#define UDP_AT 34
#define NUMBER_AT 42
#define UDP_BYTES 40 /* header, number, 24 bytes of nothing */

struct noted {
	__u64 came_ns; /* the first time */
	__be32 pod;
	__u32 count;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NUMBERS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct noted);
} noted SEC(".maps");

static __always_inline __u16 folded(__s64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline void swap16(void *one, void *other)
{
	__u16 kept = *(__u16 *)one;

	*(__u16 *)one = *(__u16 *)other;
	*(__u16 *)other = kept;
}

/* Back to where it came from. No checksum changes: they are sums over the same words. */
static __always_inline int answer(void *data)
{
	for (int i = 0; i < 6; i += 2)
		swap16(data + i, data + 6 + i);
	for (int i = 0; i < 4; i += 2)
		swap16(data + IP_AT + 12 + i, data + IP_AT + 16 + i);
	swap16(data + UDP_AT, data + UDP_AT + 2);
	return XDP_TX;
}

SEC("xdp")
int note(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct noted *entry;
	__s64 sum;
	__u64 number;
	__u32 place;

	if (data + UDP_AT + UDP_BYTES > data_end || *(__u16 *)(data + 12) != bpf_htons(0x0800) ||
	    *(__u8 *)(data + IP_AT) != 0x45 || *(__u8 *)(data + IP_AT + 9) != 17 ||
	    *(__u16 *)(data + UDP_AT + 2) != bpf_htons(PORT) || *(__u16 *)(data + UDP_AT + 4) != bpf_htons(UDP_BYTES))
		return XDP_PASS;
	sum = bpf_csum_diff(NULL, 0, data + IP_AT + 12, 8, bpf_htons(17) + bpf_htons(UDP_BYTES));
	if (folded(bpf_csum_diff(NULL, 0, data + UDP_AT, UDP_BYTES, sum)) != 0xffff ||
	    folded(bpf_csum_diff(NULL, 0, data + IP_AT, 20, 0)) != 0xffff)
		return XDP_DROP;
	number = *(__u64 *)(data + NUMBER_AT);
	place = number & (NUMBERS - 1);
	entry = bpf_map_lookup_elem(&noted, &place);
	if (!entry)
		return XDP_DROP;
	if (!entry->count)
		entry->came_ns = bpf_ktime_get_ns();
	entry->pod = *(__be32 *)(data + IP_AT + 16);
	__sync_fetch_and_add(&entry->count, 1);
	return number % ANSWER_EVERY ? XDP_DROP : answer(data);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
