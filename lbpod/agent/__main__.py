"""`python -m lbpod.agent`: the agent as a container runs it, set by HOLDFAST_* in the environment alone.

The command line (`holdfast agent`) is for people and sets the same things.
"""

import os
import sys

from lbpod.agent.imports import import_agent


def main() -> int:
    """Exit status: 0 stopped, 1 the machine lacks something, 2 a setting cannot be, 70 a mistake of our own."""
    import_agent()
    from lbpod.agent.agent import StartError
    from lbpod.agent.broken import BROKEN, BrokenError
    from lbpod.agent.run import run_agent
    from lbpod.agent.settings import SettingsError, read_settings

    try:
        run_agent(read_settings({}, os.environ))
    except SettingsError as error:
        sys.stderr.write(f"holdfast agent: {error}\n")
        return 2
    except StartError as error:
        sys.stderr.write(f"holdfast agent: {error}\n")
        return 1
    except BrokenError as error:
        sys.stderr.write(f"holdfast agent: {error}\n")
        return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
