"""Certificates of the cluster, minted here and kept in two Secrets: the CA's key with the operator's own, which nobody
else reads, and the nodes', which the DaemonSet mounts.

Why here: an LB pod has no access to the API and no token, so it cannot ask for a certificate; kubelet brings the Secret
to it, and brings what is renewed, too (the agent notices, no restart). Everything is made by ``lbpod.minting.mint`` in
a folder in memory, as `holdfast certs` would; here is only the way between folder and Secrets.

All nodes' keys are in one Secret, so whoever owns one LB's node can read the others' keys. It owns the network of that
node already; what it gains is to speak as another node. Said in the chart's README.
"""

import asyncio
import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import structlog

from lboperator.api import Api, Json
from lbpod.certs import CertsError
from lbpod.core.limits import MINTED_NODES_MAX
from lbpod.minting import mint

_LOG: Final = structlog.get_logger()
_OWN: Final = ("ca.crt", "ca.key", "controller.crt", "controller.key", "viewer.crt", "viewer.key")
_MINTABLE: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
_RESERVED: Final = frozenset({"ca", "controller", "viewer"})


class Certificates:
    """One cluster's. Invariant after ``ensure``: folder and Secrets hold the same, good for all nodes named."""

    def __init__(self, api: Api, namespace: str, ca_secret: str, lb_secret: str, folder: Path) -> None:
        self._api = api
        self._namespace = namespace
        self._ca_secret, self._lb_secret = ca_secret, lb_secret
        self._folder = folder

    async def ensure(self, nodes: Iterable[str]) -> bool:
        """Makes what is missing or about to expire; True where anything was written. Raises ApiError (409: somebody
        else has written at the same time; the next try sees what), CertsError."""
        names = _mintable(nodes)
        own, theirs = await self._read(self._ca_secret), await self._read(self._lb_secret)
        await asyncio.to_thread(self._lay_out, _data(own), _data(theirs), names)
        await asyncio.to_thread(mint, self._folder, names)
        # The CA first: a certificate of a CA that was lost would be worth nothing.
        wrote = await self._write(self._ca_secret, own, _OWN)
        wanted = ["ca.crt", *(f"{name}.{end}" for name in names for end in ("crt", "key"))]
        return await self._write(self._lb_secret, theirs, wanted) or wrote

    async def _read(self, name: str) -> Json | None:
        return await self._api.get(f"/api/v1/namespaces/{self._namespace}/secrets/{name}")

    def _lay_out(self, own: Mapping[str, bytes], theirs: Mapping[str, bytes], names: list[str]) -> None:
        """The folder as the Secrets have it: what is only in the folder is of a try that failed."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        wanted = {file: own[file] for file in _OWN if file in own}
        files = {f"{name}.{end}" for name in names for end in ("crt", "key")}
        wanted |= {file: data for file, data in theirs.items() if file in files}
        for path in self._folder.iterdir():
            if path.name not in wanted:
                path.unlink()
        for file, data in sorted(wanted.items()):
            path = self._folder / file
            if not path.exists() or path.read_bytes() != data:
                path.touch(mode=0o600)
                path.write_bytes(data)

    async def _write(self, name: str, before: Json | None, files: Iterable[str]) -> bool:
        data = {file: base64.b64encode((self._folder / file).read_bytes()).decode() for file in files}
        if before is not None and before.get("data") == data:
            return False
        folder = f"/api/v1/namespaces/{self._namespace}/secrets"
        metadata = {
            "name": name,
            "namespace": self._namespace,
            "labels": {"app.kubernetes.io/name": "holdfast", "app.kubernetes.io/managed-by": "holdfast-operator"},
        }
        body: Json = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": metadata, "data": data}
        if before is None:
            await self._api.call("POST", folder, body)
        else:
            metadata["resourceVersion"] = before["metadata"]["resourceVersion"]
            await self._api.call("PUT", f"{folder}/{name}", body)
        _LOG.info("certificates written", secret=name, files=len(data))
        return True


def _mintable(nodes: Iterable[str]) -> list[str]:
    """Names that a certificate can have; of the others it is said that they cannot."""
    names = sorted(set(nodes))
    good = [name for name in names if _MINTABLE.fullmatch(name) and name not in _RESERVED]
    if len(good) < len(names) or len(good) > MINTED_NODES_MAX:
        left = sorted(set(names) - set(good)) + good[MINTED_NODES_MAX:]
        _LOG.warning("nodes without certificates", nodes=left[:10], count=len(left), most=MINTED_NODES_MAX)
    return good[:MINTED_NODES_MAX]


def _data(secret: Json | None) -> dict[str, bytes]:
    """Raises CertsError."""
    try:
        found = (secret or {}).get("data") or {}
        return {name: base64.b64decode(text, validate=True) for name, text in found.items() if "/" not in name}
    except ValueError as error:
        raise CertsError(f"a Secret of certificates cannot be read: {error}") from error
