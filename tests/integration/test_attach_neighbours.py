"""Next hops as the kernel sees them: found, followed when they change, given up when they go."""

import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lbpod.core.layout import NODE_REACHABLE
from lbpod.core.limits import REROUTE_PAUSE_NS
from lbpod.core.messages import Configure
from lbpod.core.packets import ipv4_header, node_checksum
from lbpod.datapath import misses, netlink
from lbpod.datapath.apply import Applier
from lbpod.datapath.memory import MemoryDatapath
from lbpod.datapath.neighbours import Neighbours, NextHop, node_row
from lbpod.datapath.port import DatapathError, Rows
from tests.agents import UPLINK, snapshot
from tests.integration.attach_spaces import Space, need_namespaces, wire
from tests.integration.netlink_between import Between

MAC_A, MAC_B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
SELF, ON_LINK, ROUTED, NOBODY, ELSEWHERE, IPV6 = range(6)


def address(text: str) -> bytes:
    return bytes(10) + b"\xff\xff" + socket.inet_aton(text)


NODES = {
    SELF: address("10.99.0.1"),
    ON_LINK: address("10.99.0.2"),
    ROUTED: address("10.77.3.4"),
    NOBODY: address("10.99.0.77"),
    ELSEWHERE: address("192.0.2.1"),
    IPV6: socket.inet_pton(socket.AF_INET6, "2001:db8::1"),
}


@pytest.fixture
def spaces(tmp_path: Path) -> Iterator[tuple[Space, Space]]:
    need_namespaces()
    with wire() as (here, there):
        here.ip(f"link set hfa0 address {MAC_A}")
        there.ip(f"link set hfb0 address {MAC_B}")
        here.ip("route add 10.77.0.0/16 via 10.99.0.2")
        yield here, there


@pytest.fixture
def neighbours(spaces: tuple[Space, Space]) -> Iterator[Neighbours]:
    watcher = spaces[0].run(lambda: Neighbours(NODES[SELF]))
    yield watcher
    watcher.close()


def row(watcher: Neighbours, node: int) -> Rows:
    indices, rows = watcher.rows([node])
    assert [node] == list(indices)
    return rows[:1]


def wait_until(watcher: Neighbours, seen: Callable[[], bool]) -> set[int]:
    """Handles events, as they come, until something is seen (ten seconds at most); the nodes that changed."""
    changed: set[int] = set()
    end = time.monotonic() + 10
    while not seen():
        assert time.monotonic() < end, "what was waited for did not happen"
        if select.select([watcher], [], [], 0.05)[0] or watcher.is_due():
            changed.update(watcher.handle_events())
    return changed


def is_reachable(watcher: Neighbours, node: int) -> bool:
    return bool(row(watcher, node)["flags"][0] & NODE_REACHABLE)


def test_a_row_has_what_the_outer_header_needs() -> None:
    source, target = address("10.1.2.3"), address("10.250.251.252")
    made = node_row(target, source, NextHop(7, bytes.fromhex("02000000000a"), bytes.fromhex("02000000000b"), 70_000))
    assert (target, 7, NODE_REACHABLE, 65_535) == (
        made["addr"][0].tobytes(), int(made["ifindex"][0]), int(made["flags"][0]), int(made["mtu"][0]),
    )  # fmt: skip
    assert ("02000000000a", "02000000000b") == (made["src_mac"][0].tobytes().hex(), made["dst_mac"][0].tobytes().hex())
    # What the program makes of it, for a packet of 1,000 bytes, is the checksum of the whole header.
    total = int(made["csum"][0]) + socket.htons(20 + 1_000)
    for _ in range(2):
        total = (total & 0xFFFF) + (total >> 16)
    expected = ipv4_header(source[12:], target[12:], 17, 1_000)[10:12]
    assert expected == (~total & 0xFFFF).to_bytes(2, "little")
    assert node_checksum(source[12:], target[12:]) == int(made["csum"][0])


def test_an_unreachable_node_has_its_address_and_nothing_else() -> None:
    made = node_row(address("10.1.2.3"), address("10.1.2.4"), None)
    assert address("10.1.2.3") == made["addr"][0].tobytes()
    made["addr"] = 0
    assert not any(made.tobytes())


