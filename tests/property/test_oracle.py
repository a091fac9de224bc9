"""Promises of DESIGN's section 2 that the packets' rules keep by themselves, for any packet, path and belief.

Each test is one sentence of the design: nothing is remembered in steady state, a flow whose SYN a pod sees is known to
every replica, a relayed packet ends, what is translated has right checksums, and no bytes whatsoever make the rules
stumble. What needs messages between LBs (leases, settling) is the Keeper's to promise.
"""

import random
import struct
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, strategies as st

from lbpod.core import limits, oracle, oracle_reply
from lbpod.core.maps import mapped
from lbpod.core.oracle import Action
from lbpod.core.packets import Forward, checksum
from lbpod.core.verdicts import Verdict
from tests.bpf import frames, world
from tests.bpf.frames import ACK, SYN, Draw
from tests.bpf.world import HERE_IFINDEX, Flow
from tests.property.oracle_cluster import TCP_VIP, UDP_VIP, Cluster

NOW_NS = 10**12
flows = st.builds(Flow, st.binary(min_size=4, max_size=4), st.integers(0, 65_535), st.just(TCP_VIP))
udp_flows = st.builds(Flow, st.binary(min_size=4, max_size=4), st.integers(0, 65_535), st.just(UDP_VIP))
payloads = st.binary(max_size=60)
lb_ids = st.integers(0, 5)


def ringed(owner: int, backup: int, others: tuple[int, int, int, int] | None = None) -> Cluster:
    """Six LBs and two hosts; every slot tracking, backend 1 current, backend 2 base. others: next and prev."""
    cluster = Cluster(lbs=6, hosts=2, ring_change=others is not None)
    cluster.put_backend(1, node=6)
    cluster.put_backend(2, node=7)
    cluster.put_slots(current=1, base=2, tracking=True)
    nobody = world.owners(limits.MEMBER_NONE)
    next_, prev = (nobody, nobody) if others is None else (world.owners(*others[:2]), world.owners(*others[2:]))
    cluster.put_owners(world.owners(owner, backup), next_, prev)
    return cluster


def l4_is_right(ip: bytes) -> bool:
    """Whether IPv4 header and TCP or UDP checksums are right (a UDP checksum of 0 is)."""
    total = int.from_bytes(ip[2:4], "big")
    l4 = ip[20:total]
    if checksum(ip[:20]) != 0:
        return False
    if ip[9] == frames.UDP and l4[6:8] == b"\0\0":
        return True
    return checksum(ip[12:20] + struct.pack("!HH", ip[9], len(l4)) + l4) == 0


@given(st.integers(0, 2**32), st.binary(max_size=120), st.integers(0, 2**32))
def test_no_bytes_make_the_rules_stumble(seed: int, noise: bytes, drawn: int) -> None:
    """Every frame is counted once, with its length, and leaves as it came where it is passed on or dropped."""
    drawn_world = _world(seed % 7)
    for frame in (noise, Draw(drawn_world, drawn).incoming()):
        before = drawn_world.maps.counters.copy()
        outcome = oracle.xdp(drawn_world.maps, frame, HERE_IFINDEX, NOW_NS)
        more = drawn_world.maps.counters - before
        assert outcome.verdict is not None
        assert [1, len(frame)] == more[outcome.verdict].tolist()
        assert 1 == more[:, 0].sum()
        if outcome.action is Action.DROP or outcome.verdict in (Verdict.PASS_OTHER, Verdict.PASS_VLAN):
            assert frame == outcome.frame


def _world(seed: int) -> world.World:
    if seed not in _WORLDS:
        _WORLDS[seed] = world.draw_world(seed, NOW_NS)
    return _WORLDS[seed]


_WORLDS: dict[int, world.World] = {}


@given(st.lists(st.tuples(flows, st.integers(0, 255), payloads), max_size=20), lb_ids)
def test_nothing_is_remembered_in_steady_state(sent: list[tuple[Flow, int, bytes]], entry: int) -> None:
    """Steady slots: to current, from any LB, without a trace in any map of the LB."""
    cluster = ringed(0, 1)
    cluster.put_slots(current=1, base=0, tracking=False)
    for flow, flags, payload in sent:
        trail = cluster.walk(frames.tcp_to(flow, flags, payload), entry)
        assert Cluster.pod(1) == trail.pod
        assert Verdict.STEADY == trail.steps[0][1].verdict
    maps = cluster.nodes[entry]
    for table in (maps.cache, maps.records, maps.embryonic, maps.pending, maps.nat, maps.unassured):
        assert 0 == len(table)
    assert not maps.other_seen[TCP_VIP.id].any()
    assert not maps.vip_stats["unrecorded_ns"].any()


