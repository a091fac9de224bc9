"""How long a slot tracks after a change of the backends, under short flows: what early settle is worth.

A whole cluster in the lab: three LBs, two hosts with nginx, wrk that opens a connection for each request, as many as
this machine makes. The idle timeout is the default of TCP, an hour: without early settle every slot that a change
touches would track for longer than that. Backends are added and drained in turn. After each change the slots that
track are counted at an LB every SAMPLE_S; what has left the count between two samples has tracked until then, from the
first sample that saw the change.

Root only.
"""

import re
import signal
import statistics
import time
from typing import Any, Final

import numpy as np

from lbpod.lab import Lab
from lbpod.lab.cluster import PREFIX, VIP, VIP_PORT, Cluster, ClusterOptions
from lbpod.lab.limits import SECOND_NS
from lbpod.lab.program import Program

CHANGES: Final = 6
BACKENDS: Final = 6
CONNECTIONS: Final = 16
SAMPLE_S: Final = 0.02
BEGIN_S_MAX: Final = 20.0
SETTLE_S_MAX: Final = 90.0
IDLE_SECONDS: Final = 3_600
MAP_SIZES: Final = "records=262144,nat=262144,cache=262144"
QUANTILES: Final = (0.5, 0.9, 0.99)
LEFT_SHARE: Final = 0.002
"""Where no more slots than these are left, the next change comes: the last few may wait for a client that is slow."""


def quantiles(samples: list[tuple[float, int]], shares: tuple[float, ...] = QUANTILES) -> list[float]:
    """Seconds after which these shares of the slots had settled. samples: seconds since the change, slots tracking."""
    peak = max(count for _, count in samples)
    after = [(at, count) for at, count in samples if at >= next(at for at, count in samples if count == peak)]
    return [next((at for at, count in after if count <= peak * (1 - share)), SETTLE_S_MAX) for share in shares]


def _tracking(cluster: Cluster) -> int:
    samples = cluster.metrics(cluster.lbs[0])
    return 0 if samples is None else int(samples["holdfast_tracking_slots"])


def _watch(cluster: Cluster, left: int) -> list[tuple[float, int]]:
    """From the first sample with more slots that track than were left before to the first with hardly any."""
    asked = time.monotonic()
    while (count := _tracking(cluster)) <= left:
        if time.monotonic() > asked + BEGIN_S_MAX:
            raise AssertionError("no slot has begun to track: the change has not arrived")
        time.sleep(SAMPLE_S)
    began = time.monotonic()
    samples = [(0.0, count)]
    while samples[-1][1] > LEFT_SHARE * max(count for _, count in samples) and time.monotonic() < began + SETTLE_S_MAX:
        time.sleep(SAMPLE_S)
        samples.append((time.monotonic() - began, _tracking(cluster)))
    return samples


def _play(cluster: Cluster, changes: int) -> list[list[tuple[float, int]]]:
    found: list[list[tuple[float, int]]] = []
    for number in range(changes):
        if number % 2:
            next(one for one in cluster.served if not one.draining).draining = True
        else:
            cluster.add_backend()
        cluster.write_config()
        found.append(_watch(cluster, found[-1][-1][1] if found else 0))
    return found


def _start(cluster: Cluster) -> Program:
    lab = cluster.lab
    cluster.mint([node.name for node in lab.nodes])
    for _ in range(BACKENDS):
        cluster.add_backend()
    cluster.write_config()
    cluster.start(None)
    cluster.wait_ready()
    lab.router.set_ecmp(PREFIX, cluster.lbs)
    lab.client.set_switches({"ipv4/tcp_tw_reuse": 1})
    wrk = ["wrk", "-t", "1", "-c", str(CONNECTIONS), "-d", "1h", "--timeout", "5s", "-H", "Connection: close"]
    return lab.client.popen([*wrk, f"http://{VIP}:{VIP_PORT}/"], name="wrk")


def run(changes: int = CHANGES) -> dict[str, Any]:
    """tracking_s (median of the changes' medians), and what each change took."""
    with Lab(nodes=5) as lab:
        cluster = Cluster(lab, 3, ClusterOptions(IDLE_SECONDS, MAP_SIZES, "stay"))
        try:
            wrk = _start(cluster)
            time.sleep(3)
            began = time.monotonic()
            found = _play(cluster, changes)
            took = time.monotonic() - began
            wrk.signal(signal.SIGINT)
            wrk.finish(time.monotonic_ns() + 10 * SECOND_NS)
            rates = re.search(r"Requests/sec:\s+([\d.]+)", wrk.log_text())
        finally:
            cluster.stop()
    each = [quantiles(samples) for samples in found]
    return {
        "tracking_s": round(statistics.median(one[0] for one in each), 2),
        "settle": {
            "changes": changes,
            "seconds": round(took),
            "connections_per_s": round(float(rates[1])) if rates else 0,
            "slots": [max(count for _, count in samples) for samples in found],
            **{
                f"p{share * 100:g}_s": [round(float(value), 2) for value in np.array(each)[:, place]]
                for place, share in enumerate(QUANTILES)
            },
        },
    }


if __name__ == "__main__":
    print(run())
