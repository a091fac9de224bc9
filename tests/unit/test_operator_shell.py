"""How often the operator looks at the cluster, and when it is ready, on a clock that the test turns."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from lboperator import shell
from lboperator.api import ApiError
from lboperator.cache import Cache
from lboperator.metrics import OperatorMetrics
from lboperator.observe import Objects, Observed
from lboperator.settings import Settings, Source
from lbpod.core.limits import API_RETRY_NS, OBSERVE_REST
from lbpod.core.model import World

SECOND_NS = 1_000_000_000


async def test_others_have_their_turn_after_a_look_in_proportion_to_it_and_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took = [80_000_000, 1_000, 5 * SECOND_NS]
    now_ns, looks, cache = 0, 0, Cache()
    rests: list[float] = []

    def observe(_: Objects) -> Observed:
        nonlocal now_ns, looks
        assert looks == len(rests), "one look at once after the other"
        now_ns += took[looks]
        looks += 1
        cache.changed.set()  # the stream goes on
        return Observed(World((), ()), {})

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == len(took):
            raise asyncio.CancelledError

    monkeypatch.setattr("lboperator.shell.time.monotonic_ns", lambda: now_ns)
    monkeypatch.setattr("lboperator.shell.asyncio.sleep", rest)
    nothing: Any = SimpleNamespace(observe=observe, see=lambda _: 1, poke=lambda: None, wanted={})
    operator = shell.Operator(Settings(certificates=Source.OWN), nothing, cache, OperatorMetrics())
    with pytest.raises(asyncio.CancelledError):
        await operator._observe(nothing, nothing, nothing, nothing)
    assert [OBSERVE_REST * 0.08, OBSERVE_REST * 1e-6, API_RETRY_NS / SECOND_NS] == rests


async def test_who_is_cut_off_from_the_api_is_not_ready_until_everything_was_listed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_ns, said, answers = 7 * SECOND_NS, [], itertools.chain([True, False], itertools.repeat(None, 12), [True])
    metrics = OperatorMetrics()

    async def look(_: int) -> bool:
        answer = next(answers, "end")
        if answer == "end":
            raise asyncio.CancelledError
        if answer is None:
            raise ApiError(0, "no answer in time")
        return bool(answer)

    async def sleep(seconds: float) -> None:
        nonlocal now_ns
        now_ns += round(seconds * SECOND_NS)
        said.append(operator.why_not_ready())

    monkeypatch.setattr("lboperator.shell.time.monotonic_ns", lambda: now_ns)
    monkeypatch.setattr("lboperator.shell.time.time", lambda: now_ns / SECOND_NS)
    monkeypatch.setattr("lboperator.shell.asyncio.sleep", sleep)
    settled: Any = SimpleNamespace(look=look, converged=True)
    operator = shell.Operator(Settings(certificates=Source.OWN), settled, Cache(), metrics)
    operator._sweep = operator._driver = settled
    with pytest.raises(asyncio.CancelledError):
        await operator._sweep_always()
    minutes = shell.BLIND_NS // SECOND_NS // 60
    late = f"what is known was compared with the API {minutes} minutes ago; the log says why it was not since"
    assert [""] * (minutes + 1) + [late] == said[: minutes + 2], "an incomplete comparison is one"
    assert ["", ""] == [said[0], said[-1]]
    outcomes = {"complete": 2, "incomplete": 1, "failed": 12}
    assert outcomes == {
        one: metrics.registry.get_sample_value("holdfast_operator_sweeps_total", {"outcome": one}) for one in outcomes
    }
    assert (len(said) - 1) * 60 + 7 == metrics.registry.get_sample_value("holdfast_operator_swept_timestamp_seconds")
