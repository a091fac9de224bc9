"""What a node shares, by example: Geneve's port with other overlays, and a pod's port between VIPs.

Of the steps of ``lbpod/bpf/README.md`` this is the eighth; what else there is to it is in ``test_oracle.py``.
"""

import pytest

from lbpod.core.maps import mapped
from lbpod.core.oracle import Action
from lbpod.core.packets import Forward
from lbpod.core.verdicts import Verdict
from tests.bpf import frames
from tests.bpf.frames import ACK
from tests.bpf.world import v4
from tests.oracle_scene import FLOW, Node, lone_lb


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
