"""What is asked of cert-manager, and what becomes of what it has issued: which pairs and which CAs are in the Secrets
that the operator and the load balancers read. Pure: bodies and bytes in, bodies and bytes out.

Decided here: one Certificate for each node, the controller and a viewer, with the very names and usages that minted
ones have, for both sides of a call compare them. Not one for all nodes: a server must be known to be the node that was
meant, or a snapshot reaches the wrong one. A pair is taken only when it has proved itself in a handshake; until then
what was there stays.

A CA that changes is the one thing that could cut nodes off from each other, since kubelet brings a Secret to each when
it likes. So a new CA is added first, and the pairs that it signed replace good ones only CA_SPREAD later; the CA that
nobody needs any more goes as long after that. The same steps lead from minted certificates to issued ones.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from lboperator.api import Json
from lboperator.keeping import LABELS
from lbpod.certs import ORGANIZATION, Caller, CertsError, Role, prove, server_name
from lbpod.core.limits import CA_SPREAD_NS, MINTED_NODES_MAX, SECRET_BYTES_MAX

GROUP: Final = "cert-manager.io"
HOLDER: Final = "holdfast.dev/certificate-of"
"""Label: whose a Certificate and its Secret are."""
_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True)
class Issuer:
    """Who issues, as a Certificate's issuerRef says it."""

    group: str
    kind: str
    name: str

    @property
    def is_ours_to_ask(self) -> bool:
        """It is one of cert-manager's own kinds, which say of themselves whether they are ready."""
        return self.group == GROUP and self.kind in {"Issuer", "ClusterIssuer"}

    def path(self, namespace: str) -> str:
        """Where the API has it."""
        if self.kind == "ClusterIssuer":
            return f"/apis/{self.group}/v1/clusterissuers/{self.name}"
        return f"/apis/{self.group}/v1/namespaces/{namespace}/issuers/{self.name}"


@dataclass(frozen=True)
class Terms:
    """What all Certificates have in common. The names of each begin with that of the Secret that it is collected in."""

    issuer: Issuer
    own_prefix: str
    lb_prefix: str
    hours: int
    renew_hours: int


@dataclass(frozen=True)
class Pair:
    """A certificate, with those between it and the CA, and its key; in PEM. ca: those that its issuer tells."""

    certificate: bytes
    key: bytes
    ca: bytes = b""


@dataclass(frozen=True)
class Bundle:
    """What operator and load balancers have: CAs, and a pair for each name. Times are of the wall clock, for they
    outlive the operator."""

    cas: tuple[bytes, ...] = ()
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    grown_ns: int = 0
    """When a CA was last added to those that somebody had; 0: never."""
    idle_ns: int = 0
    """Since when there have been CAs that nobody needs; 0: there are none."""

    @property
    def ca(self) -> bytes:
        """The file ca.crt."""
        return b"".join(each + b"\n" for each in self.cas)


def holders(nodes: Iterable[str]) -> dict[str, Caller]:
    """Everybody who has a certificate, by name. nodes: none of them called as the two are."""
    own = {"controller": Caller(Role.CONTROLLER, "controller"), "viewer": Caller(Role.VIEWER, "viewer")}
    return own | {name: Caller(Role.LB, name) for name in sorted(nodes)}


def object_name(who: Caller, terms: Terms) -> str:
    """Of the Certificate, and of the Secret that cert-manager makes for it."""
    return f"{terms.lb_prefix if who.role is Role.LB else terms.own_prefix}-{who.name}"


