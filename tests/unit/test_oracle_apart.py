"""Two replicas of a slot that cannot hear each other, though clients reach both: what each may still decide."""

import pytest

from lbpod.core.layout import MEMBER_DOUBTED, MEMBER_PRESENT, MEMBER_UP
from lbpod.core.limits import CHAIN_SURE_NS, RELAY_HOPS_MAX
from lbpod.core.maps import Record
from lbpod.core.packets import Chain, Relay
from lbpod.core.verdicts import Verdict
from tests.bpf import frames
from tests.bpf.frames import ACK, FIN, SYN
from tests.bpf.world import v4
from tests.oracle_scene import (
    BASE,
    CURRENT,
    FLOW,
    LOCAL,
    NOW_NS,
    PEER,
    SELF,
    THIRD,
    UDP_FLOW,
    Node,
    lone_lb,
    option_of,
    pod_of,
)

LONG_AGO_NS = NOW_NS - CHAIN_SURE_NS - 1


@pytest.fixture
def node() -> Node:
    """PEER, the backup, is not heard."""
    found = lone_lb()
    found.maps.members["flags"][PEER] = MEMBER_PRESENT
    return found


def test_a_syn_again_begins_the_flow_anew_at_base_where_the_first_one_may_have_come_nowhere(node: Node) -> None:
    node.maps.embryonic.put(FLOW.key, Record(CURRENT, 0, LONG_AGO_NS))
    outcome = node.run(frames.tcp_to(FLOW, SYN))
    assert Verdict.FIRST_ALONE == outcome.verdict
    assert v4(f"10.244.0.{BASE}") == pod_of(outcome)
    assert Record(BASE, 0, NOW_NS) == node.maps.embryonic.get(FLOW.key)
    assert NOW_NS == node.maps.vip_stats[FLOW.vip.id]["unrecorded_ns"]


@pytest.mark.parametrize("flags", [ACK, FIN | ACK])
def test_what_goes_on_with_such_a_flow_is_dropped_for_nobody_can_tell_where_it_began(node: Node, flags: int) -> None:
    before = Record(CURRENT, 0, LONG_AGO_NS)
    node.maps.embryonic.put(FLOW.key, before)
    assert Verdict.UNRECORDED_DROP == node.run(frames.tcp_to(FLOW, flags)).verdict
    assert before == node.maps.embryonic.get(FLOW.key)


@pytest.mark.parametrize(("backend", "seen_ns"), [(CURRENT, LONG_AGO_NS + 1), (BASE, LONG_AGO_NS)])
def test_an_answer_that_comes_soon_and_a_record_of_base_are_believed(node: Node, backend: int, seen_ns: int) -> None:
    node.maps.embryonic.put(FLOW.key, Record(backend, 0, seen_ns))
    assert Verdict.PROMOTED == node.run(frames.tcp_to(FLOW, ACK)).verdict


@pytest.mark.parametrize("flags", [MEMBER_UP, MEMBER_DOUBTED])
def test_what_comes_long_after_its_syn_is_for_the_other_replica_to_decide(flags: int) -> None:
    """It may not have heard this LB when the client tried again, and be heard now."""
    node = lone_lb()
    node.maps.members["flags"][PEER] = MEMBER_PRESENT | flags
    before = Record(CURRENT, 0, LONG_AGO_NS)
    node.maps.embryonic.put(FLOW.key, before)
    outcome = node.run(frames.tcp_to(FLOW, ACK))
    assert (Verdict.RELAYED, Relay(17, 1, SELF).pack()) == (outcome.verdict, option_of(outcome))
    assert before == node.maps.embryonic.get(FLOW.key)


def test_what_has_been_there_and_back_goes_where_its_syn_went_unless_somebody_is_not_heard(node: Node) -> None:
    """Neither knows more than that SYN."""
    back = Relay(17, RELAY_HOPS_MAX, SELF)
    node.maps.embryonic.put(FLOW.key, Record(CURRENT, 0, LONG_AGO_NS))
    assert Verdict.UNRECORDED_DROP == node.from_peer(back, frames.tcp_to(FLOW, ACK)).verdict
    node.maps.members["flags"][PEER] = MEMBER_PRESENT | MEMBER_UP
    assert Verdict.PROMOTED == node.from_peer(back, frames.tcp_to(FLOW, ACK)).verdict


