"""The host agent's word: which slots have no live flow to its pods, and when it cannot tell."""

import numpy as np
import pytest

from lbpod.core.layout import NAT_ANSWERED, NAT_ASSURED, NAT_FIN_IN, NAT_FIN_OUT, NAT_RST, NAT_SYN
from lbpod.core.limits import MARGIN_NS, NAT_DUMP_AGE_NS, NAT_HALF_OPEN_NS, QUEUE_MAX, SLOT_COUNT
from lbpod.core.maps import Nat, nat_key
from lbpod.core.messages import Called, LookNat, NatLooked, QuietAnswer, QuietCall, Refuse, Reply, Tick, Woke
from lbpod.core.model import Affinity
from lbpod.datapath.port import NatMap
from tests.keepers import SECOND_NS, VIP_ADDRESS, Cluster, Node, pod_address, vip
from tests.unit.test_keeper_resolve import flows_of, slots_of

CLOSED = NAT_FIN_IN | NAT_FIN_OUT


def served() -> tuple[Cluster, Node]:
    """Pods 1 and 3 run on host1; the VIP's idle time is 8 s."""
    cluster = Cluster()
    cluster.change(vip([1, 2, 3]))
    return cluster, cluster["host1"]


def translate(
    node: Node, number: int, seen_ns: int, flags: int = 0, pod: int = 1, port: int = 80, assured: bool = True
) -> int:
    """A translated flow of client `number` to a pod; returns its slot."""
    flow = flows_of(number + 1)[number]
    key = nat_key(flow["addr"].tobytes(), pod_address(pod), int(flow["port_be"]), 8080, 6)
    table = node.datapath.maps.nat if assured else node.datapath.maps.unassured
    table.put(key, Nat(VIP_ADDRESS, port, flags, seen_ns))
    return int(slots_of(flows_of(number + 1))[number])


def call(slots: list[int], backends: tuple[int, ...] = (1,), vip_id: int = 1) -> QuietCall:
    return QuietCall(vip_id, np.array(slots, "<u2").tobytes(), np.array(backends, "<u4").tobytes())


def quiet(node: Node, body: QuietCall, now_ns: int) -> list[int] | None:
    """Per slot; None where it cannot tell."""
    answer = node.call(body, now_ns)
    assert isinstance(answer, Reply)
    assert isinstance(answer.body, QuietAnswer)
    return list(answer.body.quiet) if answer.body.can_tell else None


@pytest.mark.parametrize(
    ("flags", "silent_ns", "is_quiet"),
    [
        (0, 0, 0),
        (NAT_SYN, NAT_HALF_OPEN_NS, 0),
        (NAT_SYN, NAT_HALF_OPEN_NS + 1, 1),
        (NAT_SYN | NAT_ANSWERED, NAT_HALF_OPEN_NS + 1, 1),
        (0, NAT_HALF_OPEN_NS + 1, 0),
        (NAT_ANSWERED | NAT_ASSURED, 0, 1),
    ],
)
def test_what_is_not_assured_is_alive_until_its_handshake_has_come_to_nothing(
    flags: int, silent_ns: int, is_quiet: int
) -> None:
    """And what is assured counts where it is in nat."""
    cluster = Cluster()
    cluster.change(vip([1, 2, 3], idle_s=3_600))
    node = cluster["host1"]
    now_ns = cluster.now_ns + 2 * NAT_HALF_OPEN_NS
    slot = translate(node, 5, now_ns - silent_ns, flags, assured=False)
    assert [is_quiet] == quiet(node, call([slot]), now_ns)


@pytest.mark.parametrize(
    ("flags", "silent_ns", "is_quiet"),
    [
        (0, 0, 0),
        (0, 8 * SECOND_NS + MARGIN_NS, 0),
        (0, 8 * SECOND_NS + MARGIN_NS + 1, 1),
        (NAT_FIN_IN, 2 * MARGIN_NS, 0),
        (NAT_FIN_OUT, 2 * MARGIN_NS, 0),
        (CLOSED, MARGIN_NS, 0),
        (CLOSED, MARGIN_NS + 1, 1),
        (NAT_RST, 0, 0),
        (NAT_RST, MARGIN_NS + 1, 1),
    ],
)
def test_a_flow_is_over_when_both_sides_have_closed_it_or_it_was_silent(
    flags: int, silent_ns: int, is_quiet: int
) -> None:
    cluster, node = served()
    slot = translate(node, 0, cluster.now_ns - silent_ns, flags)
    assert [is_quiet, 1] == quiet(node, call([slot, slot ^ 1]), cluster.now_ns)


