"""Certificates that cert-manager issues and renews: asked for here, one for each node, and collected into the two
Secrets that minted ones would be in, so that agents and their mounts are the same in both cases.

Why collected, and not mounted as they are issued: a DaemonSet has one template for all nodes, and a pod that could read
the Secret of its own node would need access to the API. Why Certificates, and not CertificateRequests with keys of our
own (which would spare the right to read Secrets): renewal, status and alerts of Certificates are what people who run
cert-manager know. What is asked and what is taken is ``issued``'s business; here are the calls, and what is said where
they fail. Nothing that is wrong here takes a certificate away that is still good.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from lboperator.api import Api, ApiError, Json
from lboperator.issued import (
    GROUP,
    HOLDER,
    Bundle,
    Merged,
    Pair,
    Revision,
    Terms,
    cas_in,
    certificate,
    differs,
    holders,
    merge,
    object_name,
    revision,
    why_not_ready,
)
from lboperator.keeping import LABELS, Secrets, certifiable, files_of, lay_out, notes_of
from lbpod.certs import Caller, CertsError, Role
from lbpod.core.limits import (
    API_CALLS_MAX,
    CERTIFICATES_LOOK_NS,
    ISSUED_LOOK_NS,
    ISSUED_TOLD_NS,
    LOOK_AFTER_NS,
)

GROWN_NOTE: Final = "holdfast.dev/ca-added-at"
IDLE_NOTE: Final = "holdfast.dev/ca-idle-since"
_SECOND_NS: Final = 1_000_000_000
_LOG: Final = structlog.get_logger()


@dataclass(frozen=True)
class Trouble:
    """Why not all certificates are as they should be, as an event says it."""

    reason: str
    sentence: str


class CertManager:
    """One cluster's. Invariant after ``ensure``: both Secrets and the folder hold the newest that is good of each."""

    def __init__(self, api: Api, namespace: str, own_secret: str, lb_secret: str, terms: Terms, folder: Path) -> None:
        self._api = api
        self._namespace = namespace
        self._secrets = Secrets(api, namespace)
        self._own_secret, self._lb_secret = own_secret, lb_secret
        self._terms = terms
        self._folder = folder
        self.say: Callable[[Trouble | None], Awaitable[None]] = _say_nothing
        """Called at each look, with what is wrong."""
        self._issued: dict[str, tuple[Revision, Pair]] = {}
        """By name: what was issued, and the revision that it is."""
        self._settled: tuple[object, int] | None = None
        """The revisions that were published whole, and when; None: something is left to do."""
        self._is_urgent = True
        self._begun_ns = time.monotonic_ns()

    @property
    def look_ns(self) -> int:
        """Sooner where something is missing."""
        return LOOK_AFTER_NS if self._is_urgent else ISSUED_LOOK_NS

    async def ensure(self, nodes: Iterable[str]) -> None:
        """Asks, collects and publishes. Raises ApiError, and CertsError where not even the operator has a pair."""
        wanted = holders(certifiable(nodes))
        found, trouble = await self._ask(wanted)
        trouble = trouble or await self._why_no_issuer()
        revisions = {name: revision(one) for name, one in found.items()}
        if trouble is None and self._is_settled(revisions):
            return
        await self._collect(found, wanted)
        merged = await self._publish(wanted)
        trouble = trouble or self._trouble(found, wanted, merged)
        at_rest = trouble is None and not merged.waits and not merged.bundle.idle_ns
        self._settled = (revisions, time.monotonic_ns()) if at_rest else None
        self._is_urgent = trouble is not None and trouble.reason != "NotUsable"  # only another issue would help
        await self.say(trouble)
        if "controller" not in merged.bundle.pairs:
            raise CertsError(trouble.sentence if trouble is not None else "the controller's is not issued yet")

    def _is_settled(self, revisions: object) -> bool:
        """Nothing is left to do, as far as revisions tell. Whether the Secrets are still there is looked at seldom."""
        if self._settled is None or self._settled[0] != revisions:
            return False
        return time.monotonic_ns() - self._settled[1] < CERTIFICATES_LOOK_NS

    # --- cert-manager -------------------------------------------------------------------------------------------------
    def _path(self, name: str = "") -> str:
        folder = f"/apis/{GROUP}/v1/namespaces/{self._namespace}/certificates"
        return f"{folder}/{name}" if name else folder

    async def _ask(self, wanted: Mapping[str, Caller]) -> tuple[dict[str, Json], Trouble | None]:
        """The Certificates as they are now, by whose they are, and what could not be asked. Those of nodes that have
        gone are deleted. Raises ApiError where nobody answers."""
        selector = ",".join(f"{key}%3D{value}" for key, value in LABELS.items())
        found: dict[str, Json] = {}
        trouble = None
        try:
            listed = await self._api.get(f"{self._path()}?labelSelector={selector},{HOLDER}")
        except ApiError as error:
            return found, _not_asked(error)
        if listed is None:
            what = f"cert-manager is not installed: the API server knows no Certificates of {GROUP}/v1"
            return found, Trouble("CertManagerMissing", f"{what}; install it, or set tls.mode to mint")
        ours = {one["metadata"]["name"]: one for one in listed["items"] if self._is_ours(one)}
        for name, who in wanted.items():
            body = certificate(who, self._terms)
            try:
                found[name] = await self._asked(body, ours.pop(body["metadata"]["name"], None))
            except ApiError as error:
                trouble = trouble or _not_asked(error)
        for name in sorted(ours):
            try:
                await self._api.call("DELETE", self._path(name))
                _LOG.info("certificate given up", name=name, secret="stays until somebody deletes it")
            except ApiError as error:
                trouble = trouble or _not_asked(error)
        return found, trouble

    async def _asked(self, body: Json, had: Json | None) -> Json:
        """The Certificate, made or changed where that is needed. Raises ApiError."""
        name = body["metadata"]["name"]
        if had is not None and not differs(body, had):
            return had
        _LOG.info("certificate asked for", name=name, anew=had is not None)
        if had is None:
            return await self._api.call("POST", self._path(), body)
        return await self._api.merge(self._path(name), {"spec": body["spec"]})

    def _is_ours(self, body: Json) -> bool:
        """Another installation's may lie in the same namespace."""
        name, holder = body["metadata"]["name"], body["metadata"]["labels"][HOLDER]
        return any(name == object_name(Caller(role, holder), self._terms) for role in Role)

    async def _collect(self, found: Mapping[str, Json], wanted: Mapping[str, Caller]) -> None:
        """Reads what was issued since the last time. Raises ApiError."""
        places = asyncio.Semaphore(API_CALLS_MAX)

        async def collect(name: str, which: Revision) -> None:
            async with places:
                read = await self._secrets.read(object_name(wanted[name], self._terms))
            files = files_of(read)
            if files.get("tls.crt") and files.get("tls.key"):
                self._issued[name] = which, Pair(files["tls.crt"], files["tls.key"], files.get("ca.crt", b""))

        self._issued = {name: one for name, one in self._issued.items() if name in wanted}
        due = {name: which for name, one in found.items() if (which := revision(one)) is not None}
        fresh = [name for name, which in due.items() if self._issued.get(name, (None,))[0] != which]
        await asyncio.gather(*(collect(name, due[name]) for name in fresh))

    # --- What there is ------------------------------------------------------------------------------------------------
    async def _publish(self, wanted: Mapping[str, Caller]) -> Merged:
        """Raises ApiError."""
        own, theirs = await self._secrets.read(self._own_secret), await self._secrets.read(self._lb_secret)
        before = _bundle(files_of(own), files_of(theirs), notes_of(theirs))
        issued = {name: pair for name, (_, pair) in self._issued.items()}
        merged = await asyncio.to_thread(merge, before, issued, wanted, time.time_ns())
        bundle = merged.bundle
        stamps = {GROWN_NOTE: bundle.grown_ns, IDLE_NOTE: bundle.idle_ns}
        notes = {name: _stamp(at_ns) for name, at_ns in stamps.items() if at_ns}
        # Kubelet looks at a Secret that is there once a minute, and at one that is not every few seconds: so it comes
        # when all of them are in it, if that does not take too long.
        is_late = time.monotonic_ns() - self._begun_ns >= ISSUED_TOLD_NS
        if theirs is not None or len(bundle.pairs) == len(wanted) or (bundle.pairs and is_late):
            # The load balancers' first: whoever is to trust a CA must know it before it is used.
            await self._secrets.write(self._lb_secret, theirs, _files(bundle, wanted, lbs=True), notes)
        if bundle.pairs:
            await self._secrets.write(self._own_secret, own, _files(bundle, wanted, lbs=False), {})
        await asyncio.to_thread(lay_out, self._folder, _files(bundle, wanted, lbs=False))
        return merged

    # --- What is wrong ------------------------------------------------------------------------------------------------
    def _trouble(self, found: Mapping[str, Json], wanted: Mapping[str, Caller], merged: Merged) -> Trouble | None:
        for name, why in sorted(merged.refused.items()):
            return Trouble("NotUsable", f"the certificate issued for {name} is not taken: {why}")
        late = {name: why for name, one in found.items() if (why := why_not_ready(one))}
        left = sorted(late) or [name for name in wanted if name not in merged.bundle.pairs]
        if not left:
            return None
        why = late.get(left[0], "it is not collected yet, or there is no room for it in the Secret")
        count = f"{len(left)} of {len(wanted)} certificates are not issued"
        return Trouble("NotIssued", f"{count}; of {object_name(wanted[left[0]], self._terms)} it is said: {why}")

    async def _why_no_issuer(self) -> Trouble | None:
        """Certificates do not say it: they are just not issued. Of kinds that others have defined nobody can tell.
        Raises ApiError where nobody answers."""
        issuer = self._terms.issuer
        if not issuer.is_ours_to_ask:
            return None
        try:
            found = await self._api.get(issuer.path(self._namespace))
        except ApiError as error:
            return _not_asked(error)
        where = "" if issuer.kind == "ClusterIssuer" else f" in namespace {self._namespace}"
        if found is None:
            sentence = f"the {issuer.kind} {issuer.name} does not exist{where}; make it, or correct"
            return Trouble("IssuerNotFound", f"{sentence} tls.certManager.issuerRef")
        if not (why := why_not_ready(found)):
            return None
        return Trouble("IssuerNotReady", f"the {issuer.kind} {issuer.name}{where} is not ready: {why}")


