/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The chain: a recorded packet travels through the other replicas of its slot, one after the other, to the backend.
 *
 * Each records the flow before the backend sees the packet: causality does the work of an acknowledgement. A replica
 * adds those that the sender did not know of (a ring change is under way).
 */
#ifndef HF_CHAIN_H
#define HF_CHAIN_H

#include "record.h"
#include "send.h"

#define HF_CHAIN_FULL 0x80000000u /* beside the backend id: a full record, not an embryonic one */

/* Flags of the option. */
#define HF_OPTION_FULL 1
#define HF_OPTION_OVERRULES 2 /* a replica on the way knew better: what is recorded elsewhere gives way */

struct hf_chain {
	__u32 backend;
	__u32 flags;   /* HF_OPTION_* */
	__u32 visited; /* visited + left <= HF_REPLICAS_MAX */
	__u32 left;
	/* The visited ones, then those left, then zeros: four 16-bit places a word, the first in the low bits. Words and
	 * not an array, for an array on the stack with a variable index is what clang and the verifier fall out over. */
	__u64 low;
	__u64 high;
};
_Static_assert(HF_REPLICAS_MAX <= 8, "members of a chain fit two words");

HF_INLINE __u32 hf_chain_member(const struct hf_chain *chain, __u32 at)
{
	return (at < 4 ? chain->low >> 16 * at : chain->high >> 16 * (at & 3)) & 0xffff;
}

/* Writes a place that is still zero. */
HF_INLINE void hf_chain_put(struct hf_chain *chain, __u32 at, __u32 member)
{
	if (at < 4)
		chain->low |= (__u64)member << 16 * at;
	else
		chain->high |= (__u64)member << 16 * (at & 3);
}

HF_INLINE int hf_chain_has(const struct hf_chain *chain, __u32 member)
{
	for (__u32 i = 0; i < HF_REPLICAS_MAX; i++)
		if (i < chain->visited + chain->left && hf_chain_member(chain, i) == member)
			return 1;
	return 0;
}

/* An ownership word as it is now: read where it stands, neither earlier nor later. */
HF_INLINE __u32 hf_pair(const volatile __u32 *pair)
{
	return pair ? *pair : HF_NOBODY;
}

/* Appends the replicas of one ownership word that are new to the chain and can be sent to. */
HF_INLINE void hf_chain_extend(struct hf_chain *chain, const struct hf_config *config, __u32 pair)
{
	for (int half = 0; half < 2; half++) {
		__u32 member = half ? pair >> 16 : pair & 0xffff;

		if (member == HF_MEMBER_NONE || member == config->self || hf_chain_has(chain, member))
			continue;
		if (chain->visited + chain->left >= HF_REPLICAS_MAX || !hf_member_node(member))
			continue;
		hf_chain_put(chain, chain->visited + chain->left, member);
		chain->left++;
	}
}

/*
 * `next` is read before `own`: a switch writes prev := own, own := next, next := nobody, one after the other, and a packet
 * that had read the old own and then the empty next would miss who is new.
 */
HF_INLINE void hf_chain_extend_all(struct hf_chain *chain, const struct hf_config *config, __u32 slot)
{
	__u32 coming = config->ring_change ? hf_pair(bpf_map_lookup_elem(&next, &slot)) : HF_NOBODY;

	hf_chain_extend(chain, config, hf_pair(bpf_map_lookup_elem(&own, &slot)));
	if (!config->ring_change)
		return;
	hf_chain_extend(chain, config, coming);
	hf_chain_extend(chain, config, hf_pair(bpf_map_lookup_elem(&prev, &slot)));
}

HF_INLINE __u32 hf_encap_chain(struct xdp_md *ctx, const struct hf_config *config, const struct hf_node *node,
			       const struct hf_chain *chain, __u32 hash, __u32 origin, __u32 verdict)
{
	void *ip = hf_data(ctx) + HF_ETH_BYTES + HF_ORIGIN_ROOM(origin), *data, *option;
	__u32 tot_len;

	if (ip + HF_IP_BYTES > hf_data_end(ctx))
		return HF_DROP(HF_DROP_MALFORMED);
	tot_len = bpf_ntohs(HF_U16(ip + 2));
	if (!hf_fits(node, tot_len, HF_CHAIN_OVERHEAD_BYTES))
		return hf_too_big(ctx, node->mtu, origin);
	data = hf_make_room(ctx, HF_ORIGIN_ROOM(origin), HF_CHAIN_OVERHEAD_BYTES);
	if (!data)
		return HF_DROP(HF_DROP_NO_HEADROOM);
	hf_write_outer(data, config, node, tot_len, hash, HF_CHAIN_OVERHEAD_BYTES, HF_OPTION_CHAIN);
	option = data + HF_OPTION_AT + 4;
	HF_U32(option) = bpf_htonl(chain->backend);
	HF_U32(option + 4) = bpf_htonl(config->epoch);
	HF_U32(option + 8) = chain->visited | chain->left << 8 | chain->flags << 16;
	for (int i = 0; i < HF_REPLICAS_MAX; i += 2)
		HF_U32(option + 12 + 2 * i) =
			bpf_htons(hf_chain_member(chain, i)) |
			(__u32)bpf_htons(hf_chain_member(chain, i + 1)) << 16;
	return hf_transmit(ctx, node, verdict);
}

