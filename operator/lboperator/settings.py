"""What can be set about the operator, each with its default and the reason for it: ``HOLDFAST_<FIELD>`` in the
environment, which is what a pod has.

What belongs to one VirtualService is in the VirtualService; what never changes while the cluster lives (its seed) is
in the state object, where the operator itself has put it. Refused values say which variable, and what would do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final

from lboperator.issued import Issuer
from lbpod.core.limits import VNI_MAX

PREFIX: Final = "HOLDFAST_"
HOURS_MAX: Final = 100_000
LEVELS: Final = ("debug", "info", "warning", "error")
_LABEL: Final = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_./]*")
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_DEFAULT_ISSUER: Final = Issuer("cert-manager.io", "Issuer", "holdfast-ca")


class Source(Enum):
    """Who makes the certificates."""

    MINT = "mint"
    CERT_MANAGER = "certManager"
    OWN = "own"


class SettingsError(ValueError):
    """A setting that cannot be. str(): one sentence."""


@dataclass(frozen=True)
class Settings:
    """Everything that the operator is told when it starts."""

    namespace: str = "holdfast-system"
    """Where its own objects are: state, certificates, the Service of the agents."""

    agent_service: str = "holdfast-lb"
    """The headless Service in front of the DaemonSet's pods: its EndpointSlices tell which nodes have an agent, so that
    the operator need not see any pod."""

    agent_port: int = 9900
    """Where agents listen, on the address of their node."""

    lb_selector: tuple[tuple[str, str], ...] = ()
    """Labels of the nodes whose agents take VIP traffic, as `a=b,c=d`. Default: all. The others only host backends."""

    allowed_addresses: tuple[IPv4Network, ...] = ()
    """Ranges that VIPs may be in, as `203.0.113.0/24,198.51.100.7/32`. Default: any address; whoever may create a
    VirtualService may then take any address, so a chart for several tenants should set it."""

    load_balancer_class: str = "holdfast.dev/holdfast"
    """Services of type LoadBalancer with this class get a VirtualService of their own. Empty: none does."""

    vni: int = 7_077
    """The tunnels' VNI, where the state object does not exist yet."""

    state: str = "holdfast-state"
    """Name of the ConfigMap with generation, seed and VNI."""

    lease: str = ""
    """Name of the Lease that two operators take turns by. Empty: there is one operator, and no Lease."""

    certificates: Source = Source.MINT
    """Who makes certificates: mint (they are made and renewed here, into two Secrets), certManager (cert-manager issues
    them, and they are collected into the same Secrets) or own (they are found in the folder `tls`)."""

    issuer: Issuer = _DEFAULT_ISSUER
    """Who issues them where that is cert-manager, as GROUP/KIND/NAME."""

    certificate_hours: int = 2_160
    """How long a certificate from cert-manager is valid (90 days), if the issuer agrees ..."""

    certificate_renew_hours: int = 720
    """... and how long before its end it is renewed (30 days)."""

    pod: str = ""
    """Name of this pod, for events about it. Empty: none are written."""

    pod_uid: str = ""
    """Its uid."""

    ca_secret: str = "holdfast-ca"
    """Name of the Secret with the CA and the operator's own certificates; nobody else may read it."""

    lb_secret: str = "holdfast-lb-tls"
    """Name of the Secret with the nodes' certificates, which the DaemonSet mounts."""

    tls: Path = Path("/run/holdfast/tls")
    """Folder for certificates: in memory where they are minted, mounted where not."""

    listen: str = "0.0.0.0:9901"
    """ADDRESS:PORT of /healthz, /readyz and /metrics, without TLS, for kubelet and Prometheus."""

    log_level: str = "info"
    """debug, info, warning or error."""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Raises SettingsError."""
    values: dict[str, Any] = {}
    for each in fields(Settings):
        text = environment.get(PREFIX + each.name.upper())
        if text is not None:
            values[each.name] = _parse(each.name, PREFIX + each.name.upper(), text.strip())
    return Settings(**values)


def _parse(name: str, named: str, text: str) -> object:
    match name:
        case "agent_port":
            return _number(named, text, 1, 65_535)
        case "vni":
            return _number(named, text, 0, VNI_MAX)
        case "lb_selector":
            return tuple(sorted(_label(named, part) for part in text.split(",") if part.strip()))
        case "allowed_addresses":
            return tuple(_network(named, part.strip()) for part in text.split(",") if part.strip())
        case "certificates":
            if text not in {one.value for one in Source}:
                raise SettingsError(f"{named} is {text!r}; it must be mint, certManager or own")
            return Source(text)
        case "issuer":
            return _issuer(named, text)
        case "certificate_hours" | "certificate_renew_hours":
            return _number(named, text, 1, HOURS_MAX)
        case "tls":
            if not text:
                raise SettingsError(f"{named} is empty; give it a path")
            return Path(text)
        case "listen":
            host, _, port = text.rpartition(":")
            if not host:
                raise SettingsError(f"{named} is {text!r}; it must be ADDRESS:PORT")
            _number(named, port, 0, 65_535)
            return text
        case "log_level":
            if text not in LEVELS:
                raise SettingsError(f"{named} is {text!r}; it must be one of {', '.join(LEVELS)}")
            return text
        case "load_balancer_class" | "pod_uid":
            return text
        case "lease" | "pod" if not text:
            return text
        case _:
            if not _NAME.fullmatch(text):
                raise SettingsError(f"{named} is {text!r}; it must be the name of an object")
            return text


def _number(named: str, text: str, low: int, high: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not low <= int(text) <= high:
        raise SettingsError(f"{named} is {text!r}; it must be a number from {low} to {high}")
    return int(text)


def _label(named: str, part: str) -> tuple[str, str]:
    name, equals, value = (word.strip() for word in part.partition("="))
    if not equals or not _LABEL.fullmatch(name):
        raise SettingsError(f"{named} has {part.strip()!r}; it must be a list of labels like node-role=edge")
    return name, value


def _issuer(named: str, text: str) -> Issuer:
    parts = text.split("/")
    if len(parts) != 3 or not all(parts) or not _NAME.fullmatch(parts[2]):
        raise SettingsError(f"{named} is {text!r}; it must be GROUP/KIND/NAME, as cert-manager.io/Issuer/holdfast-ca")
    return Issuer(*parts)


def _network(named: str, part: str) -> IPv4Network:
    try:
        return IPv4Network(part, strict=False)
    except ValueError as error:
        raise SettingsError(f"{named} has {part!r}, which is no IPv4 range like 203.0.113.0/24 ({error})") from error
