"""`python -m lbpod.agent`: the agent as a container runs it, set by HOLDFAST_* in the environment alone.

The command line (`holdfast agent`) is for people and sets the same things.
"""

import os
import sys
from collections.abc import Mapping
from typing import Final

from lbpod.agent.imports import import_agent

LACKING: Final = 1
BAD_INPUT: Final = 2


def run(options: Mapping[str, str | None], who: str) -> int:
    """An agent until it ends. who: says the sentence, where there is one to say.

    The exit status: 0 stopped, 1 the machine lacks something, 2 a setting cannot be, 70 a mistake of our own.
    """
    import_agent()
    from lbpod.agent.agent import StartError
    from lbpod.agent.broken import BROKEN, BrokenError
    from lbpod.agent.run import run_agent
    from lbpod.agent.settings import SettingsError, read_settings

    try:
        run_agent(read_settings(options, os.environ))
    except SettingsError as error:
        return _failed(who, error, BAD_INPUT)
    except StartError as error:
        return _failed(who, error, LACKING)
    except BrokenError as error:
        return _failed(who, error, BROKEN)
    return 0


def _failed(who: str, error: Exception, status: int) -> int:
    sys.stderr.write(f"{who}: {error}\n")
    return status


def main() -> int:
    """The exit status, as `run` has it."""
    if sys.argv[1:]:
        said = ValueError(
            f"{sys.argv[1]} is not known here; set HOLDFAST_* in the environment, or use `holdfast agent`"
        )
        return _failed("holdfast agent", said, BAD_INPUT)
    return run({}, "holdfast agent")


if __name__ == "__main__":
    sys.exit(main())
