"""The Planner in scenes: each says what happens, and what exactly is done about it."""

import msgspec
import pytest

from lbpod.core.limits import (
    CALL_LOST_NS,
    CHANGE_GATHER_NS,
    HOST_WAIT_NS,
    LOST_NS,
    PROBE_NS,
    REFUSED_RETRY_NS,
    RETRY_NS,
)
from lbpod.core.messages import (
    AskStatus,
    CommitCall,
    LbAnswered,
    LbFailed,
    LbStatus,
    Persist,
    Persisted,
    PersistFailed,
    Phase,
    PlannerEffect,
    PlannerEvent,
    PrepareCall,
    Push,
    Tick,
    WorldSeen,
)
from lbpod.core.model import (
    Cluster,
    NextIds,
)
from lbpod.core.snapshot import digest_of
from tests.planner_scene import (
    DRAIN_NS,
    SECOND_NS,
    Scene,
    calls,
    world,
)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_change_walks_its_phases_in_order(scene: Scene) -> None:
    assert [
        "ask lb1 all",
        "ask lb2 all",
        "persist 1",
        "stage 1 lb1",
        "stage 1 lb2",
        "prepare 1 lb1",
        "prepare 1 lb2",
        "commit 1 lb1",
        "commit 1 lb2",
    ] == scene.see(world(1, 2))
    status = scene.now()
    assert (Phase.IDLE, 1, 2, 2, (), "", 1) == (
        status.phase,
        status.generation,
        status.lbs,
        status.lbs_at_generation,
        status.lagging,
        status.problem,
        status.changes,
    )
    assert [("a/b/http", 1, 2, 0)] == [(one.name, one.epoch, one.ready, one.draining) for one in status.vips]


def test_an_equal_world_uses_no_generation(scene: Scene) -> None:
    scene.see(world(1, 2))
    assert [] == scene.see(world(1, 2))
    assert [] == scene.see(world(2, 1))
    assert [1] == scene.persisted


def test_nothing_happens_before_a_world_is_seen(scene: Scene) -> None:
    assert [] == scene.later(10 * SECOND_NS)


def test_what_arrives_while_gathering_is_one_change(scene: Scene) -> None:
    scene.see(world(1))
    scene.play(WorldSeen(world(1, 2)))
    assert scene.now_ns + CHANGE_GATHER_NS == scene.planner.gather_end_ns
    scene.now_ns += CHANGE_GATHER_NS - 1
    assert [] == scene.play(WorldSeen(world(1, 2, 3)))
    scene.now_ns += 1
    assert "persist 2" == scene.play(Tick())[0]
    assert [1, 2] == scene.persisted
    assert [1, 2, 3] == scene.backends()


def test_what_arrives_while_a_change_is_in_flight_is_the_next_one(scene: Scene) -> None:
    scene.see(world(1))
    scene.silent = {"lb2"}
    assert ["persist 2", "stage 2 lb1", "stage 2 lb2"] == scene.see(world(1, 2))
    scene.see(world(1, 2, 3))
    assert Phase.STAGING is scene.now().phase
    scene.silent = set()
    scene.later(8 * SECOND_NS)
    assert [1, 2, 3] == scene.persisted
    assert [1, 2, 3] == scene.backends()


def test_an_lb_that_is_silent_for_a_moment_holds_a_change_up_and_is_reported(scene: Scene) -> None:
    scene.see(world(1))
    scene.silent = {"lb2"}
    done = scene.see(world(1, 2)) + scene.later(LOST_NS - SECOND_NS)
    assert [] == calls(done, "prepare")
    assert (("lb2",), "waiting for lb2: timed out") == (scene.now().lagging, scene.now().problem)
    assert 3 <= len([one for one in done if one.endswith("lb2")]) <= LOST_NS // PROBE_NS, (
        "tried again, but not all the time"
    )
    scene.silent = set()
    done = scene.later(8 * SECOND_NS)
    assert ["prepare 2 lb1", "prepare 2 lb2"] == calls(done, "prepare")
    assert (Phase.IDLE, (), "") == (scene.now().phase, scene.now().lagging, scene.now().problem)
    assert [1, 2] == scene.persisted


