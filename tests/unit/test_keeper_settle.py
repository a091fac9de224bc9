"""From tracking to steady in three steps: when, by whom, and what is left where the next step never comes."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core import settle
from lbpod.core.keeper_state import Effects, State, VipState
from lbpod.core.layout import NAT_FIN_IN, NAT_FIN_OUT
from lbpod.core.limits import EARLY_AFTER_NS, MARGIN_NS, OWED_NS, SETTLE_VIPS_MAX, SLOT_COUNT, TICK_NS
from lbpod.core.maps import Nat, mapped, nat_key
from lbpod.core.messages import (
    Ask,
    LookSeen,
    MemberSeen,
    PeerCall,
    QuietCall,
    Refuse,
    Reply,
    SettleAnswer,
    SettleCall,
    SettleKind,
    SettleStep,
    Tell,
    Woke,
    WriteSlots,
)
from lbpod.core.model import Protocol
from lbpod.core.transition import is_settling
from tests.keepers import SECOND_NS, VIP_ADDRESS, Cluster, Node, pod_address, vip
from tests.unit.test_keeper_resolve import flows_of, slots_of

Bools = npt.NDArray[np.bool_]

WINDOW_NS = 11 * SECOND_NS
"""Of a VIP with idle 8 s: 8 + 2 + 1."""
SOON_NS = EARLY_AFTER_NS + 2 * SECOND_NS
"""By then whatever can settle early has."""


def changed(lbs: int = 3, protocol: Protocol = Protocol.TCP) -> Cluster:
    """After a change that every slot is part of: from pods 1, 2, which drain, to pods 3, 4."""
    cluster = Cluster(lbs)
    cluster.change(vip([1, 2], protocol=protocol))
    cluster.change(vip([3, 4], [1, 2], protocol=protocol))
    return cluster


def replaced() -> Cluster:
    """After a change that every slot is part of: pods 1 and 2 are gone, 3 and 4 have come."""
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([3, 4]))
    return cluster


def is_ask(sender: str, receiver: str, body: PeerCall) -> bool:
    return isinstance(body, SettleCall) and body.step is SettleStep.ASK


def is_owed(sender: str, receiver: str, body: PeerCall) -> bool:
    return isinstance(body, SettleCall) and body.step in {SettleStep.ASK, SettleStep.OWED}


def is_tell(sender: str, receiver: str, body: PeerCall) -> bool:
    return isinstance(body, SettleCall) and body.step is SettleStep.TELL


def is_quiet_call(sender: str, receiver: str, body: PeerCall) -> bool:
    return isinstance(body, QuietCall)


def is_look(sender: str, receiver: str, body: PeerCall) -> bool:
    return isinstance(body, SettleCall) and body.step is SettleStep.LOOK


def tracking(cluster: Cluster) -> list[int]:
    return [node.status.tracking_slots for node in cluster.muxes]


def keep_alive(cluster: Cluster, number: int = 0, pod: int = 1, flags: int = 0) -> int:
    """A live flow to a pod in its host's map; returns its slot."""
    flow = flows_of(number + 1)[number]
    client, port = flow["addr"].tobytes(), int(flow["port_be"])
    host = cluster["host1" if pod % 2 else "host2"].datapath.maps
    key = nat_key(client, pod_address(pod), port, 8080, 6)
    host.nat.put(key, Nat(VIP_ADDRESS, 80, flags, cluster.now_ns))
    return int(slots_of(flows_of(number + 1))[number])


def settling(node: Node) -> Bools:
    return is_settling(node.words())


def owing() -> tuple[Cluster, Node, Node, Bools]:
    """After every answer to a settle was lost: an owner, a backup, and the slots of which that one owes it its word."""
    cluster = changed()
    cluster.muted = is_owed
    cluster.run(WINDOW_NS + 9 * SECOND_NS)
    owner, backup = cluster["lb1"], cluster["lb2"]
    owed = owner.owned() & backup.backed()
    assert settling(owner)[owed].all()
    return cluster, owner, backup, owed


# --- When -------------------------------------------------------------------------------------------------------------
def test_where_base_has_died_only_the_margin_has_to_pass() -> None:
    cluster = replaced()
    cluster.run(MARGIN_NS)
    assert [SLOT_COUNT] * 3 == tracking(cluster)
    cluster.run(SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)
    assert not any(isinstance(effect, Ask) and isinstance(effect.body, QuietCall) for effect in sent(cluster))