def _not_asked(error: ApiError) -> Trouble:
    """Raises the error where nobody has answered: that says nothing about certificates."""
    if error.status == 0:
        raise error
    return Trouble("NotAsked", str(error))


async def _say_nothing(_: Trouble | None) -> None:
    """Until somebody wants to know."""


def _bundle(own: Mapping[str, bytes], theirs: Mapping[str, bytes], notes: Mapping[str, str]) -> Bundle:
    """As two Secrets have it."""
    files = {**theirs, **own}
    names = [file.removesuffix(".crt") for file in files if file.endswith(".crt") and file != "ca.crt"]
    pairs = {name: Pair(files[f"{name}.crt"], files[f"{name}.key"]) for name in names if f"{name}.key" in files}
    cas = tuple(dict.fromkeys((*cas_in(theirs.get("ca.crt", b"")), *cas_in(own.get("ca.crt", b"")))))
    return Bundle(cas, pairs, _unstamped(notes.get(GROWN_NOTE, "")), _unstamped(notes.get(IDLE_NOTE, "")))


def _files(bundle: Bundle, wanted: Mapping[str, Caller], *, lbs: bool) -> dict[str, bytes]:
    """Of one of the two Secrets."""
    files = {"ca.crt": bundle.ca}
    for name, pair in bundle.pairs.items():
        if (wanted[name].role is Role.LB) is lbs:
            files |= {f"{name}.crt": pair.certificate, f"{name}.key": pair.key}
    return files


def _stamp(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / _SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unstamped(text: str) -> int:
    """0 where it is no time: then nothing is waited for."""
    try:
        return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()) * _SECOND_NS
    except ValueError:
        return 0
