"""What can be set about an agent, and nothing else: each setting with its unit, its default, and the reason for it.

Decided here: how settings are read (command line first, then ``HOLDFAST_*`` in the environment, then the default) and
which values are refused, each with one sentence. What the *cluster* wants (VIPs, ring, seed) comes from the controller
and is no setting. A settings file was dropped: a pod has an environment, a person has a command line.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from lbpod.core.limits import MAP_ENTRIES_MAX, NAME_BYTES_MAX, WITHDRAW_SECONDS_MAX
from lbpod.datapath.loader import PACKAGED_OBJECT, PIN_FOLDER

ENVIRONMENT_PREFIX: Final = "HOLDFAST_"
_YES: Final = frozenset({"1", "true", "yes", "on"})
_DIGITS_MAX: Final = 18
_NO: Final = frozenset({"0", "false", "no", "off", ""})
_SIZED: Final = ("cache", "embryonic", "nat", "pending", "records", "unassured")
"""Maps whose size may be set: those that fill up. The others are arrays, whose indices have a meaning."""
_LEVELS: Final = ("debug", "info", "warning", "error")


class SettingsError(ValueError):
    """A setting that cannot be. str(): one sentence that names it and says what would do."""


@dataclass(frozen=True)
class Endpoint:
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class RedisTarget:
    """Where diagnostics go. str(): as people wrote it; there is no password in it."""

    host: str
    port: int = 6379
    database: int = 0
    user: str = ""
    tls: bool = False
    password_file: Path | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"redis{'s' if self.tls else ''}://{user}{Endpoint(self.host, self.port)}/{self.database}"


class OnTerm(Enum):
    """What SIGTERM means."""

    LEAVE = "leave"
    STAY = "stay"


@dataclass(frozen=True)
class Settings:
    """Everything that one agent is told when it starts."""

    node: str = field(default_factory=lambda: os.uname().nodename)
    """Name of this node, as the controller knows it. Default: the host name, which is also what Kubernetes uses."""

    node_address: str = ""
    """IPv4 address of this node inside the cluster: source of the tunnel, and the address that the controller lists.
    Default: the first address of the interface."""

    interface: str = ""
    """The uplink that VIP packets and tunnel packets come in by. Default: the one that the default route uses."""

    listen: Endpoint = Endpoint("0.0.0.0", 9900)
    """Where controller and peers reach this agent (mutual TLS). All addresses, since the certificate decides who may
    speak."""

    metrics_listen: Endpoint = Endpoint("127.0.0.1", 9902)
    """Where /healthz, /readyz and /metrics are served without TLS, for kubelet and Prometheus have no client
    certificate. The loopback by default: what is open to everybody is opened on purpose."""

    tls: Path = Path("/etc/holdfast/tls")
    """Folder with the cluster's CA, this agent's certificate and its key (`holdfast certs` makes one)."""

    state: Path = Path("/run/holdfast")
    """Folder for the snapshots that a restarted agent goes on with. They are good for as long as the pinned maps are,
    which is until the next boot, and so is /run; a disk would only cost time. (bpffs holds no files.)"""

    bpf_object: Path = PACKAGED_OBJECT
    """The compiled fast path. Default: the one in the package."""

    pins: Path = PIN_FOLDER
    """Folder in a BPF file system where maps and programs outlive the agent. One agent per folder."""

    map_sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Entries of hash maps that are to be smaller or larger than in lbpod/bpf/limits.h, as `records=65536,nat=65536`;
    `unassured` is half of `nat` where only that is given.
    Default: none, the limits suit a node of a large cluster. Counts only for maps that are made new."""

    on_term: OnTerm = OnTerm.LEAVE
    """What SIGTERM means: `leave` hands this LB's slots over and ends when it is out of the ring (at most LEAVE_NS_MAX
    after it has asked); `stay` ends at once, for a restart or an upgrade, and the ring does not change. Default: leave,
    for whoever takes a node away seldom knows that it should have said so. SIGINT always means stay."""

    withdraw_seconds: float = 1.0
    """How long /readyz says 503 before this LB asks to leave: until then it should get no more VIP traffic, so whatever
    announces the VIPs has to look more often than this. Default: one second, for a router that is told at once."""

    detach_on_exit: bool = False
    """At the end, take the programs off the interface and remove the pins. Off: forwarding goes on without the agent,
    which is what makes restarts and upgrades harmless; the lab and an uninstallation want it on."""

    redis_url: RedisTarget | None = None
    """Redis that what happened is written to, for people to read after the fact: redis://[USER@]HOST[:PORT][/DATABASE],
    or rediss:// for TLS (with the CAs of the system, or of SSL_CERT_FILE). Default: none; nothing depends on it."""

    redis_password_file: Path | None = None
    """File with its password, read at each connection. A file, for a URL shows in process lists. Default: no
    password."""

    log_level: str = "info"
    """debug, info, warning or error. Info: one line for each change, none for packets or flows."""


