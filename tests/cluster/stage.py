"""What a scene may ask of a cluster, whoever has made it: the suite (``whole.py``) or a user (``given.py``).

Why this border: the scenes are promises about Holdfast, not about the network that they are played in. What only the
maker of a cluster can do (lose a node, kill the API server) is not in here; such scenes ask for a `WholeCluster`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from lbpod.lab import CheckerRun
from tests.cluster.apiserver import Json
from tests.tidy.sources import ROOT

WAIT_S: Final = 120
EXAMPLE: Final = ROOT / "examples/virtualservice.yaml"
README_SYSTEM: Final = "holdfast-system"
README_VIP: Final = "203.0.113.10"


def until(what: str, said: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """Waits for something true, but not for ever, and returns it."""
    end = time.monotonic() + seconds
    while True:
        found = said()
        if found:
            return found
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.1)


def container_of(deployment: Json) -> Json:
    """The one container of a Deployment's or DaemonSet's pods."""
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


class Cluster(ABC):
    """Nodes that run, a router that sends `vip` to them, a client outside, and Holdfast not yet installed."""

    system: str = README_SYSTEM
    """The namespace that the chart goes into."""
    shop: str = "default"
    """The namespace of the backends and their VirtualService, and the one that kubectl means."""
    vip: str = README_VIP
    drain_flags: ClassVar[Sequence[str]] = ()
    """More flags of `kubectl drain`."""
    install_flags: Sequence[str] = ()
    """More flags of `helm install`."""
    log_dir: Path

    # --- What each does in its own way --------------------------------------------------------------------------------
    @abstractmethod
    def kubectl(self, *argv: str, stdin: str | None = None) -> str:
        """What it prints. Raises AssertionError with what it says where it fails."""

    @abstractmethod
    def helm(self, *argv: str) -> str:
        """What it prints. Raises AssertionError with what it says where it fails."""

    @abstractmethod
    def get(self, path: str) -> Json:
        """An object of the API. Raises ApiError where it is refused."""

    @abstractmethod
    def fetch(self, *argv: str) -> str:
        """What curl prints at the client outside."""

    @abstractmethod
    def start_checker(self, *, long_count: int, short_rate: int) -> CheckerRun:
        """The checking client outside, against port 80 of the VIP."""

    @abstractmethod
    def wait_router(self) -> None:
        """Until the router sends the VIP to all nodes."""

    @abstractmethod
    def example(self) -> str:
        """The example of the README, as it can be applied here."""

    @abstractmethod
    def left_on_nodes(self) -> list[str]:
        """What an uninstallation has left on the nodes, a sentence each."""

    # --- What all do alike --------------------------------------------------------------------------------------------
    def here(self, word: str) -> str:
        """A word of the README, as it is to be said of this cluster."""
        return word.replace(README_SYSTEM, self.system).replace(README_VIP, self.vip)

    @contextmanager
    def drained(self, node: str) -> Iterator[None]:
        """The node takes no pods, and those that may be evicted are gone."""
        try:
            flags = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s", *self.drain_flags)
            self.kubectl("drain", node, *flags)
            yield
        finally:
            self.kubectl("uncordon", node)

    def pods(self, namespace: str, **labels: str) -> list[Json]:
        query = ",".join(f"{key.replace('_', '-')}={value}" for key, value in labels.items())
        return list(self.get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={query}")["items"])

    def describe(self) -> str:
        """What a person would look at first when something did not come up."""
        looks: list[tuple[str, ...]] = [("get", "nodes", "-o", "wide")]
        for namespace in (self.system, self.shop):
            looks.append(("-n", namespace, "get", "pods", "-o", "wide"))
            looks.append(("-n", namespace, "get", "events", "--sort-by=.lastTimestamp"))
        return "\n".join(self.kubectl(*argv)[-2000:] for argv in looks)


def example_with(image: str) -> str:
    """The README's example with another image."""
    text = EXAMPLE.read_text()
    (deployment,) = (one for one in yaml.safe_load_all(text) if one["kind"] == "Deployment")
    return text.replace(container_of(deployment)["image"], image)
