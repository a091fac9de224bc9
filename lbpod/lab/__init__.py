"""Hosts, links and an ECMP router in network namespaces: used by the demo, the tests and the benchmarks.

The lab knows nothing of load balancing. It gives a real router, real veth links, real servers and clients, and takes
all of it away again, whatever happens (README.md shows the picture, the traps and how to look inside).
"""

from lbpod.lab.errors import LabError
from lbpod.lab.host import Host
from lbpod.lab.program import Program, python
from lbpod.lab.registry import clean_leftovers
from lbpod.lab.topology import Client, Lab, Node, Pod, Router

__all__ = ["Client", "Host", "Lab", "LabError", "Node", "Pod", "Program", "Router", "clean_leftovers", "python"]
