"""What every end-to-end scene has: pods behind a VIP, the checking client outside, and who tells it which pods end.

A pod that is told to end goes on serving for `PRE_STOP_S` (its preStop hook). Until shortly before that is over its
flows must hold, and only then the client is told that it is gone. So a load balancer that lets go of a terminating pod
early is found out, and a pod that has really ended is nobody's fault.
"""

import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from lbpod.lab import CheckerRun
from tests.cluster.apiserver import ApiError, Json
from tests.cluster.stage import EXAMPLE, Cluster, until
from tests.tidy.sources import ROOT

LONG: Final = 200
REPLICAS: Final = 4
PRE_STOP_S: Final = 15
TEST_VIP: Final = "203.0.113.11"
"""The address of `helm test`: another one than the README's, which is in use."""
TOLD_S: Final = 2
"""So long before a terminating pod ends the client is told."""


@dataclass
class Watcher:
    """Says `gone` in time, for pods that end by themselves and for all pods of a node that is lost."""

    cluster: Cluster
    checker: CheckerRun
    _since: dict[str, float] = field(default_factory=dict)  # terminating pod -> when it was first seen so
    _told: set[str] = field(default_factory=set)
    _seen: set[str] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="pod-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def oldest(self) -> float:
        """Seconds since the first pod was told to end; 0: none was."""
        return time.monotonic() - min(self._since.values(), default=time.monotonic())

    def gone(self, *names: str) -> None:
        """These end now."""
        for name in names:
            if name not in self._told:
                self._told.add(name)
                self.checker.gone(name)

    def _run(self) -> None:
        while not self._stop.wait(0.25):
            try:
                pods = {one["metadata"]["name"]: one for one in self.cluster.pods(self.cluster.shop, app="web")}
            except (OSError, ApiError):
                continue  # the API server is away; pods do not end meanwhile
            now = time.monotonic()
            self.gone(*sorted(self._seen - pods.keys()))
            self._seen = set(pods)
            for name, pod in sorted(pods.items()):
                if "deletionTimestamp" in pod["metadata"]:
                    if now - self._since.setdefault(name, now) >= PRE_STOP_S - TOLD_S:
                        self.gone(name)


@dataclass
class Scene:
    """One scene, between its beginning (all pods serve, all connections are open) and `end`."""

    cluster: Cluster
    checker: CheckerRun
    watcher: Watcher
    _lost: list[str] = field(default_factory=list)  # pods of a lost node, which new connections may still be sent to

    def end(self) -> Json:
        """The client's last word, half a second after the last failure that anybody may have caused."""
        before = self.checker.poll() or {}
        self.checker.wait_until(lambda now: now["t_ns"] > before.get("t_ns", 0) + 3_000_000_000, seconds=15)
        self.watcher.stop()
        return self.checker.stop()

    def unbroken(self) -> Json:
        """The scene ends, and no connection was broken whose backend lived."""
        final = self.end()
        words = {key: final[key] for key in ("broken", "broken_backend_gone", "broken_unattributed")}
        assert 0 == final["broken"], f"{words}: {self.checker.failures[:5]}"
        return final

    # --- Kubernetes ---------------------------------------------------------------------------------------------------
    def pods(self) -> list[Json]:
        """Those that are not told to end."""
        return [
            one for one in self.cluster.pods(self.cluster.shop, app="web") if "deletionTimestamp" not in one["metadata"]
        ]

    def scale(self, replicas: int) -> None:
        self.cluster.kubectl("scale", "deployment/web", f"--replicas={replicas}")

    def wait_old_pods_gone(self) -> None:
        """Whoever was told to end has ended."""
        until("pods to end", lambda: len(self.pods()) == len(self.cluster.pods(self.cluster.shop, app="web")))

    def agents_on(self, node: str) -> list[Json]:
        found = self.cluster.pods(self.cluster.system, **{"app.kubernetes.io/component": "lb"})
        return [one for one in found if one["spec"].get("nodeName") == node]

    def hosts(self) -> list[str]:
        """Names of the nodes that host backends."""
        return sorted({one["spec"]["nodeName"] for one in self.pods()})

    def host_without_operator(self) -> str:
        """One that hosts backends, and not the operator."""
        (pod,) = self.cluster.pods(self.cluster.system, **{"app.kubernetes.io/component": "operator"})
        return next(one for one in self.hosts() if one != pod["spec"]["nodeName"])

    @contextmanager
    def losing(self, node: str) -> Iterator[None]:
        """A node is lost inside of this, and all pods on it."""
        # One that has just been made may have no node yet.
        pods = [one for one in self.cluster.pods(self.cluster.shop, app="web") if one["spec"].get("nodeName") == node]
        self._lost = [one["metadata"]["name"] for one in pods]
        self.watcher.gone(*self._lost)
        yield
        for name in self._lost:
            self.checker.haunts(name)

    def wait_replaced(self, node: str, others: int) -> None:
        """Kubernetes has noticed, and so has Holdfast: pods elsewhere serve, and the other load balancers form the
        ring. From then on no new connection is sent to the pods of the lost node."""

        def noticed() -> bool:
            pods = self.pods()
            return len(pods) == REPLICAS and all(one["spec"].get("nodeName") not in (None, node) for one in pods)

        until("pods to be made elsewhere", noticed)
        self.wait_backends(REPLICAS)
        until(
            "the others to be the ring",
            lambda: virtual_service(self.cluster)["status"]["loadBalancers"]["ready"] == others,
        )
        for name in self._lost:
            self.checker.forgotten(name)

    def until_condition(self, kind: str, value: str) -> None:
        def said() -> bool:
            words = virtual_service(self.cluster).get("status", {}).get("conditions", ())
            return value in [one["status"] for one in words if one["type"] == kind]

        until(f"{kind} to be {value}", said)

    def wait_backends(self, count: int, seconds: float = 120) -> None:
        wait_backends(self.cluster, count, seconds)

    def wait_agents(self, seconds: float = 120) -> None:
        """All load balancers are in the ring, and the pods are those that the DaemonSet wants now."""
        wait_agents(self.cluster, seconds)


