"""What a node shares, by example: Geneve's port with other overlays, a pod's port between VIPs, its uplink with others.

Of the steps of ``lbpod/bpf/README.md`` these are the eighth and the last; more of them is in ``test_oracle.py``.
"""

import pytest

from lbpod.core import layout, limits, oracle_reply
from lbpod.core.maps import Nat, mapped, nat_key
from lbpod.core.oracle import Action
from lbpod.core.packets import Forward
from lbpod.core.verdicts import Verdict
from tests.bpf import frames, world
from tests.bpf.frames import ACK, FIN, RST, SYN
from tests.bpf.world import Flow, v4
from tests.oracle_scene import CURRENT, FLOW, LOCAL, NOW_NS, TCP_VIP, UDP_FLOW, VIP, Node, lone_lb


@pytest.fixture
def node() -> Node:
    return lone_lb()


ANOTHERS = {
    "of OVN: Ethernet inside, its option": frames.geneve(
        bytes.fromhex("0102800100010002"), 5, bytes(60), protocol=0x6558
    ),
    "Ethernet inside, and our VNI": frames.geneve(b"", 0x48F01D, bytes(60), protocol=0x6558),
    "IPv4 inside, another VNI": frames.geneve(b"", 5, frames.tcp_to(FLOW, ACK)),
    "another VNI, our option's class": frames.geneve(bytes.fromhex("ff488400"), 5, frames.tcp_to(FLOW, ACK)),
    "a control packet of a later version": frames.geneve(b"", 5, b"", flags=0x80, version=1),
    "less than a Geneve header": frames.geneve(b"", 0x48F01D, b"")[:7],
    "nothing at all": b"",
}


@pytest.mark.parametrize("source", ["10.0.0.2", "10.9.9.9"])
@pytest.mark.parametrize("name", ANOTHERS)
def test_what_another_overlay_sends_to_this_node_goes_on_as_it_came(node: Node, name: str, source: str) -> None:
    packet = frames.tunnel(v4(source), v4("10.0.0.1"), ANOTHERS[name])
    outcome = node.run(packet)
    assert (Action.PASS, Verdict.PASS_OTHER) == (outcome.action, outcome.verdict)
    assert frames.frame(packet) == outcome.frame


def test_a_whole_packet_of_ours_with_another_vni_is_a_members_mistake_or_nobodys(node: Node) -> None:
    """A stranger's is another cluster's: it meets our addresses by whatever mistake, and is not ours to judge."""
    sent = frames.geneve(Forward(mapped(v4("10.244.0.4")), 9000).pack(), 1, frames.tcp_to(FLOW, ACK))
    found = [node.run(frames.tunnel(v4(source), v4("10.0.0.1"), sent)).verdict for source in ("10.0.0.2", "10.9.9.9")]
    assert [Verdict.DROP_GENEVE_VNI, Verdict.PASS_OTHER] == found


def test_our_vni_is_ours_whatever_the_lengths_say(node: Node) -> None:
    packet = frames.tunnel(v4("10.0.0.2"), v4("10.0.0.1"), frames.geneve(b"", 0x48F01D, b""))
    assert Verdict.DROP_GENEVE_MALFORMED == node.run(packet[:2] + b"\x00\x1c" + packet[4:]).verdict


# --- A pod's port -----------------------------------------------------------------------------------------------------
POD = v4("10.244.0.4")
OTHER = TCP_VIP._replace(id=4, port=81)
OTHERS = Flow(FLOW.client, FLOW.port, OTHER)
"""The same client's port, to another VIP."""
KEY = nat_key(mapped(FLOW.client), mapped(POD), FLOW.port, 9000, layout.PROTOCOL_TCP)
FINS = layout.NAT_FIN_IN | layout.NAT_FIN_OUT


@pytest.fixture
def host(node: Node) -> Node:
    """A node with two VIPs on one port of its pod."""
    world.put_vip(node.maps, OTHER)
    world.put_slots(node.maps, OTHER.id, node.maps.slots[TCP_VIP.id].copy())
    node.slots(current=LOCAL, tracking=False)
    return node


@pytest.mark.parametrize("flags", [SYN, ACK, FIN | ACK, RST])
@pytest.mark.parametrize("local", [False, True])
def test_a_live_flow_keeps_its_place_at_the_pod_against_another_vips(host: Node, flags: int, local: bool) -> None:
    """By tunnel as from the router, whatever the newcomer sends; and nothing is noted of it."""

    def arrives(packet: bytes) -> Verdict | None:
        return (host.run(packet) if local else host.from_peer(Forward(mapped(POD), 9000), packet)).verdict

    arrives(frames.tcp_to(FLOW, SYN))
    before = dict(host.maps.unassured.rows)
    assert Verdict.DROP_NAT_TAKEN == arrives(frames.tcp_to(OTHERS, flags))
    assert before == host.maps.unassured.rows
    assert not host.maps.nat.rows
    assert (Verdict.LOCAL if local else Verdict.DELIVERED) == arrives(frames.tcp_to(FLOW, ACK))