/*
 * To the first of those left that can be sent to; nobody: to the backend, counted as `last`. Also to one that this LB
 * believes to be down, if another has put it on the list: that one sends the flow to `current` because it takes all
 * replicas for up, so none may be left out on the way. If it is really gone the packet is lost, and sent again.
 */
HF_INLINE __u32 hf_chain_pass_on(struct xdp_md *ctx, const struct hf_config *config, const struct hf_chain *chain,
				 __u32 hash, __u32 origin, __u32 chained, __u32 last)
{
	for (__u32 i = 0; i < HF_REPLICAS_MAX; i++) {
		const struct hf_node *node;

		if (i < chain->visited || i >= chain->visited + chain->left)
			continue;
		node = hf_member_node_if(hf_chain_member(chain, i), HF_MEMBER_PRESENT);
		if (node)
			return hf_encap_chain(ctx, config, node, chain, hash, origin, chained);
	}
	return hf_send(ctx, chain->backend, hash, origin, last);
}

/* A flow has just been recorded here. backend: with HF_CHAIN_FULL or without. verdicts: chained | alone << 8. */
HF_COLD __u32 hf_chain_start(struct xdp_md *ctx, __u32 hash, __u32 backend, __u32 origin, __u32 verdicts)
{
	const struct hf_config *config = hf_config();
	struct hf_chain chain = {.backend = backend & ~HF_CHAIN_FULL,
				 .flags = backend & HF_CHAIN_FULL ? HF_OPTION_FULL : 0,
				 .visited = 1};

	if (!config)
		return HF_DROP(HF_DROP_NO_BACKEND);
	hf_chain_put(&chain, 0, config->self);
	hf_chain_extend_all(&chain, config, hash >> 16);
	return hf_chain_pass_on(ctx, config, &chain, hash, origin, verdicts & 0xff, verdicts >> 8 & 0xff);
}

/* The option as it came, with self among the visited. 0, or not 0 where the verifier has to be told. */
HF_INLINE int hf_chain_read(struct xdp_md *ctx, __u32 self, struct hf_chain *chain)
{
	void *option = hf_data(ctx) + HF_OPTION_AT + 4;
	__u32 visited, total, seen = 0;
	struct hf_chain left = {}; /* without self */

	if (option + 24 > hf_data_end(ctx))
		return -1;
	chain->backend = bpf_ntohl(HF_U32(option));
	visited = HF_U8(option + 8);
	total = visited + HF_U8(option + 9);
	chain->flags = HF_U8(option + 10) & (HF_OPTION_FULL | HF_OPTION_OVERRULES);
	for (__u32 i = 0; i < HF_REPLICAS_MAX; i++) {
		__u32 member = bpf_ntohs(HF_U16(option + 12 + 2 * i));

		if (i < visited) {
			hf_chain_put(chain, i, member);
			seen |= member == self;
		} else if (i < total && member != self) {
			hf_chain_put(&left, left.left++, member);
		}
	}
	if (!seen && visited + left.left < HF_REPLICAS_MAX)
		hf_chain_put(chain, visited++, self);
	for (__u32 i = 0; i < HF_REPLICAS_MAX; i++)
		if (i < left.left)
			hf_chain_put(chain, visited + i, hf_chain_member(&left, i));
	chain->visited = visited;
	chain->left = left.left;
	return 0;
}

/* A SYN that another replica sends to current, and what is recorded here has not been seen for so long that it is
 * of an earlier flow with the same five-tuple. That replica has dropped its own record of it, with a settle that this LB
 * has not heard of, say. Of a flow that no packet announces nobody can tell; but an owner that has asked to settle the slot
 * has found all that is recorded here to be over. */
HF_INLINE int hf_begins_anew(const struct hf_record *known, const struct hf_chain *chain, __u32 slot, int syn,
			     int unannounced, __u64 word, __u64 now)
{
	const struct hf_config *config = hf_config();
	int begins = syn && !(chain->flags & HF_OPTION_FULL);

	if (unannounced) {
		__u32 *pair = bpf_map_lookup_elem(&own, &slot);

		begins = word & HF_SLOT_SETTLING && config && pair && (*pair & 0xffff) == config->self;
	}
	return begins && chain->backend == (word & HF_SLOT_CURRENT_MASK) &&
	       known->seen_ns + HF_REUSE_NS < now;
}

/* Two replicas have recorded a flow that no packet announces, each by the base of its time, for they did not hear of each
 * other's record. What is not of base was there before base moved, and so it wins wherever the two meet. Asked where the
 * backends differ. */
HF_INLINE int hf_is_older(const struct hf_record *known, const struct hf_chain *chain, int unannounced, __u64 word)
{
	return unannounced && chain->flags & HF_OPTION_FULL && known->backend == hf_base(word);
}