def test_a_syn_again_goes_where_the_first_one_went_where_all_are_heard() -> None:
    node = lone_lb()
    node.maps.embryonic.put(FLOW.key, Record(CURRENT, 0, LONG_AGO_NS))
    assert Verdict.RECORD_HIT == node.run(frames.tcp_to(FLOW, SYN)).verdict


def test_nothing_begins_while_the_one_that_is_not_heard_may_have_agreed_to_settle_the_slot(node: Node) -> None:
    node.slots(settling=True)
    assert Verdict.UNRECORDED_DROP == node.run(frames.tcp_to(FLOW, SYN)).verdict
    assert node.maps.embryonic.get(FLOW.key) is None


def test_an_old_flow_is_asked_for_at_the_backup_also_where_base_has_become_current() -> None:
    """The backup may have agreed before that, and has another base."""
    node = lone_lb()
    node.slots(base=CURRENT, settling=True)
    assert Verdict.RELAYED == node.run(frames.tcp_to(FLOW, ACK)).verdict


def test_a_backup_begins_flows_at_base_while_its_owner_is_not_heard_whatever_flag_the_slot_has(node: Node) -> None:
    """The flag was handed over, or is of a look that an agent's end has cut short: nobody takes it off here. What has
    been agreed is base here, and the owner will ask for that."""
    node.own(PEER, SELF)
    node.slots(settling=True)
    outcome = node.run(frames.tcp_to(FLOW, SYN))
    assert (Verdict.FIRST_ALONE, v4(f"10.244.0.{BASE}")) == (outcome.verdict, pod_of(outcome))
    again = node.run(frames.tcp_to(FLOW, SYN))
    assert (Verdict.RECORD_HIT, v4(f"10.244.0.{BASE}")) == (again.verdict, pod_of(again)), "tried again"


@pytest.mark.parametrize(
    ("owner", "settling", "wins"), [(SELF, True, CURRENT), (SELF, False, LOCAL), (PEER, True, LOCAL)]
)
def test_who_has_asked_to_settle_a_slot_has_found_its_udp_flows_over(owner: int, settling: bool, wins: int) -> None:
    node = lone_lb()
    node.own(owner, PEER if owner == SELF else SELF)
    node.slots(settling=settling)
    node.maps.records.put(UDP_FLOW.key, Record(LOCAL, 0, 1))
    node.from_peer(promoted(CURRENT), frames.udp_to(UDP_FLOW, b"again"))
    found = node.maps.records.get(UDP_FLOW.key)
    assert found is not None
    assert wins == found.backend


def promoted(backend: int) -> Chain:
    return Chain(backend, 9, True, (PEER,), (SELF, THIRD))


def test_a_flow_that_has_begun_alone_here_overrules_what_another_has_promoted_and_tells_it() -> None:
    node = lone_lb()
    node.maps.embryonic.put(FLOW.key, Record(BASE, 0, LONG_AGO_NS))
    outcome = node.from_peer(promoted(CURRENT), frames.tcp_to(FLOW, ACK))
    assert Verdict.CHAIN_CONFLICT == outcome.verdict
    assert Chain(BASE, 17, True, (SELF,), (PEER, THIRD), overrules=True).pack() == option_of(outcome)
    found = node.maps.records.get(FLOW.key)
    assert found is not None
    assert (BASE, None) == (found.backend, node.maps.embryonic.get(FLOW.key))


def test_what_a_syn_has_left_here_at_current_gives_way_to_what_another_has_promoted() -> None:
    node = lone_lb()
    node.maps.embryonic.put(FLOW.key, Record(CURRENT, 0, LONG_AGO_NS))
    outcome = node.from_peer(promoted(BASE), frames.tcp_to(FLOW, ACK))
    assert Verdict.CHAIN_RECORDED == outcome.verdict
    found = node.maps.records.get(FLOW.key)
    assert found is not None
    assert BASE == found.backend


def test_who_is_overruled_records_what_it_is_told_and_turns_nothing_back() -> None:
    node = lone_lb()
    node.maps.records.put(FLOW.key, Record(CURRENT, 0, LONG_AGO_NS))
    told = Chain(BASE, 9, True, (PEER,), (SELF,), overrules=True)
    outcome = node.from_peer(told, frames.tcp_to(FLOW, ACK))
    assert Verdict.CHAIN_LAST == outcome.verdict
    assert v4(f"10.244.0.{BASE}") == pod_of(outcome)
    found = node.maps.records.get(FLOW.key)
    assert found is not None
    assert BASE == found.backend
