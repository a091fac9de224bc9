/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* One counter for every way in which a packet can leave the programs. lbpod/core/verdicts.py has the same names in the
 * same order (a tidy test compares them). Append only: the numbers are an interface for dashboards. */
#ifndef HF_VERDICT_H
#define HF_VERDICT_H

enum hf_verdict {
	HF_PASS_OTHER = 0,	 /* neither VIP nor ours: into the stack, untouched */
	HF_STEADY,		 /* steady slot: to current */
	HF_CACHE_HIT,		 /* tracking slot: to the backend of a lease */
	HF_RELAYED,		 /* tracking slot, not ours to decide: to the owner or its backup */
	HF_RECORD_HIT,		 /* replica: to the backend of a record */
	HF_CHAIN_STARTED,	 /* replica: first packet recorded, on through the other replicas */
	HF_FIRST_ALONE,		 /* replica: first packet recorded, no other replica to tell */
	HF_UNRECORDED_BASE,	 /* replica: first packet that found no room: to base */
	HF_UNRECORDED_DROP,	 /* replica: nobody here can tell where its flow belongs, nor may it go to base: dropped */
	HF_OLD_TO_BASE,		 /* replica: no record, not a first packet: to base */
	HF_OLD_TO_CURRENT,	 /* the same where base is dead */
	HF_DECIDED_ALONE,	 /* not ours to decide, but nobody to relay to, or hops used up: decided here */
	HF_CHAIN_RECORDED,	 /* replica: recorded from a chain, sent on to the next one */
	HF_CHAIN_LAST,		 /* replica: recorded from a chain, sent on to the backend */
	HF_CHAIN_CONFLICT,	 /* replica: a chain disagrees with a record, which wins; the chain turns back */
	HF_PROMOTED,		 /* replica: an embryonic record became a full one (the packet travels the chain) */
	HF_LOCAL,		 /* decided here and the backend is on this node: translated, into the stack
				  * (counted instead of the verdict that chose the backend) */
	HF_DELIVERED,		 /* host agent: stripped, translated, into the stack */
	HF_REPLY,		 /* host agent: reply translated back */
	HF_ICMP_ECHO,		 /* echo to a VIP: answered */
	HF_ICMP_ERROR,		 /* ICMP error routed by its quoted packet (counted at the mux) */
	HF_TOO_BIG,		 /* does not fit the path: answered with "packet too big" */
	HF_DROP_FRAGMENT,	 /* non-first fragment to a VIP */
	HF_DROP_NO_BACKEND,	 /* nobody alive to send it to */
	HF_DROP_NO_ROUTE,	 /* the backend's or replica's node has no known next hop */
	HF_DROP_MALFORMED,	 /* truncated or contradictory IP, TCP, UDP header to a VIP */
	HF_DROP_IP_OPTIONS,	 /* IP options to a VIP */
	HF_PASS_VLAN,		 /* VLAN-tagged packet to a VIP: not served, into the stack */
	HF_DROP_GENEVE_SOURCE,	 /* tunnel packet from someone who is not a member */
	HF_DROP_GENEVE_VNI,	 /* a member's tunnel packet, like ours in all but the VNI */
	HF_DROP_GENEVE_MALFORMED, /* tunnel packet that is truncated, oversized or of unknown form */
	HF_DROP_GENEVE_INNER,	 /* tunnel packet whose inner packet makes no sense here */
	HF_DROP_ICMP,		 /* ICMP to a VIP that is neither echo nor a routable error */
	HF_DROP_NO_HEADROOM,	 /* the driver left no room for the outer header */
	HF_DROP_NAT_TAKEN,	 /* host agent: another VIP's live flow has the client's port at this pod's port */
	HF_DROP_UNSERVED,	 /* to a VIP's address and no VIP, and on its way back to the router */
	HF_VERDICT_COUNT
};

#endif
