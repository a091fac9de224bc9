/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A tracking slot that is ours to decide: the record decides, a first packet makes one, an old flow belongs to base. */
#ifndef HF_REPLICA_H
#define HF_REPLICA_H

#include "chain.h"
#include "relay.h"

struct hf_choice {
	__u32 backend; /* 0 or dead: nobody */
	__u32 verdict;
	__u32 alone; /* 0, or through the other replicas first: the verdict where there is none */
	__u32 full;  /* with `alone`: HF_CHAIN_FULL or 0 */
};

/* No choice of ours: on to the other replica. */
#define HF_ASK_ANOTHER HF_EXIT(XDP_TX, HF_RELAYED)

/* The same in one word, or an exit (backend 0). */
#define HF_CHOICE(CHOICE) ((__u64)((CHOICE).backend | (CHOICE).full) << 32 | (CHOICE).alone << 8 | (CHOICE).verdict)

HF_INLINE __u32 hf_base_or_current(__u64 word)
{
	__u32 base = hf_base(word);

	return hf_backend_alive(base) ? base : word & HF_SLOT_CURRENT_MASK;
}

/* A flow that nobody recorded and that does not begin. */
HF_INLINE void hf_choose_old(struct hf_choice *choice, __u64 word)
{
	__u32 base = hf_base(word);

	choice->backend = hf_base_or_current(word);
	choice->verdict = hf_backend_alive(base) ? HF_OLD_TO_BASE : HF_OLD_TO_CURRENT;
}

/* The slot is about to turn steady on another backend, and nobody looks for a flow any more that begins at that of this
 * record: neither one whose first packet uses the five-tuple of a flow that is over (the client's next one comes in a
 * second, and gets through: the flag may stand for long, where the backup refuses), nor one whose first packet never came
 * to its backend, so that no host knows of it, and that is tried again now. */
HF_INLINE int hf_comes_too_early(const struct hf_record *record, int first, int full, int asks, __u64 word, __u64 now)
{
	return first && word & HF_SLOT_SETTLING && record->backend != (word & HF_SLOT_CURRENT_MASK) &&
	       (full ? record->seen_ns + HF_REUSE_NS < now : asks);
}

/* A packet of a flow that has no first one (UDP, ClientIP) met this record, one of the first few: whether the one that
 * was recorded has come through the chain nobody can tell. */
HF_INLINE int hf_chains_again(struct hf_record *record)
{
	__u32 round = *(volatile __u32 *)&record->round;

	if ((round & ~HF_SLOT_ROUND_MASK) >= HF_CHAIN_AGAIN_MAX)
		return 0;
	*(volatile __u32 *)&record->round = round + 1;
	return 1;
}

HF_INLINE int hf_is_owner(const struct hf_config *config, __u32 slot)
{
	__u32 *pair = bpf_map_lookup_elem(&own, &slot);

	return pair && (*pair & 0xffff) == config->self;
}

/* This LB has asked to settle the slot, and has no answer. The flag of a backup is of its own look, or was handed over. */
HF_INLINE int hf_asks(const struct hf_config *config, __u32 slot, __u64 word)
{
	return word & HF_SLOT_SETTLING && hf_is_owner(config, slot);
}

/* Every replica in an ownership word, self aside, can be sent to. */
HF_INLINE int hf_pair_heard(const struct hf_config *config, const __u32 *pair)
{
	for (int half = 0; pair && half < 2; half++) {
		__u32 member = half ? *pair >> 16 : *pair & 0xffff;

		if (member != HF_MEMBER_NONE && member != config->self && !hf_member_node(member))
			return 0;
	}
	return 1;
}

/* The chain can reach every other replica of the slot. */
HF_COLD int hf_all_heard(__u32 slot)
{
	const struct hf_config *config = hf_config();

	if (!config || !hf_pair_heard(config, bpf_map_lookup_elem(&own, &slot)))
		return 0;
	return !config->ring_change || (hf_pair_heard(config, bpf_map_lookup_elem(&next, &slot)) &&
					hf_pair_heard(config, bpf_map_lookup_elem(&prev, &slot)));
}