def test_next_hops_are_found_without_any_traffic(neighbours: Neighbours, spaces: tuple[Space, Space]) -> None:
    assert tuple(NODES) == neighbours.set_nodes(NODES)
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK) and is_reachable(neighbours, ROUTED))
    for node in (ON_LINK, ROUTED):
        found = row(neighbours, node)
        assert NODES[node] == found["addr"][0].tobytes()
        assert MAC_B.replace(":", "") == found["dst_mac"][0].tobytes().hex()
        assert MAC_A.replace(":", "") == found["src_mac"][0].tobytes().hex()
        assert (1_500, node_checksum(NODES[SELF][12:], NODES[node][12:])) == (found["mtu"][0], found["csum"][0])
    assert not any(is_reachable(neighbours, node) for node in (SELF, NOBODY, ELSEWHERE, IPV6))
    indices, rows = neighbours.rows(NODES)
    assert (sorted(NODES), len(NODES)) == (list(indices), len(rows))
    assert "managed" in spaces[0].ip("-d neigh show 10.99.0.2") or neighbours.misses


def test_what_changes_is_followed(neighbours: Neighbours, spaces: tuple[Space, Space]) -> None:
    here, there = spaces
    neighbours.set_nodes(NODES)
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK) and is_reachable(neighbours, ROUTED))
    here.ip("route add 192.0.2.0/24 via 10.99.0.2 mtu 1300")
    wait_until(neighbours, lambda: is_reachable(neighbours, ELSEWHERE))
    assert 1_300 == row(neighbours, ELSEWHERE)["mtu"][0]
    here.ip("link set hfa0 mtu 1400")
    changed = wait_until(neighbours, lambda: row(neighbours, ON_LINK)["mtu"][0] == 1_400)
    assert {ON_LINK, ROUTED} == changed, "a route's own MTU, smaller than the link's, stays as it is"
    there.ip("link set hfb0 address 02:00:00:00:00:99")
    here.ip("neigh replace 10.99.0.2 lladdr 02:00:00:00:00:99 dev hfa0")
    changed = wait_until(neighbours, lambda: row(neighbours, ON_LINK)["dst_mac"][0][5] == 0x99)
    assert {ON_LINK, ROUTED, ELSEWHERE} == changed
    here.ip("route del 10.77.0.0/16")
    assert {ROUTED} == wait_until(neighbours, lambda: not is_reachable(neighbours, ROUTED))
    here.ip("link set hfa0 down")
    wait_until(neighbours, lambda: not is_reachable(neighbours, ON_LINK))
    here.ip("link set hfa0 up")
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK))


def test_a_kernel_without_managed_neighbours_is_asked_again_and_again(
    neighbours: Neighbours, spaces: tuple[Space, Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(misses, "_NTF_EXT_MANAGED", 0)
    neighbours.set_nodes({ON_LINK: NODES[ON_LINK]})
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK))
    assert {misses.Miss.MANAGED_NEIGHBOURS} == neighbours.misses
    spaces[0].ip("neigh flush dev hfa0")
    wait_until(neighbours, lambda: not is_reachable(neighbours, ON_LINK))
    neighbours.resolve_all()
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK))


def test_nothing_new_is_nothing_changed(neighbours: Neighbours) -> None:
    neighbours.set_nodes(NODES)
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK))
    time.sleep(0.2)
    neighbours.handle_events()
    before = neighbours.rows(NODES)[1].tobytes()
    assert () == neighbours.resolve_all()
    assert () == neighbours.set_nodes(NODES)
    assert before == neighbours.rows(NODES)[1].tobytes()


def test_a_node_that_leaves_is_forgotten_and_its_neighbour_released(
    neighbours: Neighbours, spaces: tuple[Space, Space]
) -> None:
    neighbours.set_nodes({ON_LINK: NODES[ON_LINK], NOBODY: NODES[NOBODY]})
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK))
    moved = address("10.77.9.9")
    assert (ON_LINK,) == neighbours.set_nodes({ON_LINK: moved})
    assert moved == row(neighbours, ON_LINK)["addr"][0].tobytes()
    assert "managed" not in spaces[0].ip("-d neigh show 10.99.0.77")
    with pytest.raises(KeyError):
        neighbours.rows([NOBODY])
    assert 0 == len(neighbours.rows(np.zeros(0, np.uint32).tolist())[1])


