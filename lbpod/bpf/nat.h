/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The host agent's memory: which VIP a (client, pod) pair talks through, so that replies can be given their VIP back.
 *
 * An LRU refreshed by inbound packets: what an eviction forgets, the client's next packet teaches again. Two CPUs may
 * write flags at once and one bit may be lost; then early settle waits for the idle timeout, nothing worse.
 *
 * In two maps, as connection trackers tell *assured* entries from others: a flow is in `unassured` until the pod has answered
 * it, and not with RST, and the client has spoken again (the pod's answer alone is enough for what did not begin with a SYN:
 * to such a packet only a socket answers otherwise). Whoever makes up addresses fills that map, and evicts his like alone;
 * connections that are silent for hours stay in `nat`. Who is in both has been assured; `nat` counts.
 *
 * Two VIPs may share a pod's port, and a client may use one port of its own to both (so do proxies, and what is behind a
 * carrier's NAT). To the pod that is one five-tuple: its answers could have only one of the VIPs, and what it answers the
 * newcomer's SYN draws an RST that fits the first connection. So the first one keeps the entry until it ends, or has
 * been silent for as long as a flow may be; what the other one sends meanwhile is dropped.
 */
#ifndef HF_NAT_H
#define HF_NAT_H

#include "parse.h"

/* What PTR points to is read where it lies from here on. Otherwise the compiler keeps copies of its fields on the stack, too,
 * beyond what kernels that round each frame up to 32 bytes allow. */
#define HF_KEPT_ON_STACK(PTR) asm volatile("" : : "r"(PTR) : "memory")

HF_INLINE int hf_is_syn(__u32 tcp_flags)
{
	return (tcp_flags & (HF_TCP_SYN | HF_TCP_ACK)) == HF_TCP_SYN;
}

HF_INLINE void hf_nat_key(struct hf_nat_key *key, __be32 client, __be32 pod, __be16 client_port_be, __be16 pod_port_be,
			  __u32 protocol)
{
	hf_mapped(key->client, client);
	hf_mapped(key->pod, pod);
	key->client_port_be = client_port_be;
	key->pod_port_be = pod_port_be;
	key->protocol = protocol;
	key->pad[0] = 0;
	key->pad[1] = 0;
	key->pad[2] = 0;
}

/* Its flow has not ended, and has not been silent for the default idle timeout (the agent takes an entry out once its VIP's
 * own one is over), UDP's where the end cannot be seen, or where there has only been a SYN. */
HF_INLINE int hf_nat_lives(const struct hf_nat *entry, __u32 protocol, __u64 now_ns)
{
	__u64 silent_ns =
		protocol == HF_PROTOCOL_UDP || entry->flags & HF_NAT_SYN ? HF_NAT_TAKEN_BRIEFLY_NS : HF_NAT_TAKEN_NS;
	__u32 fins = entry->flags & (HF_NAT_FIN_IN | HF_NAT_FIN_OUT);

	if (entry->flags & HF_NAT_RST || fins == (HF_NAT_FIN_IN | HF_NAT_FIN_OUT))
		return 0;
	return entry->seen_ns + silent_ns > now_ns;
}

HF_INLINE int hf_nat_same_vip(const struct hf_nat *one, const struct hf_nat *other)
{
	return HF_U64(one->vip) == HF_U64(other->vip) && HF_U64(one->vip + 8) == HF_U64(other->vip + 8) &&
	       one->vip_port_be == other->vip_port_be;
}

/* entry: in `unassured`, and left there for a sweep: who counts how full the map has been counts on that. copy: what it says,
 * in the caller's frame, for there is little stack. */
HF_INLINE void hf_nat_assure(const struct hf_nat_key *key, struct hf_nat *entry, struct hf_nat *copy)
{
	copy->flags = entry->flags & (HF_NAT_FIN_IN | HF_NAT_FIN_OUT);
	if (!bpf_map_update_elem(&nat, key, copy, BPF_ANY))
		entry->flags |= HF_NAT_ASSURED;
}

/* Inbound, and not in `nat`. fresh: what an entry of this packet's alone would be. As hf_nat_inbound. */
HF_INLINE int hf_nat_unassured(const struct hf_packet *packet, const struct hf_nat_key *key, struct hf_nat *fresh)
{
	struct hf_nat *old = bpf_map_lookup_elem(&unassured, key);

	if (hf_is_syn(packet->tcp_flags))
		fresh->flags |= HF_NAT_SYN;
	if (!old || !hf_nat_same_vip(old, fresh)) {
		if (old && hf_nat_lives(old, packet->protocol, fresh->seen_ns))
			return -1;
		bpf_map_update_elem(&unassured, key, fresh, BPF_ANY);
		return 0;
	}
	old->seen_ns = fresh->seen_ns;
	if (fresh->flags & HF_NAT_SYN) {
		old->flags = fresh->flags;
		return 0;
	}
	old->flags = (old->flags | fresh->flags) & ~(HF_NAT_SYN | HF_NAT_ASSURED); /* `nat` has lost it, where it had it */
	if ((old->flags & (HF_NAT_ANSWERED | HF_NAT_RST)) == HF_NAT_ANSWERED)
		hf_nat_assure(key, old, fresh);
	return 0;
}

/* packet: inbound, still addressed to the VIP. 0, or not 0 where another VIP's flow has its place. */
HF_INLINE int hf_nat_inbound(const struct hf_packet *packet, __be32 pod, __be16 pod_port_be)
{
	struct hf_nat_key key;
	struct hf_nat fresh = {}, *old;

	if (packet->tcp_flags & HF_TCP_FIN)
		fresh.flags |= HF_NAT_FIN_IN;
	if (packet->tcp_flags & HF_TCP_RST)
		fresh.flags |= HF_NAT_RST;
	hf_nat_key(&key, packet->saddr, pod, HF_SPORT(packet), pod_port_be, packet->protocol);
	hf_mapped(fresh.vip, packet->daddr);
	fresh.vip_port_be = HF_DPORT(packet);
	fresh.seen_ns = bpf_ktime_get_coarse_ns();
	HF_KEPT_ON_STACK(&fresh);
	old = bpf_map_lookup_elem(&nat, &key);
	if (!old)
		return hf_nat_unassured(packet, &key, &fresh);
	if (hf_nat_same_vip(old, &fresh)) {
		old->seen_ns = fresh.seen_ns;
		if (hf_is_syn(packet->tcp_flags))
			old->flags = fresh.flags;
		else if ((old->flags & fresh.flags) != fresh.flags)
			old->flags |= fresh.flags;
		return 0;
	}
	if (hf_nat_lives(old, packet->protocol, fresh.seen_ns))
		return -1;
	bpf_map_update_elem(&nat, &key, &fresh, BPF_ANY);
	return 0;
}

/* entry: in `unassured`, and what its pod has just sent has been noted. */
HF_INLINE void hf_nat_answered(const struct hf_nat_key *key, struct hf_nat *entry, __u32 protocol)
{
	if (entry->flags & HF_NAT_RST)
		return;
	if (entry->flags & HF_NAT_ASSURED || (protocol == HF_PROTOCOL_TCP && !(entry->flags & HF_NAT_SYN))) {
		struct hf_nat copy = *entry;

		/* The element may have been given to another flow meanwhile, and what is copied stays. */
		if (bpf_map_lookup_elem(&unassured, key) == entry)
			hf_nat_assure(key, entry, &copy);
	} else if (!(entry->flags & HF_NAT_ANSWERED))
		entry->flags |= HF_NAT_ANSWERED;
}

#endif
