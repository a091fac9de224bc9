"""`holdfast doctor`, run as a user would: what it prints, and an exit status that is what an agent would make of it."""

import os
from collections.abc import Iterator

import pytest

from lbpod.lab import Lab, Node, python

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
"""Root without its capabilities, as in many a container."""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Lab(nodes=1) as lab:
        yield lab.nodes[0]


def _doctor(node: Node, *options: str, through: tuple[str, ...] = ()) -> tuple[int, str]:
    done = node.run([*through, *python("-m", "lbpod.cli", "doctor", *options)], check=False)
    return done.returncode, done.stdout


def _row(text: str, feature: str) -> str:
    """The column beside the feature: yes, no or -."""
    return next(line for line in text.splitlines() if line.startswith(f"│ {feature} ")).split("│")[2].strip()


def test_a_machine_that_lacks_nothing_is_told_so(node: Node) -> None:
    status, text = _doctor(node, "--interface", "eth0")
    assert 0 == status, text
    assert f"uplink: eth0 ({node.address}, MTU 1600)" in text
    assert "yes" == _row(text, "native xdp")
    assert "│ no" not in text


@pytest.mark.parametrize(
    ("interface", "sentence", "row"),
    [
        ("lo", "the interface lo has no Ethernet address; choose another one with --interface", "yes"),
        ("nope", "there is no interface 'nope' here; `ip link` lists those that there are", "no"),
    ],
)
def test_an_uplink_that_no_agent_would_take_is_a_lack(node: Node, interface: str, sentence: str, row: str) -> None:
    status, text = _doctor(node, "--interface", interface)
    assert 1 == status, text
    assert f"uplink: {sentence}\n" in text
    assert row == _row(text, "interface")


def test_an_address_that_only_the_operator_knows_can_be_given(node: Node) -> None:
    status, text = _doctor(node, "--interface", "eth0", "--node-address", "192.0.2.77")
    assert 1 == status, text
    assert "uplink: --node-address is 192.0.2.77, which no interface here has" in text


def test_without_a_default_route_nothing_is_said_of_an_interface(node: Node) -> None:
    node.run(["ip", "route", "del", "default"], check=False)
    status, text = _doctor(node)
    assert 1 == status, text
    assert "uplink: there is no default route to tell the uplink by; name it with --interface\n" in text
    assert ["-", "-"] == [_row(text, feature) for feature in ("interface", "native xdp")]


def test_who_may_not_load_programs_is_told_so(node: Node) -> None:
    status, text = _doctor(node, "--interface", "eth0", through=POWERLESS)
    assert 1 == status, text
    assert ["no", "no"] == [_row(text, feature) for feature in ("privileges", "bpf")]
