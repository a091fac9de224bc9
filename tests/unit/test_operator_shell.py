"""How often the operator looks at the cluster, on a clock that the test turns."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from lboperator import shell
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
