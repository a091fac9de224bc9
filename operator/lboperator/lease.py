"""Which of two operators works: the one that holds a Lease, as long as it renews it.

This saves work and noise, and is no fence: a process that was asleep may believe for a moment that it still holds the
Lease. What keeps two operators from harming each other are the generations (``state``). Whoever loses the Lease ends,
and starts again as the one that waits.

Clocks of two machines are not compared: a Lease counts as left alone when *we* have seen it unchanged for its duration.
"""

import asyncio
import time
from datetime import UTC, datetime
from typing import Final

import structlog

from lboperator.api import Api, ApiError, Json
from lbpod.core.limits import LEASE_HOLD_NS, LEASE_RENEW_NS

_SECOND_NS: Final = 1_000_000_000
_LOG: Final = structlog.get_logger()


class LeaseLostError(Exception):
    """Somebody else holds it now, or nobody knows."""


class Lease:
    """One Lease by name. me: who holds it, unique for each process."""

    def __init__(self, api: Api, namespace: str, name: str, me: str) -> None:
        self._api = api
        self._folder = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace, self._name, self._me = namespace, name, me
        self._seen: tuple[str, int] = ("", 0)  # its version, and since when
        self.holder = ""
        """Who holds it, as far as is known."""

    async def acquire(self) -> None:
        """Returns once it is ours."""
        while True:
            if await self._try():
                break
            await asyncio.sleep(LEASE_RENEW_NS / _SECOND_NS)
        _LOG.info("lease acquired", name=self._name)

    async def keep(self) -> None:
        """Renews it, until it is cancelled. Raises LeaseLostError."""
        renewed_ns = time.monotonic_ns()
        while True:
            await asyncio.sleep(LEASE_RENEW_NS / _SECOND_NS)
            begun_ns = time.monotonic_ns()
            if await self._try():
                renewed_ns = begun_ns
            elif self.holder not in {"", self._me}:
                raise LeaseLostError(f"{self.holder} holds the Lease {self._name} now")
            elif begun_ns - renewed_ns >= LEASE_HOLD_NS:
                raise LeaseLostError(f"the Lease {self._name} could not be renewed in time")

    async def release(self) -> None:
        """Whoever waits need not wait for its end. One try."""
        try:
            found = await self._api.get(f"{self._folder}/{self._name}")
            if found is not None and found["spec"].get("holderIdentity") == self._me:
                found["spec"]["holderIdentity"] = ""
                await self._api.call("PUT", f"{self._folder}/{self._name}", found)
        except ApiError as error:
            _LOG.warning("lease not released", reason=str(error))

    async def _try(self) -> bool:
        """Takes or renews it, where that is possible."""
        try:
            found = await self._api.get(f"{self._folder}/{self._name}")
            if found is None:
                await self._api.call("POST", self._folder, self._body({}, {"name": self._name}, 0))
                self.holder = self._me
                return True
            return await self._take(found)
        except ApiError as error:
            if error.status != 409:  # somebody was faster
                _LOG.warning("lease", reason=str(error))
            return False

    async def _take(self, found: Json) -> bool:
        spec, version = found["spec"], found["metadata"]["resourceVersion"]
        self.holder = spec.get("holderIdentity") or ""
        now_ns = time.monotonic_ns()
        if version != self._seen[0]:
            self._seen = (version, now_ns)
        if self.holder not in {"", self._me} and now_ns - self._seen[1] < LEASE_HOLD_NS:
            return False
        changes = int(spec.get("leaseTransitions") or 0) + (self.holder != self._me)
        body = self._body(spec, {"name": self._name, "resourceVersion": version}, changes)
        await self._api.call("PUT", f"{self._folder}/{self._name}", body)
        self.holder = self._me
        return True

    def _body(self, before: Json, metadata: Json, changes: int) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = before.get("holderIdentity") == self._me
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"namespace": self._namespace, **metadata},
            "spec": {
                "holderIdentity": self._me,
                "leaseDurationSeconds": LEASE_HOLD_NS // _SECOND_NS,
                "acquireTime": before.get("acquireTime") if mine else now,
                "renewTime": now,
                "leaseTransitions": changes,
            },
        }