@given(flows, lb_ids, st.permutations(range(6)), st.sets(lb_ids), st.booleans())
def test_a_pod_that_sees_a_syn_is_known_to_every_replica(
    flow: Flow, entry: int, ring: list[int], down: set[int], changing: bool
) -> None:
    """Before the pod has the SYN, all replicas that are believed up have recorded it, each once, and before the pod."""
    others = (ring[2], ring[1], ring[3], ring[4]) if changing else None
    cluster = ringed(ring[0], ring[1], others)
    down -= {ring[0]}
    for maps in cluster.nodes:
        for member in sorted(down):
            world.put_member(maps, member, bytes([10, 0, 0, member + 1]), member, up=False)
    trail = cluster.walk(frames.tcp_to(flow, SYN), entry)
    replicas = {ring[0], ring[1]} | ({ring[2], ring[3], ring[4]} if changing else set())
    decider = entry if entry in ring[:2] else ring[0]
    assert decider == next(node for node, outcome in trail.steps if outcome.verdict is not Verdict.RELAYED)
    left_out = down & (replicas - {decider})
    backend = 2 if left_out else 1
    assert Cluster.pod(backend) == trail.pod, "to base where one is left out, for there that one would send the next"
    up = {member for member in replicas if member not in down}
    relays = [outcome.verdict for _, outcome in trail.steps].count(Verdict.RELAYED)
    visited = [node for node in trail.nodes[relays:] if node in replicas]
    expected = up | {decider}
    assert sorted(expected) == sorted(visited)
    assert all(cluster.knows(member, flow) == backend for member in sorted(expected))
    assert 5 + backend == trail.nodes[-1]


@given(
    flows,
    st.lists(lb_ids, min_size=3, max_size=3),
    st.permutations(range(6)),
    st.lists(st.sets(lb_ids), min_size=6, max_size=6),
)
def test_wrong_beliefs_about_who_is_up_are_harmless(
    flow: Flow, entries: list[int], ring: list[int], down: list[set[int]]
) -> None:
    """Whatever each LB believes while a flow begins, and whatever it believes later: one pod.

    As long as it gives nobody up, that is: with nobody to ask it decides alone, and counts it.
    """
    cluster = ringed(ring[0], ring[1])

    def believe(at: int, up: bool) -> None:
        for member in sorted(down[at]):
            address = bytes([10, 0, 0, member + 1])
            world.put_member(cluster.nodes[at], member, address, member, up=up, doubted=not up)

    for at in range(6):
        believe(at, up=False)
    pod = cluster.walk(frames.tcp_to(flow, SYN), entries[0]).pod
    assert pod is not None
    assert pod == cluster.walk(frames.tcp_to(flow, ACK), entries[1]).pod
    for at in range(6):
        believe(at, up=True)
    assert {pod} == {cluster.walk(frames.tcp_to(flow, ACK, b"x"), entry).pod for entry in range(6)}