MOVED = address("10.77.9.9")
QUESTIONS = {
    "links": netlink.RTM_GETLINK,
    "neighbours": netlink.RTM_GETNEIGH,
    "routes": netlink.RTM_GETROUTE,
    "keep": netlink.RTM_NEWNEIGH,
}


def events_of(watcher: Neighbours, space: Space, line: str) -> None:
    """Has somebody else change something, and the watcher hear of it."""
    watcher.handle_events()
    space.ip(line)
    assert select.select([watcher], [], [], 5)[0]
    watcher.handle_events()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "ask", [Neighbours.resolve_all, lambda watcher: watcher.set_nodes({ROUTED: MOVED})], ids=["refresh", "nodes"]
)
def test_a_kernel_that_does_not_answer_takes_nothing_away(
    ask: Callable[[Neighbours], object], question: str, neighbours: Neighbours, spaces: tuple[Space, Space]
) -> None:
    """Whichever question it leaves unanswered: not a row, not a node, not a neighbour that it looks after."""
    here, _ = spaces
    neighbours.set_nodes(NODES)
    wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK) and is_reachable(neighbours, ROUTED))
    before = neighbours.rows(NODES)[1].tobytes()
    with Between(neighbours) as kernel:
        kernel.silent = QUESTIONS[question]
        with pytest.raises(DatapathError, match="does not answer"):
            ask(neighbours)
    events_of(neighbours, here, "neigh replace 10.99.0.55 lladdr 02:00:00:00:00:55 dev hfa0")
    assert before == neighbours.rows(NODES)[1].tobytes()
    events_of(neighbours, here, "link set lo txqueuelen 999")
    assert before == neighbours.rows(NODES)[1].tobytes()
    assert "managed" in here.ip("-d neigh show 10.99.0.2") or neighbours.misses
    assert (ROUTED,) == neighbours.set_nodes({ROUTED: MOVED})
    assert is_reachable(neighbours, ROUTED)


def test_nodes_that_could_not_be_told_are_those_from_before_for_whoever_writes_them(
    neighbours: Neighbours, spaces: tuple[Space, Space]
) -> None:
    """A node leaves, the kernel does not answer, and something changes before it is told again."""
    both = snapshot(1)
    alone = msgspec.structs.replace(snapshot(2, backends=1, ring=(0,)), nodes=both.nodes[:1])
    datapath = MemoryDatapath()
    applier = Applier(datapath, "n1", UPLINK, neighbours)
    applier.apply(Configure(both, None, frozenset({10}), frozenset({0, 1})))
    nodes = datapath.maps.nodes.copy()
    left = Configure(alone, None, frozenset({10}), frozenset({0}))
    with Between(neighbours) as kernel:
        kernel.silent = netlink.RTM_GETLINK
        with pytest.raises(DatapathError):
            applier.apply(left)
        spaces[0].ip("neigh replace 10.99.0.55 lladdr 02:00:00:00:00:55 dev hfa0")
        applier.take_hop_events()
    assert nodes.tobytes() == datapath.maps.nodes.tobytes()
    applier.apply(left)
    assert [True, False] == [bool(row["addr"].any()) for row in datapath.maps.nodes[1:3]]