/* The word whose round a record gets that a chain brings. A sender that tracks a slot that is steady here has prepared a
 * change that this LB has not: it belongs to the round that begins with that. (A flow of UDP is recorded at its beginning, and
 * where base moves later it must be known to every replica.) */
HF_INLINE __u64 hf_chain_word(const struct hf_chain *chain, __u64 word)
{
	int soon = !(word & HF_SLOT_TRACKING) && chain->backend == (word & HF_SLOT_CURRENT_MASK);

	return soon ? word + HF_SLOT_ROUND_ONE : word;
}

/* The sender has promoted what a SYN had recorded there, and here the flow has begun at base: the chain of that SYN was lost,
 * and the client's next one came to this replica, which could not hear the sender. So it is base that has answered. */
HF_INLINE int hf_has_begun_alone(const struct hf_flow *flow, const struct hf_chain *chain, __u64 word)
{
	const struct hf_record *known;

	if (!(word & HF_SLOT_TRACKING) || !(chain->flags & HF_OPTION_FULL) || chain->backend == hf_base(word))
		return 0;
	known = hf_live(bpf_map_lookup_elem(&embryonic, flow), word);
	return known && known->backend == hf_base(word);
}

/* Records what the chain says, or finds that a record here knows better. The verdict of a packet that is passed on. */
HF_INLINE enum hf_verdict hf_chain_record(const struct hf_flow *flow, struct hf_chain *chain, __u32 slot, int syn,
					  int unannounced, __u64 word, __u64 now)
{
	struct hf_record *known = hf_live(bpf_map_lookup_elem(&records, flow), word);
	enum hf_verdict verdict = HF_CHAIN_RECORDED;
	int full;

	if (chain->flags & HF_OPTION_OVERRULES) {
		known = NULL;
	} else if (!known && hf_has_begun_alone(flow, chain, word)) {
		chain->backend = hf_base(word);
		verdict = HF_CHAIN_CONFLICT;
	} else if (known && known->backend != chain->backend) {
		if (!hf_begins_anew(known, chain, slot, syn, unannounced, word, now) && !hf_is_older(known, chain, unannounced, word)) {
			chain->backend = known->backend;
			known->seen_ns = now;
			return HF_CHAIN_CONFLICT;
		}
		known = NULL;
	}
	if (!hf_backend_alive(chain->backend))
		return HF_DROP_NO_BACKEND;
	full = chain->flags & HF_OPTION_FULL;
	if (known && !full)
		known->seen_ns = now;
	else if (hf_record(flow, chain->backend, full, hf_chain_word(chain, word), full ? HF_CHAIN_AGAIN_MAX : 0, now))
		hf_note_unrecorded(flow->vip, now);
	return verdict;
}

/* Those that the chain has come through are told, too, that a record here knows better: what they have recorded is void. */
HF_INLINE void hf_chain_turn_back(struct hf_chain *chain, __u32 self)
{
	struct hf_chain back = {
		.backend = chain->backend, .flags = HF_OPTION_FULL | HF_OPTION_OVERRULES, .visited = 1};
	__u32 total = chain->visited + chain->left;

	hf_chain_put(&back, 0, self);
	for (__u32 i = 0; i < HF_REPLICAS_MAX; i++) {
		__u32 member = hf_chain_member(chain, i);

		if (i < total && member != self && back.left < HF_REPLICAS_MAX - 1)
			hf_chain_put(&back, 1 + back.left++, member);
	}
	*chain = back;
}

/* A CHAIN packet, its tunnel and inner headers found sound. */
HF_COLD __u32 hf_chain_link(struct xdp_md *ctx, __u32 hash, __u32 vip_id, __u64 word, __u32 origin)
{
	const struct hf_config *config = hf_config();
	__u64 now = bpf_ktime_get_coarse_ns();
	enum hf_verdict verdict;
	struct hf_chain chain = {};
	struct hf_packet packet;
	struct hf_flow flow;

	if (!config || hf_packet_again(ctx, origin, &packet) || hf_chain_read(ctx, config->self, &chain))
		return HF_DROP(HF_DROP_GENEVE_INNER);
	hf_flow_key(&flow, &packet, vip_id, origin);
	verdict = hf_chain_record(&flow, &chain, hash >> 16, hf_is_syn(packet.tcp_flags),
				  hf_is_unannounced(&packet, origin), word, now);
	if (verdict == HF_DROP_NO_BACKEND)
		return HF_DROP(HF_DROP_NO_BACKEND);
	if (chain.backend != (word & HF_SLOT_CURRENT_MASK))
		hf_stamp(vip_id, hash, now);
	hf_chain_extend_all(&chain, config, hash >> 16);
	if (verdict == HF_CHAIN_CONFLICT)
		hf_chain_turn_back(&chain, config->self);
	return hf_chain_pass_on(ctx, config, &chain, hash, origin, verdict,
				verdict == HF_CHAIN_CONFLICT ? HF_CHAIN_CONFLICT : HF_CHAIN_LAST);
}

#endif