def certificate(who: Caller, terms: Terms) -> Json:
    """The body of a Certificate. Durations are written as cert-manager itself would write them."""
    name = object_name(who, terms)
    labels = {**LABELS, HOLDER: who.name}
    spec: Json = {
        "secretName": name,
        "secretTemplate": {"labels": labels},
        "commonName": who.name,
        "subject": {"organizations": [ORGANIZATION + who.role.value]},
        "dnsNames": [server_name(who.name, who.role)],
        "usages": ["digital signature", "client auth", *(["server auth"] if who.role is Role.LB else [])],
        "privateKey": {"algorithm": "ECDSA", "size": 256, "encoding": "PKCS8", "rotationPolicy": "Always"},
        "duration": f"{terms.hours}h0m0s",
        "renewBefore": f"{terms.renew_hours}h0m0s",
        "issuerRef": {"group": terms.issuer.group, "kind": terms.issuer.kind, "name": terms.issuer.name},
    }
    return {
        "apiVersion": f"{GROUP}/v1",
        "kind": "Certificate",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def differs(wanted: Json, found: Json) -> bool:
    """What was asked for is not what is asked for now. Fields that others have added do not count."""
    spec = found.get("spec") or {}
    return any(spec.get(key) != value for key, value in wanted["spec"].items())


Revision = tuple[str, int, str]


def revision(found: Json) -> Revision | None:
    """Changes whenever something was issued; None: nothing has been yet. (Not the number alone: a Certificate that is
    made anew and finds its old Secret has an end and no number.)"""
    status = found.get("status") or {}
    number, end = int(status.get("revision") or 0), str(status.get("notAfter") or "")
    return (str(found["metadata"]["uid"]), number, end) if number or end else None


def why_not_ready(found: Json) -> str:
    """What cert-manager says of a Certificate or an Issuer; empty: all is well."""
    conditions = {one.get("type"): one for one in (found.get("status") or {}).get("conditions") or ()}
    ready = conditions.get("Ready")
    if ready is None:
        return "cert-manager has not looked at it yet; is its controller running?"
    return "" if ready.get("status") == "True" else str(ready.get("message") or ready.get("reason") or "not ready")


def cas_in(pem: bytes) -> tuple[bytes, ...]:
    """The certificates of a file, in its order, each once."""
    return tuple(dict.fromkeys(each.replace(b"\r\n", b"\n") for each in _PEM.findall(pem)))


def proven(pair: Pair, ca: bytes, who: Caller) -> str:
    """Why it is of no use; empty: it is good."""
    if not ca:
        return "its issuer does not tell its CA (the Secret has no ca.crt); use one that does, as CA or Vault"
    try:
        _prove_once(ca, pair.certificate, pair.key, who)
    except CertsError as error:
        return str(error)
    return ""


@lru_cache(2 * (MINTED_NODES_MAX + 2))
def _prove_once(ca: bytes, certificate: bytes, key: bytes, who: Caller) -> None:
    """Nine milliseconds each: while a new CA spreads, each look would prove all old pairs and all new ones. What is
    refused is not remembered, for it may just not be valid yet. Raises CertsError."""
    prove(ca, certificate, key, who)


@dataclass(frozen=True)
class Merged:
    """What there is to publish. refused: name -> why what was issued is not taken. waits: pairs that replace good ones
    once their CA is known everywhere."""

    bundle: Bundle
    refused: Mapping[str, str]
    waits: frozenset[str]


def merge(before: Bundle, issued: Mapping[str, Pair], wanted: Mapping[str, Caller], now_ns: int) -> Merged:
    """The next Bundle. issued: what cert-manager has made for the names that are wanted."""
    fresh = {name: pair for name, pair in issued.items() if not _same(pair, before.pairs.get(name))}
    refused = {name: why for name, pair in fresh.items() if (why := proven(pair, pair.ca, wanted[name]))}
    usable = {name: pair for name, pair in issued.items() if name not in refused}
    added = [ca for pair in usable.values() for ca in cas_in(pair.ca) if ca not in before.cas]
    cas = tuple(dict.fromkeys((*before.cas, *added)))
    # Nobody has to be told of a CA where nobody had one before.
    grown_ns = now_ns if added and before.cas else before.grown_ns
    is_known = not grown_ns or now_ns - grown_ns >= CA_SPREAD_NS
    pairs, waits = {}, set()
    for name, who in wanted.items():
        had, made = before.pairs.get(name), usable.get(name)
        if had is not None and name in fresh and made is not None and not is_known and not proven(had, before.ca, who):
            waits.add(name)
            made = None
        chosen = made or had
        if chosen is not None:
            pairs[name] = chosen
    bundle = Bundle(cas, _fitting(pairs), grown_ns, before.idle_ns)
    return Merged(_without_idle(bundle, issued, wanted, now_ns), refused, frozenset(waits))


def _without_idle(bundle: Bundle, issued: Mapping[str, Pair], wanted: Mapping[str, Caller], now_ns: int) -> Bundle:
    """Without the CAs that no pair has needed for so long that none is shown any more. All of them stay where not
    everything is what was issued: nobody can tell which CA the rest is of."""
    needed = {ca for pair in issued.values() for ca in cas_in(pair.ca)}
    is_whole = all(_same(issued.get(name), bundle.pairs.get(name)) for name in wanted)
    if not is_whole or needed >= set(bundle.cas):
        return replace(bundle, idle_ns=0)
    if bundle.idle_ns and now_ns - bundle.idle_ns >= CA_SPREAD_NS:
        return replace(bundle, cas=tuple(ca for ca in bundle.cas if ca in needed), idle_ns=0)
    return replace(bundle, idle_ns=bundle.idle_ns or now_ns)


def _same(one: Pair | None, other: Pair | None) -> bool:
    return one is not None and other is not None and (one.certificate, one.key) == (other.certificate, other.key)


def _fitting(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """As many as a Secret holds, the first by name."""
    kept, room = {}, SECRET_BYTES_MAX
    for name, pair in pairs.items():
        room -= len(pair.certificate) + len(pair.key)
        if room >= 0:
            kept[name] = pair
    return kept
