"""How long an agent takes from exec until /readyz says 200, when it was killed and everything is still pinned.

A whole cluster in the lab: three LBs and a host, one VIP with six backends, a controller. The LBs' agents are killed
with -9 in turn and started again at once, first on a machine that is otherwise quiet, then beside two busy loops of the
same niceness, which is what an agent has on a busy node. Wall time is measured from outside, processor time and its
steps by the agent itself, which logs them when it listens (``lbpod.agent.start_times``).

Root only.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from lbpod.lab import Lab
from lbpod.lab.cluster import Cluster, ClusterOptions
from lbpod.lab.limits import SECOND_NS
from lbpod.lab.topology import Node

KILLS: Final = 12
LBS: Final = 3
BACKENDS: Final = 6
BUSY: Final = {"quiet": 0, "busy": 2}
"""Name of a load -> busy loops beside the agent."""
POLL_S: Final = 0.005
REST_S: Final = 1.5
"""Between two kills: what a start leaves to be done is done."""
READY_NS_MAX: Final = 60 * SECOND_NS
MAP_SIZES: Final = "records=262144,nat=262144,cache=262144"


@contextmanager
def _loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _start_again(cluster: Cluster, node: Node) -> tuple[float, dict[str, Any]]:
    """Kills an agent and starts it: ms until it is ready, and its own account."""
    cluster.agents[node.name].kill()
    began_ns = time.monotonic_ns()
    cluster.start_agent_again(node)
    program = cluster.agents[node.name]
    while not cluster.ready(node):
        assert program.alive, program.log_text()
        assert time.monotonic_ns() < began_ns + READY_NS_MAX, program.log_text()
        time.sleep(POLL_S)
    took_ms = (time.monotonic_ns() - began_ns) / 1e6
    said = [json.loads(line) for line in program.log_text().splitlines() if '"started"' in line]
    return took_ms, said[-1]


def _play(cluster: Cluster, kills: int) -> dict[str, Any]:
    walls: list[float] = []
    said: list[dict[str, Any]] = []
    for number in range(kills):
        time.sleep(REST_S)
        took_ms, account = _start_again(cluster, cluster.lbs[number % LBS])
        walls.append(took_ms)
        said.append(account)
    return {
        "ready_ms": round(statistics.median(walls)),
        "ready_max_ms": round(max(walls)),
        "cpu_ms": round(statistics.median(one["cpu_ms"] for one in said)),
        "steps_cpu_ms": {
            step: round(statistics.median(one["steps"][step] for one in said), 1) for step in said[0]["steps"]
        },
    }


def run(kills: int = KILLS) -> dict[str, Any]:
    """start_ms (median, quiet), and for each load times and steps."""
    with Lab(nodes=LBS + 1) as lab:
        cluster = Cluster(lab, LBS, ClusterOptions(60, MAP_SIZES, "stay"))
        cluster.mint([node.name for node in lab.nodes])
        for _ in range(BACKENDS):
            cluster.add_backend()
        cluster.write_config()
        try:
            cluster.start(None)
            cluster.wait_ready()
            found: dict[str, Any] = {"kills": kills}
            for name, count in BUSY.items():
                with _loops(count):
                    found[name] = _play(cluster, kills)
        finally:
            cluster.stop()
    return {"start_ms": found["quiet"]["ready_ms"], "start": found}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
