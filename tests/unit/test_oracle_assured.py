"""Only what a pod has answered, and whose client has spoken again, may take room from connections that are silent."""

import pytest

from lbpod.core import layout, oracle_reply, packets
from lbpod.core.maps import Nat, mapped, nat_key
from lbpod.core.packets import Forward
from lbpod.core.verdicts import Verdict
from tests.bpf import frames
from tests.bpf.frames import ACK, FIN, RST, SYN
from tests.bpf.world import v4
from tests.oracle_scene import FLOW, NOW_NS, UDP_FLOW, VIP, Node, lone_lb

POD = v4("10.244.0.4")
FORWARD = Forward(mapped(POD), 9000)
TCP, UDP = layout.PROTOCOL_TCP, layout.PROTOCOL_UDP
IN, OUT = True, False


@pytest.fixture
def node() -> Node:
    return lone_lb()


def play(node: Node, script: list[tuple[bool, int]]) -> list[str]:
    """After each packet, where its TCP flow is noted: u(nassured), n(at), or both."""
    key, seen = nat_key(mapped(FLOW.client), mapped(POD), FLOW.port, 9000, TCP), []
    for inbound, flags in script:
        if inbound:
            assert Verdict.DELIVERED == node.from_peer(FORWARD, frames.tcp_to(FLOW, flags)).verdict
        else:
            l4 = frames.tcp(POD, FLOW.client, 9000, FLOW.port, flags)
            reply = oracle_reply.tc(node.maps, frames.frame(frames.ipv4(POD, FLOW.client, TCP, l4)), NOW_NS)
            assert Verdict.REPLY == reply.verdict, "whatever is known of a flow gets its VIP back"
        seen.append("u" * (key in node.maps.unassured.rows) + "n" * (key in node.maps.nat.rows))
    return seen


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param([(IN, SYN), (OUT, SYN | ACK), (IN, ACK)], ["u", "u", "un"], id="handshake"),
        pytest.param([(IN, SYN)] * 3, ["u"] * 3, id="nobody answers"),
        pytest.param([(IN, SYN), (OUT, SYN | ACK), (OUT, SYN | ACK)], ["u"] * 3, id="flood"),
        pytest.param([(IN, SYN), (OUT, SYN | ACK), (IN, RST)], ["u"] * 3, id="flood in the name of a machine"),
        pytest.param([(IN, SYN), (OUT, RST | ACK), (IN, ACK)], ["u"] * 3, id="closed port"),
        pytest.param([(IN, SYN), (OUT, SYN | ACK), (IN, SYN), (IN, ACK)], ["u"] * 4, id="begun anew"),
        pytest.param([(IN, SYN), (IN, ACK), (OUT, ACK)], ["u", "u", "un"], id="the answer came another way"),
        pytest.param([(IN, ACK), (OUT, RST)], ["u"] * 2, id="flood of ACKs"),
        pytest.param([(IN, ACK), (IN, ACK)], ["u"] * 2, id="no socket, and no RST"),
        pytest.param([(IN, ACK), (OUT, ACK)], ["u", "un"], id="a connection whose entry was lost"),
        pytest.param([(IN, FIN | ACK), (OUT, ACK), (OUT, FIN | ACK)], ["u", "un", "un"], id="its end"),
    ],
)
def test_who_is_assured(node: Node, script: list[tuple[bool, int]], expected: list[str]) -> None:
    assert expected == play(node, script)


def test_udp_is_assured_when_the_client_goes_on_after_an_answer(node: Node) -> None:
    def ask() -> None:
        node.from_peer(FORWARD, frames.udp_to(UDP_FLOW, b"question"))

    def answer() -> None:
        l4 = frames.udp(POD, UDP_FLOW.client, 9000, UDP_FLOW.port, b"answer")
        reply = oracle_reply.tc(node.maps, frames.frame(frames.ipv4(POD, UDP_FLOW.client, UDP, l4)), NOW_NS)
        assert Verdict.REPLY == reply.verdict

    for step in (ask, ask, answer, answer):
        step()
    assert (1, 0) == (len(node.maps.unassured), len(node.maps.nat))
    ask()
    assert 1 == len(node.maps.nat)


def test_what_is_assured_is_noted_in_nat_alone(node: Node) -> None:
    """The copy that is left for a sweep says what it said when it was made: nobody may take it for alive."""
    play(node, [(IN, SYN), (OUT, SYN | ACK), (IN, ACK)])
    (copy,) = node.maps.unassured.rows.values()
    assert layout.NAT_ANSWERED | layout.NAT_ASSURED == copy.flags
    play(node, [(IN, FIN | ACK), (OUT, FIN | ACK)])
    assert [copy] == list(node.maps.unassured.rows.values())
    assert [layout.NAT_FIN_IN | layout.NAT_FIN_OUT] == [entry.flags for entry in node.maps.nat.rows.values()]


def test_what_nat_has_lost_is_in_use_again_with_the_next_packet(node: Node) -> None:
    """An old entry that goes on saying "assured" would be passed over by lists of live flows, and swept."""
    assert ["u", "un"] == play(node, [(IN, ACK), (OUT, ACK)])
    node.maps.nat.rows.clear()
    assert ["u"] == play(node, [(IN, ACK)])
    assert [0] == [entry.flags for entry in node.maps.unassured.rows.values()]
    assert ["un"] == play(node, [(OUT, ACK)])
    node.maps.nat.rows.clear()
    assert ["un"] == play(node, [(OUT, ACK)]), "the pod speaks first"


def test_a_udp_flow_that_nat_has_lost_comes_back_with_the_pods_next_word(node: Node) -> None:
    key = nat_key(mapped(UDP_FLOW.client), mapped(POD), UDP_FLOW.port, 9000, UDP)
    node.maps.unassured.put(key, Nat(VIP, 53, layout.NAT_ANSWERED | layout.NAT_ASSURED, NOW_NS))
    l4 = frames.udp(POD, UDP_FLOW.client, 9000, UDP_FLOW.port, b"news")
    oracle_reply.tc(node.maps, frames.frame(frames.ipv4(POD, UDP_FLOW.client, UDP, l4)), NOW_NS)
    assert key in node.maps.nat.rows


def test_a_flood_evicts_its_like_and_no_silent_connection(node: Node) -> None:
    node.maps.unassured.count_max = node.maps.nat.count_max = 8
    play(node, [(IN, SYN), (OUT, SYN | ACK), (IN, ACK)])
    for number in range(100):
        for flags in (SYN, ACK):
            l4 = frames.tcp(v4("198.51.100.1"), VIP[12:], 1_000 + 2 * number + (flags == ACK), 80, flags)
            packet = frames.ipv4(v4("198.51.100.1"), VIP[12:], TCP, l4)
            assert Verdict.DELIVERED == node.from_peer(FORWARD, packet).verdict
    assert (8, 1) == (len(node.maps.unassured), len(node.maps.nat))
    push = frames.ipv4(POD, FLOW.client, TCP, frames.tcp(POD, FLOW.client, 9000, FLOW.port, ACK))
    pushed = oracle_reply.tc(node.maps, frames.frame(push), NOW_NS)
    assert Verdict.REPLY == pushed.verdict
    assert VIP[12:] == packets.source(pushed.frame[14:])
