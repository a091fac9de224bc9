"""Is what we know still what there is? From time to time the API is asked for the names of everything.

A watch that was interrupted for too long begins anew with a list, and nobody tells of what was deleted in between: such
an endpoint would get traffic for ever. What is listed but unknown twice in a row, while the watch has told of nothing,
means that a kind is not watched at all (its CRD was not there when the operator started): then the process ends, and
starts again. A watch that tells of objects is only late: a thousand of them that are made at once, on a busy machine,
take longer than the time between two looks, and starting again would make that longer still. It is given SWEEP_LATE_MAX
looks. An operator that starts looks every second, and is done once all that is listed is known; its looks count less
(SWEEP_START_LOOKS), for the watches have only just begun.
"""

from collections.abc import Set
from typing import Final

import structlog

from lboperator.api import Api
from lboperator.cache import Cache, Kind
from lboperator.nouns import Key
from lbpod.core.limits import SWEEP_LATE_MAX

_LOG: Final = structlog.get_logger()


class BlindError(Exception):
    """Objects exist that no watch tells of."""


class Unheard:
    """Objects of one kind that are there, and that its watch has not told of."""

    def __init__(self) -> None:
        self._looks: dict[Key, int] = {}
        """In how many looks in a row, up to the last one."""
        self._heard = 0

    def look(self, missing: Set[Key], heard: int, patience: int = 1) -> set[Key]:
        """Those that the watch will not tell of any more. missing: now; heard: how much it has told in its life;
        patience: that many looks count as one."""
        looks_max = patience * (2 if heard == self._heard else SWEEP_LATE_MAX)
        self._looks = {key: self._looks.get(key, 0) + 1 for key in missing}
        self._heard = heard
        return {key for key, looks in self._looks.items() if looks >= looks_max}


class Sweep:
    """Looks at all kinds, again and again."""

    def __init__(self, api: Api, cache: Cache) -> None:
        self._api = api
        self._cache = cache
        self._unheard = {kind: Unheard() for kind in Kind}

    async def look(self, patience: int = 1) -> bool:
        """Compares all kinds; True where all that is listed is known. patience: that many looks count as one. Raises
        ApiError, BlindError."""
        complete = True
        for kind in Kind:
            before = self._cache.number
            listed = {key async for key in self._api.names(kind.path)}
            gone, missing = self._cache.strangers(kind, listed, before)
            for key in gone:
                _LOG.warning("was deleted unseen", kind=kind.name.lower(), namespace=key[0], name=key[1])
                self._cache.drop(kind, key)
            never = self._unheard[kind].look(missing, self._cache.heard[kind], patience)
            if never:
                raise BlindError(f"{len(never)} objects of {kind.path} are there and were never heard of")
            complete &= not missing
        return complete
