"""Beats between LBs, what is believed from them, and the fence: one Keeper, and a clock that the test turns."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from lbpod.core import watch
from lbpod.core.keeper import Keeper
from lbpod.core.layout import MEMBER_DOUBTED, MEMBER_PRESENT, MEMBER_UP
from lbpod.core.limits import (
    AWAY_NS,
    BEAT_DOWN_NS,
    BEAT_NS,
    BEATS_MAX,
    BEATS_OPEN_MAX,
    FENCE_NS,
    LOST_NS,
    MEMBER_NONE,
    OUTSTANDING_MAX,
    SYN_RETRY_NS,
    TICK_NS,
    WATCH_MAX,
)
from lbpod.core.messages import (
    Answered,
    Ask,
    AskFailed,
    BeatAnswer,
    BeatCall,
    Called,
    CommitCall,
    Configure,
    ControlCall,
    ControllerSeen,
    KeeperEffect,
    MemberSeen,
    PeerCall,
    PrepareCall,
    Refuse,
    Reply,
    Tick,
    Trace,
)
from lbpod.core.model import Node as ClusterNode, Ring, Snapshot, parse_address
from lbpod.core.snapshot import digest_of
from tests.keepers import CLUSTER, SECOND_NS, START_NS, Cluster, is_beat, vip

UP_AGAIN_NS = BEAT_NS + 2 * TICK_NS
TOLD_NS = 3 * BEAT_NS + 2 * TICK_NS
"""From the first word that an LB hears again until the others have heard that it has been told what it missed."""


def cluster_of(lbs: int = 3) -> Cluster:
    """LBs that have heard each other, with a VIP, all slots steady."""
    cluster = Cluster(lbs)
    cluster.change(vip([1, 2]))
    cluster.run(SECOND_NS)
    return cluster


def between(*names: str) -> Callable[[str, str, PeerCall], bool]:
    """Nothing gets from any of these to anybody, nor from anybody to them."""
    return lambda sender, receiver, body: sender in names or receiver in names


def nothing(sender: str, receiver: str, body: PeerCall) -> bool:
    return False


def believes(cluster: Cluster, name: str, member: int) -> bool:
    """Does the fast path of this LB take the member for up?"""
    return bool(cluster[name].datapath.maps.members["flags"][member] & MEMBER_UP)


def configures(cluster: Cluster, name: str) -> int:
    return sum(isinstance(effect, Configure) for effect in cluster[name].effects)


# --- Belief -----------------------------------------------------------------------------------------------------------
def test_who_answers_is_up_and_costs_the_fast_path_nothing() -> None:
    cluster = cluster_of()
    before = configures(cluster, "lb1")
    cluster.run(60 * SECOND_NS)
    assert all(believes(cluster, name, member) for name in cluster.lbs for member in range(3))
    assert before == configures(cluster, "lb1")
    assert 0 == cluster["lb1"].status.tracking_slots


def test_who_is_asked_and_not_heard_is_down_within_a_second_and_up_with_its_first_word() -> None:
    cluster = cluster_of()
    cluster.blocked = between("lb2")
    cluster.run(BEAT_DOWN_NS - BEAT_NS - TICK_NS)
    assert believes(cluster, "lb1", 1), "a lost beat is not enough"
    cluster.run(BEAT_NS + 3 * TICK_NS)
    assert [(True, False), (True, False)] == [
        (believes(cluster, one, other), believes(cluster, one, 1)) for one, other in (("lb1", 2), ("lb3", 0))
    ]
    before = configures(cluster, "lb1")
    cluster.run(2 * SECOND_NS)
    assert before == configures(cluster, "lb1"), "what is believed already is not written again"
    cluster.blocked = nothing
    cluster.run(UP_AGAIN_NS)
    assert all(believes(cluster, "lb2", member) for member in range(3))
    assert not believes(cluster, "lb1", 1), "it says that it is there, and that it does not know yet what it has missed"
    cluster.run(TOLD_NS)
    assert all(believes(cluster, name, member) for name in cluster.lbs for member in range(3))
    said = [trace.detail for trace in cluster["lb1"].traces if trace.what in {"believed down", "believed up"}]
    assert ["member 1", "member 1"] == said


def test_who_is_silent_is_doubted_at_once_however_many_they_are_and_given_up_when_lost_for_long() -> None:
    def flags() -> list[int]:
        found: list[int] = cluster["lb1"].datapath.maps.members["flags"][:3].tolist()
        return found

    cluster = cluster_of()
    cluster.blocked = between("lb2", "lb3")
    cluster.run(BEAT_DOWN_NS + 3 * TICK_NS)
    doubted, up = MEMBER_PRESENT | MEMBER_DOUBTED, MEMBER_PRESENT | MEMBER_UP
    assert [up, doubted, doubted] == flags()
    assert ((1, 2), ()) == (cluster["lb1"].keeper.beliefs().down, cluster["lb1"].keeper.beliefs().given_up)
    cluster.run(LOST_NS - BEAT_DOWN_NS - SECOND_NS)
    assert [up, doubted, doubted] == flags()
    before = configures(cluster, "lb1")
    cluster.run(2 * SECOND_NS)
    assert [up, MEMBER_PRESENT, MEMBER_PRESENT] == flags()
    assert before < configures(cluster, "lb1") <= before + 2
    cluster.blocked = between("lb3")
    cluster.run(UP_AGAIN_NS)
    assert [up, doubted, MEMBER_PRESENT] == flags(), "it is there, and waits for a word of lb3"
    cluster.run(LOST_NS + TOLD_NS)
    assert [up, up, MEMBER_PRESENT] == flags()
    cluster.blocked = between("lb2", "lb3")
    cluster.run(BEAT_DOWN_NS + 3 * TICK_NS)
    assert [up, doubted, MEMBER_PRESENT] == flags(), "its silence is counted anew"


def test_a_new_agent_says_whom_the_one_before_had_given_up_until_it_hears_of_them() -> None:
    """Agents that die one after the other would hold a loss up for ever, did each begin to count anew. To its fast path
    that one is doubted again: it has not listened for so long itself."""

    def said() -> tuple[tuple[int, ...], tuple[int, ...], int]:
        lb1 = cluster["lb1"]
        return lb1.status.given_up, lb1.keeper.beliefs().given_up, int(lb1.datapath.maps.members["flags"][1])

    cluster = cluster_of()
    cluster.blocked = between("lb2")
    cluster.run(LOST_NS + SECOND_NS)
    assert ((1,), (1,), MEMBER_PRESENT) == said()
    cluster["lb1"].restart(cluster.now_ns)
    assert ((1,), (), MEMBER_PRESENT | MEMBER_DOUBTED) == said()
    cluster.run(2 * SECOND_NS)
    assert ((1,), (), MEMBER_PRESENT | MEMBER_DOUBTED) == said()
    cluster.blocked = between("nobody")
    cluster.run(UP_AGAIN_NS + TOLD_NS)
    assert ((), (), MEMBER_PRESENT | MEMBER_UP) == said()


def test_one_way_is_enough_to_be_heard() -> None:
    """What lb1 asks is lost, what lb2 asks arrives: a call proves that its agent runs."""
    cluster = cluster_of(2)
    cluster.blocked = lambda sender, receiver, body: sender == "lb1"
    cluster.run(2 * SECOND_NS)
    assert believes(cluster, "lb1", 1)
    assert believes(cluster, "lb2", 0)


def test_who_answers_without_state_is_down() -> None:
    """Its machine has restarted: what is relayed to it is lost."""
    cluster = cluster_of()
    cluster["lb2"].lose_everything()
    cluster.run(BEAT_DOWN_NS + 2 * TICK_NS)
    assert not believes(cluster, "lb1", 1)
    answer = cluster["lb2"].call(BeatCall(0, 1, 1), cluster.now_ns)
    assert isinstance(answer, Refuse)
    assert 503 == answer.status


def without_lb3() -> tuple[Cluster, int]:
    """Nobody hears lb3 any more, and everybody knows; its number."""
    cluster = cluster_of()
    cluster.blocked = between("lb3")
    cluster.run(SECOND_NS)
    return cluster, cluster["lb3"].status.member


def test_an_agent_that_is_away_is_no_lb_that_is_down_for_as_long_as_a_start_may_take() -> None:
    cluster = cluster_of()
    cluster.agentless = {"lb2"}
    cluster.run(AWAY_NS)
    assert believes(cluster, "lb1", 1)
    cluster.run(BEAT_DOWN_NS + 3 * TICK_NS)
    assert not believes(cluster, "lb1", 1), "nobody starts it again"
    cluster.agentless = set()
    cluster.run(UP_AGAIN_NS + TOLD_NS)
    assert believes(cluster, "lb1", 1)


def test_who_falls_silent_while_its_agent_is_away_is_down_as_soon_as_anybody() -> None:
    cluster = cluster_of()
    cluster.agentless = {"lb2"}
    cluster.run(2 * SECOND_NS)
    cluster.blocked = between("lb2")
    cluster.run(BEAT_DOWN_NS + 3 * TICK_NS)
    assert not believes(cluster, "lb1", 1)


def test_who_hears_nobody_but_a_machine_without_its_agent_has_missed_what_others_recorded() -> None:
    """One rack is cut off: this LB, and the machine of another one whose agent is away."""
    cluster = cluster_of()
    cluster.agentless = {"lb2"}
    cluster.blocked = lambda sender, receiver, body: {"lb1", "lb3"} == {sender, receiver}
    cluster.run(3 * SECOND_NS)
    assert believes(cluster, "lb1", 1)
    assert cluster["lb1"].status.serving
    cluster.blocked = nothing
    call = next(
        effect.body for effect in reversed(cluster["lb1"].effects) if is_beat(effect) and isinstance(effect, Ask)
    )
    assert isinstance(call, BeatCall)
    assert call.returning, "it says so with the first word that is heard"


def test_a_machine_that_refuses_connections_brings_nobody_up() -> None:
    """One that boots has no fast path yet."""
    cluster, lost = without_lb3()
    cluster.blocked, cluster.agentless = nothing, {"lb3"}
    cluster.run(2 * SECOND_NS)
    assert not believes(cluster, "lb1", lost)


def test_who_is_trusted_is_up_in_the_fast_path_too_and_has_been_since() -> None:
    cluster = cluster_of()
    node, now_ns = cluster["lb1"], cluster.now_ns
    state = node.keeper._state
    assert watch.trusts(state, 1, now_ns)
    for up in (False, True):
        node.feed(MemberSeen(1, up), now_ns)
    assert (False, True) == (watch.trusts(state, 1, now_ns), watch.trusts(state, 1, now_ns + 1))
    state.unwritten.configure = True
    assert not watch.trusts(state, 1, now_ns + 1), "the map still says otherwise"


def test_an_agent_that_restarts_goes_on_without_who_is_down_until_it_answers() -> None:
    cluster, member = without_lb3()
    node = cluster["lb1"]
    assert not believes(cluster, "lb1", member)
    node.effects.clear()
    node.restart(cluster.now_ns)
    written = [effect for effect in node.effects if isinstance(effect, Configure)]
    assert written
    assert not any(member in effect.members_up for effect in written), "not for a moment"
    assert all(node.status.member in effect.members_up for effect in written)
    cluster.run(2 * SECOND_NS)
    assert not believes(cluster, "lb1", member)
    cluster.blocked = nothing
    cluster.run(TOLD_NS + SECOND_NS)
    assert believes(cluster, "lb1", member)


def test_an_agent_that_has_missed_a_loss_believes_the_first_who_tells_it() -> None:
    cluster = cluster_of(4)  # two of them hear each other all the time
    member = cluster["lb3"].status.member
    cluster.blocked = between("lb1", "lb3")
    cluster.run(SECOND_NS)
    node = cluster["lb1"]
    node.datapath.maps.members["flags"] |= MEMBER_UP  # as it was when this agent was killed
    node.restart(cluster.now_ns)
    assert believes(cluster, "lb1", member)
    cluster.blocked = between("lb3")
    cluster.run(BEAT_NS + 2 * TICK_NS)
    assert not believes(cluster, "lb1", member)
    # Of one that it has heard itself it believes nobody.
    cluster.blocked = nothing
    cluster.run(TOLD_NS + SECOND_NS)
    assert believes(cluster, "lb1", member)
    before = configures(cluster, "lb1")
    cluster.believe("lb2", member, up=False)
    cluster.run(BEAT_NS)
    assert before == configures(cluster, "lb1")
    assert believes(cluster, "lb1", member)


@pytest.mark.parametrize("returning", [True, False])
def test_who_was_cut_off_itself_is_not_believed_about_others(returning: bool) -> None:
    cluster = cluster_of()
    teller, member = (cluster[name].status.member for name in ("lb2", "lb3"))
    node = cluster["lb1"]
    node.restart(cluster.now_ns)
    node.feed(Called(1_000, BeatCall(teller, 0, 0, (member,), returning)), cluster.now_ns)
    assert returning == believes(cluster, "lb1", member)


def said_by(cluster: Cluster, name: str) -> list[tuple[int, ...]]:
    """Whom an LB says to be down, in the beats that it has sent."""
    return [
        effect.body.down
        for effect in cluster[name].effects
        if isinstance(effect, Ask) and isinstance(effect.body, BeatCall)
    ]


def test_what_an_agent_believes_by_hearsay_it_does_not_say_itself_before_it_has_found_it() -> None:
    cluster, member = without_lb3()
    node = cluster["lb1"]
    node.restart(cluster.now_ns)
    node.effects.clear()
    cluster.run(BEAT_NS)
    assert said_by(cluster, "lb1")
    assert not any(member in down for down in said_by(cluster, "lb1"))
    assert not believes(cluster, "lb1", member)
    cluster.run(SECOND_NS)
    node.effects.clear()
    cluster.run(2 * BEAT_NS)
    assert said_by(cluster, "lb1")
    assert all(member in down for down in said_by(cluster, "lb1"))


def test_what_the_shell_says_counts_until_a_beat_says_otherwise() -> None:
    cluster = cluster_of()
    cluster.feed("lb1", MemberSeen(1, up=False))
    assert not believes(cluster, "lb1", 1)
    cluster.run(UP_AGAIN_NS)
    assert believes(cluster, "lb1", 1)
    cluster.feed("lb1", MemberSeen(0, up=False))
    cluster.feed("lb1", MemberSeen(MEMBER_NONE, up=False))
    assert believes(cluster, "lb1", 0), "an LB believes in itself"


def test_an_lb_that_was_stopped_does_not_take_its_own_silence_for_that_of_others() -> None:
    cluster = cluster_of()
    keeper, now_ns = cluster["lb1"].keeper, cluster.now_ns + FENCE_NS - 2 * TICK_NS
    keeper.step(ControllerSeen(), now_ns)
    assert [] == [effect for effect in keeper.step(Tick(), now_ns) if isinstance(effect, Configure)]
    assert () == keeper.beliefs().down


def test_a_clock_that_was_set_back_does_not_stop_the_beats() -> None:
    cluster = cluster_of()
    keeper, now_ns = cluster["lb1"].keeper, cluster.now_ns - 500 * SECOND_NS
    beats = [effect for effect in keeper.step(Tick(), now_ns) if isinstance(effect, Ask)]
    assert [BeatCall] * 2 == [type(beat.body) for beat in beats]


# --- Bounds -----------------------------------------------------------------------------------------------------------
def test_beats_to_who_is_down_are_bounded_and_keep_nobody_from_asking() -> None:
    """A shell that never answers: the Keeper gives up each question after CALL_LOST_NS."""
    cluster = cluster_of()
    state = cluster["lb1"].keeper._state
    for number in range(1, 100):
        cluster["lb1"].keeper.step(Tick(), cluster.now_ns + number * TICK_NS)
        cluster["lb1"].keeper.check_invariants()
    assert {1: BEATS_OPEN_MAX, 2: BEATS_OPEN_MAX} == state.watch.open
    assert all(state.has_room(node) for node in state.node_of_member.values())


def test_beats_are_asked_where_no_other_question_has_room() -> None:
    cluster = cluster_of(2)
    cluster.blocked = between("lb2")
    state = cluster["lb1"].keeper._state
    node = state.node_of_member[1]

    class Stuck:
        def failed(self, *_: object) -> list[KeeperEffect]:
            return []

    for _ in range(OUTSTANDING_MAX):
        state.open(Stuck(), cluster.now_ns, node)  # type: ignore[arg-type]
    assert not state.has_room(node)
    cluster.run(BEAT_DOWN_NS + 2 * TICK_NS)
    assert not believes(cluster, "lb1", 1)


# --- A large ring -----------------------------------------------------------------------------------------------------
LARGE = 24


def in_large_ring(member: int = 0, count: int = LARGE) -> Keeper:
    """A Keeper of a ring in which it cannot watch everybody."""
    nodes = tuple(
        ClusterNode(number + 1, f"lb{number}", parse_address(f"10.0.0.{number + 1}"), f"lb{number}:9900", number)
        for number in range(count)
    )
    snapshot = Snapshot(CLUSTER, 1, Ring(1, tuple(range(count))), nodes)
    keeper = Keeper(f"lb{member}")
    for body in steps_of(snapshot):
        effects = keeper.step(Called(1, body), START_NS)
        assert isinstance(effects[-1], Reply), effects
    return keeper


def steps_of(snapshot: Snapshot) -> tuple[ControlCall, ...]:
    generation, digest = snapshot.generation, digest_of(snapshot)
    return snapshot, PrepareCall(generation, digest), CommitCall(generation, digest)


def beats_of(effects: list[KeeperEffect]) -> list[int]:
    """Members asked: node ids are one more."""
    return [effect.node - 1 for effect in effects if isinstance(effect, Ask) and isinstance(effect.body, BeatCall)]


def ticks(keeper: Keeper, dead: set[int], count: int, start_ns: int, said: tuple[int, ...] = ()) -> Iterator[list[int]]:
    """Ticks whose beats are answered at once, but by the dead; who was asked in each."""
    for number in range(count):
        now_ns = start_ns + number * TICK_NS
        effects = keeper.step(Tick(), now_ns)
        yield answer(keeper, effects, dead, now_ns, said)
        keeper.check_invariants()


def answer(
    keeper: Keeper, effects: list[KeeperEffect], dead: set[int], now_ns: int, said: tuple[int, ...]
) -> list[int]:
    """The members that were asked, also because of the answers."""
    members: list[int] = []
    todo = list(effects)
    while todo:
        effect = todo.pop(0)
        if isinstance(effect, Ask):
            member = effect.node - 1
            members.append(member)
            if member not in dead:
                todo += keeper.step(Answered(effect.token, BeatAnswer(member, 1, 1, True, said)), now_ns)
    return members


def test_in_a_large_ring_everybody_is_watched_by_somebody_and_nobody_watches_more_than_a_few() -> None:
    watched = {member: in_large_ring(member).beliefs().watched for member in range(LARGE)}
    assert all(len(members) == WATCH_MAX and member not in members for member, members in watched.items())
    assert all(any(member in members for members in watched.values()) for member in range(LARGE))
    assert all((member + 1) % LARGE in members for member, members in watched.items())


def test_a_rumour_is_checked_at_once_and_believed_only_where_the_check_fails() -> None:
    keeper = in_large_ring()
    others, watched = set(keeper.beliefs().others), set(keeper.beliefs().watched)
    dead, alive = sorted(others - watched)[:2]
    assert all(set(asked) <= watched for asked in ticks(keeper, {dead}, 10, START_NS + TICK_NS))
    now_ns = START_NS + 11 * TICK_NS
    asked: list[int] = []
    for members in ticks(keeper, {dead}, 10, now_ns, said=(dead, alive)):
        asked += members
    assert {dead, alive} <= set(asked)
    assert (dead,) == keeper.beliefs().down
    later = START_NS + 21 * TICK_NS
    assert any(dead in members for members in ticks(keeper, {dead}, 4, later)), "who is down is asked until it is back"
    for _ in ticks(keeper, set(), 4, later + 4 * TICK_NS):
        pass
    assert () == keeper.beliefs().down
    assert not any({dead, alive} & set(members) for members in ticks(keeper, set(), 6, later + 9 * TICK_NS))


def test_a_check_comes_with_the_rumour_and_not_with_the_next_beat() -> None:
    keeper = in_large_ring()
    others, watched = set(keeper.beliefs().others), set(keeper.beliefs().watched)
    rumoured = sorted(others - watched)
    call = BeatCall(rumoured[0], 1, 1, tuple(rumoured[1:]))
    effects = keeper.step(Called(9, call), START_NS + SECOND_NS)
    assert isinstance(effects[0], Reply)
    assert rumoured[1 : 1 + WATCH_MAX] == beats_of(effects), "so many at one time, and no more"
    effects = keeper.step(Called(10, BeatCall(rumoured[0], 1, 1, (min(watched),))), START_NS + SECOND_NS)
    assert [] == beats_of(effects), "who is watched anyway needs no rumour"
    effects = keeper.step(Called(11, BeatCall(LARGE + 5, 9, 9, (LARGE + 7,))), START_NS + SECOND_NS)
    assert 1 == len(effects), "a stranger is answered, and not listened to"
    keeper.check_invariants()


def test_where_nearly_everybody_is_down_all_are_found_and_what_is_open_stays_bounded() -> None:
    keeper = in_large_ring()
    others = set(keeper.beliefs().others)
    survivor = min(keeper.beliefs().watched)
    dead = others - {survivor}
    found = 0
    for number, asked in enumerate(ticks(keeper, dead, 120, START_NS, said=tuple(sorted(dead)))):
        assert len(asked) <= 3 * WATCH_MAX
        assert sum(keeper._state.watch.open.values()) <= BEATS_MAX
        found = found or (number if set(keeper.beliefs().down) == dead else 0)
    assert 0 < found * TICK_NS < LOST_NS, "they take turns, and are found all the same"
    for _ in ticks(keeper, set(), 120, START_NS + 120 * TICK_NS):
        pass
    assert () == keeper.beliefs().down


# --- Whom else --------------------------------------------------------------------------------------------------------
def test_hosts_and_an_lb_alone_watch_nobody_and_are_never_fenced() -> None:
    cluster = cluster_of(1)
    cluster.run(3 * FENCE_NS)
    for name in ("lb1", "host1"):
        beliefs = cluster[name].keeper.beliefs()
        assert ((), (), 0) == (beliefs.others, beliefs.watched, beliefs.fenced_count)
    assert 0 == cluster["lb1"].status.tracking_slots
    asked = cluster["host1"].call(BeatCall(0, 1, 1), cluster.now_ns)
    assert isinstance(asked, Refuse)


def test_an_answer_that_is_not_the_one_asked_for_changes_nothing() -> None:
    cluster = cluster_of()
    keeper, now_ns = cluster["lb1"].keeper, cluster.now_ns + BEAT_NS
    tokens = [effect.token for effect in keeper.step(Tick(), now_ns) if isinstance(effect, Ask)]
    before = dict(keeper._state.watch.heard_ns)
    assert [] == keeper.step(Answered(tokens[0], BeatAnswer(2, 1, 1, True)), now_ns + 1), "another member answers"
    assert [] == keeper.step(AskFailed(tokens[1], "silence"), now_ns + 1)
    [trace] = keeper.step(Answered(tokens[1], BeatAnswer(2, 1, 1, True)), now_ns + 1)
    assert isinstance(trace, Trace)
    assert "late answer" == trace.what
    assert before == keeper._state.watch.heard_ns
    keeper.check_invariants()


def test_a_member_that_has_left_the_ring_is_forgotten() -> None:
    keeper = in_large_ring(count=3)
    state = keeper._state
    for _ in ticks(keeper, {1, 2}, LOST_NS // TICK_NS + 5, START_NS):
        pass
    assert (1, 2) == keeper.beliefs().down == keeper.beliefs().given_up
    old = state.committed.snapshot if state.committed is not None else None
    assert old is not None
    new = Snapshot(CLUSTER, 2, Ring(2, (0, 1)), old.nodes)
    for body in steps_of(new):
        keeper.step(Called(1, body), START_NS + 2 * SECOND_NS)
    keeper.step(Tick(), START_NS + 2 * SECOND_NS)
    assert ((1,), (1,)) == (keeper.beliefs().others, keeper.beliefs().down)
    assert {1} == set(state.watch.asked_ns) == state.down == state.given_up


# --- Fence ------------------------------------------------------------------------------------------------------------
def test_who_hears_nobody_tracks_all_and_settles_when_in_touch_again() -> None:
    cluster = cluster_of()
    before = cluster["lb1"].words().copy()
    cluster.blocked = between("lb1")
    cluster.run(FENCE_NS - 2 * TICK_NS)
    assert 0 == cluster["lb1"].status.tracking_slots
    cluster.run(2 * BEAT_NS + 2 * TICK_NS)
    status = cluster["lb1"].status
    assert (65_536, True) == (status.tracking_slots, "neither the controller" in status.problem)
    assert (cluster["lb1"].current() == (before & np.uint64(0xFFFFFF))).all()
    assert (cluster["lb1"].base() == cluster["lb1"].current()).all()
    assert [0, 0] == [cluster[name].status.tracking_slots for name in ("lb2", "lb3")], "these hear each other"
    cluster.run(20 * SECOND_NS)
    assert 65_536 == cluster["lb1"].status.tracking_slots
    assert 1 == cluster["lb1"].keeper.beliefs().fenced_count
    cluster.blocked = nothing
    cluster.run(4 * SECOND_NS)
    assert "" == cluster["lb1"].status.problem
    assert 0 == cluster["lb1"].status.tracking_slots
    assert (before & np.uint64(0xFFFFFF) == cluster["lb1"].current()).all()


@pytest.mark.parametrize("event", [ControllerSeen(), None])
def test_the_controller_alone_is_company_enough(event: ControllerSeen | None) -> None:
    """event None: it calls for something that has been done."""
    cluster = cluster_of()
    cluster.blocked = between("lb1")
    assert cluster.snapshot is not None
    for _ in range(8):
        if event is not None:
            cluster.feed("lb1", event)
        else:
            cluster["lb1"].call(CommitCall(1, digest_of(cluster.snapshot)), cluster.now_ns)
        cluster.run(SECOND_NS)
    assert 0 == cluster["lb1"].keeper.beliefs().fenced_count


def test_who_hears_of_a_newer_generation_and_not_of_the_controller_is_fenced() -> None:
    cluster = cluster_of()
    second = cluster.plan(vip([1, 2, 3]))
    others = ("lb2", "lb3")
    for step in (cluster.stage, cluster.prepare, cluster.commit):
        step(second, others)
    cluster.run(FENCE_NS + TICK_NS)
    status = cluster["lb1"].status
    assert (65_536, True) == (status.tracking_slots, "generation 2 is in force elsewhere" in status.problem)
    for step in (cluster.stage, cluster.prepare, cluster.commit):
        step(second, ("lb1",))
    cluster.run(TICK_NS)
    assert "" == cluster["lb1"].status.problem
    cluster.run(60 * SECOND_NS)
    assert [0, 0, 0] == [cluster[name].status.tracking_slots for name in cluster.lbs]


def behind(cluster: Cluster, name: str) -> tuple[bool, int]:
    """Is it in doubt, and which newer generation does it know of?"""
    beliefs = cluster[name].keeper.beliefs()
    return beliefs.in_doubt, beliefs.behind


def test_who_was_left_out_is_behind_from_the_first_word_of_a_peer_until_it_has_what_is_in_force() -> None:
    cluster = cluster_of()
    assert (False, 0) == behind(cluster, "lb1")
    second, others = cluster.plan(vip([1, 2, 3])), ("lb2", "lb3")
    cluster.blocked = between("lb1")
    for step in (cluster.stage, cluster.prepare, cluster.commit):
        step(second, others)
    cluster.run(FENCE_NS + TICK_NS)
    assert (True, 0) == behind(cluster, "lb1"), "nobody has told"
    cluster.blocked = nothing
    cluster.run(2 * BEAT_NS)
    assert (True, 2) == behind(cluster, "lb1")
    for step in (cluster.stage, cluster.prepare):
        step(second, ("lb1",))
        cluster.run(2 * TICK_NS)
        assert (True, 2) == behind(cluster, "lb1"), "the controller speaks, but nothing newer is in force here yet"
    cluster.commit(second, ("lb1",))
    cluster.run(2 * TICK_NS)
    assert (False, 0) == behind(cluster, "lb1")


def test_a_doubt_ends_with_a_peer_that_is_not_ahead_and_without_peers_with_the_controller() -> None:
    cluster = cluster_of()
    cluster.blocked = between("lb1")
    cluster.run(FENCE_NS + TICK_NS)
    cluster.feed("lb1", ControllerSeen())
    cluster.run(2 * TICK_NS)
    assert (True, 0) == behind(cluster, "lb1"), "a peer that can be heard again speaks within that of a lost SYN"
    cluster.run(SYN_RETRY_NS + 2 * BEAT_NS)
    assert (False, 0) == behind(cluster, "lb1"), "its peers are silent, and the controller is not"
    cluster.run(FENCE_NS + TICK_NS)
    assert (True, 0) == behind(cluster, "lb1")
    cluster.blocked = nothing
    cluster.run(2 * BEAT_NS)
    assert (False, 0) == behind(cluster, "lb1")


def test_a_word_that_was_on_its_way_all_the_time_ends_no_doubt() -> None:
    """The kernel has kept a peer's beat while the cable was cut. It says what was in force before."""
    cluster = cluster_of()
    second, others = cluster.plan(vip([1, 2, 3])), ("lb2", "lb3")
    cluster.blocked = between("lb1")
    for step in (cluster.stage, cluster.prepare, cluster.commit):
        step(second, others)
    cluster.run(FENCE_NS + TICK_NS)
    cluster["lb1"].call(BeatCall(1, 1, 1), cluster.now_ns)
    cluster.run(2 * TICK_NS)
    assert (True, 0) == behind(cluster, "lb1")
    cluster.blocked = nothing
    cluster.run(2 * BEAT_NS)
    assert (True, 2) == behind(cluster, "lb1")