def test_a_silent_host_does_not(scene: Scene) -> None:
    scene.see(world(1, hosts=1))
    assert 1 == scene.nodes["host1"].committed
    scene.silent = {"host1"}
    scene.see(world(1, 2, hosts=1))
    assert (Phase.IDLE, 2, ("host1",), "") == (
        scene.now().phase,
        scene.now().generation,
        scene.now().lagging,
        scene.now().problem,
    )
    scene.silent = set()
    assert calls(scene.later(8 * SECOND_NS), "commit 2 host1")
    assert () == scene.now().lagging


def test_a_host_that_says_nothing_at_all_is_waited_for_a_while(scene: Scene) -> None:
    """Its shell has not even heard of a failure yet."""
    scene.see(world(1, hosts=1))
    answer = scene._answer
    scene._answer = lambda effect, done: (  # type: ignore[method-assign]
        None if isinstance(effect, Push) and effect.node == "host1" else answer(effect, done)
    )
    assert [] == calls(scene.see(world(1, 2, hosts=1)), "prepare")
    assert [] == calls(scene.later(HOST_WAIT_NS - SECOND_NS), "prepare")
    assert ["prepare 2 lb1", "prepare 2 lb2"] == calls(scene.later(2 * SECOND_NS), "prepare")
    assert (Phase.IDLE, ("host1",)) == (scene.now().phase, scene.now().lagging)


def test_it_tells_what_is_newest_and_what_is_in_force(scene: Scene) -> None:
    def told() -> tuple[list[int], list[int]]:
        status = scene.now()
        assert {"203.0.113.1:80/TCP"} == {one.place for one in (*status.vips, *status.in_force)}
        return [one.ready for one in status.vips], [one.ready for one in status.in_force]

    scene.see(world(1))
    assert ([1], [1]) == told()
    scene.silent = {"lb2"}
    scene.see(world(1, 2))
    assert (Phase.STAGING, ([2], [1])) == (scene.now().phase, told())
    scene.restart()
    scene.see(world(1, 2, 3))
    assert (Phase.STARTING, (), ()) == (scene.now().phase, scene.now().vips, scene.now().in_force)
    scene.silent = set()
    scene.later(30 * SECOND_NS)
    assert (Phase.IDLE, ([3], [3])) == (scene.now().phase, told())


def test_a_draining_backend_goes_when_its_time_is_over(scene: Scene) -> None:
    scene.see(world(1, 2))
    scene.see(world(1, 2, draining=[2]))
    assert [("a/b/http", 2, 1, 1)] == [(one.name, one.epoch, one.ready, one.draining) for one in scene.now().vips]
    scene.later(DRAIN_NS - SECOND_NS)
    assert [1, 2] == scene.backends()
    scene.later(2 * SECOND_NS)
    assert [1] == scene.backends()
    assert [] == calls(scene.see(world(1, 2, draining=[2])), "persist"), "it stays away"


def test_a_backend_that_is_ready_again_drains_from_the_start_the_next_time(scene: Scene) -> None:
    scene.see(world(1, 2, draining=[2]))
    scene.later(DRAIN_NS - SECOND_NS)
    scene.see(world(1, 2))
    scene.see(world(1, 2, draining=[2]))
    scene.later(DRAIN_NS - SECOND_NS)
    assert [1, 2] == scene.backends()


def test_a_refused_change_is_reported_and_retried_slowly(scene: Scene) -> None:
    scene.see(world(1))
    scene.refusing = {"lb2": "prepare"}
    scene.see(world(1, 2))
    assert (Phase.PREPARING, "lb2 refuses: cannot prepare") == (scene.now().phase, scene.now().problem)
    done = scene.later(2 * REFUSED_RETRY_NS)
    assert 2 == len(calls(done, "prepare 2 lb2"))
    assert [] == calls(done, "commit")


def test_a_refused_change_gives_way_to_another_world(scene: Scene) -> None:
    scene.see(world(1))
    scene.refusing = {"lb2": "prepare"}
    scene.see(world(1, 2))
    scene.refusing = {}
    done = scene.see(world(1, 3))
    assert ["persist 3"] == calls(done, "persist")
    assert (Phase.IDLE, 3, "") == (scene.now().phase, scene.now().generation, scene.now().problem)
    assert [1, 3] == scene.backends("lb2")


