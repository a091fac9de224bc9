"""`python -m lboperator`: builds the parts, and runs them side by side until SIGTERM or until one of them ends.

Settings come from the environment (``settings``), credentials from the pod's service account or KUBECONFIG. kopf's
watches, the operator and its HTTP server live in one event loop; where one of them fails, the process ends with 1 and
one sentence, for a restart is harmless and half an operator is not.
"""

import asyncio
import logging
import os
import sys
from typing import Any, Final, cast

import kopf
import structlog
from aiohttp import web

from lboperator.api import Api
from lboperator.cache import Cache
from lboperator.handlers import make_registry, make_settings
from lboperator.lease import LeaseLostError
from lboperator.metrics import OperatorMetrics, make_app
from lboperator.settings import Settings, SettingsError, read_settings
from lboperator.shell import Operator
from lboperator.sweep import BlindError
from lbpod.logs import configure_logs

_LOG: Final = structlog.get_logger()


async def serve(settings: Settings) -> None:
    """Everything, until SIGTERM. Raises what has ended it, in a group."""
    cache, metrics = Cache(), OperatorMetrics()
    kopf_settings = make_settings()
    api = Api(kopf_settings)
    operator = Operator(settings, api, cache, metrics)
    runner = web.AppRunner(make_app(operator, metrics), access_log=None)
    await runner.setup()
    try:
        host, _, port = settings.listen.rpartition(":")
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        _LOG.info("started", listen=settings.listen, namespace=settings.namespace)
        async with asyncio.TaskGroup() as group:
            work = group.create_task(operator.run())

            async def end() -> None:
                work.cancel()
                await asyncio.wait({work})

            # It returns at SIGTERM or SIGINT, which it has handlers for.
            registry = make_registry(cache, end)
            # kopf names itself by the user's name, and nobody's user has none. The type is private to kopf.
            me = cast(Any, os.uname().nodename)
            await kopf.operator(
                registry=registry, settings=kopf_settings, identity=me, clusterwide=True, standalone=True
            )
            work.cancel()
    finally:
        await runner.cleanup()
        await api.close()
    _LOG.info("stopped", forwarding="goes on without the operator")


def _leaves(errors: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """All that has failed; groups lie in groups."""
    found: list[BaseException] = []
    for one in errors.exceptions:
        found += _leaves(one) if isinstance(one, BaseExceptionGroup) else [one]
    return found


def main() -> int:
    """The exit status."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    configure_logs(settings.log_level, "operator")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        asyncio.run(serve(settings))
    except (OSError, kopf.LoginError) as error:
        _LOG.critical("ended", sentence=str(error))
        return 1
    except BaseExceptionGroup as errors:
        leaves = _leaves(errors)
        expected = all(isinstance(one, OSError | BlindError | LeaseLostError) for one in leaves)
        # What nobody expected is ours to mend, and comes with its traceback, in the same form as all else.
        _LOG.critical("ended", sentence="; ".join(str(one) for one in leaves), exc_info=not expected)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
