"""The one object that the operator keeps: generation and identity of the cluster, in a ConfigMap.

Why it is written before anything is pushed: a generation that was pushed must never mean something else, even if the
operator dies in between, and even if two of them run (kopf's peering is no fence, this is). ``persist`` is a
compare-and-swap by resourceVersion; in the usual case it is one call, for the last version that was written here is
known.

Losing the object is harmless: the load balancers know seed and VNI, and generations go on from the highest of theirs.
A damaged one is not taken for a lost one: somebody should look at it first.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec

from lboperator.api import Api, ApiError, Json
from lboperator.keeping import LABELS
from lbpod.core.limits import API_RETRY_NS, GENERATION_MAX, PERSIST_TRIES_MAX, VNI_MAX
from lbpod.core.messages import NO_IDS, Persist, Persisted, PersistFailed
from lbpod.core.model import Cluster, NextIds

_SECOND_NS: Final = 1_000_000_000


class StateError(Exception):
    """The object is there and cannot be used. str(): one sentence that says what to do."""


@dataclass(frozen=True)
class Written:
    """What the object says. version: its resourceVersion, '' where it has not been written."""

    cluster: Cluster
    generation: int = 0
    next_ids: NextIds = NO_IDS
    version: str = ""


def encode(written: Written) -> dict[str, str]:
    """The ConfigMap's data."""
    return {
        "seed": str(written.cluster.seed),
        "vni": str(written.cluster.vni),
        "generation": str(written.generation),
        "nextIds": msgspec.json.encode(written.next_ids).decode(),
    }


def decode(body: Json) -> Written:
    """Raises StateError."""
    metadata = body["metadata"]
    name = f"ConfigMap {metadata.get('namespace')}/{metadata.get('name')}"
    data = body.get("data") or {}
    try:
        cluster = Cluster(int(data["vni"]), int(data["seed"]))
        generation = int(data["generation"])
        next_ids = msgspec.json.decode(data["nextIds"], type=NextIds)
    except (KeyError, ValueError) as error:
        raise StateError(f"{name} is damaged ({error}); delete it, and what load balancers know is used") from error
    sound = 0 <= generation <= GENERATION_MAX and 0 <= cluster.vni <= VNI_MAX and 0 <= cluster.seed <= 0xFFFF_FFFF
    if not sound:
        raise StateError(f"{name} has impossible numbers; delete it, and what load balancers know is used")
    return Written(cluster, generation, next_ids, metadata["resourceVersion"])


class State:
    """The object by name. Invariant: ``_known`` is what was read or written last."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api = api
        self._namespace, self._name = namespace, name
        self._folder = f"/api/v1/namespaces/{namespace}/configmaps"
        self._known: Written | None = None

    async def read(self) -> Written | None:
        """None: there is none. Raises ApiError, StateError."""
        body = await self._api.get(f"{self._folder}/{self._name}")
        self._known = decode(body) if body is not None else None
        return self._known

    async def create(self, cluster: Cluster, generation: int = 0) -> Written:
        """The object for a cluster that has none; where somebody was faster, theirs. Raises ApiError, StateError."""
        try:
            self._known = decode(await self._write(Written(cluster, generation), "POST"))
        except ApiError as error:
            found = await self.read() if error.status == 409 else None
            if found is None:
                raise
        assert self._known is not None, "it was made or read"
        return self._known

    async def persist(self, effect: Persist) -> Persisted | PersistFailed:
        """As lbpod.controller.driver.Store says."""
        wanted, reason = effect.snapshot.next_ids, ""
        for _ in range(PERSIST_TRIES_MAX):
            try:
                known = self._known or await self.read() or await self.create(effect.snapshot.cluster)
                if known.cluster != effect.snapshot.cluster:
                    raise StateError(f"ConfigMap {self._namespace}/{self._name} belongs to another cluster now")
                if known.generation > effect.after:
                    why = f"ConfigMap {self._namespace}/{self._name} holds generation {known.generation}"
                    return PersistFailed(effect.generation, known.generation, why, known.next_ids)
                made = Written(known.cluster, effect.generation, wanted, known.version)
                self._known = decode(await self._write(made, "PUT"))
                return Persisted(effect.generation)
            except ApiError as error:
                self._known, reason = None, str(error)  # whatever it is now has to be read
                if error.status not in {404, 409}:
                    await asyncio.sleep(API_RETRY_NS / _SECOND_NS)
            except StateError as error:
                self._known = None
                return PersistFailed(effect.generation, 0, str(error))
        return PersistFailed(effect.generation, 0, reason)

    async def _write(self, written: Written, method: str) -> Json:
        metadata = {
            "name": self._name,
            "namespace": self._namespace,
            "labels": LABELS,
        }
        if written.version:
            metadata["resourceVersion"] = written.version
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": encode(written)}
        path = self._folder if method == "POST" else f"{self._folder}/{self._name}"
        return await self._api.call(method, path, body)
