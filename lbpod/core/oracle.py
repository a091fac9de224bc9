"""What a packet gets, in slow and plain Python: DESIGN's section 2 as a program that one can read.

``lbpod/bpf/lb.bpf.c`` does the same in nanoseconds. Both were written from ``lbpod/bpf/README.md``, independently, and
a test compares them on random packets and map states; so this file explains the C program, checks it, and stands in
for it in the simulator and in scenarios (through ``lbpod/datapath/memory.py``): whole clusters without a kernel.

The order of the functions is the order of the README's steps. A decision that ends a packet early is raised as
``_End``, so that each rule reads as a sentence and not as a ladder of returned codes; nothing else here raises.

Left to others: bytes (``packets.py``), what the maps hold (``maps.py``), and who filled them (the Keeper). Speed is no
goal; being obviously right is. Dropped: one function table by verdict, which hid the order of the rules.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, assert_never

import numpy as np

from lbpod.core import layout, limits, packets
from lbpod.core.hashing import flow_hash, slot_of
from lbpod.core.maps import Config, Lease, Maps, Nat, Pending, Record, Vip, flow_key, mapped, nat_key
from lbpod.core.packets import ETHERNET_BYTES, ICMP_BYTES, IPV4_BYTES, TCP_BYTES, UDP_BYTES, Chain, Forward, Relay
from lbpod.core.verdicts import Verdict


class Action(IntEnum):
    """What the driver does with the frame (numbers of the kernel's xdp_action)."""

    DROP = 1
    PASS = 2
    TX = 3
    REDIRECT = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one frame got. frame: as it leaves, as it came where action is DROP. verdict None: passed uncounted (tc)."""

    action: Action
    verdict: Verdict | None
    frame: bytes
    redirect_ifindex: int = 0
    """Invariant: not 0 only where action is REDIRECT."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """A packet of a flow of a VIP, as far as decisions look at it."""

    ip: bytes
    vip: Vip
    protocol: int
    client: bytes
    """4 bytes, as is what follows: for an ICMP error, taken from the packet that it quotes."""
    client_port: int
    icmp: bool = False
    tcp_flags: int = 0
    """Invariant: 0 unless TCP."""
    quic_initial: bool = False

    @property
    def syn(self) -> bool:
        return self.tcp_flags & (packets.TCP_SYN | packets.TCP_ACK) == packets.TCP_SYN

    @property
    def first(self) -> bool:
        return self.syn or self.quic_initial

    @property
    def closing(self) -> bool:
        return bool(self.tcp_flags & (packets.TCP_FIN | packets.TCP_RST))


class _End(Exception):  # noqa: N818  (an end, not an error)
    """The packet's way ends here: dropped, or passed as it came where the verdict says so."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.name)
        self.verdict = verdict


_PASSED: Final = (Verdict.PASS_OTHER, Verdict.PASS_VLAN)


def xdp(maps: Maps, frame: bytes, ifindex: int, now_ns: int) -> Outcome:
    """Decide one frame that came in by interface ``ifindex``; all map changes are made in ``maps``.

    frame: from the Ethernet header on, without checksum. now_ns: coarse monotonic clock.
    """
    try:
        outcome = _arrive(maps, frame, ifindex, now_ns)
    except _End as end:
        outcome = Outcome(Action.PASS if end.verdict in _PASSED else Action.DROP, end.verdict, frame)
    assert outcome.verdict is not None, "every frame that hf_xdp sees is counted"
    maps.count(outcome.verdict, len(frame))
    return outcome


def _arrive(maps: Maps, frame: bytes, ifindex: int, now_ns: int) -> Outcome:
    """Steps 1 to 3: whose packet is this?"""
    if len(frame) < ETHERNET_BYTES:
        raise _End(Verdict.PASS_OTHER)
    if packets.ethertype(frame) in packets.ETHERTYPES_VLAN:
        raise _End(_tagged(maps, frame))
    ip = frame[ETHERNET_BYTES:]
    if packets.ethertype(frame) != packets.ETHERTYPE_IPV4 or not packets.is_ipv4(ip):
        raise _End(Verdict.PASS_OTHER)
    if _is_tunnel_end(maps.settings(), ip):
        return _open_tunnel(maps, frame, ifindex, now_ns)
    found = _inspect(maps, ip, len(ip))
    if isinstance(found, _Subject):
        return _Passage(maps, found, frame, ifindex, now_ns).decide()
    if found is Verdict.ICMP_ECHO:
        return Outcome(Action.TX, found, packets.echo_reply(frame))
    raise _End(found)


def _tagged(maps: Maps, frame: bytes) -> Verdict:
    ip = frame[ETHERNET_BYTES + 4 :]
    inside = int.from_bytes(frame[ETHERNET_BYTES + 2 : ETHERNET_BYTES + 4], "big")
    if inside == packets.ETHERTYPE_IPV4 and packets.is_ipv4(ip) and is_vip_address(maps, packets.destination(ip)):
        return Verdict.PASS_VLAN
    return Verdict.PASS_OTHER


def is_vip_address(maps: Maps, address: bytes) -> bool:
    """Whether any VIP has it, whatever the port. address: 4 bytes, as in an IPv4 header."""
    return maps.vip(mapped(address), 0, layout.PROTOCOL_ICMP) is not None


def _is_tunnel_end(config: Config, ip: bytes) -> bool:
    if packets.protocol(ip) != layout.PROTOCOL_UDP or packets.header_words(ip) != 5 or packets.is_fragment(ip):
        return False
    if len(ip) < IPV4_BYTES + UDP_BYTES or mapped(packets.destination(ip)) != config.node_addr:
        return False
    return packets.ports(ip[IPV4_BYTES:])[1] == limits.GENEVE_PORT


# --- Step 3: what is it? ----------------------------------------------------------------------------------------------
def _inspect(maps: Maps, ip: bytes, room_bytes: int) -> _Subject | Verdict:
    """Read an IPv4 packet: its flow, or its verdict where it belongs to none. room_bytes: how long it may be."""
    odd = _oddity(ip, room_bytes)
    if odd is not None:
        return odd if is_vip_address(maps, packets.destination(ip)) else Verdict.PASS_OTHER
    protocol = packets.protocol(ip)
    if protocol == layout.PROTOCOL_ICMP:
        return _inspect_icmp(maps, ip)
    if protocol not in (layout.PROTOCOL_TCP, layout.PROTOCOL_UDP):
        return Verdict.PASS_OTHER
    sport, dport = packets.ports(ip[IPV4_BYTES:])
    vip = maps.vip(mapped(packets.destination(ip)), dport, protocol)
    if vip is None:
        return Verdict.PASS_OTHER
    l4 = ip[IPV4_BYTES : packets.total_bytes(ip)]
    return _Subject(
        ip,
        vip,
        protocol,
        client=packets.source(ip),
        client_port=sport,
        tcp_flags=l4[13] if protocol == layout.PROTOCOL_TCP else 0,
        quic_initial=protocol == layout.PROTOCOL_UDP and packets.is_quic_initial(l4[UDP_BYTES:]),
    )


def _oddity(ip: bytes, room_bytes: int) -> Verdict | None:
    """Say what is wrong with a packet, were it for a VIP. Order: options, lengths, fragment, TCP or UDP header."""
    words, total = packets.header_words(ip), packets.total_bytes(ip)
    if words > 5:
        return Verdict.DROP_IP_OPTIONS
    if words < 5 or total < IPV4_BYTES or total > room_bytes:
        return Verdict.DROP_MALFORMED
    if packets.fragment_offset(ip) != 0:
        return Verdict.DROP_FRAGMENT
    l4 = ip[IPV4_BYTES:total]
    if packets.protocol(ip) == layout.PROTOCOL_UDP and len(l4) < UDP_BYTES:
        return Verdict.DROP_MALFORMED
    if packets.protocol(ip) == layout.PROTOCOL_TCP:
        if len(l4) < TCP_BYTES or l4[12] >> 4 < 5 or (l4[12] >> 4) * 4 > len(l4):
            return Verdict.DROP_MALFORMED
    return None


def _inspect_icmp(maps: Maps, ip: bytes) -> _Subject | Verdict:
    """Step 7. An error belongs to the flow that it quotes: a packet from a VIP to a client."""
    if not is_vip_address(maps, packets.destination(ip)):
        return Verdict.PASS_OTHER
    icmp = ip[IPV4_BYTES : packets.total_bytes(ip)]
    if len(icmp) >= ICMP_BYTES and icmp[0] == packets.ICMP_ECHO_REQUEST:
        return Verdict.ICMP_ECHO
    quoted = packets.quoted_packet(ip)
    if quoted is None or packets.protocol(quoted) not in (layout.PROTOCOL_TCP, layout.PROTOCOL_UDP):
        return Verdict.DROP_ICMP
    vip_port, client_port = packets.ports(quoted[packets.header_words(quoted) * 4 :])
    vip = maps.vip(mapped(packets.source(quoted)), vip_port, packets.protocol(quoted))
    if vip is None:
        return Verdict.DROP_ICMP
    return _Subject(ip, vip, packets.protocol(quoted), packets.destination(quoted), client_port, icmp=True)


# --- Step 8: out of the tunnel ----------------------------------------------------------------------------------------
def _open_tunnel(maps: Maps, frame: bytes, ifindex: int, now_ns: int) -> Outcome:
    ip, config = frame[ETHERNET_BYTES:], maps.settings()
    tunnel, is_member = packets.parse_tunnel(ip), mapped(packets.source(ip)) in maps.member_by_addr
    if packets.overlay(ip) != (packets.ETHERTYPE_IPV4, config.vni):
        # The node may be in other overlays, too. But no other one sends our option, and from a member.
        raise _End(Verdict.DROP_GENEVE_VNI if tunnel is not None and is_member else Verdict.PASS_OTHER)
    if not is_member:
        raise _End(Verdict.DROP_GENEVE_SOURCE)
    if tunnel is None:
        raise _End(Verdict.DROP_GENEVE_MALFORMED)
    if tunnel.room_bytes < IPV4_BYTES or not packets.is_ipv4(tunnel.inner):
        raise _End(Verdict.DROP_GENEVE_INNER)
    found = _inspect(maps, tunnel.inner, tunnel.room_bytes)
    if not isinstance(found, _Subject):
        raise _End(Verdict.DROP_GENEVE_INNER)
    passage = _Passage(maps, found, frame, ifindex, now_ns, came_under_bytes=tunnel.overhead_bytes)
    if isinstance(tunnel.option, Forward):
        return passage.deliver(Verdict.DELIVERED, tunnel.option.address, tunnel.option.port)
    if config.self == limits.MEMBER_NONE:
        raise _End(Verdict.DROP_GENEVE_INNER)
    if isinstance(tunnel.option, Relay):
        return passage.decide(tunnel.option)
    if isinstance(tunnel.option, Chain):
        return passage.link(tunnel.option)
    assert_never(tunnel.option)


class _Passage:
    """One packet of a served flow on its way through this LB: decided (steps 4 to 6, 8), then sent (step 9)."""

    def __init__(
        self, maps: Maps, subject: _Subject, frame: bytes, ifindex: int, now_ns: int, came_under_bytes: int = 0
    ) -> None:
        self.maps, self.subject, self.frame, self.ifindex, self.now_ns = maps, subject, frame, ifindex, now_ns
        self.came_under_bytes = came_under_bytes
        """Outer headers that the packet came under; 0: from the router."""
        self.config = maps.settings()
        self.vip = subject.vip
        port = 0 if self.vip.client_ip else subject.client_port
        client, address = mapped(subject.client), self.vip.address
        self.hash = flow_hash(client, address, port, self.vip.port, subject.protocol, self.config.seed)
        self.slot = slot_of(self.hash)
        self.key = flow_key(client, port, self.vip.id)
        words = maps.slots.get(self.vip.id)
        word = int(words[self.slot]) if words is not None else 0
        self.current = word & layout.SLOT_CURRENT_MASK
        self.tracking = bool(word & layout.SLOT_TRACKING)
        self.settling = bool(word & layout.SLOT_SETTLING)
        self.round = word & layout.SLOT_ROUND_MASK
        self.agreed = bool(word & layout.SLOT_AGREED)
        self.base = word >> layout.SLOT_BASE_SHIFT & layout.SLOT_CURRENT_MASK
        self.syn, self.first, self.closing = subject.syn, subject.first, subject.closing
        self.unannounced = subject.protocol == layout.PROTOCOL_UDP
        """Nobody can tell by a packet whether it is its flow's first."""
        if self.vip.client_ip:
            # A client's second SYN does not begin the flow (the client), nor does a FIN end it.
            self.syn = self.first = self.closing = False
            self.unannounced = True

    # --- Steps 5 and 6 ---
    def decide(self, relay: Relay | None = None) -> Outcome:
        """relay: the option that the packet came with, None from the router."""
        if not self.tracking:
            return self._to_backend(Verdict.STEADY, self.current)
        # In next or prev alone, only what came by relay is ours. Nobody relays to a next LB before having switched,
        # that is after the handover, and a prev LB still has everything; the router may give a next LB packets before
        # it has base and records.
        deciders = self.maps.owners(self.slot) if relay is None else self.maps.replicas(self.slot)
        if self.config.self in deciders:
            return self._decide_as_replica(relay)
        return self._decide_as_another(relay)

    def _relay(self, node: int, relay: Relay | None) -> Outcome:
        """On to a node that decides. relay: as it came."""
        hops, origin = (0, self.config.self) if relay is None else (relay.hops, relay.origin)
        return self._send(Verdict.RELAYED, node, Relay(self.config.epoch, hops + 1, origin))

    def _decide_as_another(self, relay: Relay | None) -> Outcome:
        """Not ours to decide: a lease, else the owner or its backup, else alone."""
        lease = self.maps.cache.get(self.key)
        if self.syn:
            self.maps.cache.delete(self.key)
        elif self._holds(lease):
            assert lease is not None, "it holds"
            if self.closing:
                self.maps.cache.delete(self.key)
            return self._to_backend(Verdict.CACHE_HIT, lease.backend)
        hops = 0 if relay is None else relay.hops
        node = self._owner_node()
        if node is not None and hops < limits.RELAY_HOPS_MAX:
            if relay is None and not self.subject.icmp:
                self._want_lease()
            return self._relay(node, relay)
        return self._to_backend(Verdict.DECIDED_ALONE, self._base_or_current())

    def _want_lease(self) -> None:
        """The agent is to ask about the flow. Not about one that closes: what the owner says of it now would be met by
        the next connection with this five-tuple. Nor about a first packet's: the owner records it."""
        if self.closing:
            self.maps.pending.delete(self.key)
        elif not self.first:
            self.maps.pending.put(self.key, Pending(self.slot, 0, self.now_ns))

    def _owner_node(self) -> int | None:
        """Node of the owner where it is up, else that of the backup; where both are silent, of one that is doubted."""
        word = int(self.maps.own[self.slot])
        for flag in (layout.MEMBER_UP, layout.MEMBER_DOUBTED):
            for member in (word & 0xFFFF, word >> 16):
                node = self.maps.member_node(member, flag)
                if node is not None and member != self.config.self:
                    return node
        return None

    def _backup_asked(self, relay: Relay | None) -> int | None:
        """Node of the backup, where the owner (this LB) has asked it to settle the slot and has no answer: it may have
        agreed, and then knows better what base is (also where base is current here: it may have agreed before the last
        change). What it has not agreed to has the same base there as here. One that is only doubted may serve all the
        same."""
        return self._another_asked(relay) if self.settling and self._is_owner() else None

    def _another_asked(self, relay: Relay | None) -> int | None:
        """Node of the other replica, where the packet has not been there and back."""
        return self._owner_node() if relay is None or relay.hops < limits.RELAY_HOPS_MAX else None

    def _decide_as_replica(self, relay: Relay | None) -> Outcome:
        full = self._live(self.maps.records.get(self.key))
        embryonic = self._live(self.maps.embryonic.get(self.key)) if full is None else None
        self._wait_for_settle(full, embryonic)
        if full is not None:
            return self._meet_full(full)
        if embryonic is not None:
            return self._meet_embryonic(embryonic, relay)
        asked = None if self.first else self._backup_asked(relay)
        if asked is not None:
            return self._relay(asked, relay)
        if self.subject.icmp or not (self.unannounced or self.syn):
            if self._alive(self.base):
                return self._to_backend(Verdict.OLD_TO_BASE, self.base, stamp=True)
            return self._to_backend(Verdict.OLD_TO_CURRENT, self.current)
        return self._begin()

    def _wait_for_settle(self, full: Record | None, embryonic: Record | None) -> None:
        """The slot is about to turn steady on another backend: none looks for what begins with the five-tuple of a flow
        that is over (its next try gets through), or with a SYN whose first try no host has seen."""
        record = full or embryonic
        if record is None or not self.first or not self.settling or record.backend == self.current:
            return
        if full is not None and full.seen_ns + limits.REUSE_NS < self.now_ns:
            self.maps.records.put(self.key, full._replace(seen_ns=self.now_ns))
            raise _End(Verdict.UNRECORDED_DROP)
        if full is None and self._is_owner():
            raise _End(Verdict.UNRECORDED_DROP)

    def _is_owner(self) -> bool:  # who alone asks to settle; the flag of a backup is of its look, or was handed over
        return int(self.maps.own[self.slot]) & 0xFFFF == self.config.self

    def _meet_full(self, record: Record) -> Outcome:
        """The first few packets of a flow without a first one travel the chain again: that recorded may be lost."""
        chained = record.round & ~layout.SLOT_ROUND_MASK
        again = self.unannounced and not self.subject.icmp and chained < limits.CHAIN_AGAIN_MAX
        self.maps.records.put(self.key, record._replace(round=record.round + again, seen_ns=self.now_ns))
        return self._meet_record(record.backend, full=True, again=again)

    def _meet_embryonic(self, record: Record, relay: Relay | None) -> Outcome:
        if self._is_doubtful(record):
            asked = None if self.first else self._another_asked(relay)
            if asked is not None:
                return self._relay(asked, relay)
            if not self._is_all_heard():
                if self.first:
                    return self._begin()
                raise _End(Verdict.UNRECORDED_DROP)
        if not self.syn and not self.subject.icmp and self._record_full(record.backend):
            return self._start_chain(Verdict.PROMOTED, Verdict.PROMOTED, record.backend, full=True)
        self.maps.embryonic.put(self.key, record._replace(seen_ns=self.now_ns))
        return self._meet_record(record.backend, full=False)

    def _meet_record(self, backend: int, full: bool, again: bool = False) -> Outcome:
        """A first packet may be a second try, the one before lost in the chain: it travels the chain again."""
        if self.first or again:
            return self._start_chain(Verdict.RECORD_HIT, Verdict.RECORD_HIT, backend, full=full)
        return self._to_backend(Verdict.RECORD_HIT, backend, stamp=True)

    def _is_doubtful(self, record: Record) -> bool:
        """The SYN that made this record may have been lost in the chain, and the client has had the time to try again:
        at a replica that did not hear this one, and so began the flow at base."""
        if self.subject.icmp or record.backend == self._base_or_current():
            return False
        return record.seen_ns + limits.CHAIN_SURE_NS < self.now_ns

    def _is_all_heard(self) -> bool:
        """The chain can reach every other replica of the slot."""
        return all(self.maps.member_node(m) is not None for m in self.maps.replicas(self.slot) if m != self.config.self)

    def _is_base_open(self) -> bool:
        """Whom the chain leaves out may have agreed to settle the slot: its owner cannot tell what base is there."""
        return self.settling and self._is_owner()

    def _begin(self) -> Outcome:
        """The first packet of a flow, or any that nobody knows where no packet announces one (UDP, ClientIP)."""
        heard = self._is_all_heard()
        if not heard and self._is_base_open():
            raise _End(Verdict.UNRECORDED_DROP)
        backend = self.current if self.first and heard else self._base_or_current()
        if not self._alive(backend):
            raise _End(Verdict.DROP_NO_BACKEND)
        if not heard:
            # Whom the chain leaves out may be up all the same, and would send the flow's next packets to base.
            self._note_unrecorded()
        full = self.unannounced
        if self._record_full(backend) if full else self._record_embryonic(backend):
            return self._start_chain(Verdict.CHAIN_STARTED, Verdict.FIRST_ALONE, backend, full=full)
        self._note_unrecorded()
        if not full and (self.settling or not self._is_owner()):
            raise _End(Verdict.UNRECORDED_DROP)
        return self._to_backend(Verdict.UNRECORDED_BASE, self._base_or_current(), stamp=True)

    def _start_chain(self, chained: Verdict, alone: Verdict, backend: int, full: bool) -> Outcome:
        others = [m for m in self.maps.replicas(self.slot) if m != self.config.self]
        left = tuple(m for m in others if self.maps.member_node(m) is not None)
        chain = Chain(backend, self.config.epoch, full, (self.config.self,), left)
        return self._pass_on(chained, alone, chain)

    # --- Step 8, CHAIN ---
    def link(self, chain: Chain) -> Outcome:
        """Record what another replica has recorded, and pass it on."""
        if self.subject.icmp:
            raise _End(Verdict.DROP_GENEVE_INNER)
        known = self._known(chain)
        backend = self.base if self._has_begun_alone(chain) else chain.backend if known is None else known.backend
        conflict = backend != chain.backend
        chain = replace(chain, epoch=self.config.epoch, backend=backend)
        if not self._alive(chain.backend):
            raise _End(Verdict.DROP_NO_BACKEND)
        if known is not None and (conflict or not chain.full):
            self.maps.records.put(self.key, known._replace(seen_ns=self.now_ns))
        else:
            self._look_ahead(chain.backend)
            if not self._record_chained(chain):
                self._note_unrecorded()
        chain = self._extend(chain)
        if conflict:
            chain = self._turn_back(chain)
            return self._pass_on(Verdict.CHAIN_CONFLICT, Verdict.CHAIN_CONFLICT, chain)
        return self._pass_on(Verdict.CHAIN_RECORDED, Verdict.CHAIN_LAST, chain)

    def _known(self, chain: Chain) -> Record | None:
        """The full record here, where it has the chain's backend or one that wins."""
        known = self._live(self.maps.records.get(self.key))
        if known is None or chain.overrules or self._begins_anew(known, chain) or self._is_older(known, chain):
            return None
        return known

    def _has_begun_alone(self, chain: Chain) -> bool:
        """The sender has promoted what a SYN had recorded there, and here the flow has begun at base: the chain of that
        SYN was lost, and the client's next one came here, where the sender was not heard. So base has answered."""
        if not self.tracking or chain.overrules or not chain.full or self._live(self.maps.records.get(self.key)):
            return False
        known = self._live(self.maps.embryonic.get(self.key))
        return known is not None and known.backend == self.base != chain.backend

    def _turn_back(self, chain: Chain) -> Chain:
        """Those that the chain has come through are told, too: what they have recorded is void."""
        left = tuple(m for m in (*chain.visited, *chain.left) if m != self.config.self)[: limits.REPLICAS_MAX - 1]
        return replace(chain, full=True, overrules=True, visited=(self.config.self,), left=left)

    def _look_ahead(self, backend: int) -> None:
        """A sender that tracks a slot that is steady here has prepared a change that this LB has not: what it says
        belongs to the round that begins with that."""
        if not self.tracking and backend == self.current:
            self.round = self.round + layout.SLOT_ROUND_ONE & layout.SLOT_ROUND_MASK

    def _begins_anew(self, known: Record, chain: Chain) -> bool:
        """The five-tuple of the flow that is recorded here is used again, and the sender has dropped its record."""
        old = known.seen_ns + limits.REUSE_NS < self.now_ns
        begins = self.syn and not chain.full
        if self.unannounced:  # nobody can tell; but who has asked to settle the slot has found all that is here over
            begins = self.settling and self.config.self == int(self.maps.own[self.slot]) & 0xFFFF
        return begins and known.backend != chain.backend == self.current and old

    def _is_older(self, known: Record, chain: Chain) -> bool:
        """Two replicas have recorded a flow that no packet announces, each by the base of its time. What is not of base
        was there before base moved, and so it wins wherever the two meet."""
        return self.unannounced and chain.full and known.backend == self.base != chain.backend

    def _extend(self, chain: Chain) -> Chain:
        """Move self to visited, and add the replicas that the sender did not know."""
        visited, left = list(chain.visited), [m for m in chain.left if m != self.config.self]
        if self.config.self not in visited and len(visited) + len(left) < limits.REPLICAS_MAX:
            visited.append(self.config.self)
        for member in self.maps.replicas(self.slot):
            known = member == self.config.self or member in visited or member in left
            if not known and self.maps.member_node(member) is not None:
                if len(visited) + len(left) < limits.REPLICAS_MAX:
                    left.append(member)
        return replace(chain, visited=tuple(visited), left=tuple(left))

    def _pass_on(self, chained: Verdict, last: Verdict, chain: Chain) -> Outcome:
        """To the first replica of ``left`` that can be sent to; else the chain ends at the backend.

        Also to one that this LB believes to be down: whoever has put it on the list takes it for up, and relies on it.
        """
        for member in chain.left:
            node = self.maps.member_node(member, layout.MEMBER_PRESENT)
            if node is not None:
                self._stamp(chain.backend)
                return self._send(chained, node, chain)
        return self._to_backend(last, chain.backend, stamp=True)

    # --- Records ---
    def _alive(self, backend: int) -> bool:
        return self.maps.backend(backend) is not None

    def _live(self, record: Record | None) -> Record | None:
        """Its backend is alive, and the slot has not been steady, nor agreed upon for another, since it was made."""
        valid = record is not None and self._is_of_round(record) and self._alive(record.backend)
        if record is not None and self.agreed:
            valid &= record.backend == self.current
        return record if valid else None

    def _is_of_round(self, record: Record) -> bool:
        return not (record.round ^ self.round) & layout.SLOT_ROUND_MASK

    def _holds(self, lease: Lease | None) -> bool:
        if lease is None or lease.round != self.round:
            return False
        return lease.until_ns > self.now_ns and self._alive(lease.backend)

    def _base_or_current(self) -> int:
        return self.base if self._alive(self.base) else self.current

    def _record_chained(self, chain: Chain) -> bool:
        """What a chain brings is not chained again: who has begun the flow does that."""
        if chain.full:
            return self._record_full(chain.backend, chained=limits.CHAIN_AGAIN_MAX)
        return self._record_embryonic(chain.backend)

    def _record_full(self, backend: int, chained: int = 0) -> bool:
        recorded = self.maps.records.put(self.key, Record(backend, self.round | chained, self.now_ns))
        if recorded:
            self.maps.embryonic.delete(self.key)
        return recorded

    def _record_embryonic(self, backend: int) -> bool:
        """Called only where no live full record is: a dead one goes."""
        recorded = self.maps.embryonic.put(self.key, Record(backend, self.round, self.now_ns))
        if recorded:
            self.maps.records.delete(self.key)
        return recorded

    def _note_unrecorded(self) -> None:
        self.maps.vip_stats[self.vip.id]["unrecorded_ns"] = self.now_ns

    def _stamp(self, backend: int) -> None:
        """other_seen: all that settling needs to know."""
        seen = self.maps.other_seen.get(self.vip.id)
        if backend != self.current and seen is not None:
            seen[self.slot] = np.uint64(self.now_ns)

    # --- Step 9 ---
    def _to_backend(self, verdict: Verdict, backend: int, stamp: bool = False) -> Outcome:
        """stamp: a replica has decided."""
        row = self.maps.backend(backend)
        if row is None:
            raise _End(Verdict.DROP_NO_BACKEND)
        if stamp:
            self._stamp(backend)
        if row.local:
            return self.deliver(Verdict.LOCAL, row.address, row.port)
        return self._send(verdict, row.node, Forward(row.address, row.port))

    def deliver(self, verdict: Verdict, pod: bytes, pod_port: int) -> Outcome:
        """Into this node's stack, addressed to the pod. pod: 16 bytes."""
        if self.subject.icmp:
            ip = packets.rewrite_quoted(self.subject.ip, pod[12:], pod_port)
        else:
            ip = packets.rewrite_destination(self.subject.ip, pod[12:], pod_port)
            self._note_nat(pod, pod_port)
        return Outcome(Action.PASS, verdict, self.frame[:ETHERNET_BYTES] + ip)

    def _note_nat(self, pod: bytes, pod_port: int) -> None:
        """One five-tuple at the pod is one VIP's, until its flow ends or has been silent for as long as it may be."""
        subject = self.subject
        key = nat_key(mapped(subject.client), pod, subject.client_port, pod_port, subject.protocol)
        flags = layout.NAT_FIN_IN if subject.tcp_flags & packets.TCP_FIN else 0
        if subject.tcp_flags & packets.TCP_RST:
            flags |= layout.NAT_RST
        fresh = Nat(self.vip.address, self.vip.port, flags, self.now_ns)
        entry = self.maps.nat.get(key)
        if entry is None:
            self._note_unassured(key, fresh)
            return
        if self._is_ours(entry) and not subject.syn:
            fresh = fresh._replace(flags=entry.flags | flags)
        self.maps.nat.put(key, fresh)

    def _note_unassured(self, key: bytes, fresh: Nat) -> None:
        """Until the pod has answered and the client has spoken again. A SYN begins it anew."""
        entry = self.maps.unassured.get(key)
        if entry is not None and not self._is_ours(entry):
            entry = None
        if self.subject.syn:
            fresh = fresh._replace(flags=fresh.flags | layout.NAT_SYN)
        elif entry is not None:
            lost = layout.NAT_SYN | layout.NAT_ASSURED  # `nat` has lost it, where it had it
            fresh = fresh._replace(flags=(entry.flags | fresh.flags) & ~lost)
            if fresh.flags & (layout.NAT_ANSWERED | layout.NAT_RST) == layout.NAT_ANSWERED:
                fresh = self.maps.assure(key, fresh)
        self.maps.unassured.put(key, fresh)

    def _is_ours(self, entry: Nat) -> bool:
        """Whether an entry is this VIP's. Ends with DROP_NAT_TAKEN where it is another's and that flow goes on: only
        TCP says when it has ended; about UDP, and what has only sent a SYN, the clock decides, and sooner."""
        if (entry.vip, entry.vip_port) == (self.vip.address, self.vip.port):
            return True
        fins = layout.NAT_FIN_IN | layout.NAT_FIN_OUT
        has_ended = entry.flags & layout.NAT_RST or entry.flags & fins == fins
        brief = self.subject.protocol == layout.PROTOCOL_UDP or entry.flags & layout.NAT_SYN
        lasts_ns = limits.NAT_TAKEN_BRIEFLY_NS if brief else limits.NAT_TAKEN_NS
        if not has_ended and entry.seen_ns + lasts_ns > self.now_ns:
            raise _End(Verdict.DROP_NAT_TAKEN)
        return False

    def _send(self, verdict: Verdict, node_index: int, option: packets.Option) -> Outcome:
        """Through the tunnel to a node."""
        node = self.maps.node(node_index)
        if node is None:
            raise _End(Verdict.DROP_NO_ROUTE)
        total = packets.total_bytes(self.subject.ip)
        overhead = packets.option_overhead_bytes(option)
        if node.mtu and total + overhead > node.mtu:
            return self._too_big(node.mtu)
        if overhead - self.came_under_bytes > self.maps.headroom_bytes:
            raise _End(Verdict.DROP_NO_HEADROOM)
        outer = packets.tunnel_headers(
            self.config.node_addr[12:], node.address, self.hash, self.config.vni, option, total
        )
        frame = packets.ethernet(node.dst_mac, node.src_mac) + outer + self.subject.ip
        counted = Verdict.ICMP_ERROR if self.subject.icmp else verdict
        if node.ifindex == self.ifindex:
            return Outcome(Action.TX, counted, frame)
        return Outcome(Action.REDIRECT, counted, frame, redirect_ifindex=node.ifindex)

    def _too_big(self, mtu: int) -> Outcome:
        if self.came_under_bytes or self.subject.icmp or not packets.dont_fragment(self.subject.ip):
            raise _End(Verdict.TOO_BIG)
        if packets.TOO_BIG_GROWTH_BYTES > self.maps.headroom_bytes:
            raise _End(Verdict.DROP_NO_HEADROOM)
        next_hop_mtu = max(mtu - limits.UNDERLAY_EXTRA_BYTES, 0)
        return Outcome(Action.TX, Verdict.TOO_BIG, packets.too_big_reply(self.frame, next_hop_mtu))