def test_a_commit_that_one_refuses_gives_way_too(scene: Scene) -> None:
    scene.see(world(1))
    scene.refusing = {"lb2": "commit"}
    scene.see(world(1, 2))
    assert (2, 1) == (scene.nodes["lb1"].committed, scene.nodes["lb2"].committed)
    scene.refusing = {}
    scene.see(world(1, 3))
    assert (3, 3) == (scene.nodes["lb1"].committed, scene.nodes["lb2"].committed)


def test_a_world_that_cannot_be_is_said_and_the_last_one_stays(scene: Scene) -> None:
    scene.see(world(1))
    bad = msgspec.structs.replace(world(1), nodes=())
    assert [] == calls(scene.see(bad), "persist")
    assert "runs on node 'lb1', which is not listed" in scene.now().problem
    scene.see(world(1, 2))
    assert ("", 2) == (scene.now().problem, scene.now().generation)


# --- Restarts ---------------------------------------------------------------------------------------------------------
def test_a_new_planner_goes_on_where_the_old_one_was(scene: Scene) -> None:
    scene.see(world(1))
    scene.restart()
    assert ["ask lb1 all", "ask lb2 all"] == scene.see(world(1))
    assert (Phase.IDLE, 1, 2, 0) == (
        scene.now().phase,
        scene.now().generation,
        scene.now().lbs_at_generation,
        scene.now().changes,
    )


@pytest.mark.parametrize("word", ["stage", "prepare", "commit"])
def test_a_new_planner_finishes_what_was_begun(scene: Scene, word: str) -> None:
    """The old one got lb1 to do this step, and no further."""
    scene.see(world(1))
    scene.refusing = {"lb2": word}
    scene.see(world(1, 2))
    scene.refusing = {}
    scene.restart()
    scene.see(world(1, 2))
    assert (2, 2) == (scene.nodes["lb1"].committed, scene.nodes["lb2"].committed)
    assert [1, 2] == scene.persisted


def test_a_new_planner_makes_nothing_new_before_all_have_been_heard_or_are_lost(scene: Scene) -> None:
    scene.see(world(1))
    scene.restart()
    scene.silent = {"lb2"}
    assert [] == calls(scene.see(world(1, 2)) + scene.later(LOST_NS - SECOND_NS), "persist")
    assert (("lb2",), ()) == (scene.now().lagging, scene.now().lost)
    scene.silent = set()
    scene.later(8 * SECOND_NS)
    assert ([1, 2], Phase.IDLE) == (scene.persisted, scene.now().phase)


def test_a_former_life_is_learned_from_hosts_where_no_lb_knows_anything(scene: Scene) -> None:
    """They are asked for one snapshot; LBs that have lost everything get it first, so that ids keep their meaning and
    flows the backend that they had."""
    scene.see(world(1, 2, hosts=2))
    for name in ("lb1", "lb2"):
        scene.empty(name)
    scene.restart()
    done = scene.see(world(3, hosts=2)) + scene.later(SECOND_NS)
    assert ["ask host2 all"] == [one for one in calls(done, "ask host") if one.endswith("all")]
    assert "commit 1 lb1" in done
    assert [1, 2] == scene.persisted
    assert (1, [3]) == (scene.staged["lb1"].vips[0].id, [one.id for one in scene.staged["lb1"].vips[0].backends])
    assert (2, 2) == (scene.nodes["lb1"].committed, scene.nodes["host1"].committed)


