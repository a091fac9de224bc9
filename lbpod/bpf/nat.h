/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The host agent's memory: which VIP a (client, pod) pair talks through, so that replies can be given their VIP back.
 *
 * An LRU refreshed by inbound packets: what an eviction forgets, the client's next packet teaches again. Two CPUs may
 * write flags at once and one bit may be lost; then early settle waits for the idle timeout, nothing worse.
 *
 * Two VIPs may share a pod's port, and a client may use one port of its own to both (so do proxies, and what is behind a
 * carrier's NAT). To the pod that is one five-tuple: its answers could have only one of the VIPs, and what it answers the
 * newcomer's SYN draws an RST that fits the first connection. So the first one keeps the entry until it ends, or has
 * been silent for as long as a flow may be; what the other one sends meanwhile is dropped.
 */
#ifndef HF_NAT_H
#define HF_NAT_H

#include "parse.h"

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

/* Its flow has not ended, and the default idle timeout is not over. The agent takes it out once the VIP's own one is. */
HF_INLINE int hf_nat_lives(const struct hf_nat *entry, __u32 protocol, __u64 now_ns)
{
	__u32 fins = entry->flags & (HF_NAT_FIN_IN | HF_NAT_FIN_OUT);
	__u64 silent_ns = protocol == HF_PROTOCOL_UDP ? HF_NAT_TAKEN_UDP_NS : HF_NAT_TAKEN_NS;

	if (entry->flags & HF_NAT_RST || fins == (HF_NAT_FIN_IN | HF_NAT_FIN_OUT))
		return 0;
	return entry->seen_ns + silent_ns > now_ns;
}

/* packet: inbound, still addressed to the VIP. 0, or not 0 where another VIP's flow has its place. */
HF_INLINE int hf_nat_inbound(const struct hf_packet *packet, __be32 pod, __be16 pod_port_be)
{
	struct hf_nat_key key;
	struct hf_nat fresh = {}, *old;
	__u32 flags = 0;

	if (packet->tcp_flags & HF_TCP_FIN)
		flags |= HF_NAT_FIN_IN;
	if (packet->tcp_flags & HF_TCP_RST)
		flags |= HF_NAT_RST;
	hf_nat_key(&key, packet->saddr, pod, HF_SPORT(packet), pod_port_be, packet->protocol);
	hf_mapped(fresh.vip, packet->daddr);
	fresh.seen_ns = bpf_ktime_get_coarse_ns();
	old = bpf_map_lookup_elem(&nat, &key);
	if (old && HF_U64(old->vip) == HF_U64(fresh.vip) && HF_U64(old->vip + 8) == HF_U64(fresh.vip + 8) &&
	    old->vip_port_be == HF_DPORT(packet)) {
		old->seen_ns = fresh.seen_ns;
		if (hf_is_syn(packet->tcp_flags))
			old->flags = flags;
		else if ((old->flags & flags) != flags)
			old->flags |= flags;
		return 0;
	}
	if (old && hf_nat_lives(old, packet->protocol, fresh.seen_ns))
		return -1;
	fresh.vip_port_be = HF_DPORT(packet);
	fresh.flags = flags;
	bpf_map_update_elem(&nat, &key, &fresh, BPF_ANY);
	return 0;
}

#endif