def sent(cluster: Cluster) -> list[object]:
    return [effect for node in cluster.muxes for effect in node.effects]


def test_where_hosts_see_nobody_the_idle_time_need_not_pass() -> None:
    cluster = changed()
    cluster.run(EARLY_AFTER_NS)
    assert [SLOT_COUNT] * 3 == tracking(cluster)
    cluster.run(2 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)
    words = [node.words() for node in cluster.muxes]
    assert all((words[0] == other).all() for other in words)


def test_a_slot_with_a_live_flow_stays_until_the_flow_is_over() -> None:
    cluster = changed()
    for _ in range(20):
        slot = keep_alive(cluster)
        cluster.run(SECOND_NS // 2)
        for node in cluster.muxes:
            node.datapath.maps.other_seen[1][slot] = cluster.now_ns
    assert [1, 1, 1] == tracking(cluster)
    assert all(node.tracking()[slot] for node in cluster.muxes)
    keep_alive(cluster, flags=NAT_FIN_IN | NAT_FIN_OUT)
    cluster.run(14 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_one_fin_is_not_the_end() -> None:
    cluster = changed()
    number = next(n for n in range(50) if cluster["lb1"].base()[slots_of(flows_of(n + 1))[n]] == 1)
    for _ in range(20):
        slot = keep_alive(cluster, number, flags=NAT_FIN_IN)
        cluster.run(SECOND_NS // 2)
    assert [1, 1, 1] == tracking(cluster)
    assert cluster["lb1"].tracking()[slot]


def test_flows_of_the_new_backend_are_no_obstacle() -> None:
    cluster = changed()
    current = cluster["lb1"].current()
    for number in range(80):
        keep_alive(cluster, number, pod=int(current[slots_of(flows_of(number + 1))[number]]))
    assert 80 == sum(len(cluster[host].datapath.maps.nat) for host in ("host1", "host2"))
    cluster.run(SOON_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_without_host_agents_the_window_has_to_pass() -> None:
    cluster = changed()
    cluster.blocked = is_quiet_call
    cluster.run(WINDOW_NS)
    assert [SLOT_COUNT] * 3 == tracking(cluster)
    cluster.run(9 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


@pytest.mark.parametrize("role", ["owner", "backup"])
def test_what_a_replica_sent_elsewhere_counts_the_window_anew(role: str) -> None:
    cluster = changed()
    cluster.blocked = is_quiet_call
    node = cluster["lb1"]
    slot = int(np.flatnonzero(node.owned() if role == "owner" else node.backed())[0])
    cluster.run(6 * SECOND_NS)
    node.datapath.maps.other_seen[1][slot] = cluster.now_ns
    cluster.run(10 * SECOND_NS)
    assert [1, 1, 1] == tracking(cluster) or all(one.tracking()[slot] for one in cluster.muxes)
    cluster.run(20 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_a_host_agent_that_cannot_tell_says_nothing() -> None:
    cluster = changed()
    cluster["host1"].datapath.maps.nat.count_max = 1
    keep_alive(cluster)
    theirs = cluster["lb1"].base() == 1
    cluster.run(SOON_NS)
    assert all(node.tracking()[theirs].all() for node in cluster.muxes)


def test_the_backup_waits_longer_than_any_answer_of_a_host_is_old() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    snapshot = cluster.plan(vip([3, 4], [1, 2]))
    cluster.stage(snapshot)
    cluster.prepare(snapshot)
    cluster.commit(snapshot, ["lb1", "lb2", "host1", "host2"])
    cluster.run(5 * SECOND_NS)
    late = cluster["lb3"]
    cluster.commit(snapshot, ["lb3"])
    cluster.run(EARLY_AFTER_NS - 2 * SECOND_NS)
    assert all(one.tracking()[late.backed()].all() for one in cluster.muxes)
    settled = ~(late.backed() | late.owned())
    assert not cluster["lb1"].tracking()[settled].any()
    cluster.run(14 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def without_flags(cluster: Cluster) -> bool:
    """Soon there is a moment at which no slot is flagged. (Each round flags those that it asks about.)"""
    for _ in range(6 * SECOND_NS // TICK_NS):
        cluster.run(TICK_NS)
        if not any(settling(node).any() for node in cluster.muxes):
            return True
    return False


# --- Each step safe if the next never comes ---------------------------------------------------------------------------
def test_a_question_that_never_arrives_leaves_both_as_they_were_but_for_the_flag() -> None:
    cluster = changed()
    before = [node.words() for node in cluster.muxes]
    cluster.blocked = is_owed
    cluster.run(WINDOW_NS + 9 * SECOND_NS)
    flag = np.uint64(0x0200_0000)
    for node, words in zip(cluster.muxes, before, strict=True):
        assert (words == node.words() & ~flag).all()
        assert (settling(node) <= node.owned()).all(), "only owners flag"
        assert settling(node)[node.owned()].all()
    cluster.blocked = is_ask
    assert without_flags(cluster), "the backups have told what base is"
    assert all((words == node.words() & ~flag).all() for node, words in zip(cluster.muxes, before, strict=True))


def test_a_question_that_surely_was_not_taken_leaves_no_flag_of_its_own() -> None:
    cluster = changed()
    cluster.blocked, cluster.untaken = is_owed, True
    cluster.run(WINDOW_NS + 9 * SECOND_NS)
    assert not any(settling(node).any() for node in cluster.muxes)
    assert all(node.status.tracking_slots for node in cluster.muxes)
    cluster.untaken = False
    cluster.run(20 * SECOND_NS)
    assert all(settling(node).any() for node in cluster.muxes)
    cluster.untaken = True
    cluster.run(20 * SECOND_NS)
    assert all(settling(node).any() for node in cluster.muxes), "an earlier question may have been taken"
    cluster.blocked = is_ask
    assert without_flags(cluster), "now the backups have told what base is"


def test_an_answer_that_never_arrives_leaves_the_backup_tracking_and_the_owner_flagged() -> None:
    cluster = changed()
    cluster.muted = is_owed
    cluster.run(WINDOW_NS + 9 * SECOND_NS)
    for node in cluster.muxes:
        assert SLOT_COUNT == node.status.tracking_slots
        assert (node.base() == node.current())[node.backed()].all(), "the backup has agreed"
        assert (node.base() != node.current())[node.owned()].all(), "the owner does not know"
        assert settling(node)[node.owned()].all(), "so what it cannot record must not go to base"
    cluster.muted = lambda sender, receiver, body: False
    cluster.run(20 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster), "agreeing twice is agreeing once"


def test_what_the_backup_has_agreed_to_is_asked_about_and_becomes_base_where_the_answer_was_lost() -> None:
    cluster = changed()
    cluster.muted = is_ask
    cluster.run(WINDOW_NS + 9 * SECOND_NS)
    for node in cluster.muxes:
        assert SLOT_COUNT == node.status.tracking_slots
        replica = node.owned() | node.backed()
        assert (node.base() == node.current())[replica].all(), (
            "what begins there while the owner seems down is no secret"
        )


def test_a_backup_that_owes_an_answer_decides_while_it_may_be_there_and_again_once_it_is_back() -> None:
    cluster, owner, backup, owed = owing()
    cluster.muted, cluster.blocked = is_owed, lambda *ends_body: {"lb1", "lb2"} == set(ends_body[:2])
    cluster.run(2 * OWED_NS)
    assert settling(owner)[owed].all(), "lb3 hears it: it may have sent new flows to its new base"
    cluster.blocked = lambda *_: False
    cluster.run(SECOND_NS)
    cluster.muted, cluster.blocked = lambda *_: False, lambda *ends_body: backup.name in ends_body[:2]
    cluster.run(OWED_NS - SECOND_NS // 2)
    assert settling(owner)[owed].all(), "its agent may restart"
    cluster.run(SECOND_NS)
    assert not settling(owner)[owed].any(), "old flows need somebody"
    assert owner.tracking()[owed].all()
    assert (owner.base() != owner.current())[owed].all()
    cluster.muted, cluster.blocked = is_owed, lambda *_: False
    cluster.run(SECOND_NS)
    assert settling(owner)[owed].all(), "what it has agreed to counts again"
    cluster.muted = lambda *_: False
    cluster.run(20 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_a_backup_that_its_owner_alone_does_not_hear_is_asked_through_another() -> None:
    cluster, owner, backup, owed = owing()
    cluster.muted, cluster.blocked = lambda *_: False, lambda *ends_body: {"lb1", "lb2"} == set(ends_body[:2])
    cluster.run(2 * OWED_NS)
    assert not settling(owner)[owed].any(), "lb3 has asked"
    assert (owner.base() == backup.base())[owed].all()
    assert owner.tracking()[owed].all(), "nothing settles with one that is not heard"
    cluster.blocked = lambda *_: False
    cluster.run(20 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_who_cannot_ask_that_backup_either_says_so_and_nothing_changes() -> None:
    cluster, owner, _, owed = owing()
    asked = []

    def blocked(sender: str, receiver: str, body: PeerCall) -> bool:
        asked.append((sender, receiver, is_owed(sender, receiver, body)))
        return {"lb1", "lb2"} == {sender, receiver} or asked[-1] == ("lb3", "lb2", True)

    cluster.muted, cluster.blocked = lambda *_: False, blocked
    cluster.run(2 * OWED_NS)
    assert {("lb1", "lb3", True), ("lb3", "lb2", True)} <= set(asked)
    assert settling(owner)[owed].all()
    assert (owner.base() != owner.current())[owed].all()


def test_a_telling_that_never_arrives_is_asked_about() -> None:
    cluster = replaced()
    cluster.blocked = lambda sender, receiver, body: isinstance(body, SettleCall) and body.step is not SettleStep.ASK
    cluster.run(4 * SECOND_NS)
    for node in cluster.muxes:
        assert not node.tracking()[node.owned()].any()
        assert node.tracking()[~node.owned()].all()
    cluster.blocked = is_tell
    cluster.run(6 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_the_owner_takes_the_agreed_base_over_but_stays_tracking_where_something_newer_came() -> None:
    cluster = changed()
    cluster.delay_ns_max = 0
    newer = cluster.plan(vip([3, 4, 5], [1, 2]))
    cluster.stage(newer)
    owner = cluster["lb1"]
    before = owner.current()

    def interrupt(sender: str, receiver: str, body: PeerCall) -> bool:
        if isinstance(body, SettleCall) and sender == "lb1" and owner.status.prepared == 0:
            cluster.prepare(newer, ["lb1"])
        return False

    cluster.blocked = interrupt
    cluster.run(SOON_NS)
    assert newer.generation == owner.status.prepared
    owned = owner.owned()
    assert owner.tracking()[owned].all()
    taken = owner.base() == before
    assert taken[owned].any()
    assert not settling(owner)[taken & owned].any()


def test_a_backup_that_has_prepared_something_newer_agrees_to_nothing() -> None:
    cluster = changed()
    newer = cluster.plan(vip([3, 4, 5], [1, 2]))
    cluster.stage(newer)
    cluster.prepare(newer, ["lb2", "lb3"])
    cluster.run(WINDOW_NS + 9 * SECOND_NS)
    node = cluster["lb1"]
    assert node.tracking().all()
    assert not settling(node).any(), "an answer has come: nothing is outstanding"


def ask(owner: Node, slots: npt.NDArray[np.intp], epoch: int = 2, step: SettleStep = SettleStep.ASK) -> SettleCall:
    return SettleCall(
        owner.status.member, step, SettleKind.SETTLE, 1, epoch, slots.astype("<u2").tobytes(), early_backends=b""
    )


def agreed(node: Node, call: SettleCall, now_ns: int) -> set[int]:
    answer = node.call(call, now_ns)
    assert isinstance(answer, Reply)
    assert isinstance(answer.body, SettleAnswer)
    bases = np.frombuffer(answer.body.bases, "<u4")
    slots = np.frombuffer(answer.body.slots, "<u2")
    assert (node.current()[slots] == bases).all()
    return set(slots.tolist())


def owned_and_backed(cluster: Cluster) -> npt.NDArray[np.intp]:
    """Slots that lb1 owns and lb2 backs."""
    return np.flatnonzero(cluster["lb1"].owned() & cluster["lb2"].backed())


def test_the_backup_agrees_by_its_own_clock_only() -> None:
    cluster = changed()
    backup, slots = cluster["lb2"], owned_and_backed(cluster)
    call, now_ns = ask(cluster["lb1"], slots), cluster.now_ns
    assert set() == agreed(backup, call, now_ns + WINDOW_NS)
    assert set(slots.tolist()) == agreed(backup, call, now_ns + WINDOW_NS + 1)
    assert set(slots.tolist()) == agreed(backup, call, now_ns), "it has agreed already"
    assert backup.tracking()[slots].all()
    assert (backup.base() == backup.current())[slots].all()


def test_the_backup_agrees_to_its_own_slots_at_its_own_generation_only() -> None:
    cluster = changed()
    backup, slots, late_ns = cluster["lb2"], owned_and_backed(cluster), cluster.now_ns + 99 * SECOND_NS
    assert set() == agreed(backup, ask(cluster["lb1"], slots, epoch=1), late_ns)
    assert set() == agreed(backup, ask(cluster["lb3"], slots), late_ns), "lb3 does not own them"
    foreign = np.flatnonzero(cluster["lb1"].owned() & ~cluster["lb2"].backed())
    assert set() == agreed(backup, ask(cluster["lb1"], foreign), late_ns)
    answer = cluster["host1"].call(ask(cluster["lb1"], slots), late_ns)
    assert isinstance(answer, Reply)
    assert SettleAnswer(b"", b"") == answer.body, "nor does a host"


@pytest.mark.parametrize("who", ["lb1", "lb2"])
def test_a_clock_that_leaps_silences_no_flow(who: str) -> None:
    """Owner or backup: each would find the slots quiet, were it not told that it may only have slept."""
    cluster = changed()
    slots, start_ns = owned_and_backed(cluster), cluster.now_ns
    cluster[who].feed(Woke(WINDOW_NS), start_ns + WINDOW_NS)
    cluster.now_ns += WINDOW_NS + SECOND_NS
    cluster.blocked = is_quiet_call
    cluster.run(3 * SECOND_NS)
    assert cluster["lb1"].tracking()[slots].all()
    cluster.run(WINDOW_NS + 10 * SECOND_NS)
    assert not cluster["lb1"].tracking()[slots].any()


def test_the_backup_looks_at_its_stamps_before_it_agrees() -> None:
    cluster = changed()
    backup, slots = cluster["lb2"], owned_and_backed(cluster)
    late_ns = cluster.now_ns + WINDOW_NS + SECOND_NS
    backup.datapath.maps.other_seen[1][slots[0]] = cluster.now_ns + 2 * SECOND_NS
    backup.effects.clear()
    assert set(slots[1:].tolist()) == agreed(backup, ask(cluster["lb1"], slots), late_ns)
    kinds = [type(effect) for effect in backup.effects]
    assert [WriteSlots, LookSeen, WriteSlots, Reply] == kinds, "what is acknowledged has been written"
    flagged, written = (effect for effect in backup.effects if isinstance(effect, WriteSlots))
    assert slots.tolist() == flagged.slots.tolist(), "a five-tuple that is used again waits for its word"
    assert is_settling(flagged.words).all()
    assert not is_settling(written.words).any()


def test_a_backup_whose_look_fails_takes_its_flag_off() -> None:
    cluster = changed()
    backup, slots = cluster["lb2"], owned_and_backed(cluster)
    backup.fails = lambda effect: isinstance(effect, LookSeen)
    answer = backup.call(ask(cluster["lb1"], slots), cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert not is_settling(backup.words()[slots]).any()


@pytest.mark.parametrize("why", ["epoch", "sender", "prepared"])
def test_a_telling_counts_only_at_the_same_generation_from_the_owner_with_nothing_newer(why: str) -> None:
    cluster = changed()
    node, slots = cluster["lb3"], owned_and_backed(cluster)
    sender = cluster["lb2"] if why == "sender" else cluster["lb1"]
    if why == "prepared":
        newer = cluster.plan(vip([3, 4, 5], [1, 2]))
        cluster.stage(newer, ["lb3"])
        cluster.prepare(newer, ["lb3"])
    call = ask(sender, slots, epoch=1 if why == "epoch" else 2, step=SettleStep.TELL)
    before = node.words()
    agreed(node, call, cluster.now_ns)
    assert (before == node.words()).all()
    if why == "epoch":
        agreed(node, ask(cluster["lb1"], slots, step=SettleStep.TELL), cluster.now_ns)
        assert not node.tracking()[slots].any()


def test_whoever_looks_hears_what_is_steady_and_nothing_changes_by_it() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster.change(vip([1, 2, 3]))
    node, everything = cluster["lb1"], np.arange(SLOT_COUNT)
    before = node.words()
    steady = agreed(node, ask(cluster["lb2"], everything, step=SettleStep.LOOK), cluster.now_ns)
    assert set(np.flatnonzero(~node.tracking()).tolist()) == steady
    assert (before == node.words()).all()
    assert set() == agreed(node, ask(cluster["lb2"], everything, 1, SettleStep.LOOK), cluster.now_ns)


# --- Beliefs and losses -----------------------------------------------------------------------------------------------
def test_nothing_settles_with_a_backup_that_seems_down_and_all_does_once_it_is_back() -> None:
    cluster = replaced()
    for name in ("lb1", "lb3"):
        cluster.believe(name, 1, up=False)
    cluster.run(5 * SECOND_NS)
    backed = cluster["lb2"].backed()
    assert cluster["lb1"].tracking()[backed].all()
    for name in ("lb1", "lb3"):
        cluster.believe(name, 1, up=True)
    cluster.run(5 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_a_backup_that_takes_the_owner_for_down_agrees_to_nothing() -> None:
    """It begins flows alone, at base: also between its look and its word."""
    cluster = changed()
    backup, slots = cluster["lb2"], owned_and_backed(cluster)
    late_ns, call = cluster.now_ns + WINDOW_NS + SECOND_NS, ask(cluster["lb1"], slots)
    backup.feed(MemberSeen(0, up=False), late_ns)
    assert set() == agreed(backup, call, late_ns + 1)
    backup.feed(MemberSeen(0, up=True), late_ns + 2)
    assert set() == agreed(backup, call, late_ns + 2)
    assert set(slots.tolist()) == agreed(backup, call, late_ns + 3)
    backup.feed(MemberSeen(0, up=False), late_ns + 4)
    assert set(slots.tolist()) == agreed(backup, call, late_ns + 5), "what it has agreed to stays so"


def test_an_owner_that_took_its_backup_for_down_meanwhile_takes_the_base_over_and_tracks_on() -> None:
    """It has begun flows alone, at the base that it had, since it looked; their records are not dropped."""
    cluster = replaced()
    slots, asked = owned_and_backed(cluster), list[PeerCall]()

    def turns(sender: str, receiver: str, body: PeerCall) -> bool:
        if is_ask(sender, receiver, body) and (sender, receiver) == ("lb1", "lb2") and not asked:
            asked.append(body)
            cluster.later(cluster.now_ns, lambda: cluster.believe("lb1", 1, up=False))
        return False

    cluster.blocked = turns
    cluster.run(5 * SECOND_NS)
    owner = cluster["lb1"]
    assert asked
    assert owner.tracking()[slots].all()
    assert (owner.base() == owner.current())[slots].all()
    assert not settling(owner)[slots].any()
    cluster.believe("lb1", 1, up=True)
    cluster.run(SOON_NS + 5 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_a_backup_that_is_down_is_not_asked_and_no_slot_waits_for_it() -> None:
    cluster, asked = replaced(), list[str]()

    def listens(sender: str, receiver: str, body: PeerCall) -> bool:
        asked.extend([receiver] if is_ask(sender, receiver, body) else [])
        return False

    cluster.blocked = listens
    cluster.believe("lb1", 1, up=False)
    cluster.believe("lb3", 1, up=False)
    cluster.run(5 * SECOND_NS)
    assert "lb2" not in asked
    assert "lb1" in asked
    assert not settling(cluster["lb1"]).any()


def test_an_lb_that_has_lost_its_maps_learns_from_the_others_what_is_steady() -> None:
    cluster = Cluster()
    cluster.change(vip([1, 2]))
    cluster["lb1"].lose_everything()
    snapshot = cluster.plan(vip([1, 2], idle_s=9))
    cluster.stage(snapshot)
    cluster.prepare(snapshot)
    cluster.commit(snapshot)
    assert [SLOT_COUNT, 0, 0] == tracking(cluster)
    cluster.blocked = is_quiet_call
    cluster.run(9 * SECOND_NS)
    assert [0, 0, 0] == tracking(cluster)
    assert (cluster["lb1"].current() == cluster["lb2"].current()).all()


def test_a_restarted_owner_asks_hosts_about_every_backend() -> None:
    cluster = changed()
    cluster["lb1"].restart(cluster.now_ns)
    cluster.blocked = is_look
    cluster.run(SOON_NS)
    assert [0, 0, 0] == tracking(cluster)
    slots = [np.frombuffer(call.backends, "<u4").tolist() for call in quiet_calls(cluster["lb1"])]
    assert {1, 2, 3, 4} == {one for backends in slots for one in backends}


def quiet_calls(node: Node) -> list[QuietCall]:
    asks = [effect.body for effect in node.effects if isinstance(effect, Ask)]
    return [body for body in asks if isinstance(body, QuietCall)]


def test_hosts_are_asked_about_their_own_backends_and_never_about_current() -> None:
    cluster = changed()
    cluster.run(SOON_NS)
    node = cluster["lb1"]
    for effect in node.effects:
        if isinstance(effect, Ask) and isinstance(effect.body, QuietCall):
            backends = np.frombuffer(effect.body.backends, "<u4").tolist()
            assert {1} == set(backends) if cluster._node_of(effect.node).name == "host1" else {2} == set(backends)
    assert 2 == len(quiet_calls(node)), "one question to each host, for all slots together"


def test_everyone_is_told_once_and_by_the_owner() -> None:
    cluster = replaced()
    cluster.run(3 * SECOND_NS)
    for node in cluster.muxes:
        tells = [effect for effect in node.effects if isinstance(effect, Tell)]
        assert {effect.node for effect in tells} == {
            number for number in (1, 2, 3, 4, 5) if cluster._node_of(number).name in cluster.lbs
        } - {number for number in range(1, 6) if cluster._node_of(number) is node}
        told = [np.frombuffer(effect.body.slots, "<u2") for effect in tells if isinstance(effect.body, SettleCall)]
        assert 2 * int(node.owned().sum()) == sum(len(slots) for slots in told)


# --- UDP --------------------------------------------------------------------------------------------------------------
def test_udp_is_rebased_first_and_settles_when_its_exceptions_have_ended() -> None:
    cluster = changed(protocol=Protocol.UDP)
    cluster.blocked = is_quiet_call
    cluster.run(WINDOW_NS + 9 * SECOND_NS)
    node = cluster["lb1"]
    replica = node.owned() | node.backed()
    assert node.tracking().all()
    assert (node.base() == node.current())[replica].all(), "new flows reach the new backends"
    slot = int(np.flatnonzero(node.owned())[0])
    node.datapath.maps.other_seen[1][slot] = cluster.now_ns
    cluster.run(WINDOW_NS - SECOND_NS)
    assert node.tracking()[slot], "a recorded exception is still alive"
    cluster.run(2 * WINDOW_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_udp_is_not_rebased_while_flows_go_unrecorded() -> None:
    cluster = changed(protocol=Protocol.UDP)
    cluster.blocked = is_quiet_call
    for _ in range(25):
        cluster.run(SECOND_NS)
        for node in cluster.muxes:
            node.datapath.maps.vip_stats["unrecorded_ns"][1] = cluster.now_ns
    node = cluster["lb1"]
    assert (node.base() != node.current())[node.owned()].all()


def test_udp_settles_early_in_two_rounds_where_hosts_see_nobody() -> None:
    cluster = changed(protocol=Protocol.UDP)
    cluster.run(SOON_NS)
    node = cluster["lb1"]
    assert node.tracking()[node.owned()].all()
    assert (node.base() == node.current())[node.owned()].all()
    cluster.run(SOON_NS)
    assert [0, 0, 0] == tracking(cluster)


def test_a_flow_key_has_the_mapped_address() -> None:
    assert flows_of(1)[0]["addr"].tobytes() == mapped(bytes([198, 18, 0, 0]))


def test_where_many_vips_track_they_take_turns_and_all_of_them_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ninety VIPs looked at in one tick are a second in which an agent hears nobody."""
    looked: Counter[tuple[str, int]] = Counter()
    begun: set[tuple[str, int]] = set()
    begin = settle._begin

    def counted(state: State, vs: VipState, now_ns: int) -> Effects:
        looked[state.node_name, now_ns] += 1
        begun.add((state.node_name, vs.id))
        return begin(state, vs, now_ns)

    monkeypatch.setattr(settle, "_begin", counted)
    count = SETTLE_VIPS_MAX + 2
    cluster = Cluster(2)
    cluster.change(*[vip([1, 2], port=port) for port in range(80, 80 + count)])
    cluster.change(*[vip([3, 4], port=port) for port in range(80, 80 + count)])
    assert [count * SLOT_COUNT] * 2 == tracking(cluster)
    cluster.run(MARGIN_NS + 10 * TICK_NS)
    assert {node.name for node in cluster.muxes} == {name for name, _ in begun}
    assert 2 * count == len(begun)
    assert SETTLE_VIPS_MAX == max(looked.values())
    cluster.run(SOON_NS)
    assert [0, 0] == tracking(cluster)
