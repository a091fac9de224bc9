"""The packet rules by example: each step of ``lbpod/bpf/README.md`` with a frame that one can read.

Random comparison (tests/bpf) says that two programs agree; this says on what. The bytes of our own headers are written
out here once, by hand from the RFCs, so that both programs cannot agree on something wrong.
"""

import pytest

from lbpod.core import layout, limits, oracle, oracle_reply
from lbpod.core.hashing import flow_hash
from lbpod.core.maps import FlowTable, Lease, Record, mapped, nat_key
from lbpod.core.oracle import Action, Outcome
from lbpod.core.packets import Chain, Forward, Relay
from lbpod.core.verdicts import Verdict
from tests.bpf import frames, world
from tests.bpf.frames import ACK, DF, FIN, RST, SYN
from tests.bpf.world import HERE_IFINDEX, Flow, v4
from tests.oracle_scene import (
    BASE,
    CURRENT,
    DEAD,
    FLOW,
    LOCAL,
    NOW_NS,
    PEER,
    SELF,
    STICKY_VIP,
    TCP_VIP,
    THIRD,
    UDP_FLOW,
    UDP_VIP,
    VIP,
    Node,
    lone_lb,
    option_of,
    pod_of,
)


@pytest.fixture
def node() -> Node:
    return lone_lb()


# --- On the wire ------------------------------------------------------------------------------------------------------
def test_forward_byte_by_byte(node: Node) -> None:
    node.slots(tracking=False)
    packet = frames.tcp_to(FLOW, ACK, b"hello")
    outcome = node.run(packet)
    port = 49_152 + (flow_hash(mapped(FLOW.client), VIP, FLOW.port, 80, 6, 0x5EED) & 0x3FFF)
    expected = bytes.fromhex(
        "02dd0a000004 02550a000004 0800"  # next hop, uplink
        "45000069 00004000 40112680 0a000001 0a000004"  # TTL 64, DF, id 0
        f"{port:04x} 17c1 0055 0000"  # to 6081, no checksum
        "06400800 48f01d00"  # six words of options, C, IPv4 inside, VNI
        "ff488105 00000000000000000000ffff0af40001 2328 0000"  # FORWARD to 10.244.0.1:9000
    )
    assert (Action.TX, Verdict.STEADY) == (outcome.action, outcome.verdict)
    assert expected + packet == outcome.frame


def test_relay_byte_by_byte(node: Node) -> None:
    node.own(PEER, THIRD)
    outcome = node.run(frames.tcp_to(FLOW, ACK))
    assert Verdict.RELAYED == outcome.verdict
    assert bytes.fromhex("ff4882020000001101000000") == option_of(outcome)
    assert v4("10.0.0.2") == outcome.frame[30:34]


def test_chain_byte_by_byte(node: Node) -> None:
    outcome = node.run(frames.tcp_to(FLOW, SYN))
    assert Verdict.CHAIN_STARTED == outcome.verdict
    expected = "ff488306000000010000001101010000000000010000000000000000"
    assert bytes.fromhex(expected) == option_of(outcome)


def test_too_big_byte_by_byte(node: Node) -> None:
    node.slots(tracking=False)
    node.maps.nodes[3]["mtu"] = 1_500
    packet = frames.tcp_to(FLOW, ACK, bytes(1_401))
    outcome = node.run(packet)
    expected = bytes.fromhex(
        "020000000002 020000000001 0800"  # back the way that it came
        "45000038 00004000 40013cb3 cb00710a c0000207"
    )
    assert (Action.TX, Verdict.TOO_BIG) == (outcome.action, outcome.verdict)
    assert expected == outcome.frame[:34]
    assert (bytes.fromhex("0304"), bytes.fromhex("0000059c")) == (outcome.frame[34:36], outcome.frame[38:42])
    assert packet[:28] == outcome.frame[42:]
    assert Verdict.STEADY == node.run(frames.tcp_to(FLOW, ACK, bytes(1_400))).verdict


def test_redirect_where_the_next_hop_is_elsewhere(node: Node) -> None:
    node.slots(tracking=False)
    assert (Action.REDIRECT, HERE_IFINDEX) == _way(node.run(frames.tcp_to(FLOW, ACK), ifindex=9))


def _way(outcome: Outcome) -> tuple[Action, int]:
    return outcome.action, outcome.redirect_ifindex