def virtual_service(cluster: Cluster) -> Json:
    return cluster.get(f"/apis/holdfast.dev/v1alpha1/namespaces/{cluster.shop}/virtualservices/web")


def wait_backends(cluster: Cluster, count: int, seconds: float = 120) -> None:
    """So many backends get new flows, at every load balancer."""

    def said() -> bool:
        status = virtual_service(cluster).get("status", {})
        words = {one["type"]: one["status"] for one in status.get("conditions", ())}
        return words.get("Converged") == "True" and status["backends"]["ready"] == count

    try:
        until("", said, seconds)
    except AssertionError:
        raise AssertionError(
            f"not {count} backends in force:\n{virtual_service(cluster)}\n{cluster.describe()}"
        ) from None


def wait_agents(cluster: Cluster, seconds: float = 120) -> None:
    def said() -> bool:
        found = cluster.get(f"/apis/apps/v1/namespaces/{cluster.system}/daemonsets/holdfast-lb")
        status, wanted = found["status"], found["metadata"]["generation"]
        counts = {status.get(f"{word}NumberScheduled", 0) for word in ("updated", "desired")} | {
            status.get("numberReady")
        }
        return bool(status.get("observedGeneration") == wanted and len(counts) == 1 and counts != {0})

    try:
        until("", said, seconds)
    except AssertionError:
        raise AssertionError(f"not all agents are ready:\n{cluster.describe()}\n{agents_say(cluster)}") from None


def agents_say(cluster: Cluster) -> str:
    """The end of the logs of all agents and of the operator."""
    words = ("-n", cluster.system, "logs", "--prefix", "--tail=20", "--ignore-errors", "-l")
    return "".join(cluster.kubectl(*words, f"app.kubernetes.io/component={one}") for one in ("lb", "operator"))


def readme_commands() -> list[str]:
    """The lines of the README's quick start, in their order."""
    _, found, rest = (ROOT / "README.md").read_text().partition("\n## On Kubernetes\n")
    assert found, "the README has a section On Kubernetes"
    block = rest.partition("```sh\n")[2].partition("```")[0]
    return [line.partition("#")[0].strip() for line in block.splitlines() if line.strip()]


def run_like_a_reader(cluster: Cluster, line: str) -> str:
    """One of these lines, and what it prints: helm and kubectl as they are, curl at the client outside."""
    program, *argv = (cluster.here(word) for word in shlex.split(line))
    match program:
        case "helm":
            return cluster.helm(*argv, *cluster.install_flags)
        case "kubectl" if argv[:2] == ["apply", "-f"]:
            assert EXAMPLE == ROOT / argv[2], "the only file that the quick start applies"
            return cluster.kubectl("apply", "-f", "-", stdin=cluster.example())
        case "kubectl":
            return cluster.kubectl(*argv)
        case "curl":
            return cluster.fetch("--silent", "--show-error", "--max-time", "5", *argv)
    raise AssertionError(f"nobody knows how to run {line!r}")


@contextmanager
def scene(cluster: Cluster, *, long_count: int = LONG, short_rate: int = 20) -> Iterator[Scene]:
    """All pods serve, all connections are open."""
    cluster.kubectl("scale", "deployment/web", f"--replicas={REPLICAS}")
    wait_agents(cluster)
    wait_backends(cluster, REPLICAS)
    until("pods that were told to end to be gone", lambda: len(cluster.pods(cluster.shop, app="web")) == REPLICAS)
    cluster.wait_router()
    checker = cluster.start_checker(long_count=long_count, short_rate=short_rate)
    watcher = Watcher(cluster, checker)
    try:
        checker.wait_until(lambda now: sum(now["backends"].values()) == long_count, seconds=30)
        watcher.start()
        yield Scene(cluster, checker, watcher)
    finally:
        if watcher._thread.is_alive():
            watcher.stop()
        if checker.program.alive:
            checker.program.kill()
