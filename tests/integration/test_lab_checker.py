"""The checking client counts what happens, and blames the right one: on a quiet target nothing, else who did it."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lbpod.lab import CheckerRun, Lab, start_nginx, start_udp_echo
from lbpod.lab.chaos.verdict import miscounted
from lbpod.lab.workload import Backend

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing feature: root"),
]

LONG_COUNT = 20


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=1) as lab:
        yield lab


def _started(
    lab: Lab, *, interval_ms: int = 100, short_rate: int = 0, timeout_ms: int | None = None
) -> tuple[Backend, CheckerRun]:
    """A server in a pod of its own, and a checker all of whose long-lived flows it has answered."""
    pod = lab.add_pod(lab.nodes[0])
    backend = start_nginx(lab, pod)
    checker = CheckerRun.start(
        lab,
        f"{pod.address}:{backend.port}",
        long_count=LONG_COUNT,
        interval_ms=interval_ms,
        short_rate=short_rate,
        timeout_ms=timeout_ms,
    )
    checker.wait_until(lambda c: c["long_lived"] == LONG_COUNT)
    return backend, checker


def test_nothing_is_broken_on_a_quiet_target_and_a_told_removal_is_nobodys_fault(lab: Lab) -> None:
    backend, checker = _started(lab, short_rate=50)
    quiet = checker.wait_until(lambda c: c["long_lived"] == LONG_COUNT and c["short_done"] >= 60)
    assert (0, 0, 0) == (quiet["broken"], quiet["broken_backend_gone"], quiet["broken_unattributed"])
    assert {backend.name: LONG_COUNT} == quiet["backends"]
    assert quiet["connections"] >= LONG_COUNT + quiet["short_done"]
    assert 0 < quiet["latency_ns"]["p50"] <= quiet["latency_ns"]["p99"] <= quiet["latency_ns"]["max"]
    assert 0 == quiet["unanswered"]

    checker.gone(backend.name)
    backend.program.kill()
    final = checker.wait_until(lambda c: c["broken_backend_gone"] >= LONG_COUNT) and checker.stop()
    assert LONG_COUNT == final["broken_backend_gone"]
    assert 0 == final["long_lived"]
    assert {"closed", "reset"} >= final["by_reason"]["broken_backend_gone"].keys()
    assert final["broken_unattributed"] > 0, "short flows that were refused: no backend had named itself"
    assert {"refused"} >= final["by_reason"].get("broken", {}).keys(), "new ones: nobody said that they go there still"
    assert final["failed_unopened"] > 0
    assert "" == miscounted(final)


def test_new_flows_wait_in_vain_for_a_backend_that_was_lost_and_nobody_can_tell(lab: Lab) -> None:
    backend, checker = _started(lab, short_rate=50, timeout_ms=4_000)
    checker.gone(backend.name)
    lab.remove_pod(backend.pod, silent=True)
    checker.haunts(backend.name)
    checker.wait_until(lambda c: c["unanswered"] == LONG_COUNT)
    late = checker.wait_until(lambda c: c["by_reason"].get("broken_unattributed", {}).get("connect_timeout", 0) > 60)
    assert {"timeout": LONG_COUNT} == late["by_reason"]["broken_backend_gone"]
    final = checker.stop()
    assert 0 == final["broken"], "a pod that is removed silently resets nothing and completes no handshake"
    assert "" == miscounted(final)


def test_a_backend_that_dies_untold_has_broken_its_flows(lab: Lab) -> None:
    backend, checker = _started(lab)
    backend.program.kill()
    checker.wait_until(lambda c: c["broken"] >= LONG_COUNT)
    again = start_nginx(lab, backend.pod, name="successor")
    checker.wait_until(lambda c: c["backends"] == {again.name: LONG_COUNT})
    final = checker.stop()
    assert 0 == final["broken_backend_gone"]
    assert final["broken"] >= LONG_COUNT
    assert LONG_COUNT == len([one for one in checker.failures if one["backend"] == backend.name])
    assert all(one["local_port"] > 0 for one in checker.failures if one["answers"])
    assert "" == miscounted(final)


def test_a_reset_is_stamped_when_it_arrives_and_a_removal_that_follows_is_no_excuse(lab: Lab) -> None:
    backend, checker = _started(lab, interval_ms=4_000)
    backend.program.kill()
    killed_ns = time.monotonic_ns()
    time.sleep(0.8)
    checker.gone(backend.name)

    def own() -> list[dict[str, Any]]:
        return [one for one in checker.failures if one["backend"] == backend.name]

    checker.wait_until(lambda _: len(own()) == LONG_COUNT)
    final = checker.stop()
    assert {"broken"} == {one["verdict"] for one in own()}, final["by_reason"]
    assert all(abs(one["failed_ns"] - killed_ns) < 400_000_000 for one in own()), "not when the next request met it"
    late = [one for one in own() if one["gone_ns"] is not None]
    assert late, "most noticed it after the word"
    assert all("went only" in one["detail"] for one in late)


def test_silence_breaks_a_flow_by_timeout(lab: Lab) -> None:
    pod = lab.add_pod(lab.nodes[0])
    backend = start_nginx(lab, pod)
    checker = CheckerRun.start(lab, f"{pod.address}:{backend.port}", long_count=5, interval_ms=100, timeout_ms=300)
    checker.wait_until(lambda c: c["long_lived"] == 5)
    lab.remove_pod(pod, silent=True)
    counters = checker.wait_until(lambda c: c["broken"] >= 5)
    assert 5 == counters["by_reason"]["broken"]["timeout"]
    checker.stop()


def test_udp_flows_notice_another_backend(lab: Lab) -> None:
    pod = lab.add_pod(lab.nodes[0])
    backend = start_udp_echo(pod, name="before")
    checker = CheckerRun.start(
        lab, f"{pod.address}:{backend.port}", long_count=LONG_COUNT, short_rate=20, interval_ms=300, udp=True
    )
    quiet = checker.wait_until(lambda c: c["long_lived"] == LONG_COUNT and c["short_done"] >= 20)
    assert 0 == quiet["broken"] == quiet["lost"]
    backend.program.kill()
    start_udp_echo(pod, name="after")
    final = checker.wait_until(lambda c: c["backends"] == {"after": LONG_COUNT}) and checker.stop()
    assert {"other_backend", "refused"} >= final["by_reason"]["broken"].keys()
    assert final["broken"] >= LONG_COUNT


def test_a_mark_says_whom_the_loss_held_up(lab: Lab) -> None:
    node = lab.add_node()
    pod = lab.add_pod(node)
    backend = start_nginx(lab, pod)
    checker = CheckerRun.start(
        lab, f"{pod.address}:{backend.port}", long_count=LONG_COUNT, interval_ms=50, probes=5, probe_interval_ms=20
    )
    checker.wait_until(lambda c: c["long_lived"] == LONG_COUNT + 5)
    lost_ns = time.monotonic_ns()
    lab.sever(node)
    time.sleep(0.5)
    lab.mend(node)
    mended_ns = time.monotonic_ns()
    checker.mark(7, lost_ns)
    checker.wait_until(lambda _: bool(checker.marks))
    final = checker.stop()
    assert 0 == final["broken"]
    (mark,) = checker.marks
    assert 7 == mark["mark"]
    for name, count in (("long", LONG_COUNT), ("probe", 5)):
        felt = mark["groups"][name]
        assert (count, 0) == (felt["flows"], felt["unanswered"])
        assert count == len(felt["held_ns"]), "the loss was long enough for all of them to ask"
        assert min(felt["held_ns"]) >= 500_000_000
    assert mended_ns - lost_ns <= max(mark["groups"]["probe"]["held_ns"])