# --- Steps 1 to 3 -----------------------------------------------------------------------------------------------------
ODD = {
    "no IP": (b"", Verdict.PASS_OTHER),
    "IPv6": (b"\x60" + bytes(39), Verdict.PASS_OTHER),
    "another address": (frames.tcp_to(Flow(FLOW.client, 1, TCP_VIP._replace(address=mapped(v4("1.2.3.4")))), SYN),
                        Verdict.PASS_OTHER),
    "another port": (frames.tcp_to(Flow(FLOW.client, 1, TCP_VIP._replace(port=81)), SYN), Verdict.PASS_OTHER),
    "another protocol": (frames.ipv4(FLOW.client, VIP[12:], 47, bytes(20)), Verdict.PASS_OTHER),
    "options": (frames.ipv4(FLOW.client, VIP[12:], 6, bytes(20), options=bytes(4)), Verdict.DROP_IP_OPTIONS),
    "longer than it is": (frames.tcp_to(FLOW, ACK, b"x")[:-1], Verdict.DROP_MALFORMED),
    "short header": (b"\x44" + frames.tcp_to(FLOW, ACK)[1:], Verdict.DROP_MALFORMED),
    "TCP cut": (frames.ipv4(FLOW.client, VIP[12:], 6, bytes(19)), Verdict.DROP_MALFORMED),
    "UDP cut": (frames.ipv4(FLOW.client, VIP[12:], 17, bytes(7)), Verdict.DROP_MALFORMED),
    "data offset 4": (frames.ipv4(FLOW.client, VIP[12:], 6, bytes(12) + b"\x40" + bytes(7)), Verdict.DROP_MALFORMED),
    "data offset 6 of 5": (frames.ipv4(FLOW.client, VIP[12:], 6, bytes(12) + b"\x60" + bytes(7)),
                           Verdict.DROP_MALFORMED),
    "later fragment": (frames.ipv4(FLOW.client, VIP[12:], 6, bytes(3), fragment=185), Verdict.DROP_FRAGMENT),
    "ICMP that is nothing": (frames.ipv4(FLOW.client, VIP[12:], 1, bytes(8)), Verdict.DROP_ICMP),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_packets(node: Node, name: str) -> None:
    packet, verdict = ODD[name]
    outcome = node.run(packet)
    assert verdict == outcome.verdict
    assert frames.frame(packet) == outcome.frame
    assert (Action.PASS if verdict is Verdict.PASS_OTHER else Action.DROP) == outcome.action
    assert [1, len(packet) + 14] == node.maps.counters[verdict].tolist()


def test_a_first_fragment_is_served_and_padding_travels_along(node: Node) -> None:
    node.slots(tracking=False)
    packet = frames.tcp_to(FLOW, ACK, b"hi", fragment=frames.MF) + b"pad"
    outcome = node.run(packet)
    assert Verdict.STEADY == outcome.verdict
    assert packet == outcome.frame[74:]
    assert len(packet) - 3 + 60 == int.from_bytes(outcome.frame[16:18], "big")


def test_a_tag_on_a_vips_packet(node: Node) -> None:
    tagged = frames.MACS + b"\x81\x00\x00\x05\x08\x00"
    for packet, verdict in ((frames.tcp_to(FLOW, SYN), Verdict.PASS_VLAN), (bytes(40), Verdict.PASS_OTHER)):
        outcome = oracle.xdp(node.maps, tagged + packet, HERE_IFINDEX, NOW_NS)
        assert (Action.PASS, verdict) == (outcome.action, outcome.verdict)


def test_affinity_leaves_the_clients_port_out(node: Node) -> None:
    for port in (1, 2):
        node.run(frames.tcp_to(Flow(FLOW.client, port, STICKY_VIP), SYN))
    assert [Flow(FLOW.client, 0, STICKY_VIP).key] == list(node.maps.records)


def test_with_affinity_a_clients_syn_begins_no_flow(node: Node) -> None:
    """Its older connections are of the same flow, unrecorded and at base: there the new one has to go, too."""
    outcome = node.run(frames.tcp_to(Flow(FLOW.client, 1, STICKY_VIP), SYN))
    assert Verdict.CHAIN_STARTED == outcome.verdict
    assert Chain(BASE, 17, True, (SELF,), (PEER,)).pack() == option_of(outcome)
    assert {BASE} == {record.backend for record in node.maps.records.rows.values()}


# --- Step 5 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("current", [0, DEAD, limits.BACKEND_IDS_MAX])
def test_nobody_to_send_to(node: Node, current: int) -> None:
    node.slots(current=current, tracking=False)
    assert Verdict.DROP_NO_BACKEND == node.run(frames.tcp_to(FLOW, ACK)).verdict


def test_a_vip_without_slots(node: Node) -> None:
    del node.maps.slots[TCP_VIP.id]
    assert Verdict.DROP_NO_BACKEND == node.run(frames.tcp_to(FLOW, ACK)).verdict


def test_a_node_without_next_hop(node: Node) -> None:
    world.put_node(node.maps, 3, v4("10.0.0.4"), reachable=False)
    assert Verdict.DROP_NO_ROUTE == node.run(frames.tcp_to(FLOW, ACK)).verdict
    assert NOW_NS == node.stamped(), "a missing route does not undo the stamp"


# --- Step 6, not a replica --------------------------------------------------------------------------------------------
def test_a_lease_is_used_until_it_ends(node: Node) -> None:
    node.own(PEER)
    node.maps.cache.put(FLOW.key, Lease(BASE, 0, NOW_NS + 1))
    assert Verdict.CACHE_HIT == node.run(frames.tcp_to(FLOW, ACK)).verdict
    node.maps.cache.put(FLOW.key, Lease(BASE, 0, NOW_NS))
    assert Verdict.RELAYED == node.run(frames.tcp_to(FLOW, ACK)).verdict
    assert (FLOW.slot(0x5EED), 0, NOW_NS) == node.maps.pending.get(FLOW.key)
    node.maps.cache.put(FLOW.key, Lease(DEAD, 0, NOW_NS + 1))
    assert Verdict.RELAYED == node.run(frames.tcp_to(FLOW, ACK)).verdict


def test_a_lease_of_before_the_slot_was_last_steady_is_void(node: Node) -> None:
    node.own(PEER)
    node.slots(number=2)
    node.maps.cache.put(FLOW.key, Lease(BASE, layout.SLOT_ROUND_ONE, NOW_NS + 1))
    assert Verdict.RELAYED == node.run(frames.tcp_to(FLOW, ACK)).verdict
    node.maps.cache.put(FLOW.key, Lease(BASE, 2 * layout.SLOT_ROUND_ONE, NOW_NS + 1))
    assert Verdict.CACHE_HIT == node.run(frames.tcp_to(FLOW, ACK)).verdict


@pytest.mark.parametrize("flags", [FIN | ACK, RST])
def test_who_closes_is_not_asked_about(node: Node, flags: int) -> None:
    node.own(PEER)
    node.run(frames.tcp_to(FLOW, ACK))
    assert FLOW.key in node.maps.pending.rows
    assert Verdict.RELAYED == node.run(frames.tcp_to(FLOW, flags)).verdict
    assert 0 == len(node.maps.pending)


@pytest.mark.parametrize(("flags", "kept"), [(ACK, True), (FIN | ACK, False), (RST, False), (SYN, False)])
def test_a_lease_ends_with_the_connection(node: Node, flags: int, kept: bool) -> None:
    node.own(PEER)
    node.maps.cache.put(FLOW.key, Lease(BASE, 0, NOW_NS + 1))
    outcome = node.run(frames.tcp_to(FLOW, flags))
    assert (Verdict.RELAYED if flags == SYN else Verdict.CACHE_HIT) == outcome.verdict
    assert kept == (FLOW.key in node.maps.cache.rows)
    assert 0 == len(node.maps.pending)


def test_the_backup_where_the_owner_seems_down_and_alone_where_both_do(node: Node) -> None:
    node.own(PEER, THIRD)
    world.put_member(node.maps, PEER, v4("10.0.0.2"), PEER, up=False)
    assert v4("10.0.0.3") == node.run(frames.tcp_to(FLOW, ACK)).frame[30:34]
    world.put_member(node.maps, THIRD, v4("10.0.0.3"), 77)
    old, first = node.run(frames.tcp_to(FLOW, ACK)), node.run(frames.tcp_to(FLOW, SYN))
    assert [Verdict.DECIDED_ALONE] * 2 == [old.verdict, first.verdict]
    assert [v4("10.244.0.2")] * 2 == [pod_of(old), pod_of(first)], "nobody records the first: it goes where all will"
    assert 0 == node.stamped(), "only replicas stamp"


def test_where_both_are_silent_one_that_is_only_doubted(node: Node) -> None:
    """It may be up all the same: who decides in its place decides wrongly. A chain does not wait for it."""
    node.own(PEER, THIRD)
    addresses = {member: v4(f"10.0.0.{member + 1}") for member in (PEER, THIRD)}
    for doubted, expected in (({PEER, THIRD}, PEER), ({THIRD}, THIRD), ({PEER}, PEER)):
        for member, address in addresses.items():
            world.put_member(node.maps, member, address, member, up=False, doubted=member in doubted)
        outcome = node.run(frames.tcp_to(FLOW, ACK))
        assert (Verdict.RELAYED, addresses[expected]) == (outcome.verdict, outcome.frame[30:34])
    world.put_member(node.maps, THIRD, addresses[THIRD], THIRD)
    assert addresses[THIRD] == node.run(frames.tcp_to(FLOW, ACK)).frame[30:34], "one that is up comes first"
    node.own(SELF, PEER)
    assert Verdict.FIRST_ALONE == node.run(frames.tcp_to(FLOW, SYN)).verdict


def test_three_relays_at_most(node: Node) -> None:
    node.own(PEER)
    inner = frames.tcp_to(FLOW, ACK)
    outcome = node.from_peer(Relay(1, 2, THIRD), inner)
    assert Verdict.RELAYED == outcome.verdict
    assert Relay(17, 3, THIRD).pack() == option_of(outcome)
    assert Verdict.DECIDED_ALONE == node.from_peer(Relay(1, 3, THIRD), inner).verdict
    assert 0 == len(node.maps.pending), "asked by whoever had it from the router"


# --- Step 6, replica --------------------------------------------------------------------------------------------------
def test_a_syn_is_recorded_and_promoted_by_what_follows(node: Node) -> None:
    assert Verdict.CHAIN_STARTED == node.run(frames.tcp_to(FLOW, SYN)).verdict
    assert Record(CURRENT, 0, NOW_NS) == node.maps.embryonic.get(FLOW.key)
    assert Verdict.RECORD_HIT == node.run(frames.tcp_to(FLOW, SYN)).verdict
    outcome = node.run(frames.tcp_to(FLOW, ACK))
    assert Verdict.PROMOTED == outcome.verdict
    assert Chain(CURRENT, 17, True, (SELF,), (PEER,)).pack() == option_of(outcome)
    assert (0, 1) == (len(node.maps.embryonic), len(node.maps.records))
    assert Verdict.RECORD_HIT == node.run(frames.tcp_to(FLOW, ACK)).verdict
    assert 0 == node.stamped(), "all of it went to current"


@pytest.mark.parametrize("full", [True, False])
def test_a_record_of_before_the_slot_was_last_steady_is_void_and_one_that_is_made_has_its_round(
    node: Node, full: bool
) -> None:
    node.slots(number=3)
    table = node.maps.records if full else node.maps.embryonic
    table.put(FLOW.key, Record(CURRENT, 2 * layout.SLOT_ROUND_ONE, 1))
    assert Verdict.OLD_TO_BASE == node.run(frames.tcp_to(FLOW, ACK)).verdict
    assert Verdict.CHAIN_STARTED == node.run(frames.tcp_to(FLOW, SYN)).verdict
    assert Record(CURRENT, 3 * layout.SLOT_ROUND_ONE, NOW_NS) == node.maps.embryonic.get(FLOW.key)
    assert not full or FLOW.key not in node.maps.records.rows


@pytest.mark.parametrize(
    ("flags", "record", "settling", "verdict"),
    [
        (SYN, BASE, True, Verdict.UNRECORDED_DROP),
        (SYN, CURRENT, True, Verdict.RECORD_HIT),
        (SYN, BASE, False, Verdict.RECORD_HIT),
        (ACK, BASE, True, Verdict.RECORD_HIT),
    ],
)
def test_a_five_tuple_that_is_used_again_waits_for_the_settle_that_would_move_it(
    node: Node, flags: int, record: int, settling: bool, verdict: Verdict
) -> None:
    node.slots(settling=settling)
    node.maps.records.put(FLOW.key, Record(record, 0, 1))
    assert verdict == node.run(frames.tcp_to(FLOW, flags)).verdict
    assert Record(record, 0, NOW_NS) == node.maps.records.get(FLOW.key)
    assert Verdict.RECORD_HIT == node.run(frames.tcp_to(FLOW, flags)).verdict, "what is sent again gets through"


@pytest.mark.parametrize("seen_ns", [1, NOW_NS])
def test_a_second_try_of_a_first_packet_waits_for_the_settle_too(node: Node, seen_ns: int) -> None:
    """Its backend may never have got the one before, so no host speaks for the flow."""
    node.slots(settling=True)
    node.maps.embryonic.put(FLOW.key, Record(BASE, 0, seen_ns))
    assert Verdict.UNRECORDED_DROP == node.run(frames.tcp_to(FLOW, SYN)).verdict
    assert Verdict.UNRECORDED_DROP == node.run(frames.tcp_to(FLOW, SYN)).verdict, "as long as the flag stands"
    assert Record(BASE, 0, seen_ns) == node.maps.embryonic.get(FLOW.key)
    node.maps.embryonic.put(FLOW.key, Record(CURRENT, 0, seen_ns))
    assert Verdict.RECORD_HIT == node.run(frames.tcp_to(FLOW, SYN)).verdict
    node.slots(settling=False)
    node.maps.embryonic.put(FLOW.key, Record(BASE, 0, seen_ns))
    assert Verdict.RECORD_HIT == node.run(frames.tcp_to(FLOW, SYN)).verdict


RINGS = {"next only": (SELF, limits.MEMBER_NONE), "prev only": (limits.MEMBER_NONE, SELF)}


@pytest.mark.parametrize("ring", RINGS)
def test_in_next_or_prev_alone_the_routers_packets_are_the_owners(node: Node, ring: str) -> None:
    """A next LB may have neither record nor base yet; what it has does not count either. Leases do."""
    node.change_ring(*RINGS[ring])
    node.maps.records.put(FLOW.key, Record(CURRENT, 0, 1))
    for packet in (frames.tcp_to(FLOW, SYN), frames.tcp_to(FLOW, ACK), frames.udp_to(UDP_FLOW, b"x")):
        outcome = node.run(packet)
        assert (Verdict.RELAYED, v4("10.0.0.2")) == (outcome.verdict, outcome.frame[30:34])
    error = node.run(frames.icmp_error_to(FLOW, frames.quoted_from(FLOW)))
    assert (Verdict.ICMP_ERROR, v4("10.0.0.2")) == (error.verdict, error.frame[30:34])
    assert [FLOW.key, UDP_FLOW.key] == list(node.maps.pending)
    node.maps.cache.put(FLOW.key, Lease(BASE, 0, NOW_NS + 1))
    outcome = node.run(frames.tcp_to(FLOW, ACK))
    assert (Verdict.CACHE_HIT, v4("10.244.0.2")) == (outcome.verdict, pod_of(outcome))
    node.maps.cache.delete(FLOW.key)
    for member in (PEER, THIRD):
        world.put_member(node.maps, member, v4(f"10.0.0.{member + 1}"), member, up=False)
    assert Verdict.DECIDED_ALONE == node.run(frames.tcp_to(FLOW, ACK)).verdict
    assert {FLOW.key: Record(CURRENT, 0, 1)} == node.maps.records.rows
    assert ([], 0) == (list(node.maps.embryonic), node.stamped()), "nothing recorded, nothing stamped"


@pytest.mark.parametrize("ring", RINGS)
def test_in_next_or_prev_alone_what_is_relayed_is_decided(node: Node, ring: str) -> None:
    """Whoever relays it has switched. A chain is recorded and extended all the same."""
    node.change_ring(*RINGS[ring])
    relay = Relay(17, 1, PEER)
    outcome = node.from_peer(relay, frames.tcp_to(FLOW, SYN))
    assert Verdict.CHAIN_STARTED == outcome.verdict
    assert Chain(CURRENT, 17, False, (SELF,), (PEER, THIRD)).pack() == option_of(outcome)
    assert Verdict.PROMOTED == node.from_peer(relay, frames.tcp_to(FLOW, ACK)).verdict
    other = Flow(FLOW.client, 1, TCP_VIP)
    assert Verdict.OLD_TO_BASE == node.from_peer(relay, frames.tcp_to(other, ACK)).verdict
    error = node.from_peer(relay, frames.icmp_error_to(FLOW, frames.quoted_from(FLOW)))
    assert (Verdict.ICMP_ERROR, v4("10.244.0.1")) == (error.verdict, pod_of(error))
    outcome = node.from_peer(Chain(CURRENT, 9, False, (PEER,), (SELF,)), frames.tcp_to(other, SYN))
    assert Chain(CURRENT, 17, False, (PEER, SELF), (THIRD,)).pack() == option_of(outcome)
    assert Record(CURRENT, 0, NOW_NS) == node.maps.embryonic.get(other.key)
    node.maps.config["ring_change"] = 0
    assert Verdict.RELAYED == node.from_peer(relay, frames.tcp_to(FLOW, ACK)).verdict, "next and prev no longer count"


def test_alone_and_with_ring_change(node: Node) -> None:
    node.own(SELF)
    assert Verdict.FIRST_ALONE == node.run(frames.tcp_to(FLOW, SYN)).verdict
    node.maps.config["ring_change"] = 1
    node.maps.next[:], node.maps.prev[:] = world.owners(PEER, SELF), world.owners(THIRD)
    outcome = node.run(frames.tcp_to(FLOW, ACK))
    assert Chain(CURRENT, 17, True, (SELF,), (PEER, THIRD)).pack() == option_of(outcome)


def test_a_first_packet_goes_to_base_where_the_chain_leaves_a_replica_out(node: Node) -> None:
    """The one left out may be up all the same, and would send what follows to base."""
    world.put_member(node.maps, PEER, v4("10.0.0.2"), PEER, up=False)
    outcome = node.run(frames.tcp_to(FLOW, SYN))
    assert (Verdict.FIRST_ALONE, v4("10.244.0.2")) == (outcome.verdict, pod_of(outcome))
    assert Record(BASE, 0, NOW_NS) == node.maps.embryonic.get(FLOW.key)
    assert (NOW_NS, NOW_NS) == (node.stamped(), int(node.maps.vip_stats[TCP_VIP.id]["unrecorded_ns"]))
    node.slots(base=DEAD)
    outcome = node.run(frames.tcp_to(Flow(FLOW.client, 1, TCP_VIP), SYN))
    assert (Verdict.FIRST_ALONE, v4("10.244.0.1")) == (outcome.verdict, pod_of(outcome))


def test_a_chain_leaves_nobody_out_that_another_has_put_on_its_list(node: Node) -> None:
    """The first one sent the flow to current because it took all replicas for up; what it says of them is relied on."""
    world.put_member(node.maps, THIRD, v4("10.0.0.3"), THIRD, up=False)
    outcome = node.from_peer(Chain(CURRENT, 9, False, (PEER,), (SELF, THIRD)), frames.tcp_to(FLOW, SYN))
    assert (Verdict.CHAIN_RECORDED, v4("10.0.0.3")) == (outcome.verdict, outcome.frame[30:34])
    world.put_member(node.maps, THIRD, v4("10.0.0.3"), THIRD, present=False)
    outcome = node.from_peer(Chain(CURRENT, 9, False, (PEER,), (SELF, THIRD)), frames.tcp_to(FLOW, SYN))
    assert Verdict.CHAIN_LAST == outcome.verdict, "one that nobody knows of here is no member any more"


def test_an_old_flow_goes_to_base_and_stamps(node: Node) -> None:
    outcome = node.run(frames.tcp_to(FLOW, ACK))
    assert (Verdict.OLD_TO_BASE, v4("10.244.0.2")) == (outcome.verdict, pod_of(outcome))
    assert NOW_NS == node.stamped()
    node.slots(base=DEAD)
    assert Verdict.OLD_TO_CURRENT == node.run(frames.tcp_to(FLOW, ACK)).verdict


def test_udp_is_recorded_at_base_and_quic_initials_at_current(node: Node) -> None:
    outcome = node.run(frames.udp_to(UDP_FLOW, b"x"))
    assert Chain(BASE, 17, True, (SELF,), (PEER,)).pack() == option_of(outcome)
    other = Flow(UDP_FLOW.client, 1, UDP_VIP)
    assert Chain(CURRENT, 17, True, (SELF,), (PEER,)).pack() == option_of(node.run(_quic(other)))
    assert [BASE, CURRENT] == [node.maps.records.rows[flow.key].backend for flow in (UDP_FLOW, other)]


def test_the_first_packets_of_udp_travel_the_chain_again_for_the_one_that_was_recorded_may_be_lost(node: Node) -> None:
    found = [node.run(frames.udp_to(UDP_FLOW, b"x")) for _ in range(1 + limits.CHAIN_AGAIN_MAX)]
    assert {Chain(BASE, 17, True, (SELF,), (PEER,)).pack()} == {option_of(each) for each in found}
    assert v4("10.244.0.2") == pod_of(node.run(frames.udp_to(UDP_FLOW, b"x"))), "and those after them do not"


def test_what_came_by_chain_is_not_chained_again(node: Node) -> None:
    """Else two replicas that both see packets of a flow would go on telling each other of it."""
    node.own(PEER, SELF)
    node.from_peer(Chain(BASE, 9, True, (PEER,), (SELF,)), frames.udp_to(UDP_FLOW, b"x"))
    outcome = node.run(frames.udp_to(UDP_FLOW, b"x"))
    assert (Verdict.RECORD_HIT, v4("10.244.0.2")) == (outcome.verdict, pod_of(outcome))


def _quic(flow: Flow) -> bytes:
    return frames.udp_to(flow, frames.QUIC_INITIAL)


def test_a_full_map(node: Node) -> None:
    """UDP goes to base, unrecorded and noted; TCP (in a map that could refuse) only at the owner of a calm slot."""
    node.maps.records = FlowTable(0, evicts=False)
    node.maps.embryonic = FlowTable(0, evicts=False)
    outcome = node.run(frames.udp_to(UDP_FLOW, b"x"))
    assert (Verdict.UNRECORDED_BASE, v4("10.244.0.2")) == (outcome.verdict, pod_of(outcome))
    assert NOW_NS == node.maps.vip_stats[UDP_VIP.id]["unrecorded_ns"]
    assert NOW_NS == node.stamped(UDP_FLOW)
    assert Verdict.UNRECORDED_BASE == node.run(frames.tcp_to(FLOW, SYN)).verdict
    node.slots(settling=True)
    assert Verdict.UNRECORDED_DROP == node.run(frames.tcp_to(FLOW, SYN)).verdict
    node.slots()
    node.own(PEER, SELF)
    assert Verdict.UNRECORDED_DROP == node.run(frames.tcp_to(FLOW, SYN)).verdict
    assert Verdict.UNRECORDED_BASE == node.run(frames.udp_to(UDP_FLOW, b"x")).verdict


def test_no_room_to_promote(node: Node) -> None:
    node.run(frames.tcp_to(FLOW, SYN))
    node.maps.records = FlowTable(0, evicts=False)
    assert Verdict.RECORD_HIT == node.run(frames.tcp_to(FLOW, ACK)).verdict
    assert FLOW.key in node.maps.embryonic.rows


def test_a_record_of_the_dead_is_void(node: Node) -> None:
    node.maps.records.put(FLOW.key, Record(DEAD, 0, 1))
    assert Verdict.OLD_TO_BASE == node.run(frames.tcp_to(FLOW, ACK)).verdict
    assert Verdict.CHAIN_STARTED == node.run(frames.tcp_to(FLOW, SYN)).verdict
    assert ([], [FLOW.key]) == (list(node.maps.records), list(node.maps.embryonic))
    node.slots(current=DEAD)
    assert Verdict.DROP_NO_BACKEND == node.run(frames.tcp_to(Flow(FLOW.client, 9, TCP_VIP), SYN)).verdict


# --- Step 7 -----------------------------------------------------------------------------------------------------------
def test_echo(node: Node) -> None:
    ask = frames.ipv4(FLOW.client, VIP[12:], 1, frames.icmp(8, 0, b"\x00\x01\x00\x02", b"ping"), ttl=3)
    answer = frames.ipv4(VIP[12:], FLOW.client, 1, frames.icmp(0, 0, b"\x00\x01\x00\x02", b"ping"), ttl=64)
    outcome = node.run(ask)
    assert (Action.TX, Verdict.ICMP_ECHO) == (outcome.action, outcome.verdict)
    assert frames.MACS[6:] + frames.MACS[:6] + b"\x08\x00" + answer == outcome.frame


def test_an_icmp_error_follows_its_flow_and_writes_no_record(node: Node) -> None:
    node.run(frames.tcp_to(FLOW, SYN))
    outcome = node.run(frames.icmp_error_to(FLOW, frames.quoted_from(FLOW)))
    assert (Verdict.ICMP_ERROR, v4("10.244.0.1")) == (outcome.verdict, pod_of(outcome))
    assert ([FLOW.key], []) == (list(node.maps.embryonic), list(node.maps.records))
    stranger = Flow(FLOW.client, 40_000, TCP_VIP._replace(port=81))
    assert Verdict.DROP_ICMP == node.run(frames.icmp_error_to(FLOW, frames.quoted_from(stranger))).verdict
    assert Verdict.DROP_ICMP == node.run(frames.icmp_error_to(FLOW, frames.quoted_from(FLOW, l4_bytes=7))).verdict
    node.own(PEER)
    assert Verdict.ICMP_ERROR == node.run(frames.icmp_error_to(FLOW, frames.quoted_from(FLOW))).verdict
    assert 0 == len(node.maps.pending)


# --- Step 8 -----------------------------------------------------------------------------------------------------------
def test_the_tunnels_door(node: Node) -> None:
    inner, forward = frames.tcp_to(FLOW, ACK), Forward(mapped(v4("10.244.0.4")), 9000)
    rubbish = frames.geneve(b"", 0x48F01D, b"rubbish")
    stranger = frames.tunnel(v4("10.9.9.9"), v4("10.0.0.1"), rubbish)
    assert Verdict.DROP_GENEVE_SOURCE == node.run(stranger).verdict
    assert Verdict.DROP_GENEVE_VNI == node.from_peer(forward, inner, vni=1).verdict
    member = frames.tunnel(v4("10.0.0.2"), v4("10.0.0.1"), rubbish)
    assert Verdict.DROP_GENEVE_MALFORMED == node.run(member).verdict
    assert Verdict.DROP_GENEVE_MALFORMED == node.from_peer(Forward(bytes(16), 1), inner).verdict
    assert Verdict.DROP_GENEVE_INNER == node.from_peer(forward, inner[:19]).verdict
    assert Verdict.DELIVERED == node.from_peer(forward, inner).verdict
    node.maps.config["self"] = limits.MEMBER_NONE
    assert Verdict.DELIVERED == node.from_peer(forward, inner).verdict
    assert Verdict.DROP_GENEVE_INNER == node.from_peer(Relay(1, 1, PEER), inner).verdict


def test_delivery_and_reply(node: Node) -> None:
    pod = v4("10.244.0.4")
    forward = Forward(mapped(pod), 9000)
    outcome = node.from_peer(forward, frames.tcp_to(FLOW, SYN))
    expected = frames.ipv4(FLOW.client, pod, 6, frames.tcp(FLOW.client, pod, FLOW.port, 9000, SYN))
    assert (Action.PASS, frames.frame(expected)) == (outcome.action, outcome.frame)
    answer = frames.ipv4(pod, FLOW.client, 6, frames.tcp(pod, FLOW.client, 9000, FLOW.port, SYN | ACK))
    reply = oracle_reply.tc(node.maps, frames.frame(answer), NOW_NS)
    back = frames.ipv4(VIP[12:], FLOW.client, 6, frames.tcp(VIP[12:], FLOW.client, 80, FLOW.port, SYN | ACK))
    assert (Verdict.REPLY, frames.frame(back)) == (reply.verdict, reply.frame)
    assert None is oracle_reply.tc(node.maps, frames.frame(back), NOW_NS).verdict


def test_what_nat_remembers_of_a_connections_end(node: Node) -> None:
    pod = v4("10.244.0.4")
    key = nat_key(mapped(FLOW.client), mapped(pod), FLOW.port, 9000, 6)
    forward = Forward(mapped(pod), 9000)
    seen = []
    for flags in (SYN, FIN | ACK, RST, SYN):
        node.from_peer(forward, frames.tcp_to(FLOW, flags))
        seen.append(node.maps.unassured.rows[key].flags)
    syn, fin_in = layout.NAT_SYN, layout.NAT_FIN_IN
    assert [syn, fin_in, fin_in | layout.NAT_RST, syn] == seen
    answer = frames.ipv4(pod, FLOW.client, 6, frames.tcp(pod, FLOW.client, 9000, FLOW.port, FIN | ACK))
    oracle_reply.tc(node.maps, frames.frame(answer), NOW_NS)
    assert syn | layout.NAT_FIN_OUT | layout.NAT_ANSWERED == node.maps.unassured.rows[key].flags
    node.from_peer(forward, frames.tcp_to(FLOW, ACK))
    assert layout.NAT_FIN_OUT == node.maps.nat.rows[key].flags, "what has been seen goes along"
    node.from_peer(forward, frames.tcp_to(FLOW, SYN))
    assert 0 == node.maps.nat.rows[key].flags


def test_a_chain_is_recorded_extended_and_ends_at_the_backend(node: Node) -> None:
    node.own(SELF, THIRD)
    outcome = node.from_peer(Chain(CURRENT, 9, False, (PEER,), (SELF,)), frames.tcp_to(FLOW, SYN))
    assert Verdict.CHAIN_RECORDED == outcome.verdict
    assert Chain(CURRENT, 17, False, (PEER, SELF), (THIRD,)).pack() == option_of(outcome)
    assert Record(CURRENT, 0, NOW_NS) == node.maps.embryonic.get(FLOW.key)
    outcome = node.from_peer(Chain(CURRENT, 9, True, (THIRD, PEER), (SELF,)), frames.tcp_to(FLOW, ACK))
    assert (Verdict.CHAIN_LAST, v4("10.244.0.1")) == (outcome.verdict, pod_of(outcome))
    assert ([FLOW.key], []) == (list(node.maps.records), list(node.maps.embryonic))


@pytest.mark.parametrize(("backend", "round_"), [(CURRENT, layout.SLOT_ROUND_ONE), (BASE, 0)])
def test_what_a_chain_brings_to_a_steady_slot_counts_once_that_tracks(node: Node, backend: int, round_: int) -> None:
    """Its sender has prepared a change already: `current` here will be base. Another backend is one of before."""
    node.own(PEER, SELF)
    node.slots(tracking=False)
    outcome = node.from_peer(Chain(backend, 9, True, (PEER,), (SELF,)), frames.tcp_to(FLOW, ACK))
    assert Verdict.CHAIN_LAST == outcome.verdict
    assert Record(backend, round_ | limits.CHAIN_AGAIN_MAX, NOW_NS) == node.maps.records.get(FLOW.key)


@pytest.mark.parametrize("full", [False, True])
def test_a_second_syn_travels_the_chain_again_for_the_first_may_be_lost(node: Node, full: bool) -> None:
    node.own(SELF, PEER)
    table = node.maps.records if full else node.maps.embryonic
    table.put(FLOW.key, Record(BASE, 0, 1))
    outcome = node.run(frames.tcp_to(FLOW, SYN))
    assert Verdict.RECORD_HIT == outcome.verdict
    assert Chain(BASE, 17, full, (SELF,), (PEER,)).pack() == option_of(outcome)
    assert Record(BASE, 0, NOW_NS) == table.get(FLOW.key)
    assert NOW_NS == node.stamped()


def test_a_record_wins_over_a_chain(node: Node) -> None:
    node.own(PEER, SELF)
    node.maps.records.put(FLOW.key, Record(BASE, 0, 1))
    outcome = node.from_peer(Chain(CURRENT, 9, True, (PEER,), (SELF, THIRD)), frames.tcp_to(FLOW, ACK))
    assert Verdict.CHAIN_CONFLICT == outcome.verdict
    assert Chain(BASE, 17, True, (SELF,), (PEER, THIRD), overrules=True).pack() == option_of(outcome)
    assert Record(BASE, 0, NOW_NS) == node.maps.records.get(FLOW.key)
    assert NOW_NS == node.stamped()


@pytest.mark.parametrize(
    ("recorded", "brought", "full", "sticky", "wins"),
    [
        (BASE, CURRENT, True, False, CURRENT),
        (CURRENT, BASE, True, False, CURRENT),
        (BASE, CURRENT, True, True, CURRENT),
        (BASE, DEAD, True, False, None),
        (BASE, CURRENT, False, False, BASE),
        (LOCAL, CURRENT, True, False, LOCAL),
    ],
)
def test_of_two_records_of_a_flow_without_a_first_packet_the_one_that_is_not_of_base_is_older(
    node: Node, recorded: int, brought: int, full: bool, sticky: bool, wins: int | None
) -> None:
    node.own(PEER, SELF)
    flow = Flow(FLOW.client, 0, STICKY_VIP) if sticky else UDP_FLOW
    packet = frames.tcp_to(Flow(FLOW.client, 7, STICKY_VIP), ACK) if sticky else frames.udp_to(UDP_FLOW, b"x")
    node.maps.records.put(flow.key, Record(recorded, 0, 1))
    outcome = node.from_peer(Chain(brought, 9, full, (PEER,), (SELF, THIRD)), packet)
    if wins is None:
        assert Verdict.DROP_NO_BACKEND == outcome.verdict
        return
    on, back = (
        Chain(wins, 17, full, (PEER, SELF), (THIRD,)),
        Chain(wins, 17, True, (SELF,), (PEER, THIRD), overrules=True),
    )
    assert (Verdict.CHAIN_RECORDED if wins == brought else Verdict.CHAIN_CONFLICT) == outcome.verdict
    assert (on if wins == brought else back).pack() == option_of(outcome)
    found = node.maps.records.get(flow.key)
    assert found is not None
    assert (wins, NOW_NS) == (found.backend, found.seen_ns)


@pytest.mark.parametrize(
    ("flags", "backend", "seen_ns", "wins"),
    [
        (SYN, CURRENT, 1, "chain"),
        (ACK, CURRENT, 1, "record"),
        (SYN, LOCAL, 1, "record"),
        (SYN, CURRENT, NOW_NS - limits.REUSE_NS, "record"),
    ],
)
def test_a_five_tuple_that_is_used_again_follows_the_replica_that_has_dropped_its_record(
    node: Node, flags: int, backend: int, seen_ns: int, wins: str
) -> None:
    node.own(PEER, SELF)
    node.maps.records.put(FLOW.key, Record(BASE, 0, seen_ns))
    outcome = node.from_peer(Chain(backend, 9, False, (PEER,), (SELF,)), frames.tcp_to(FLOW, flags))
    if wins == "chain":
        assert Verdict.CHAIN_LAST == outcome.verdict
        assert ([], [FLOW.key]) == (list(node.maps.records), list(node.maps.embryonic))
        assert Record(CURRENT, 0, NOW_NS) == node.maps.embryonic.get(FLOW.key)
    else:
        assert Verdict.CHAIN_CONFLICT == outcome.verdict
        assert Record(BASE, 0, NOW_NS) == node.maps.records.get(FLOW.key)


def test_where_a_backup_has_agreed_a_record_of_another_backend_is_none(node: Node) -> None:
    node.own(PEER, SELF)
    node.slots(CURRENT, CURRENT, agreed=True)
    node.maps.records.put(FLOW.key, Record(BASE, 0, NOW_NS))
    outcome = node.run(frames.tcp_to(FLOW, SYN))
    assert Record(CURRENT, 0, NOW_NS) == node.maps.embryonic.get(FLOW.key)
    assert Chain(CURRENT, 17, False, (SELF,), (PEER,)).pack() == option_of(outcome)


def test_a_chain_without_room_goes_on(node: Node) -> None:
    node.own(PEER, SELF)
    node.maps.records = FlowTable(0, evicts=False)
    outcome = node.from_peer(Chain(CURRENT, 9, True, (PEER,), (SELF,)), frames.tcp_to(FLOW, ACK))
    assert Verdict.CHAIN_LAST == outcome.verdict
    assert NOW_NS == node.maps.vip_stats[TCP_VIP.id]["unrecorded_ns"]
    outcome = node.from_peer(Chain(DEAD, 9, True, (PEER,), (SELF,)), frames.tcp_to(FLOW, ACK))
    assert Verdict.DROP_NO_BACKEND == outcome.verdict


# --- Step 9 -----------------------------------------------------------------------------------------------------------
def test_a_local_backend_gets_it_at_once(node: Node) -> None:
    node.slots(current=LOCAL, tracking=False)
    outcome = node.run(frames.tcp_to(FLOW, SYN))
    pod = v4("10.244.0.4")
    expected = frames.ipv4(FLOW.client, pod, 6, frames.tcp(FLOW.client, pod, FLOW.port, 9000, SYN))
    assert (Action.PASS, Verdict.LOCAL) == (outcome.action, outcome.verdict)
    assert frames.frame(expected) == outcome.frame
    assert (0, 1) == (len(node.maps.nat), len(node.maps.unassured))


def test_too_big_without_an_answer(node: Node) -> None:
    node.maps.nodes["mtu"] = 150
    big = frames.tcp_to(FLOW, ACK, bytes(200))
    fragmentable = frames.tcp_to(FLOW, ACK, bytes(200), fragment=0)
    error = frames.ipv4(v4("198.18.0.1"), VIP[12:], 1, frames.icmp(3, 4, bytes(4), frames.quoted_from(FLOW, 84)), DF)
    for outcome in (node.run(fragmentable), node.from_peer(Relay(1, 1, PEER), big), node.run(error + bytes(40))):
        assert (Action.DROP, Verdict.TOO_BIG) == (outcome.action, outcome.verdict)


def test_no_room_in_front_of_the_frame(node: Node) -> None:
    node.maps.headroom_bytes = 11
    assert Verdict.DROP_NO_HEADROOM == node.run(frames.tcp_to(FLOW, ACK)).verdict
    outcome = node.from_peer(Relay(1, 1, PEER), frames.tcp_to(FLOW, ACK))
    assert Verdict.DROP_NO_HEADROOM == outcome.verdict, "FORWARD is 12 bytes longer than RELAY"
    assert Verdict.CHAIN_LAST == node.from_peer(Chain(1, 9, True, (PEER,), ()), frames.tcp_to(FLOW, ACK)).verdict


# --- hf_lookup --------------------------------------------------------------------------------------------------------
def test_lookup(node: Node) -> None:
    others = [Flow(FLOW.client, port, TCP_VIP).key for port in (1, 2)]
    node.maps.records.put(FLOW.key, Record(1, 0, 10))
    node.maps.embryonic.put(FLOW.key, Record(2, 0, 20))
    node.maps.embryonic.put(others[0], Record(3, 0, 30))
    expected = [Record(1, 0, 10), Record(3, layout.RECORD_EMBRYONIC, 30), Record(0, layout.RECORD_MISSING, 0)]
    assert expected == node.maps.lookup([FLOW.key, *others])
