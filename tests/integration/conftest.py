"""A lab with the fast path on three nodes, written by hand: what most traffic tests stand on."""

from collections.abc import Iterator

import pytest

from lbpod.lab import Lab
from tests.integration.traffic import Fabric


@pytest.fixture(scope="module")
def fabric() -> Iterator[Fabric]:
    """Three nodes with the fast path; node 1 is the only LB, so that every packet to a VIP passes it."""
    with Lab(nodes=3) as lab, Fabric(lab, lab.nodes[:1]) as fabric:
        yield fabric