def test_a_neighbour_that_finds_no_room_costs_its_own_node_and_no_other(
    neighbours: Neighbours, spaces: tuple[Space, Space]
) -> None:
    spaces[1].ip("addr add 10.99.0.9/24 dev hfb0")
    late = max(NODES) + 1  # asked for after the one that is refused
    with Between(neighbours) as kernel:
        kernel.no_room_for = frozenset({"10.99.0.2"})
        neighbours.set_nodes({**NODES, late: address("10.99.0.9")})
        wait_until(neighbours, lambda: is_reachable(neighbours, late))
        assert not is_reachable(neighbours, ON_LINK)
        assert misses.Miss.NEIGHBOUR_REFUSED in neighbours.misses
        kernel.no_room_for = frozenset({"10.99.0.77"})
        neighbours.resolve_all()
        wait_until(neighbours, lambda: is_reachable(neighbours, ON_LINK) and is_reachable(neighbours, ROUTED))
        assert misses.Miss.NEIGHBOUR_REFUSED in neighbours.misses
        kernel.no_room_for = frozenset()
        neighbours.resolve_all()
    assert misses.Miss.NEIGHBOUR_REFUSED not in neighbours.misses
    with Between(neighbours) as kernel:
        kernel.no_room_for = frozenset({"10.99.0.77"})
        neighbours.set_nodes({ON_LINK: NODES[ON_LINK]})  # nor does one that is to be released
    assert is_reachable(neighbours, ON_LINK)


def test_a_neighbour_that_has_gone_is_not_made_anew_to_be_released(
    neighbours: Neighbours, spaces: tuple[Space, Space]
) -> None:
    here, _ = spaces
    neighbours.set_nodes({ON_LINK: NODES[ON_LINK], NOBODY: NODES[NOBODY]})
    assert "10.99.0.77" in here.ip("neigh show nud all dev hfa0")
    here.ip("neigh del 10.99.0.77 dev hfa0")
    neighbours.set_nodes({ON_LINK: NODES[ON_LINK]})
    assert "10.99.0.77" not in here.ip("neigh show nud all dev hfa0")


def is_asked_because_of(watcher: Neighbours, space: Space, line: str, seconds: float) -> bool:
    """Whether routes are looked up again within this time."""
    with Between(watcher) as kernel:
        events_of(watcher, space, line)
        end = time.monotonic() + seconds
        while not kernel.asked[netlink.RTM_GETROUTE] and time.monotonic() < end:
            time.sleep(0.01)
            watcher.handle_events()
        return kernel.asked[netlink.RTM_GETROUTE] > 0


def test_only_a_route_that_leads_to_a_node_has_the_routes_looked_up_again(
    neighbours: Neighbours, spaces: tuple[Space, Space]
) -> None:
    here, _ = spaces
    neighbours.set_nodes(NODES)
    wait_until(neighbours, lambda: is_reachable(neighbours, ROUTED))
    for prefix in ("10.77.3.3/32", "10.77.3.5/32", "10.77.2.0/24", "203.0.113.0/24"):
        assert not is_asked_because_of(neighbours, here, f"route add {prefix} via 10.99.0.2", 0.3)
    for prefix in ("10.77.3.4/32", "10.77.3.0/24", "0.0.0.0/0"):
        assert is_asked_because_of(neighbours, here, f"route add {prefix} via 10.99.0.2", 5)
        assert is_asked_because_of(neighbours, here, f"route del {prefix} via 10.99.0.2", 5)
    assert not is_reachable(neighbours, ELSEWHERE)
    assert is_asked_because_of(neighbours, here, "route add 192.0.2.1 via 10.99.0.2", 5)
    assert is_reachable(neighbours, ELSEWHERE)


def test_a_storm_of_links_has_the_routes_looked_up_now_and_then(
    neighbours: Neighbours, spaces: tuple[Space, Space]
) -> None:
    here, _ = spaces
    neighbours.set_nodes(NODES)
    wait_until(neighbours, lambda: is_reachable(neighbours, ROUTED))
    began = time.monotonic()
    with Between(neighbours) as kernel:
        for length in range(60):
            events_of(neighbours, here, f"link set lo txqueuelen {900 + length}")
        here.ip("route add 192.0.2.0/24 via 10.99.0.2")
        wait_until(neighbours, lambda: is_reachable(neighbours, ELSEWHERE))
        look_ups = kernel.asked[netlink.RTM_GETROUTE] / (len(NODES) - 1)  # one node has no IPv4 address
    assert look_ups <= 2 + (time.monotonic() - began) * 1e9 / REROUTE_PAUSE_NS
    assert not neighbours.is_due()
