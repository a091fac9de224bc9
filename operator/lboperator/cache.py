"""What the operator knows of the cluster, kept up to date by kopf's handlers, and when that may be looked at.

Invariant: an object is here as its newest event said. Nothing is looked at before all that the API lists is known (the
sweep sees to that), because a World without its endpoints takes backends away.

Events of one object come in their order, but kopf has a worker for each uid, so those of two that have had one name
after each other may come mixed. What is told late of the former one changes nothing.

A watch that breaks and begins again does not tell of what was deleted meanwhile; ``strangers`` and ``drop`` are how the
sweep puts that right.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from lboperator import nouns
from lboperator.nouns import Key, Life, Node, Noun, Service, Slice, VirtualService


class Kind(Enum):
    """The kinds that are watched: group, version, plural; and where the API lists them."""

    VIRTUAL_SERVICE = ("holdfast.dev", "v1alpha1", "virtualservices")
    SERVICE = ("", "v1", "services")
    SLICE = ("discovery.k8s.io", "v1", "endpointslices")
    NODE = ("", "v1", "nodes")

    @property
    def path(self) -> str:
        """Of the list of all of them."""
        group, version, plural = self.value
        return f"/apis/{group}/{version}/{plural}" if group else f"/api/{version}/{plural}"


_PARSERS: Mapping[Kind, Callable[[nouns.Body], Noun]] = {
    Kind.VIRTUAL_SERVICE: nouns.virtual_service,
    Kind.SERVICE: nouns.service,
    Kind.SLICE: nouns.endpoint_slice,
    Kind.NODE: nouns.node,
}


_OF_METADATA: Final = ("uid", "annotations", "deletionTimestamp")
"""The rest (resourceVersion, managedFields) says nothing to us."""


@dataclass(frozen=True)
class _Entry:
    noun: Noun
    number: int
    """Of the event that it came with."""
    life: Life


class Cache:
    """All objects that are watched."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        """Something is other than it was; whoever looks clears it first."""
        self.statuses: dict[Key, dict[str, Any]] = {}
        """The status of each VirtualService, as the API has it."""
        self.lb_services: dict[Key, dict[str, Any]] = {}
        """Bodies of Services of type LoadBalancer: they may want a VirtualService of their own."""
        self._entries: dict[Kind, dict[Key, _Entry]] = {kind: {} for kind in Kind}
        self._slices: dict[Key, dict[Key, Slice]] = defaultdict(dict)
        self._number = 0
        self.heard: Counter[Kind] = Counter()
        """How often a watch has told that an object is there."""

    # --- Events -------------------------------------------------------------------------------------------------------
    def put(self, kind: Kind, body: nouns.Body) -> None:
        """An object is there, as this; of no account where another one has its name by now."""
        noun, life = _PARSERS[kind](body), nouns.life_of(body)
        self._number += 1
        self.heard[kind] += 1
        before = self._entries[kind].get(noun.key)
        if before is not None and life.is_before(before.life):
            return
        self._entries[kind][noun.key] = _Entry(noun, self._number, life)
        if isinstance(noun, VirtualService):
            self.statuses[noun.key] = dict(body.get("status") or {})
        noted = self._note_lb_service(noun, body)
        if before is not None and before.noun == noun and not noted:
            return
        if isinstance(noun, Slice):
            if before is not None and isinstance(before.noun, Slice):
                self._forget_slice(before.noun)
            self._slices[noun.namespace, noun.service][noun.key] = noun
        self.changed.set()

    def drop(self, kind: Kind, key: Key, uid: str = "") -> None:
        """An object is gone; of no account where another one has its name by now. uid: '', whichever it is."""
        gone = self._entries[kind].get(key)
        if gone is None or uid not in {"", gone.life.uid}:
            return
        del self._entries[kind][key]
        if isinstance(gone.noun, Slice):
            self._forget_slice(gone.noun)
        if kind is Kind.VIRTUAL_SERVICE:
            self.statuses.pop(key, None)
        if kind is Kind.SERVICE:
            self.lb_services.pop(key, None)
        self.changed.set()

    def _note_lb_service(self, noun: Noun, body: nouns.Body) -> bool:
        """True where something that matters for its VirtualService has changed."""
        if not isinstance(noun, Service):
            return False
        before = self.lb_services.get(noun.key)
        if noun.kind != "LoadBalancer":
            return self.lb_services.pop(noun.key, None) is not None
        now = {name: dict(body.get(name) or {}) for name in ("metadata", "spec", "status")}
        self.lb_services[noun.key] = now
        if before is None or any(before[name] != now[name] for name in ("spec", "status")):
            return True
        return any(before["metadata"].get(name) != now["metadata"].get(name) for name in _OF_METADATA)

    def _forget_slice(self, gone: Slice) -> None:
        where = (gone.namespace, gone.service)
        self._slices[where].pop(gone.key, None)
        if not self._slices[where]:
            del self._slices[where]

    # --- What is known ------------------------------------------------------------------------------------------------
    @property
    def number(self) -> int:
        """Of the newest event."""
        return self._number

    def virtual_services(self) -> list[VirtualService]:
        """All of them."""
        return [
            one.noun for one in self._entries[Kind.VIRTUAL_SERVICE].values() if isinstance(one.noun, VirtualService)
        ]

    def services(self) -> dict[Key, Service]:
        """All Services."""
        found = self._entries[Kind.SERVICE]
        return {key: one.noun for key, one in found.items() if isinstance(one.noun, Service)}

    def slices(self) -> dict[Key, tuple[Slice, ...]]:
        """By their Service; those of one Service by name, so that equal knowledge is equal."""
        return {where: tuple(those[key] for key in sorted(those)) for where, those in self._slices.items()}

    def nodes(self) -> dict[str, Node]:
        """By name."""
        return {one.noun.name: one.noun for one in self._entries[Kind.NODE].values() if isinstance(one.noun, Node)}

    def strangers(self, kind: Kind, listed: set[Key], before: int) -> tuple[list[Key], set[Key]]:
        """What is known and not listed any more (nor was heard of after event number ``before``), and what is listed
        and not known."""
        entries = self._entries[kind]
        gone = sorted(key for key, one in entries.items() if key not in listed and one.number <= before)
        return gone, listed - entries.keys()
