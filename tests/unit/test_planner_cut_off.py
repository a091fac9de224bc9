"""A Planner that was cut off while another one changed everything: what it knows itself is worth nothing then."""

import msgspec

from lbpod.core.limits import LOST_NS
from lbpod.core.messages import Persist, PersistFailed, PlannerEffect, PlannerEvent, WorldSeen
from tests.planner_scene import SECOND_NS, Scene, world


class Written(Scene):
    """What is written down is compared before it is replaced, as by the shells."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Persist | None = None

    def _answer(self, effect: PlannerEffect, done: list[str]) -> PlannerEvent | None:
        if isinstance(effect, Persist):
            there = self.written
            if there is not None and there.generation > effect.after:
                return PersistFailed(effect.generation, there.generation, "another one", there.snapshot.next_ids)
            self.written = effect
        return super()._answer(effect, done)


def test_a_planner_whose_whole_ring_is_gone_asks_who_serves_before_it_makes_anything() -> None:
    """It was cut off while another one replaced all LBs. What it knows itself is no reason to hurry."""
    scene = Written()
    both, others = world(1, lbs=4, hosts=1), world(1, 2, lbs=4, hosts=1)
    on_host = tuple(msgspec.structs.replace(one, node="host1") for one in others.vips[0].backends)
    vips = (msgspec.structs.replace(others.vips[0], backends=on_host),)
    others = msgspec.structs.replace(others, nodes=others.nodes[2:], vips=vips)
    scene.see(world(1))
    first = scene.planner
    scene.silent = {"lb1", "lb2", "lb3", "lb4"}
    scene.later(2 * LOST_NS)
    assert {"lb1", "lb2"} == set(scene.now().lost)
    scene.silent = set()
    scene.restart()
    for wanted in (both, others):
        scene.see(wanted)
        scene.later(10 * SECOND_NS)
    before = scene.in_force["lb3"]
    assert 2 == len(before.ring.members)
    scene.silent, scene.planner = {"lb1", "lb2"}, first
    scene.play(WorldSeen(others))
    scene.later(2 * LOST_NS)
    after = scene.in_force["lb3"]
    assert (before.ring.members, before.vips[0].backends) == (after.ring.members, after.vips[0].backends)