def test_with_affinity_a_client_s_flow_is_not_over_with_its_connection() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2, 3], affinity=Affinity.CLIENT_IP))
    node = cluster["host1"]
    translate(node, 0, cluster.now_ns - 8 * SECOND_NS, CLOSED)
    everywhere = call(list(range(SLOT_COUNT)))
    assert 1 == quiet_count(node, everywhere, cluster.now_ns), "it may open another one until the idle timeout"
    cluster.run(SECOND_NS + MARGIN_NS)
    assert 0 == quiet_count(node, everywhere, cluster.now_ns)


def test_time_that_a_host_may_have_slept_is_nobody_s_silence() -> None:
    """Its clock may as well have leapt. Once an idle timeout has passed since, it is believed again."""
    cluster, node = served()
    slot = translate(node, 0, cluster.now_ns)
    node.feed(Woke(9 * SECOND_NS), cluster.now_ns + 9 * SECOND_NS)
    assert [0] == quiet(node, call([slot]), cluster.now_ns + 18 * SECOND_NS)
    assert [1] == quiet(node, call([slot]), cluster.now_ns + 19 * SECOND_NS)
    slot = translate(node, 0, cluster.now_ns + 30 * SECOND_NS)
    assert [0] == quiet(node, call([slot]), cluster.now_ns + 39 * SECOND_NS)
    assert [1] == quiet(node, call([slot]), cluster.now_ns + 40 * SECOND_NS)


def quiet_count(node: Node, body: QuietCall, now_ns: int) -> int:
    """Slots that are not quiet."""
    return (quiet(node, body, now_ns) or []).count(0)


def test_only_flows_to_the_backends_that_were_asked_about_count() -> None:
    cluster, node = served()
    slot = translate(node, 0, cluster.now_ns, pod=3)
    assert [1] == quiet(node, call([slot], (1,)), cluster.now_ns)
    assert [0] == quiet(node, call([slot], (1, 3)), cluster.now_ns)


def test_flows_of_another_vip_do_not_count() -> None:
    cluster, node = served()
    slot = translate(node, 0, cluster.now_ns, port=81)
    assert [1] == quiet(node, call([slot]), cluster.now_ns)


def test_with_affinity_the_slot_is_the_client_s() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2], affinity=Affinity.CLIENT_IP))
    node = cluster["host1"]
    translate(node, 0, cluster.now_ns)
    flows = flows_of(1)
    flows["port_be"] = 0
    assert [0] == quiet(node, call([int(slots_of(flows)[0])]), cluster.now_ns)


def test_what_it_does_not_know_or_may_have_lost_it_cannot_tell() -> None:
    cluster, node = served()
    assert quiet(node, call([1], (99,)), cluster.now_ns) is None
    assert quiet(node, call([1], vip_id=9), cluster.now_ns) is None
    assert quiet(Cluster()["host1"], call([1]), cluster.now_ns) is None
    node.datapath.maps.nat.count_max = 1
    translate(node, 0, cluster.now_ns)
    assert quiet(node, call([1]), cluster.now_ns + SECOND_NS) is None


def lists_begun(node: Node) -> int:
    return sum(isinstance(effect, LookNat) and effect.cursor is None for effect in node.effects)


def test_questions_that_come_together_share_one_list_that_does_not_grow_old() -> None:
    cluster, node = served()
    node.effects.clear()
    for _ in range(3):
        assert [1] == quiet(node, call([7]), cluster.now_ns)
    assert [1] == quiet(node, call([7]), cluster.now_ns + NAT_DUMP_AGE_NS)
    assert 1 == lists_begun(node)
    assert [1] == quiet(node, call([7]), cluster.now_ns + NAT_DUMP_AGE_NS + 1)
    assert 2 == lists_begun(node)
    node.feed(Tick(), cluster.now_ns + 3 * NAT_DUMP_AGE_NS)
    assert node.keeper._state.host.nat is None


def test_all_that_wait_for_a_list_are_answered_and_not_too_many_may_wait() -> None:
    cluster, node = served()
    now_ns = cluster.now_ns
    [look] = node.keeper.step(Called(1, call([7])), now_ns)
    assert isinstance(look, LookNat)
    for request in range(2, QUEUE_MAX + 1):
        assert [] == node.keeper.step(Called(request, call([7])), now_ns)
    [refuse] = node.keeper.step(Called(9_999, call([7])), now_ns)
    assert isinstance(refuse, Refuse)
    assert 503 == refuse.status
    keys, values, _ = node.datapath.nat_slice(NatMap.NAT, None)
    replies = node.keeper.step(NatLooked(look.token, keys, values, True, None, 100, 0), now_ns)
    assert list(range(1, QUEUE_MAX + 1)) == [reply.request for reply in replies if isinstance(reply, Reply)]


def test_a_list_that_cannot_be_made_is_answered_with_cannot_tell() -> None:
    cluster, node = served()
    node.fails = lambda effect: isinstance(effect, LookNat)
    assert quiet(node, call([7]), cluster.now_ns) is None