@pytest.mark.parametrize(
    ("flags", "silent_ns", "goes_on"),
    [
        (0, limits.NAT_TAKEN_NS - 1, True),
        (0, limits.NAT_TAKEN_NS, False),
        (layout.NAT_FIN_IN, 0, True),
        (layout.NAT_FIN_OUT, 0, True),
        (FINS, 0, False),
        (layout.NAT_RST, 0, False),
    ],
)
def test_a_flow_gives_its_place_up_when_it_has_ended_or_is_silent(
    host: Node, flags: int, silent_ns: int, goes_on: bool
) -> None:
    now_ns = NOW_NS + limits.NAT_TAKEN_NS
    host.maps.nat.put(KEY, Nat(VIP, 80, flags, now_ns - silent_ns))
    found = host.run(frames.tcp_to(OTHERS, SYN), now_ns=now_ns)
    assert (Verdict.DROP_NAT_TAKEN if goes_on else Verdict.LOCAL) == found.verdict
    assert (80 if goes_on else 81) == host.maps.nat.rows[KEY].vip_port


@pytest.mark.parametrize(
    ("silent_ns", "goes_on"), [(limits.NAT_TAKEN_BRIEFLY_NS - 1, True), (limits.NAT_TAKEN_BRIEFLY_NS, False)]
)
def test_a_mere_syn_keeps_its_place_for_a_minute(host: Node, silent_ns: int, goes_on: bool) -> None:
    """A SYN with a made-up address, a client that lost its power in the middle of a handshake."""
    host.run(frames.tcp_to(FLOW, SYN))
    found = host.run(frames.tcp_to(OTHERS, SYN), now_ns=NOW_NS + silent_ns)
    assert (Verdict.DROP_NAT_TAKEN if goes_on else Verdict.LOCAL) == found.verdict
    assert (80 if goes_on else 81) == host.maps.unassured.rows[KEY].vip_port


def test_a_connection_whose_entry_was_lost_keeps_its_place_like_any_other(host: Node) -> None:
    """Its client has acknowledged something, to which its pod says nothing."""
    host.run(frames.tcp_to(FLOW, ACK))
    found = host.run(frames.tcp_to(OTHERS, SYN), now_ns=NOW_NS + limits.NAT_TAKEN_NS - 1)
    assert Verdict.DROP_NAT_TAKEN == found.verdict


@pytest.mark.parametrize(
    ("silent_ns", "goes_on"), [(limits.NAT_TAKEN_BRIEFLY_NS - 1, True), (limits.NAT_TAKEN_BRIEFLY_NS, False)]
)
def test_udp_has_no_end_but_silence(host: Node, silent_ns: int, goes_on: bool) -> None:
    key = nat_key(mapped(FLOW.client), mapped(POD), FLOW.port, 9000, layout.PROTOCOL_UDP)
    now_ns = NOW_NS + limits.NAT_TAKEN_BRIEFLY_NS
    host.maps.nat.put(key, Nat(VIP, 53, 0, now_ns - silent_ns))
    found = host.run(frames.udp_to(UDP_FLOW, b"x"), now_ns=now_ns)
    assert (Verdict.DROP_NAT_TAKEN if goes_on else Verdict.LOCAL) == found.verdict


def test_what_the_pod_says_counts_as_much_as_what_the_client_says(host: Node) -> None:
    host.run(frames.tcp_to(FLOW, ACK))
    later_ns = NOW_NS + limits.NAT_TAKEN_NS
    answer = frames.ipv4(POD, FLOW.client, 6, frames.tcp(POD, FLOW.client, 9000, FLOW.port, ACK))
    oracle_reply.tc(host.maps, frames.frame(answer), later_ns - 1)
    assert Verdict.DROP_NAT_TAKEN == host.run(frames.tcp_to(OTHERS, SYN), now_ns=later_ns).verdict


def test_a_flow_to_another_pod_is_in_nobodys_way(host: Node) -> None:
    host.run(frames.tcp_to(FLOW, SYN))
    elsewhere = Forward(mapped(v4("10.244.0.5")), 9000)
    assert Verdict.DELIVERED == host.from_peer(elsewhere, frames.tcp_to(OTHERS, SYN)).verdict
    host.maps.slots[OTHER.id][:] = world.slot_word(CURRENT)
    assert Verdict.STEADY == host.run(frames.tcp_to(OTHERS, SYN)).verdict


@pytest.mark.parametrize("protocol", [frames.TCP, 132])
@pytest.mark.parametrize(("to_vip", "goes_back"), [(True, True), (True, False), (False, True)])
def test_what_nobody_serves_goes_round_in_no_circle(node: Node, protocol: int, to_vip: bool, goes_back: bool) -> None:
    target = FLOW.vip.address[12:] if to_vip else v4("198.51.100.1")
    packet = frames.frame(frames.ipv4(FLOW.client, target, protocol, bytes(20)))
    outcome = oracle_reply.tc(node.maps, packet, NOW_NS, goes_back=goes_back)
    assert (Verdict.DROP_UNSERVED if to_vip and goes_back else None) == outcome.verdict
    assert (Action.DROP if to_vip and goes_back else Action.PASS, packet) == (outcome.action, outcome.frame)
