"""The ways in which a packet can leave the programs, one counter each.

The same names in the same order as ``lbpod/bpf/verdict.h`` (a tidy test compares them). Append only: the numbers are an
interface, the lower-case names are label values of the metric ``holdfast_packets_total{verdict=...}``.
"""

from enum import IntEnum


class Verdict(IntEnum):
    """What became of one packet. Exactly one for each packet in hf_xdp; hf_tc counts what it changes or drops."""

    PASS_OTHER = 0
    """Neither VIP nor ours: into the stack, untouched."""
    STEADY = 1
    """Steady slot: to current."""
    CACHE_HIT = 2
    """Tracking slot: to the backend of a lease."""
    RELAYED = 3
    """Tracking slot, not ours to decide: to the owner or its backup."""
    RECORD_HIT = 4
    """Replica: to the backend of a record."""
    CHAIN_STARTED = 5
    """Replica: first packet recorded, on through the other replicas."""
    FIRST_ALONE = 6
    """Replica: first packet recorded, no other replica to tell."""
    UNRECORDED_BASE = 7
    """Replica: first packet that found no room: to base."""
    UNRECORDED_DROP = 8
    """Replica: nobody here can tell where its flow belongs, and it may not go to base: dropped, to be sent again."""
    OLD_TO_BASE = 9
    """Replica: no record, not a first packet: to base."""
    OLD_TO_CURRENT = 10
    """The same where base is dead."""
    DECIDED_ALONE = 11
    """Not ours to decide, but nobody to relay to, or hops used up: decided here."""
    CHAIN_RECORDED = 12
    """Replica: recorded from a chain, sent on to the next one."""
    CHAIN_LAST = 13
    """Replica: recorded from a chain, sent on to the backend."""
    CHAIN_CONFLICT = 14
    """Replica: a chain disagrees with a record; the record wins, and the chain turns back to say so."""
    PROMOTED = 15
    """Replica: an embryonic record became a full one (the packet travels the chain)."""
    LOCAL = 16
    """Decided here, the backend is on this node: translated, into the stack. Counted instead of how it was chosen."""
    DELIVERED = 17
    """Host agent: stripped, translated, into the stack."""
    REPLY = 18
    """Host agent: reply translated back."""
    ICMP_ECHO = 19
    """Echo to a VIP: answered."""
    ICMP_ERROR = 20
    """ICMP error routed by its quoted packet (counted at the mux)."""
    TOO_BIG = 21
    """Does not fit the path: answered with "packet too big"."""
    DROP_FRAGMENT = 22
    """Non-first fragment to a VIP."""
    DROP_NO_BACKEND = 23
    """Nobody alive to send it to."""
    DROP_NO_ROUTE = 24
    """The backend's or replica's node has no known next hop."""
    DROP_MALFORMED = 25
    """Truncated or contradictory IP, TCP, UDP header to a VIP."""
    DROP_IP_OPTIONS = 26
    """IP options to a VIP."""
    PASS_VLAN = 27
    """VLAN-tagged packet to a VIP: not served, into the stack."""
    DROP_GENEVE_SOURCE = 28
    """Tunnel packet from someone who is not a member."""
    DROP_GENEVE_VNI = 29
    """A member's tunnel packet, like ours in all but the VNI."""
    DROP_GENEVE_MALFORMED = 30
    """Tunnel packet that is truncated, oversized or of unknown form."""
    DROP_GENEVE_INNER = 31
    """Tunnel packet whose inner packet makes no sense here."""
    DROP_ICMP = 32
    """ICMP to a VIP that is neither echo nor a routable error."""
    DROP_NO_HEADROOM = 33
    """The driver left no room for the outer header."""
    DROP_NAT_TAKEN = 34
    """Host agent: another VIP's live flow has the client's port at this pod's port."""
    DROP_UNSERVED = 35
    """To a VIP's address and no VIP (another port, another protocol), and on its way back to where it came from."""