def read_settings(options: Mapping[str, str | None], environment: Mapping[str, str]) -> Settings:
    """Settings from options (by field name; None: not given), else HOLDFAST_<FIELD>, else the default.

    Raises SettingsError.
    """
    values: dict[str, Any] = {}
    for each in fields(Settings):
        text = options.get(each.name)
        named = f"--{each.name.replace('_', '-')}"
        if text is None:
            named = ENVIRONMENT_PREFIX + each.name.upper()
            text = environment.get(named)
        if text is not None:
            values[each.name] = _parse(each.name, named, text)
    settings = _with_password(Settings(**values))
    if not 1 <= len(settings.node.encode()) <= NAME_BYTES_MAX:
        raise SettingsError(f"the node's name has to have 1 to {NAME_BYTES_MAX} bytes: set --node")
    return settings


def _with_password(settings: Settings) -> Settings:
    """Where Redis is and what opens it are two settings, and one thing."""
    target = settings.redis_url
    if target is None:
        return settings
    return replace(settings, redis_url=replace(target, password_file=settings.redis_password_file))


def _parse(name: str, named: str, text: str) -> object:
    match name:
        case "listen" | "metrics_listen":
            return _endpoint(named, text)
        case "tls" | "state" | "bpf_object" | "pins":
            if not text:
                raise SettingsError(f"{named} is empty; give it a path")
            return Path(text).absolute()
        case "redis_url":
            return _redis(named, text) if text else None
        case "redis_password_file":
            return Path(text).absolute() if text else None
        case "map_sizes":
            return _sizes(named, text)
        case "detach_on_exit":
            if text.lower() not in _YES | _NO:
                raise SettingsError(f"{named} is {text!r}; it must be yes or no")
            return text.lower() in _YES
        case "on_term":
            if text not in {each.value for each in OnTerm}:
                raise SettingsError(f"{named} is {text!r}; it must be {' or '.join(each.value for each in OnTerm)}")
            return OnTerm(text)
        case "withdraw_seconds":
            return _seconds(named, text)
        case "log_level":
            if text not in _LEVELS:
                raise SettingsError(f"{named} is {text!r}; it must be one of {', '.join(_LEVELS)}")
            return text
        case _:
            return text


def _endpoint(named: str, text: str) -> Endpoint:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise SettingsError(f"{named} is {text!r}; it must be ADDRESS:PORT, for example 0.0.0.0:9900")
    return Endpoint(host.removeprefix("[").removesuffix("]"), int(port))


_REDIS: Final = re.compile(
    r"(?P<scheme>rediss?)://((?P<user>[^:@/?#\s]+)@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253})"
    r"(:(?P<port>[0-9]{1,5}))?(/(?P<database>[0-9]{1,4})?)?"
)


def _redis(named: str, text: str) -> RedisTarget:
    if "@" in text and ":" in text.rpartition("@")[0].partition("://")[2]:  # the text is not repeated: it is secret
        raise SettingsError(
            f"{named} has a password in it, which process lists show; put it into a file, and name that"
        )
    found = _REDIS.fullmatch(text)
    if found is None or not 1 <= int(found["port"] or 6379) <= 65_535:
        raise SettingsError(
            f"{named} is {text!r}; it must be redis://[USER@]HOST[:PORT][/DATABASE], for example redis://10.0.0.9:6379"
        )
    return RedisTarget(
        found["host"].removeprefix("[").removesuffix("]"),
        int(found["port"] or 6379),
        int(found["database"] or 0),
        found["user"] or "",
        tls=found["scheme"] == "rediss",
    )


def _seconds(named: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3})?", text) or float(text) > WITHDRAW_SECONDS_MAX:
        raise SettingsError(f"{named} is {text!r}; it must be a number of seconds from 0 to {WITHDRAW_SECONDS_MAX}")
    return float(text)


def _sizes(named: str, text: str) -> Mapping[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, count = (word.strip() for word in part.partition("="))
        if not count.isascii() or not count.isdecimal() or len(count) > _DIGITS_MAX or int(count) < 1:
            raise SettingsError(f"{named} has {part!r}; it must be a list like records=65536,nat=65536")
        if name not in _SIZED:
            raise SettingsError(f"{named} names {name!r}; sizes can be set for {', '.join(_SIZED)}")
        if int(count) > MAP_ENTRIES_MAX:
            raise SettingsError(f"{named} has {part!r}; a map has room for {MAP_ENTRIES_MAX} entries at most")
        sizes[name] = int(count)
    if "nat" in sizes:  # of translated flows, those that are assured and those that are not
        sizes.setdefault("unassured", max(sizes["nat"] // 2, 1))
    return MappingProxyType(sizes)