/* The chain of the SYN that made this record may have been lost, and the client has had the time to try again, where
 * another replica, if it did not hear this one then, began the flow alone, at base. */
HF_INLINE int hf_is_doubtful(const struct hf_record *record, __u64 word, __u64 now)
{
	return record->seen_ns + HF_CHAIN_SURE_NS < now && record->backend != hf_base_or_current(word);
}

/* Another replica can be asked to decide: the packet has not been there and back, and one can be sent to. */
HF_COLD int hf_can_ask(__u32 slot, __u32 origin)
{
	const struct hf_config *config = hf_config();

	return config && HF_ORIGIN_HOPS(origin) < HF_RELAY_HOPS_MAX && hf_owner_node(config, slot);
}

/* A packet of a flow that is recorded, or may be. 0: it is not. HF_RELAYED: the other replica is asked.
 * A first packet that meets a record may be a second try, the one before lost on its way through the chain: it travels the
 * chain again, or a replica would know nothing of a flow that the client believes open. repeats: so do the first few of a
 * flow that has no first packet. */
HF_INLINE int hf_choose_recorded(struct hf_choice *choice, const struct hf_flow *flow, __u32 slot, __u32 origin, int asks,
				 int first, int promotes, int repeats, __u64 word, __u64 now)
{
	struct hf_record *record = hf_live(bpf_map_lookup_elem(&records, flow), word);
	int full = !!record;

	if (!record)
		record = hf_live(bpf_map_lookup_elem(&embryonic, flow), word);
	if (!record)
		return 0;
	choice->verdict = HF_UNRECORDED_DROP;
	if (hf_comes_too_early(record, first, full, asks, word, now)) {
		if (full)
			record->seen_ns = now;
		return 1;
	}
	if (!full && (first || promotes) && hf_is_doubtful(record, word, now)) {
		if (!first && hf_can_ask(slot, origin)) {
			choice->verdict = HF_RELAYED;
			return 1;
		}
		if (!hf_all_heard(slot))
			return !first; /* a first one begins the flow anew, others are dropped */
	}
	choice->verdict = HF_RECORD_HIT;
	choice->backend = record->backend;
	record->seen_ns = now;
	if (full && repeats)
		first |= hf_chains_again(record);
	choice->alone = first ? HF_RECORD_HIT : 0;
	if (full) {
		choice->full = first ? HF_CHAIN_FULL : 0;
		return 1;
	}
	if (promotes && !hf_record(flow, choice->backend, 1, word, 0, now)) {
		choice->verdict = choice->alone = HF_PROMOTED;
		choice->full = HF_CHAIN_FULL;
	}
	return 1;
}

/*
 * First packet of TCP, any of UDP and of ClientIP: recorded. It goes where every LB would look for it, if it cannot be
 * recorded, or if a replica is left out of the chain: that one may be up all the same (only its agent is not, say), and
 * the flow's next packets may reach it. So it is with a crashed LB until own and prev have dropped it: base is safe,
 * and the stamp only makes settling wait. unannounced: a full record at once.
 */
HF_INLINE void hf_choose_first(struct hf_choice *choice, const struct hf_config *config, const struct hf_flow *flow,
			       __u32 slot, int asks, __u64 word, int first, int unannounced, __u64 now)
{
	int heard = hf_all_heard(slot);

	/* Whom the chain leaves out may have agreed to settle the slot: its owner cannot tell what base is there. */
	choice->verdict = HF_UNRECORDED_DROP;
	if (!heard && asks)
		return;
	choice->backend = first && heard ? word & HF_SLOT_CURRENT_MASK : hf_base_or_current(word);
	choice->verdict = HF_DROP_NO_BACKEND;
	if (!hf_backend_alive(choice->backend))
		return;
	if (!heard)
		hf_note_unrecorded(flow->vip, now);
	if (!hf_record(flow, choice->backend, unannounced, word, 0, now)) {
		choice->verdict = HF_CHAIN_STARTED;
		choice->alone = HF_FIRST_ALONE;
		choice->full = unannounced ? HF_CHAIN_FULL : 0;
		return;
	}
	hf_note_unrecorded(flow->vip, now);
	choice->backend = hf_base_or_current(word);
	choice->verdict = HF_UNRECORDED_BASE;
	if (!unannounced && (word & HF_SLOT_SETTLING || !hf_is_owner(config, slot)))
		choice->verdict = HF_UNRECORDED_DROP;
}

