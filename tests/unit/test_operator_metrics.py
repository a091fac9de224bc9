"""What the operator's metrics say of a cluster that it has looked at."""

from lboperator.metrics import OperatorMetrics
from lboperator.observe import Observed
from lbpod.core.model import World, WorldNode, parse_address


def value(metrics: OperatorMetrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"holdfast_operator_{name}")


def test_wanted_are_the_agents_that_balance_whatever_became_of_them() -> None:
    metrics = OperatorMetrics()
    nodes = tuple(
        WorldNode(f"n{last}", parse_address(f"10.0.0.{last}"), f"10.0.0.{last}:9900", last != 2) for last in range(1, 5)
    )
    for count, wanted in ((4, 3), (3, 2), (0, 0)):
        metrics.observed(Observed(World(nodes[:count], ()), {}))
        assert wanted == value(metrics, "wanted_lbs")
