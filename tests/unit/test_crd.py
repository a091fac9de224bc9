"""The CRD's file: its bounds are those of the core, and the chart has the very same."""

from typing import Any

import pytest
import yaml

from lbpod.core import limits
from tests.tidy.sources import ROOT

CRD = ROOT / "crds/virtualservices.holdfast.dev.yaml"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    version = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]
    return dict(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])


def test_the_chart_installs_this_very_file() -> None:
    assert CRD.read_bytes() == (ROOT / "charts/holdfast/charts/crds/templates" / CRD.name).read_bytes()


@pytest.mark.parametrize(
    ("field", "low", "high", "default"),
    [
        (
            "idleTimeoutSeconds",
            limits.IDLE_TIMEOUT_SECONDS_MIN,
            limits.IDLE_TIMEOUT_SECONDS_MAX,
            limits.IDLE_TIMEOUT_SECONDS_DEFAULT,
        ),
        (
            "udpIdleTimeoutSeconds",
            limits.IDLE_TIMEOUT_SECONDS_MIN,
            limits.IDLE_TIMEOUT_SECONDS_MAX,
            limits.UDP_IDLE_TIMEOUT_SECONDS_DEFAULT,
        ),
        ("drainTimeoutSeconds", 0, limits.DRAIN_TIMEOUT_SECONDS_MAX, limits.DRAIN_TIMEOUT_SECONDS_DEFAULT),
    ],
)
def test_bounds_and_defaults_are_those_of_the_core(
    spec: dict[str, Any], field: str, low: int, high: int, default: int
) -> None:
    assert (low, high, default) == (spec[field]["minimum"], spec[field]["maximum"], spec[field]["default"])
