"""Is what we know still what there is? From time to time the API is asked for the names of everything.

A watch that was interrupted for too long begins anew with a list, and nobody tells of what was deleted in between: such
an endpoint would get traffic for ever. What is listed but unknown twice in a row means that a kind is not watched at
all (its CRD was not there when the operator started): then the process ends, and starts again.
"""

from typing import Final

import structlog

from lboperator.api import Api
from lboperator.cache import Cache, Kind
from lboperator.nouns import Key

_LOG: Final = structlog.get_logger()


class BlindError(Exception):
    """Objects exist that no watch tells of."""


class Sweep:
    """Invariant: ``_missing`` is what the last ``look`` found listed and unknown."""

    def __init__(self, api: Api, cache: Cache) -> None:
        self._api = api
        self._cache = cache
        self._missing: dict[Kind, set[Key]] = {kind: set() for kind in Kind}

    async def look(self) -> bool:
        """Compares all kinds; True where all that is listed is known. Raises ApiError, BlindError."""
        complete = True
        for kind in Kind:
            before = self._cache.number
            listed = {key async for key in self._api.names(kind.path)}
            gone, missing = self._cache.strangers(kind, listed, before)
            for key in gone:
                _LOG.warning("was deleted unseen", kind=kind.name.lower(), namespace=key[0], name=key[1])
                self._cache.drop(kind, key)
            twice = missing & self._missing[kind]
            self._missing[kind] = missing
            if twice:
                raise BlindError(f"{len(twice)} objects of {kind.path} are there and were never heard of")
            complete &= not missing
        return complete