@dataclass
class Changing:
    """A ring change, and clients whose every packet goes through another LB. Everyone is up."""

    old: list[int]
    new: list[int]
    dice: random.Random
    pods: dict[Flow, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cluster = ringed(self.old[0], self.old[1])
        self.joining = sorted(set(self.new) - set(self.old))
        for member in self.joining:
            self.cluster.put_slots_at(member, current=1, base=1, tracking=True)

    def hand_over(self) -> None:
        """The first replica gives the new ones what it has: base and records."""
        for member in self.joining:
            self.cluster.put_slots_at(member, current=1, base=2, tracking=True)
            self.cluster.hand_over(self.old[0], member)

    def traffic(self) -> None:
        """One flow begins, or turns out to be older than everything, and some go on: each packet by any LB."""
        vip, flags = self.dice.choice([(TCP_VIP, SYN), (TCP_VIP, ACK), (UDP_VIP, 0)])
        fresh = Flow(self.dice.randbytes(4), self.dice.randrange(65_536), vip)
        self.pods[fresh] = Cluster.pod(1 if flags == SYN else 2)
        others = sorted(self.pods, key=lambda flow: flow.key)
        for flow in [fresh, *self.dice.sample(others, min(len(others), 3))]:
            flags = flags if flow is fresh else ACK
            packet = frames.udp_to(flow, b"x") if flow.vip is UDP_VIP else frames.tcp_to(flow, flags)
            assert self.pods[flow] == self.cluster.walk(packet, self.dice.randrange(6)).pod


@given(
    st.permutations(range(6)),
    st.permutations(range(6)),
    st.lists(st.permutations(range(6)), min_size=3, max_size=3),
    st.integers(0, 2**32),
)
def test_no_flow_moves_while_every_lb_is_at_another_step_of_a_ring_change(
    old: list[int], new: list[int], orders: list[list[int]], seed: int
) -> None:
    """Prepare, handover, switch, done: each step only when all have taken the one before, in any order among them.

    A new replica that is only in next has neither base nor records until the handover: what the router gives it in the
    meantime is not for it to decide.
    """
    change = Changing(old[:2], new[:2], random.Random(seed))
    was, becomes, nobody = world.owners(*old[:2]), world.owners(*new[:2]), world.owners(limits.MEMBER_NONE)
    change.traffic()
    steps = [(was, becomes, nobody), (becomes, nobody, was), (becomes, nobody, nobody)]
    for step, order in zip(steps, orders, strict=True):
        if step[0] == becomes and step[2] == was:
            change.hand_over()
        for member in order:
            change.cluster.put_owners_at(member, *step)
            change.traffic()


@given(flows, lb_ids, lb_ids, st.permutations(range(6)))
def test_a_flow_stays_where_its_record_says(flow: Flow, first: int, second: int, ring: list[int]) -> None:
    """SYN through one LB, everything after it through another: the same pod, though base is another one."""
    cluster = ringed(ring[0], ring[1])
    assert Cluster.pod(1) == cluster.walk(frames.tcp_to(flow, SYN), first).pod
    assert Cluster.pod(1) == cluster.walk(frames.tcp_to(flow, ACK), second).pod
    cluster.put_slots(current=2, base=2, tracking=True)
    assert Cluster.pod(1) == cluster.walk(frames.tcp_to(flow, ACK, b"x"), first).pod
    assert all(flow.key in cluster.nodes[member].records.rows for member in ring[:2]), "promoted at owner and backup"


@given(flows, lb_ids, st.lists(lb_ids, min_size=2, max_size=2, unique=True))
def test_an_old_flow_goes_to_base_from_everywhere(flow: Flow, entry: int, ring: list[int]) -> None:
    cluster = ringed(ring[0], ring[1])
    assert Cluster.pod(2) == cluster.walk(frames.tcp_to(flow, ACK, b"x"), entry).pod
    assert all(cluster.knows(member, flow) is None for member in range(6)), "nothing is recorded about old flows"
    assert (entry not in ring) == (flow.key in cluster.nodes[entry].pending.rows)


@given(udp_flows, lb_ids, lb_ids, st.lists(lb_ids, min_size=2, max_size=2, unique=True))
def test_a_udp_flow_is_recorded_where_it_goes(flow: Flow, first: int, second: int, ring: list[int]) -> None:
    cluster = ringed(ring[0], ring[1])
    assert Cluster.pod(2) == cluster.walk(frames.udp_to(flow, b"question"), first).pod
    assert [2, 2] == [cluster.knows(member, flow) for member in ring]
    cluster.put_slots(current=1, base=1, tracking=True)
    assert Cluster.pod(2) == cluster.walk(frames.udp_to(flow, b"again"), second).pod


@given(flows, st.sampled_from([SYN, ACK]), lb_ids, st.lists(st.tuples(lb_ids, lb_ids), min_size=6, max_size=6))
def test_relays_end_whatever_everyone_believes(
    flow: Flow, flags: int, entry: int, beliefs: list[tuple[int, int]]
) -> None:
    """Every LB believes in another ring: three relays, then the packet is decided where it is; and it is delivered."""
    cluster = ringed(0, 1)
    for node, (owner, backup) in enumerate(beliefs):
        cluster.nodes[node].own = np.full(limits.SLOT_COUNT, world.owners(owner, backup), np.uint32)
    trail = cluster.walk(frames.tcp_to(flow, flags), entry)
    assert trail.pod in (Cluster.pod(1), Cluster.pod(2))
    relays = [outcome for _, outcome in trail.steps if outcome.verdict is Verdict.RELAYED]
    assert len(relays) <= limits.RELAY_HOPS_MAX


@given(st.one_of(flows, udp_flows), payloads, st.booleans(), st.binary(min_size=4, max_size=4), st.integers(0, 65_535))
def test_what_is_translated_has_right_checksums(
    flow: Flow, payload: bytes, summed: bool, pod: bytes, port: int
) -> None:
    """There (FORWARD at the host agent) and back (hf_tc): only addresses and ports change, checksums fit."""
    cluster = Cluster(lbs=1, hosts=1)
    host = cluster.nodes[1]
    is_udp = flow.vip.protocol == frames.UDP
    packet = frames.udp_to(flow, payload, summed) if is_udp else frames.tcp_to(flow, ACK, payload)
    sent = frames.geneve(Forward(mapped(pod), port).pack(), 0x48F01D, packet)
    outer = frames.frame(frames.tunnel(world.v4("10.0.0.1"), world.v4("10.0.0.2"), sent))
    outcome = oracle.xdp(host, outer, HERE_IFINDEX, NOW_NS)
    assert Verdict.DELIVERED == outcome.verdict
    ip = outcome.frame[14:]
    assert (flow.client, pod, port) == (ip[12:16], ip[16:20], int.from_bytes(ip[22:24], "big"))
    assert l4_is_right(ip)
    if is_udp:
        assert (not summed) == (ip[26:28] == b"\0\0"), "no checksum stays none, and none becomes none"
    if is_udp:
        l4 = frames.udp(pod, flow.client, port, flow.port, payload)
    else:
        l4 = frames.tcp(pod, flow.client, port, flow.port, ACK, payload)
    answer = frames.ipv4(pod, flow.client, flow.vip.protocol, l4)
    reply = oracle_reply.tc(host, frames.frame(answer), NOW_NS)
    back = reply.frame[14:]
    assert Verdict.REPLY == reply.verdict
    assert (flow.vip.address[12:], flow.vip.port) == (back[12:16], int.from_bytes(back[20:22], "big"))
    assert l4_is_right(back)
    assert answer[16:20] == back[16:20], "the client stays"
    assert payload == back[len(back) - len(payload) :]


@given(flows, lb_ids, st.booleans())
def test_an_icmp_error_reaches_the_pod_that_it_is_about(flow: Flow, entry: int, promoted: bool) -> None:
    """As an error about the pod's own packet; and it neither records nor promotes anything."""
    cluster = ringed(0, 1)
    cluster.walk(frames.tcp_to(flow, SYN), entry)
    if promoted:
        cluster.walk(frames.tcp_to(flow, ACK), entry)
    before = [sorted(cluster.nodes[node].records.rows) for node in range(6)]
    trail = cluster.walk(frames.icmp_error_to(flow, frames.quoted_from(flow, 20)), entry)
    assert Cluster.pod(1) == trail.pod
    ip = trail.last.frame[14:]
    assert 0 == checksum(ip[20 : int.from_bytes(ip[2:4], "big")])
    assert 0 == checksum(ip[28:48]), "the quoted header's own checksum"
    assert (Cluster.pod(1), 8080) == (ip[40:44], int.from_bytes(ip[48:50], "big"))
    assert before == [sorted(cluster.nodes[node].records.rows) for node in range(6)]


@given(st.integers(0, 2**32), st.integers(0, 2**16), st.integers(536, 9_000))
def test_an_mss_is_only_ever_lowered(seed: int, mss_max: int, mss: int) -> None:
    """Wherever in the options it lies, at an even or at an odd place, the checksum stays right."""
    dice = random.Random(seed)
    options = b"\x01" * dice.randrange(5) + b"\x02\x04" + struct.pack("!H", mss) + b"\x01" * dice.randrange(3)
    options += bytes(-len(options) % 4)
    flow = Flow(b"\xc0\x00\x02\x01", 40_000, TCP_VIP)
    cluster = Cluster(lbs=1, hosts=1)
    host = cluster.nodes[1]
    host.config["mss_max"] = mss_max % 65_536
    sent = frames.geneve(Forward(mapped(b"\x0a\xf4\x00\x01"), 80).pack(), 0x48F01D, frames.tcp_to(flow, SYN))
    tunnel = frames.tunnel(world.v4("10.0.0.1"), world.v4("10.0.0.2"), sent)
    oracle.xdp(host, frames.frame(tunnel), HERE_IFINDEX, NOW_NS)
    pod = b"\x0a\xf4\x00\x01"
    segment = frames.tcp(pod, flow.client, 80, flow.port, SYN | ACK, options=options)
    reply = oracle_reply.tc(host, frames.frame(frames.ipv4(pod, flow.client, frames.TCP, segment)), NOW_NS).frame[14:]
    at = 40 + options.index(b"\x02\x04") + 2
    limit = mss_max % 65_536 or 65_535
    assert min(mss, limit) == int.from_bytes(reply[at : at + 2], "big")
    assert l4_is_right(reply)


def test_the_cluster_of_these_tests_tracks() -> None:
    """That the tests above are about what they say: slots track, and owner and backup differ."""
    cluster = ringed(2, 4)
    words = cluster.nodes[0].slots[TCP_VIP.id]
    assert np.uint64(world.slot_word(1, 2, tracking=True)) == words[0]
    assert [2, 4] == cluster.nodes[0].replicas(0)