@pytest.mark.parametrize("with_snapshot", [False, True], ids=["what it has", "all that it knows"])
def test_one_call_to_a_host_that_fails_does_not_make_a_former_life_forgotten(scene: Scene, with_snapshot: bool) -> None:
    scene.see(world(1, 2, hosts=1))
    for name in ("lb1", "lb2"):
        scene.empty(name)
    scene.restart()
    answer = scene._answer
    failures: list[PlannerEffect] = []

    def first_fails(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        wanted = isinstance(effect, AskStatus) and effect.node == "host1" and effect.with_snapshot == with_snapshot
        if wanted and not failures:
            failures.append(effect)
            return LbFailed("host1", 0, refused=False, reason="connection reset")
        return answer(effect, done)

    scene._answer = first_fails  # type: ignore[method-assign]
    scene.see(world(3, hosts=1))
    scene.later(5 * SECOND_NS)
    assert failures
    assert [1, 2] == scene.persisted, "no generation is made twice"
    assert [3] == [one.id for one in scene.in_force["lb1"].vips[0].backends], "nor is an id"


def test_a_ring_of_a_former_life_is_asked_though_the_world_lists_no_lb(scene: Scene) -> None:
    scene.see(world(1, hosts=1))
    scene.restart()
    scene.see(world(lbs=0, hosts=1))
    scene.later(2 * SECOND_NS)
    assert ["lb1", "lb2"] == scene.ring()


def test_generations_go_on_from_the_highest_that_is_known_anywhere(scene: Scene) -> None:
    scene.see(world(1))
    snapshot = msgspec.structs.replace(scene.staged["lb1"], generation=41)
    for name in ("lb1", "lb2"):
        scene._take(name, 41, snapshot)
        scene._take(name, 41, PrepareCall(41, b""))
        scene._take(name, 41, CommitCall(41, b""))
    scene.restart()
    scene.see(world(1, 2))
    assert [1, 42] == scene.persisted


# --- Two controllers, and a disk that says no -------------------------------------------------------------------------
def test_a_persist_that_fails_is_tried_again(scene: Scene) -> None:
    answer = scene._answer
    scene._answer = lambda effect, done: (  # type: ignore[method-assign]
        PersistFailed(effect.generation, 0, "disk full") if isinstance(effect, Persist) else answer(effect, done)
    )
    scene.see(world(1))
    assert "generation 1 cannot be written down: disk full" == scene.now().problem
    scene._answer = answer  # type: ignore[method-assign]
    assert "persist 1" in scene.later(RETRY_NS)
    assert "" == scene.now().problem


def test_a_generation_that_somebody_else_wrote_is_stepped_over_with_its_ids(scene: Scene) -> None:
    answer = scene._answer

    def first_refused(effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        if isinstance(effect, Persist) and effect.generation <= 7:
            return PersistFailed(effect.generation, 7, "it holds 7", NextIds(20, 30, 2, 40))
        return answer(effect, done)

    scene._answer = first_refused  # type: ignore[method-assign]
    scene.see(world(1))
    scene.later(2 * SECOND_NS)
    assert [8] == scene.persisted
    made = scene.staged["lb1"]
    assert (8, 20, 40) == (made.generation, made.vips[0].id, made.vips[0].backends[0].id)
    assert [30, 31] == [node.id for node in made.nodes]


def test_a_newer_generation_of_somebody_else_is_adopted(scene: Scene) -> None:
    scene.see(world(1))
    other = Scene()
    other.nodes, other.staged, other.persisted = scene.nodes, scene.staged, scene.persisted
    other.in_force = scene.in_force
    other.see(world(1, 2))
    assert 2 == other.now().generation
    scene.later(3 * SECOND_NS)
    assert [1] == scene.backends(), "each wants its own; the newer generation wins"
    assert (3, Phase.IDLE) == (scene.now().generation, scene.now().phase)


def test_the_same_generation_with_other_contents_is_replaced_by_a_newer_one(scene: Scene) -> None:
    """Of two controllers that shared nothing: the LB would refuse ours for ever."""
    scene.see(world(1))
    other = msgspec.structs.replace(scene.staged["lb2"], vips=())
    scene.staged["lb2"] = other
    scene.nodes["lb2"] = msgspec.structs.replace(scene.nodes["lb2"], digest=digest_of(other))
    scene.later(4 * SECOND_NS)
    assert [1, 2] == scene.persisted
    assert (Phase.IDLE, 2, 2) == (scene.now().phase, scene.nodes["lb1"].committed, scene.nodes["lb2"].committed)
    assert [1] == scene.backends("lb2")


def test_a_late_answer_does_not_say_what_an_lb_knows(scene: Scene) -> None:
    """It answers a question without ?snapshot=1, asked before the Planner had to start again: ask once more."""
    scene.see(world(1))
    scene.now_ns += PROBE_NS
    assert [] != [one for one in scene.step(Tick()) if isinstance(one, AskStatus) and not one.with_snapshot]
    newer = msgspec.structs.replace(scene.staged["lb1"], generation=2)
    for name in ("lb1", "lb2"):
        scene._take(name, 2, newer)
    scene.step(LbAnswered("lb1", 0, scene._said("lb1", False)))
    assert Phase.STARTING is scene.now().phase
    scene.now_ns += RETRY_NS
    effects = scene.step(LbAnswered("lb2", 0, scene._said("lb2", False)))
    assert [True] == [one.with_snapshot for one in effects if isinstance(one, AskStatus)]
    assert Phase.STARTING is scene.now().phase


def test_an_agent_that_is_another_node_is_refused(scene: Scene) -> None:
    scene.step(WorldSeen(world(1)))
    scene.step(LbAnswered("lb1", 0, LbStatus("lb2", 0, 0, 0, 0, b"", 1, 0)))
    assert "lb1 refuses: the agent at lb1:9900 says that it is lb2" == scene.now().problem


def test_an_lb_of_another_cluster_is_refused(scene: Scene) -> None:
    scene.see(world(1))
    strange = msgspec.structs.replace(scene.staged["lb2"], cluster=Cluster(8, 12))
    scene.staged["lb2"] = strange
    scene.restart()
    scene.see(world(1))
    assert "lb2 refuses: it belongs to a cluster with VNI 8 and seed 12" in scene.now().problem
    assert [1] == scene.persisted


# --- Calls ------------------------------------------------------------------------------------------------------------
def test_one_call_at_a_time_for_each_node(scene: Scene) -> None:
    effects = scene.step(WorldSeen(world(1)))
    assert 2 == len([one for one in effects if isinstance(one, AskStatus)])
    for _ in range(20):
        scene.now_ns += SECOND_NS // 10
        assert [] == [one for one in scene.step(Tick()) if isinstance(one, AskStatus | Push)]


def test_a_call_says_whether_it_is_to_an_lb(scene: Scene) -> None:
    """The shell has places for those of their own."""
    scene.see(world(1, hosts=1))
    scene.step(WorldSeen(world(1, 2, hosts=1)))
    scene.now_ns += CHANGE_GATHER_NS
    scene.step(Tick())
    pushes = [one for one in scene.step(Persisted(2)) if isinstance(one, Push)]
    assert [("host1", False), ("lb1", True), ("lb2", True)] == sorted((one.node, one.lb) for one in pushes)
    scene.restart()
    asked = [one for one in scene.step(WorldSeen(world(1, hosts=1))) if isinstance(one, AskStatus)]
    assert [("host1", False), ("lb1", True), ("lb2", True)] == sorted((one.node, one.lb) for one in asked)


def test_a_call_that_is_never_answered_is_given_up(scene: Scene) -> None:
    scene.step(WorldSeen(world(1)))
    scene.now_ns += CALL_LOST_NS
    scene.step(Tick())
    assert ("lb1", "lb2") == scene.now().lagging
    scene.now_ns += RETRY_NS
    assert 2 == len([one for one in scene.step(Tick()) if isinstance(one, AskStatus)])


def test_answers_about_nobody_are_passed_over(scene: Scene) -> None:
    scene.see(world(1))
    assert [] == scene.step(LbAnswered("gone", 1, LbStatus("gone", 0, 9, 0, 9, bytes(16), 1, 0)))
    assert [] == scene.step(LbFailed("gone", 1, False, "timed out"))
    assert [] == scene.step(Persisted(99))
    assert [] == scene.step(PersistFailed(99, 120, "late"))


def test_what_an_lb_complains_of_is_passed_on(scene: Scene) -> None:
    scene.see(world(1))
    scene.nodes["lb2"] = msgspec.structs.replace(scene.nodes["lb2"], problem="the records are full")
    scene.later(2 * PROBE_NS)
    assert "lb2: the records are full" == scene.now().problem
