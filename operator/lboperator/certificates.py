"""Certificates of the cluster, minted here and kept in two Secrets: the CA's key with the operator's own, which nobody
else reads, and the nodes', which the DaemonSet mounts. (Those that cert-manager issues: ``certmanager``.)

Why here: an LB pod has no access to the API and no token, so it cannot ask for a certificate; kubelet brings the Secret
to it, and brings what is renewed, too (the agent notices, no restart). Everything is made by ``lbpod.minting.mint`` in
a folder in memory, as `holdfast certs` would; here is only the way between folder and Secrets.

All nodes' keys are in one Secret, so whoever owns one LB's node can read the others' keys. It owns the network of that
node already; what it gains is to speak as another node. Said in the chart's README.
"""

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol

from lboperator.api import Json
from lboperator.keeping import Secrets, certifiable, files_of, lay_out
from lbpod.core.limits import CERTIFICATES_LOOK_NS
from lbpod.minting import mint

_OWN: Final = ("ca.crt", "ca.key", "controller.crt", "controller.key", "viewer.crt", "viewer.key")


class Certifier(Protocol):
    """Whoever sees to it that operator and load balancers have certificates."""

    @property
    def look_ns(self) -> int:
        """How soon to ask again where no node has come or gone."""

    async def ensure(self, nodes: Iterable[str]) -> None:
        """The folder has the operator's own, and the Secret of the nodes theirs, as well as can be. Raises ApiError
        (409: somebody else has written at the same time; the next try sees what), CertsError."""


class Certificates:
    """One cluster's. Invariant after ``ensure``: folder and Secrets hold the same, good for all nodes named."""

    look_ns = CERTIFICATES_LOOK_NS

    def __init__(self, secrets: Secrets, ca_secret: str, lb_secret: str, folder: Path) -> None:
        self._secrets = secrets
        self._ca_secret, self._lb_secret = ca_secret, lb_secret
        self._folder = folder

    async def ensure(self, nodes: Iterable[str]) -> None:
        """Makes what is missing or about to expire. Raises ApiError, CertsError."""
        names = certifiable(nodes)
        own, theirs = await self._secrets.read(self._ca_secret), await self._secrets.read(self._lb_secret)
        await asyncio.to_thread(self._lay_out, files_of(own), files_of(theirs), names)
        await asyncio.to_thread(mint, self._folder, names)
        # The CA first: a certificate of a CA that was lost would be worth nothing.
        await self._write(self._ca_secret, own, _OWN)
        await self._write(self._lb_secret, theirs, ("ca.crt", *_files(names)))

    def _lay_out(self, own: Mapping[str, bytes], theirs: Mapping[str, bytes], names: list[str]) -> None:
        """The folder as the Secrets have it: what is only in the folder is of a try that failed."""
        wanted = {file: own[file] for file in _OWN if file in own}
        lay_out(self._folder, wanted | {file: theirs[file] for file in _files(names) if file in theirs})

    async def _write(self, name: str, before: Json | None, files: Iterable[str]) -> None:
        await self._secrets.write(name, before, {file: (self._folder / file).read_bytes() for file in files})


def _files(names: Iterable[str]) -> list[str]:
    return [f"{name}.{end}" for name in names for end in ("crt", "key")]
