"""What a scenario wants: a few lines of YAML become VIPs.

Shorter than the standalone configuration on purpose: a transcript is read whole, and a VirtualService in full would
take more lines than what it shows. All VIPs share one address and differ in port and protocol.

    web:
      port: 80            # and protocol: TCP or UDP
      idle: 600s          # and drain: 60s
      affinity: ClientIP
      pods: {1: host1, 2: host2 draining}
"""

from typing import Any, Final

import yaml

from lbpod.core.model import Affinity, BackendState, Protocol, WorldBackend, WorldVip, parse_address
from tests.scenarios.traffic import POD_PORT, pod_address

VIP_ADDRESS: Final = parse_address("203.0.113.10")
KNOWN: Final = {"port", "protocol", "idle", "drain", "affinity", "pods"}


def parse_seconds(text: str) -> int:
    """'1.5s' as nanoseconds."""
    assert text.endswith("s"), f"a time is written like 1.5s, not {text!r}"
    return round(float(text[:-1]) * 1_000_000_000)


def parse_world(text: str) -> tuple[WorldVip, ...]:
    """VIPs by name, sorted."""
    wanted: dict[str, dict[str, Any]] = yaml.safe_load(text) or {}
    return tuple(_vip(name, fields) for name, fields in sorted(wanted.items()))


def _vip(name: str, fields: dict[str, Any]) -> WorldVip:
    unknown = sorted(fields.keys() - KNOWN)
    assert not unknown, f"{name} has unknown fields: {', '.join(unknown)}"
    pods: dict[int, str] = fields.get("pods") or {}
    return WorldVip(
        name=name,
        address=VIP_ADDRESS,
        port=int(fields.get("port", 80)),
        protocol=Protocol[fields.get("protocol", "TCP")],
        affinity=Affinity.CLIENT_IP if fields.get("affinity") == "ClientIP" else Affinity.NONE,
        idle_ns=parse_seconds(fields.get("idle", "600s")),
        drain_ns=parse_seconds(fields.get("drain", "600s")),
        backends=tuple(_backend(number, str(words).split()) for number, words in sorted(pods.items())),
    )


def _backend(number: int, words: list[str]) -> WorldBackend:
    assert words[1:] in ([], ["draining"]), f"pod {number}: a node, and draining where it is"
    state = BackendState.DRAINING if words[1:] else BackendState.READY
    return WorldBackend(pod_address(number), POD_PORT, words[0], 1, state)