/*
 * What is to become of the packet: an HF_CHOICE(). Everything that is to be remembered has been written then.
 *
 * The backup knows better than this LB what base is where the owner has asked it to settle the slot, and has no answer. It
 * may have agreed, and then has sent new flows to its new base while the owner seemed down (also where base is current
 * here: that may have changed since). What it has not agreed to has the same base there as here. Also one that is only
 * doubted: it may serve all the same.
 */
HF_COLD __u64 hf_replica_choose(struct xdp_md *ctx, __u32 hash, __u32 vip_id, __u64 word, __u32 origin)
{
	const struct hf_config *config = hf_config();
	__u64 now = bpf_ktime_get_coarse_ns();
	int syn, first, unannounced, asks, icmp = !!(origin & HF_ORIGIN_ICMP);
	struct hf_choice choice = {};
	struct hf_packet packet;
	struct hf_flow flow;

	if (!config || hf_packet_again(ctx, origin, &packet))
		return HF_DROP(HF_DROP_MALFORMED);
	hf_flow_key(&flow, &packet, vip_id, origin);
	syn = hf_is_syn(packet.tcp_flags);
	first = syn || hf_is_quic_initial(ctx, origin, &packet);
	unannounced = hf_is_unannounced(&packet, origin);
	asks = hf_asks(config, hash >> 16, word);
	if (!hf_choose_recorded(&choice, &flow, hash >> 16, origin, asks, first, !syn && !icmp, unannounced && !icmp,
				word, now)) {
		choice.alone = 0;
		if (!first && asks && hf_can_ask(hash >> 16, origin))
			return HF_ASK_ANOTHER;
		if (icmp || (!unannounced && !syn))
			hf_choose_old(&choice, word);
		else
			hf_choose_first(&choice, config, &flow, hash >> 16, asks, word, first, unannounced, now);
	}
	if (choice.verdict == HF_RELAYED)
		return HF_ASK_ANOTHER;
	if (choice.verdict == HF_UNRECORDED_DROP)
		return HF_DROP(HF_UNRECORDED_DROP);
	if (!hf_backend_alive(choice.backend))
		return HF_DROP(HF_DROP_NO_BACKEND);
	if (choice.backend != (word & HF_SLOT_CURRENT_MASK))
		hf_stamp(vip_id, hash, now);
	return HF_CHOICE(choice);
}

HF_COLD __u32 hf_relay_to_another(struct xdp_md *ctx, __u32 hash, __u32 origin)
{
	const struct hf_config *config = hf_config();
	const struct hf_node *node;
	struct hf_packet packet;

	if (!config || hf_packet_again(ctx, origin, &packet))
		return HF_DROP(HF_DROP_MALFORMED);
	node = hf_owner_node(config, hash >> 16);
	return node ? hf_relay(ctx, config, node, packet.tot_len, hash, origin) : HF_DROP(HF_DROP_NO_ROUTE);
}

HF_COLD __u32 hf_replica(struct xdp_md *ctx, __u32 hash, __u32 vip_id, __u64 word, __u32 origin)
{
	__u64 choice = hf_replica_choose(ctx, hash, vip_id, word, origin);
	__u32 backend = choice >> 32;

	if (choice == HF_ASK_ANOTHER)
		return hf_relay_to_another(ctx, hash, origin);
	if (!backend)
		return choice;
	if (choice >> 8 & 0xff)
		return hf_chain_start(ctx, hash, backend, origin, choice);
	return hf_send(ctx, backend, hash, origin, choice & 0xff);
}

#endif