def test_a_peer_ahead_is_no_reason_for_a_doubt_by_itself() -> None:
    """Everybody is behind for a moment with each change."""
    cluster = cluster_of()
    second, others = cluster.plan(vip([1, 2, 3])), ("lb2", "lb3")
    for step in (cluster.stage, cluster.prepare, cluster.commit):
        step(second, others)
    cluster.run(2 * BEAT_NS)
    assert (False, 0) == behind(cluster, "lb1")
    cluster.run(FENCE_NS)
    assert (True, 2) == behind(cluster, "lb1"), "but nobody is for long, where the controller speaks"


def test_who_has_prepared_what_others_have_committed_is_not_fenced() -> None:
    """The controller has gone in the middle of a commit: what differs is tracked already."""
    cluster = cluster_of()
    second = cluster.plan(vip([1, 2, 3]))
    cluster.stage(second)
    cluster.prepare(second)
    cluster.commit(second, ("lb2", "lb3"))
    cluster.run(5 * FENCE_NS)
    assert 0 == cluster["lb1"].keeper.beliefs().fenced_count
    assert 0 < cluster["lb1"].status.tracking_slots < 65_536 // 2


def test_who_wakes_up_is_fenced_by_the_first_word_that_it_hears() -> None:
    cluster = cluster_of()
    node = cluster["lb1"]
    later_ns = cluster.now_ns + 60 * SECOND_NS
    node.feed(Called(7, BeatCall(1, 1, 1)), later_ns)
    assert isinstance(node.answers.pop(7), Reply)
    assert 65_536 == node.status.tracking_slots
    node.feed(Tick(), later_ns + TICK_NS)
    assert "" == node.status.problem


def test_a_fence_that_could_not_be_written_is_written_with_the_next_tick() -> None:
    cluster = cluster_of()
    cluster.blocked = between("lb1")
    cluster["lb1"].fails = lambda effect: True
    cluster.run(FENCE_NS + TICK_NS)
    assert "writing to the datapath failed" in cluster["lb1"].status.problem
    assert not cluster["lb1"].tracking().any()
    cluster["lb1"].fails = lambda effect: False
    cluster.run(2 * TICK_NS)
    assert cluster["lb1"].tracking().all()
