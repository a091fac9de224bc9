"""The Planner and the ring in scenes: who joins, who leaves, who is lost, and what exactly is done about it."""

import msgspec
import pytest

from lbpod.core.limits import (
    AWAY_NS,
    HOST_WAIT_NS,
    JOIN_RETRY_NS,
    LEFT_NS,
    LOST_NS,
    MARGIN_NS,
    PROBE_NS,
    REFUSED_RETRY_NS,
    START_WAIT_NS,
)
from lbpod.core.messages import (
    AskStatus,
    HandoverCall,
    LbAnswered,
    LbFailed,
    Phase,
    PlannerEffect,
    PlannerEvent,
    Push,
    RingStep,
    RingSwitchCall,
    Tick,
)
from lbpod.core.model import (
    parse_address,
)
from lbpod.core.snapshot import digest_of
from tests.planner_scene import (
    SECOND_NS,
    WORDS,
    Scene,
    calls,
    lose_at,
    quiet,
    without_asking,
    world,
)


@pytest.fixture
def scene() -> Scene:
    return Scene()


# --- The ring ---------------------------------------------------------------------------------------------------------
def test_a_newcomer_joins_in_four_acknowledged_phases(scene: Scene) -> None:
    scene.see(world(1))
    done = scene.see(world(1, lbs=3))
    assert [] == calls(done, "prepare"), "the ring goes first"
    assert [
        "persist 2",
        *(f"stage 2 lb{number}" for number in (1, 2, 3)),
        *(f"learn 2 lb{number}" for number in (1, 2, 3)),
        *(f"hand 2 lb{number} round 1 without []" for number in (1, 2, 3)),
        *(f"switch 2 lb{number}" for number in (1, 2, 3)),
    ] == without_asking(done)
    assert (Phase.SWITCHING, ("lb1", "lb2", "lb3"), 3) == (scene.now().phase, scene.now().ring, scene.now().lbs)
    assert [] == without_asking(scene.later(MARGIN_NS - SECOND_NS // 4)), "packets are on their way to former owners"
    assert [f"end 2 lb{number}" for number in (1, 2, 3)] == without_asking(scene.later(SECOND_NS // 2))
    status = scene.now()
    assert (Phase.IDLE, 2, 3, 1, 1, "") == (
        *(status.phase, status.generation, status.lbs_at_generation, status.changes, status.ring_changes),
        status.problem,
    )
    assert ["lb1", "lb2", "lb3"] == scene.ring()


def test_a_newcomer_that_does_not_answer_disturbs_nobody(scene: Scene) -> None:
    scene.see(world(1))
    scene.silent = {"lb3"}
    scene.see(world(1, 2, lbs=3))
    scene.later(4 * SECOND_NS)
    assert (Phase.IDLE, 2, ("lb1", "lb2")) == (scene.now().phase, scene.now().generation, scene.now().ring)
    assert "lb3 is not in the ring: timed out" == scene.now().problem
    scene.silent = set()
    quiet(scene)
    assert ["lb1", "lb2", "lb3"] == scene.ring()


def test_a_join_waits_for_a_host_that_is_away_for_a_moment_and_a_change_of_backends_does_not(scene: Scene) -> None:
    scene.see(world(1, hosts=1))
    scene.silent = {"host1"}
    assert calls(scene.see(world(1, 2, hosts=1)), "commit 2 lb1")
    assert [] == calls(scene.see(world(1, 2, lbs=3, hosts=1)), "learn"), "host1 would drop what lb3 sends it"
    scene.silent = set()
    learned = calls(scene.later(HOST_WAIT_NS - SECOND_NS), "learn")
    assert any(one.endswith("host1") for one in learned)
    scene.later(2 * SECOND_NS)
    assert ["lb1", "lb2", "lb3"] == scene.ring()


def test_a_join_does_not_wait_for_a_host_for_long(scene: Scene) -> None:
    scene.see(world(1, hosts=1))
    scene.silent = {"host1"}
    scene.see(world(1, lbs=3, hosts=1))
    scene.later(HOST_WAIT_NS + 2 * SECOND_NS)
    assert ["lb1", "lb2", "lb3"] == scene.ring()


@pytest.mark.parametrize("name", ["host1", "lb2", "lb3"])
def test_an_agent_that_has_restarted_since_it_was_pushed_to_is_pushed_to_again_while_all_wait(
    scene: Scene, name: str
) -> None:
    """It refuses to prepare what it does not know any more: that is no refusal of the ring."""
    scene.see(world(1, hosts=1))
    answer, restarted = scene._answer, list[int]()

    def forgets(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        if restarted or not isinstance(effect, Push) or effect.node != name or WORDS[type(effect.body)] != "learn":
            return answer(effect, done)
        restarted.append(effect.generation)
        force = scene.staged[name] = scene.in_force[name]
        scene.nodes[name] = msgspec.structs.replace(
            scene.nodes[name], staged=force.generation, digest=digest_of(force), prepared=0
        )
        done.append("refuse")
        return LbFailed(name, effect.generation, True, "has not been pushed")

    scene._answer = forgets  # type: ignore[method-assign]
    done = scene.see(world(1, lbs=3, hosts=1)) + scene.later(3 * SECOND_NS)
    since = done[done.index("refuse") :]
    steps = [since.index(f"{word} {restarted[0]} {name}") for word in ("stage", "learn")]
    assert steps[0] < steps[1] < since.index(f"hand {restarted[0]} lb1 round 1 without []")
    quiet(scene)
    assert (["lb1", "lb2", "lb3"], "") == (scene.ring(), scene.now().problem)


def test_all_joins_and_leaves_of_one_moment_are_one_change(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    there = world(1, lbs=5)
    done = scene.see(msgspec.structs.replace(there, nodes=(there.nodes[0], *there.nodes[2:])))
    assert [f"hand 2 lb{number} round 1 without []" for number in (1, 2, 3, 4, 5)] == calls(done, "hand")
    quiet(scene)
    assert (["lb1", "lb3", "lb4", "lb5"], 1) == (scene.ring(), scene.now().ring_changes)


def test_one_that_wants_to_leave_hands_over_first(scene: Scene) -> None:
    scene.see(world(1))
    scene.leaving = {"lb2"}
    done = scene.later(4 * SECOND_NS)
    assert [f"hand 2 {name} round 1 without []" for name in ("lb1", "lb2")] == calls(done, "hand")
    assert (["lb1"], False) == (scene.ring(), scene.nodes["lb2"].serving)
    scene.leaving = set()
    quiet(scene)
    assert ["lb1", "lb2"] == scene.ring(), "its agent has started again"


def test_one_that_the_world_lists_no_more_hands_over_and_goes(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    done = scene.see(world(1, lbs=2))
    assert "hand 2 lb3 round 1 without []" in done
    quiet(scene)
    assert (["lb1", "lb2"], 3) == (scene.ring(), scene.now().generation)
    assert ["lb1", "lb2"] == [node.name for node in scene.in_force["lb1"].nodes]
    assert [] == [one for one in scene.later(4 * SECOND_NS) if "lb3" in one]


def test_one_whose_address_changes_goes_and_comes_back(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    there = world(1, lbs=3)
    moved = msgspec.structs.replace(there.nodes[2], address=parse_address("10.0.0.77"))
    scene.see(msgspec.structs.replace(there, nodes=(*there.nodes[:2], moved)))
    quiet(scene)
    assert (["lb1", "lb2", "lb3"], [1, 2, 3], 2) == (scene.ring(), scene.persisted, scene.now().ring_changes)
    assert parse_address("10.0.0.77") == scene.in_force["lb1"].nodes[2].address


def test_where_all_have_another_address_one_waits_for_the_others(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    there = world(1, lbs=3)
    moved = tuple(
        msgspec.structs.replace(node, address=parse_address(f"10.0.1.{last}")) for last, node in enumerate(there.nodes)
    )
    scene.see(msgspec.structs.replace(there, nodes=moved))
    quiet(scene)
    assert (["lb1", "lb2", "lb3"], 3) == (scene.ring(), scene.now().ring_changes)
    assert [node.address for node in moved] == [node.address for node in scene.in_force["lb1"].nodes]


def test_an_address_that_another_still_has_is_waited_for(scene: Scene) -> None:
    """lb3's machine is called lb4 now."""
    scene.see(world(1, lbs=3))
    there = world(1, lbs=3)
    renamed = msgspec.structs.replace(there.nodes[2], name="lb4", control="lb4:9900")
    scene.see(msgspec.structs.replace(there, nodes=(*there.nodes[:2], renamed)))
    quiet(scene)
    assert ["lb1", "lb2", "lb4"] == scene.ring()


def test_two_newcomers_at_one_address_keep_nobody_from_leaving(scene: Scene) -> None:
    scene.see(world(1, lbs=2))
    there = world(1, lbs=4)
    twin = msgspec.structs.replace(there.nodes[3], address=there.nodes[2].address)
    scene.leaving = {"lb2"}
    scene.see(msgspec.structs.replace(there, nodes=(*there.nodes[:3], twin)))
    scene.later(5 * SECOND_NS)
    assert ["lb1"] == scene.ring()
    assert "node address 10.0.0.3 is there 2 times" in scene.now().problem


def test_a_lost_member_is_taken_out_and_joins_again(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    scene.silent = {"lb3"}
    assert [] == calls(scene.later(LOST_NS), "persist")
    scene.later(4 * SECOND_NS)
    assert (["lb1", "lb2"], (), Phase.IDLE) == (scene.ring(), scene.now().lost, scene.now().phase)
    assert "hand 2 lb1 round 1 without [2]" in scene.log
    scene.silent = set()
    quiet(scene)
    assert (["lb1", "lb2", "lb3"], [1, 2, 3]) == (scene.ring(), scene.persisted)


def test_a_member_that_is_back_in_time_has_never_been_away(scene: Scene) -> None:
    scene.see(world(1))
    scene.silent = {"lb2"}
    scene.later(LOST_NS - SECOND_NS)
    scene.silent = set()
    quiet(scene)
    assert [1] == scene.persisted


def test_a_controller_that_was_stopped_blames_nobody(scene: Scene) -> None:
    """All calls under way have timed out when it goes on."""
    scene.see(world(1))
    scene.now_ns += PROBE_NS
    late = [effect.node for effect in scene.step(Tick()) if isinstance(effect, AskStatus)]
    assert ["lb1", "lb2"] == late
    scene.now_ns += 10 * LOST_NS
    for name in ("lb1", "lb2"):
        scene.play(LbFailed(name, 0, False, "timed out"))
    quiet(scene)
    assert ([1], ()) == (scene.persisted, scene.now().lost)


def test_a_member_that_restarts_empty_is_lost_at_once_and_joins_again(scene: Scene) -> None:
    scene.see(world(1))
    scene.empty("lb2")
    done = scene.later(2 * PROBE_NS)
    assert "hand 2 lb1 round 1 without [1]" in done
    assert [] == [one for one in without_asking(done) if "lb2" in one], "nothing is asked of it"
    quiet(scene)
    assert (["lb1", "lb2"], [1, 2, 3]) == (scene.ring(), scene.persisted)
    assert "hand 3 lb1 round 1 without []" in scene.log


def test_where_all_have_restarted_empty_they_get_what_is_in_force(scene: Scene) -> None:
    scene.see(world(1))
    for name in ("lb1", "lb2"):
        scene.empty(name)
    done = scene.later(2 * PROBE_NS)
    assert [f"{word} 1 {name}" for word in ("stage", "prepare", "commit") for name in ("lb1", "lb2")] == sorted(
        without_asking(done), key=lambda one: (["stage", "prepare", "commit"].index(one.split()[0]), one)
    )
    assert ([1], ["lb1", "lb2"], "") == (scene.persisted, scene.ring(), scene.now().problem)


def test_where_the_last_change_was_one_of_the_ring_they_get_it_without_the_change(scene: Scene) -> None:
    scene.see(world(1))
    scene.see(world(1, lbs=3))
    quiet(scene)
    for name in ("lb1", "lb2", "lb3"):
        scene.empty(name)
    scene.later(3 * PROBE_NS)
    assert ([1, 2, 3], Phase.IDLE, ()) == (scene.persisted, scene.now().phase, scene.now().lost)
    assert () == scene.in_force["lb1"].ring.before
    assert ["lb1", "lb2", "lb3"] == scene.ring()


def test_the_ring_stays_where_nobody_is_left(scene: Scene) -> None:
    scene.see(world(1))
    scene.silent = {"lb1", "lb2"}
    scene.later(30 * SECOND_NS)
    assert ([1], ("lb1", "lb2"), ("lb1", "lb2")) == (scene.persisted, scene.now().ring, scene.now().lost)
    assert "lb1 is lost: timed out" == scene.now().problem
    scene.silent = set()
    quiet(scene)
    assert ([1], (), "") == (scene.persisted, scene.now().lost, scene.now().problem)


def test_one_that_does_not_answer_is_lost_as_soon_as_the_others_have_given_it_up(scene: Scene) -> None:
    """A controller that has just started has counted nothing itself."""
    scene.see(world(1, lbs=3))
    scene.silent, scene.given_up = {"lb3"}, (2,)
    scene.restart()
    scene.see(world(1, lbs=3))
    scene.later(LOST_NS - 2 * SECOND_NS)
    assert (["lb1", "lb2"], Phase.IDLE) == (scene.ring(), scene.now().phase)


def test_a_newcomer_that_has_given_up_nobody_does_not_bring_back_whom_the_ring_goes_on_without(scene: Scene) -> None:
    """It has not listened for so long."""
    scene.see(world(1, lbs=3))
    scene.silent, scene.given_up, scene.unaware = {"lb3"}, (2,), {"lb4"}
    scene.restart()
    scene.see(world(1, lbs=4))
    scene.later(AWAY_NS + 3 * SECOND_NS)
    assert (["lb1", "lb2", "lb4"], Phase.IDLE) == (scene.ring(), scene.now().phase)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize(("word", "waits_ns"), [("end", LEFT_NS), ("switch", LOST_NS)])
def test_one_that_has_switched_to_a_ring_without_itself_is_not_waited_for_as_long_as_one_that_has_not(
    scene: Scene, word: str, waits_ns: int, restarts: bool
) -> None:
    """Its agent has ended. A new controller knows by lb1, which has ended the change, that all had switched."""
    scene.see(world(1, lbs=3))
    lose_at(scene, "lb3", word)
    scene.leaving = {"lb3"}
    scene.later(3 * SECOND_NS)
    assert ("lb3" in scene.silent, "switch 2 lb3" in scene.log) == (True, True)
    began_ns = scene.now_ns
    if restarts:
        scene.restart()
        scene.see(world(1, lbs=3))
    while scene.now().phase is not Phase.IDLE:
        scene.later(SECOND_NS // 4)
    assert ["lb1", "lb2"] == scene.ring()
    assert waits_ns - 3 * SECOND_NS <= scene.now_ns - began_ns <= waits_ns + 3 * SECOND_NS


def test_who_hears_nobody_is_no_witness(scene: Scene) -> None:
    """It may be the one that was cut off: it says so of all others until it has heard them again."""
    scene.see(world(1, lbs=3))
    scene.silent, scene.given_up = {"lb2", "lb3"}, (1, 2)
    scene.restart()
    scene.see(world(1, lbs=3))
    scene.later(LOST_NS - 2 * SECOND_NS)
    assert (["lb1", "lb2", "lb3"], ()) == (scene.ring(), scene.now().lost)


def test_one_that_answers_is_not_lost_whatever_others_say(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    scene.given_up = (2,)
    scene.later(2 * LOST_NS)
    assert (["lb1", "lb2", "lb3"], ()) == (scene.ring(), scene.now().lost)


def test_the_ring_keeps_its_last_member_though_it_wants_to_leave(scene: Scene) -> None:
    scene.see(world(1))
    scene.leaving = {"lb1", "lb2"}
    scene.later(LOST_NS + 6 * SECOND_NS)
    assert [1] == scene.persisted
    scene.silent = {"lb2"}
    scene.later(LOST_NS + 6 * SECOND_NS)
    assert ["lb1"] == scene.ring()


def test_a_loss_before_the_commit_is_a_ring_change_first(scene: Scene) -> None:
    scene.see(world(1))
    scene.silent = {"lb2"}
    scene.see(world(1, 2))
    assert Phase.STAGING is scene.now().phase
    done = scene.later(LOST_NS + 2 * SECOND_NS)
    assert [] == calls(done, "prepare 2"), "lb2 may forward by the table before"
    assert ["persist 3", "stage 3 lb1", "learn 3 lb1", "hand 3 lb1 round 1 without [1]"] == without_asking(done)[:4]
    quiet(scene)
    assert ([1, 2, 3, 4], [1, 2], ["lb1"]) == (scene.persisted, scene.backends(), scene.ring())
    assert () == tuple(vip for vip in scene.in_force["lb1"].vips if vip.epoch != 4)


@pytest.mark.parametrize("word", ["prepare", "commit"])
def test_a_loss_later_in_a_change_of_backends(scene: Scene, word: str) -> None:
    """Prepared by lb1 alone it is superseded; prepared by both it is finished by lb1."""
    scene.see(world(1))
    lose_at(scene, "lb2", word)
    scene.see(world(1, 2))
    scene.later(LOST_NS + 6 * SECOND_NS)
    assert (["lb1"], [1, 2], Phase.IDLE) == (scene.ring(), scene.backends(), scene.now().phase)
    assert ([1, 2, 3, 4] if word == "prepare" else [1, 2, 3]) == scene.persisted
    assert ("commit 2 lb1" in scene.log) == (word == "commit")


@pytest.mark.parametrize("word", ["stage", "learn", "hand"])
def test_a_newcomer_that_is_lost_before_the_switch_is_left_out(scene: Scene, word: str) -> None:
    scene.see(world(1))
    lose_at(scene, "lb3", word)
    scene.see(world(1, lbs=3))
    done = scene.later(LOST_NS + 6 * SECOND_NS)
    assert [] == calls(done, "switch")
    assert (["lb1", "lb2"], (), Phase.IDLE) == (scene.ring(), scene.now().lost, scene.now().phase)
    assert (1, 1) == (scene.nodes["lb1"].ring_epoch, scene.in_force["lb1"].ring.epoch), "the ring has not changed"
    assert scene.in_force["lb1"].generation >= 3, "but `next` is taken back by a newer generation"


@pytest.mark.parametrize("word", ["switch", "end"])
def test_one_that_is_lost_after_the_handover_is_taken_out_by_the_next_change(scene: Scene, word: str) -> None:
    scene.see(world(1))
    lose_at(scene, "lb3", word)
    scene.see(world(1, lbs=3))
    done = scene.later(LOST_NS + 6 * SECOND_NS)
    assert ["end 2 lb1", "end 2 lb2"] == [one for one in calls(done, "end 2") if not one.endswith("lb3")]
    assert "hand 3 lb1 round 1 without [2]" in done
    assert ["lb1", "lb2"] == scene.ring()
    scene.silent = set()
    scene._answer = Scene._answer.__get__(scene)  # type: ignore[method-assign]
    quiet(scene)
    assert ["lb1", "lb2", "lb3"] == scene.ring()


def test_a_leaver_that_is_lost_costs_another_round(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    scene.leaving = {"lb3"}
    lose_at(scene, "lb3", "hand")
    done = scene.later(LOST_NS + 6 * SECOND_NS)
    rounds = [one for one in calls(done, "hand") if not one.startswith("hand 2 lb3")]
    assert [
        *("hand 2 lb1 round 1 without []", "hand 2 lb2 round 1 without []"),
        *("hand 2 lb1 round 2 without [2]", "hand 2 lb2 round 2 without [2]"),
    ] == rounds
    assert (["lb1", "lb2"], [1, 2]) == (scene.ring(), scene.persisted)


def test_a_member_that_is_lost_while_another_joins_supersedes(scene: Scene) -> None:
    scene.see(world(1, lbs=2))
    lose_at(scene, "lb2", "hand")
    scene.see(world(1, lbs=3))
    scene.later(LOST_NS + 6 * SECOND_NS)
    assert (["lb1", "lb3"], [1, 2, 3]) == (scene.ring(), scene.persisted)
    assert scene.in_force["lb1"].ring.before == (0, 1), "it follows upon what is in force"
    assert "hand 3 lb1 round 1 without [1]" in scene.log


def test_a_newcomer_that_restarts_empty_is_handed_over_to_once_more(scene: Scene) -> None:
    scene.see(world(1))
    slow = {"lb1"}
    answer = scene._answer

    def still_busy(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        if isinstance(effect, Push) and isinstance(effect.body, HandoverCall) and effect.node in slow:
            done.append(f"busy {effect.node} round {effect.body.round}")
            return LbAnswered(effect.node, effect.generation, scene._said(effect.node, False))
        return answer(effect, done)

    scene._answer = still_busy  # type: ignore[method-assign]
    scene.see(world(1, lbs=3))
    scene.later(SECOND_NS)
    assert Phase.HANDING_OVER is scene.now().phase
    scene.empty("lb3")
    done = scene.later(2 * PROBE_NS)
    assert {"stage 2 lb3", "learn 2 lb3", "hand 2 lb2 round 2 without []", "busy lb1 round 2"} <= set(done)
    slow.clear()
    quiet(scene)
    assert (["lb1", "lb2", "lb3"], [1, 2]) == (scene.ring(), scene.persisted)


def test_a_handover_that_takes_its_time_is_asked_for_without_haste(scene: Scene) -> None:
    scene.see(world(1))
    answer = scene._answer

    def busy(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        if not isinstance(effect, Push) or not isinstance(effect.body, HandoverCall):
            return answer(effect, done)
        done.append(f"busy {effect.node}")
        return LbAnswered(effect.node, effect.generation, scene._said(effect.node, False))

    scene._answer = busy  # type: ignore[method-assign]
    scene.see(world(1, lbs=3))
    done = scene.later(SECOND_NS)
    assert 4 == len(calls(done, "busy lb1")), "once a tick"


def test_a_newcomer_that_refuses_holds_nobody_up_and_is_asked_again_later(scene: Scene) -> None:
    scene.see(world(1))
    scene.refusing = {"lb3": "stage"}
    scene.see(world(1, 2, lbs=3))
    scene.later(4 * SECOND_NS)
    assert (["lb1", "lb2"], [1, 2], Phase.IDLE) == (scene.ring(), scene.backends(), scene.now().phase)
    assert "lb3 refuses: cannot stage" == scene.now().problem
    scene.refusing = {}
    done = scene.later(JOIN_RETRY_NS - 5 * SECOND_NS)
    assert [] == calls(done, "persist")
    scene.later(LOST_NS + 6 * SECOND_NS)
    assert (["lb1", "lb2", "lb3"], "") == (scene.ring(), scene.now().problem)


def test_a_ring_change_that_a_member_refuses_gives_way_to_the_world(scene: Scene) -> None:
    scene.see(world(1))
    scene.refusing = {"lb2": "learn"}
    scene.see(world(1, lbs=3))
    assert (Phase.RING_PREPARING, "lb2 refuses: cannot learn") == (scene.now().phase, scene.now().problem)
    scene.see(world(1, 2, lbs=3))
    scene.later(4 * SECOND_NS)
    assert (["lb1", "lb2"], [1, 2], Phase.IDLE) == (scene.ring(), scene.backends(), scene.now().phase)
    scene.refusing = {}
    scene.later(JOIN_RETRY_NS + 4 * SECOND_NS)
    assert ["lb1", "lb2", "lb3"] == scene.ring()


def test_one_that_prepared_and_was_lost_commits_before_it_takes_part_in_a_ring_change(scene: Scene) -> None:
    scene.see(world(1, lbs=3))
    answer = scene._answer
    lose_at(scene, "lb3", "commit")
    scene.see(world(1, 2, lbs=3))
    losing = scene._answer

    def slow(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        learns = isinstance(effect, Push) and WORDS[type(effect.body)] == "learn"
        return None if learns else losing(effect, done)

    scene._answer = slow  # type: ignore[method-assign]
    scene.later(LOST_NS + 2 * SECOND_NS)
    assert (Phase.RING_PREPARING, ("lb3",)) == (scene.now().phase, scene.now().lost)
    scene.silent = set()
    scene._answer = answer  # type: ignore[method-assign]
    done = scene.later(2 * PROBE_NS)
    assert ["commit 2 lb3", "stage 3 lb3", "learn 3 lb3"] == [one for one in without_asking(done) if "lb3" in one][:3]


# --- The first ring ---------------------------------------------------------------------------------------------------
def test_the_first_ring_is_formed_without_one_that_is_silent(scene: Scene) -> None:
    scene.silent = {"lb2"}
    assert [] == calls(scene.see(world(1, lbs=3)) + scene.later(START_WAIT_NS - SECOND_NS), "persist")
    scene.later(2 * SECOND_NS)
    assert ["lb1", "lb3"] == scene.ring()
    scene.silent = set()
    quiet(scene)
    assert (["lb1", "lb2", "lb3"], [1, 2]) == (scene.ring(), scene.persisted)


def test_there_is_no_ring_of_nobody(scene: Scene) -> None:
    scene.silent = {"lb1", "lb2"}
    scene.see(world(1, hosts=1))
    assert [] == calls(scene.later(30 * SECOND_NS), "persist")
    assert Phase.STARTING is scene.now().phase
    scene.silent = {"lb2"}
    scene.later(2 * PROBE_NS)
    assert ["lb1"] == scene.ring()


@pytest.mark.parametrize("word", ["stage", "prepare", "commit"])
def test_one_of_the_first_ring_that_is_lost_before_it_is_in_force(scene: Scene, word: str) -> None:
    lose_at(scene, "lb2", word)
    scene.see(world(1))
    scene.later(LOST_NS + 6 * SECOND_NS)
    assert (["lb1"], [1, 2], Phase.IDLE) == (scene.ring(), scene.persisted, scene.now().phase)
    assert (word == "commit") == ("hand 2 lb1 round 1 without [1]" in scene.log)


def test_a_ring_forms_when_the_first_lbs_come(scene: Scene) -> None:
    scene.see(world(lbs=0, hosts=1))
    assert (Phase.IDLE, 1, ()) == (scene.now().phase, scene.nodes["host1"].committed, scene.now().ring)
    scene.silent = {"lb2"}
    scene.see(world(1, lbs=2, hosts=1))
    scene.later(START_WAIT_NS + SECOND_NS)
    assert (["lb1"], 0) == (scene.ring(), scene.now().ring_changes)
    scene.silent = set()
    quiet(scene)
    assert ["lb1", "lb2"] == scene.ring()


# --- A controller that restarts while the ring changes ----------------------------------------------------------------
@pytest.mark.parametrize("word", ["stage", "learn", "hand", "switch", "end"])
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_new_planner_goes_on_with_a_ring_change(scene: Scene, word: str, is_lost: bool) -> None:
    """The old one got lb1 to do this step, and lb3, who joins, no further than the one before."""
    scene.see(world(1))
    lose_at(scene, "lb3", word)
    scene.see(world(1, lbs=3))
    scene.later(2 * SECOND_NS)
    scene._answer = Scene._answer.__get__(scene)  # type: ignore[method-assign]
    scene.restart()
    if not is_lost:
        scene.silent = set()
    done = scene.see(world(1, lbs=3)) + scene.later(LOST_NS + 6 * SECOND_NS)
    assert Phase.IDLE is scene.now().phase
    assert (["lb1", "lb2"] if is_lost else ["lb1", "lb2", "lb3"]) == scene.ring()
    if not is_lost:
        assert [1, 2] == scene.persisted
    if word == "hand":
        rounds = calls(done, "hand 2 lb1")
        assert is_lost or ["hand 2 lb1 round 2 without []"] == rounds, "a round that nobody else has begun"
    if word in ("switch", "end"):
        assert [] == calls(done, "hand 2"), "that one has switched proves that all had handed over"
        assert calls(done, "end 2 lb1") == (["end 2 lb1"] if word == "switch" else [])


def test_a_new_planner_takes_out_one_that_was_lost_before_a_commit(scene: Scene) -> None:
    """What is in force is not the newest snapshot, and has to be told by the LBs."""
    scene.see(world(1, lbs=3))
    scene.silent = {"lb3"}
    scene.see(world(1, 2, lbs=3))
    assert 2 == scene.nodes["lb1"].staged == scene.nodes["lb2"].staged
    scene.restart()
    scene.see(world(1, 2, lbs=3))
    scene.later(LOST_NS + 6 * SECOND_NS)
    assert (["lb1", "lb2"], [1, 2], Phase.IDLE) == (scene.ring(), scene.backends(), scene.now().phase)
    assert [] == calls(scene.log, "prepare 2")
    assert "hand 3 lb1 round 1 without [2]" in scene.log


def test_a_round_of_another_controller_is_stepped_over(scene: Scene) -> None:
    scene.see(world(1))
    lose_at(scene, "lb3", "hand")
    scene.see(world(1, lbs=3))
    scene.nodes["lb1"] = msgspec.structs.replace(scene.nodes["lb1"], ring_round=4)
    scene.later(2 * PROBE_NS)
    scene._answer = Scene._answer.__get__(scene)  # type: ignore[method-assign]
    scene.silent = set()
    quiet(scene)
    assert "hand 2 lb1 round 5 without []" in scene.log
    assert ["lb1", "lb2", "lb3"] == scene.ring()


def test_a_ring_change_that_another_controller_has_switched_to_is_not_taken_back(scene: Scene) -> None:
    """It was superseded here, for nobody had said so yet. What follows is made from what is in force."""
    scene.see(world(1))
    scene.refusing = {"lb2": "learn"}
    scene.see(world(1, lbs=3))
    other = scene.staged["lb1"]
    scene.refusing = {"lb2": "stage"}
    scene.see(world(1, 2, lbs=3))
    assert (Phase.STAGING, 3) == (scene.now().phase, scene.now().generation)
    for name in ("lb1", "lb2", "lb3"):
        scene.nodes[name] = msgspec.structs.replace(
            scene.nodes[name], committed=2, prepared=0, ring_step=RingStep.NONE, ring_epoch=2, serving=True
        )
        scene.in_force[name] = other
    scene.refusing = {}
    quiet(scene)
    assert (["lb1", "lb2", "lb3"], [1, 2, 3, 4, 5]) == (scene.ring(), scene.persisted)
    assert [] == calls(scene.log, "prepare 3"), "generation 3 follows upon a ring that is not in force any more"
    assert [] == calls(scene.log, "hand"), "nothing is handed over once more"


def test_a_newcomer_that_is_refused_its_ring_is_told_before_anything_else_goes_on(scene: Scene) -> None:
    """Another controller may still make it switch, until it has staged what takes the change back."""
    scene.see(world(1))
    scene.refusing = {"lb2": "learn"}
    scene.see(world(1, lbs=3))
    scene.refusing = {}
    scene.silent = {"lb3"}
    scene.see(world(1, 2, lbs=3))
    assert (3, Phase.STAGING) == (scene.now().generation, scene.now().phase)
    assert [] == calls(scene.later(2 * SECOND_NS), "prepare 3"), "lb3 is no member, and is waited for"
    scene.silent = set()
    assert "prepare 3 lb1" in scene.later(2 * PROBE_NS)


def test_a_switch_that_was_left_open_is_ended_before_anything_else(scene: Scene) -> None:
    """A host agent took the call late, when the change was long over."""
    scene.see(world(1, hosts=1))
    scene.silent = {"host1"}
    scene.see(world(1, lbs=3, hosts=1))
    scene.later(4 * SECOND_NS)
    scene._take("host1", 2, scene.staged["lb1"])
    scene._take("host1", 2, RingSwitchCall(2, b""))
    scene.see(world(1, 2, lbs=3, hosts=1))
    scene.silent = set()
    done = scene.later(LOST_NS + 6 * SECOND_NS)
    assert "end 2 host1" == next(one for one in without_asking(done) if "host1" in one)
    assert scene.now().generation == scene.nodes["host1"].committed


def test_a_member_that_can_follow_no_more_gets_what_is_in_force_with_a_new_number(scene: Scene) -> None:
    """It has not committed what is in force, and has staged something newer: it would refuse both."""
    scene.see(world(1, lbs=1))
    scene.see(world(1, 2, lbs=1))
    scene.refusing = {"lb1": "learn"}
    scene.see(world(1, 2, lbs=2))
    assert (Phase.RING_PREPARING, 3) == (scene.now().phase, scene.now().generation)
    scene.nodes["lb1"] = msgspec.structs.replace(scene.nodes["lb1"], committed=1)
    scene.later(2 * REFUSED_RETRY_NS)
    assert "commit 4 lb1" in scene.log
    scene.refusing = {}
    quiet(scene)
    assert (["lb1", "lb2"], [1, 2, 3, 4, 5]) == (scene.ring(), scene.persisted)
