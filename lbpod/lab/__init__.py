"""Hosts, links and an ECMP router in network namespaces: used by the demo, the tests and the benchmarks.

The lab knows nothing of load balancing. It gives a real router, real veth links, real servers and clients, and takes
all of it away again, whatever happens (README.md shows the picture, the traps and how to look inside).

Names are fetched on first use: ``python -m lbpod.lab.udp_echo`` runs once per pod and must not load a netlink library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lbpod.lab.capture import Capture
    from lbpod.lab.errors import LabError
    from lbpod.lab.host import Host
    from lbpod.lab.program import Program, python
    from lbpod.lab.registry import clean_leftovers
    from lbpod.lab.topology import Client, Lab, Node, Pod, Router
    from lbpod.lab.workload import Backend, CheckerRun, start_nginx, start_udp_echo, wait_bound

__all__ = [
    "Backend",
    "Capture",
    "CheckerRun",
    "Client",
    "Host",
    "Lab",
    "LabError",
    "Node",
    "Pod",
    "Program",
    "Router",
    "clean_leftovers",
    "python",
    "start_nginx",
    "start_udp_echo",
    "wait_bound",
]

_HOME: Final = {
    "Backend": "workload",
    "Capture": "capture",
    "CheckerRun": "workload",
    "Client": "topology",
    "Host": "host",
    "Lab": "topology",
    "LabError": "errors",
    "Node": "topology",
    "Pod": "topology",
    "Program": "program",
    "Router": "topology",
    "clean_leftovers": "registry",
    "python": "program",
    "start_nginx": "workload",
    "start_udp_echo": "workload",
    "wait_bound": "workload",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
