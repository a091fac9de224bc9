"""What a running agent has imported: every node pays for it, so the heavy half of our dependencies stays out."""

import json
import subprocess
import sys

HEAVY = {"cryptography", "kopf", "pydantic", "pyroute2", "redis", "sqlite3", "typer", "watchfiles", "yaml"}
"""Ten megabytes each, more or less."""


def test_an_agent_imports_nothing_heavy_that_it_does_not_use() -> None:
    program = "from lbpod.agent.imports import import_agent; import_agent()\n"
    program += "import json, sys, lbpod.agent.run, lbpod.agent.settings; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    imported = set(json.loads(done.stdout))
    assert "lbpod.agent.run" in imported
    assert set() == imported & HEAVY
