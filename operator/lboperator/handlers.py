"""What kopf is told: which kinds are watched, and that every event is only a change of what is known.

``on.event``, nothing else: kopf then writes nothing into objects, needs no finalizer and blocks no deletion, also where
the operator is gone. When the cache is complete is not kopf's to say but the sweep's, which compares it with the API.

Tried and dropped: indexes, because kopf calls no other handler before all indexed kinds were listed once. It has each
object wait for all others and wakes all that wait for each one (1.65 million times for three thousand objects): 15 of
the 20 seconds that an operator with a thousand VirtualServices took to start.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import kopf

from lboperator.api import login
from lboperator.cache import Cache, Kind
from lboperator.nouns import key_of, life_of

NAME: Final = "holdfast.dev"


def make_registry(cache: Cache, end: Callable[[], Awaitable[None]]) -> kopf.OperatorRegistry:
    """Handlers that fill the cache. end: ends all else (kopf takes tasks that go on after its own for hung, and waits
    five seconds for them)."""
    registry = kopf.OperatorRegistry()

    @kopf.on.cleanup(registry=registry)
    async def _end(**_: Any) -> None:
        await end()

    @kopf.on.login(registry=registry)
    def _login(settings: kopf.OperatorSettings, **_: Any) -> kopf.ConnectionInfo:
        return login(settings)

    for kind in Kind:
        _watch(registry, cache, kind)
    return registry


def _watch(registry: kopf.OperatorRegistry, cache: Cache, kind: Kind) -> None:
    group, version, plural = kind.value

    @kopf.on.event(group, version, plural, id=f"{plural}-event", registry=registry)
    async def _event(type: str | None, body: kopf.Body, **_: Any) -> None:
        if type == "DELETED":
            cache.drop(kind, key_of(body), life_of(body).uid)
        else:
            cache.put(kind, body)


def make_settings() -> kopf.OperatorSettings:
    """kopf's settings, each for a reason."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # events are ours to decide: on transitions only
    settings.scanning.disabled = True  # no watch of CRDs and namespaces, and no right to it
    settings.peering.standalone = True  # it is no fence; epochs are
    settings.persistence.finalizer = f"{NAME}/finalizer"  # never used: no handler asks for one
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=NAME)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=NAME, key="last-handled")
    settings.networking.request_timeout = 30.0  # five minutes of silence are too long for any of our calls
    settings.networking.connect_timeout = 5.0
    settings.networking.error_backoffs = (0.5, 1.0, 2.0, 4.0)
    settings.watching.server_timeout = 300  # whole: the API server refuses 300.0
    settings.watching.client_timeout = 330.0
    settings.queueing.idle_timeout = 1.0  # memory of objects that do not change is given back soon
    settings.queueing.error_delays = (0.5, 1.0, 2.0, 4.0)
    return settings
