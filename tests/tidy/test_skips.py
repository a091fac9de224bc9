"""A skip must be earned: what tests/conftest.py does with skips in CI, shown on a suite of four small tests.

The suite runs in a process of its own, because the rule is a pytest hook and CI is an environment variable.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FEATURES, skip_is_earned
from tests.tidy.sources import ROOT

SUITE = """
import pytest
from tests import conftest
conftest.FEATURES["flux"] = lambda: False
conftest.FEATURES["python"] = lambda: True

def test_earned():
    pytest.skip("missing feature: flux capacitor is not plugged in")

def test_present():
    pytest.skip("missing feature: python")

def test_idle():
    pytest.skip("did not feel like it")

@pytest.mark.xfail(strict=True)
def test_expected():
    assert False
"""


def _run(folder: Path, suite: str, ci: str) -> str:
    """What pytest says about a suite in a process of its own, with our conftest as its only plugin of that kind."""
    (folder / "test_suite.py").write_text(suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(folder), str(folder)],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ran.stdout + ran.stderr


@pytest.mark.parametrize(("ci", "outcome"), [("true", "2 failed, 1 skipped, 1 xfailed"), ("", "3 skipped, 1 xfailed")])
def test_in_ci_only_earned_skips_stand(tmp_path: Path, ci: str, outcome: str) -> None:
    assert outcome in _run(tmp_path, SUITE, ci)


def test_a_module_that_skips_at_import_fails_in_ci(tmp_path: Path) -> None:
    assert "1 error" in _run(tmp_path, 'import pytest\npytest.importorskip("no_such_module")\n', "true")


def test_only_named_features_earn_a_skip() -> None:
    assert not skip_is_earned("missing feature: root") or not FEATURES["root"]()
    assert not skip_is_earned("missing feature: patience")
    assert not skip_is_earned("")
