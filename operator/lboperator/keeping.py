"""Where certificates are kept, whoever makes them: Secrets in the API, and a folder in memory that TLS reads from.

A Secret is written by compare-and-swap and only where it differs, so that two operators cannot undo each other's work
and kubelet has nothing to bring where nothing is new. Names that no certificate can have are sorted out here, too.
"""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import structlog

from lboperator.api import Api, Json
from lboperator.nouns import MANAGED_BY, OPERATOR
from lbpod.certs import CertsError, is_node_name
from lbpod.core.limits import MINTED_NODES_MAX

LABELS: Final = {"app.kubernetes.io/name": "holdfast", MANAGED_BY: OPERATOR}
_LOG: Final = structlog.get_logger()


class Secrets:
    """The Secrets of one namespace, as files by name."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._folder = f"/api/v1/namespaces/{namespace}/secrets"
        self._namespace = namespace

    async def read(self, name: str) -> Json | None:
        """None: there is none. Raises ApiError."""
        return await self._api.get(f"{self._folder}/{name}")

    async def write(
        self, name: str, before: Json | None, files: Mapping[str, bytes], notes: Mapping[str, str] | None = None
    ) -> bool:
        """False where it holds just that already. before: what was read. notes: annotations of ours; none of others'
        are kept. Raises ApiError (409: somebody else has written at the same time; the next try sees what)."""
        data = {file: base64.b64encode(content).decode() for file, content in files.items()}
        noted = notes_of(before)
        if before is not None and before.get("data") == data and (notes is None or noted == dict(notes)):
            return False
        metadata: Json = {"name": name, "namespace": self._namespace, "labels": dict(LABELS)}
        if notes:
            metadata["annotations"] = dict(notes)
        body: Json = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": metadata, "data": data}
        if before is None:
            await self._api.call("POST", self._folder, body)
        else:
            metadata["resourceVersion"] = before["metadata"]["resourceVersion"]
            await self._api.call("PUT", f"{self._folder}/{name}", body)
        _LOG.info("certificates written", secret=name, files=len(data))
        return True


def files_of(secret: Json | None) -> dict[str, bytes]:
    """What is in it. Raises CertsError."""
    try:
        found = (secret or {}).get("data") or {}
        return {name: base64.b64decode(text, validate=True) for name, text in found.items() if "/" not in name}
    except ValueError as error:
        raise CertsError(f"a Secret of certificates cannot be read: {error}") from error


def notes_of(secret: Json | None) -> dict[str, str]:
    """Its annotations under our name."""
    found = ((secret or {}).get("metadata") or {}).get("annotations") or {}
    return {name: str(value) for name, value in found.items() if name.startswith("holdfast.dev/")}


def lay_out(folder: Path, wanted: Mapping[str, bytes]) -> None:
    """The folder has just these files, readable by nobody else. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    for file, data in sorted(wanted.items()):
        path = folder / file
        if not path.exists() or path.read_bytes() != data:
            path.touch(mode=0o600)
            path.write_bytes(data)


def certifiable(nodes: Iterable[str]) -> list[str]:
    """Names that a certificate can have; of the others it is said that they cannot."""
    names = sorted(set(nodes))
    good = [name for name in names if is_node_name(name)]
    if len(good) < len(names) or len(good) > MINTED_NODES_MAX:
        left = sorted(set(names) - set(good)) + good[MINTED_NODES_MAX:]
        _LOG.warning("nodes without certificates", nodes=left[:10], count=len(left), most=MINTED_NODES_MAX)
    return good[:MINTED_NODES_MAX]
