"""`python -m lboperator.farewell`: tells every agent that Holdfast is being removed, before helm removes it.

An agent that gets SIGTERM cannot know why: a restart, an upgrade and a rollback must leave programs and pins where
they are, or packets would be lost; an uninstallation must not. So this runs as a hook before anything is deleted, says
it to each agent with the controller's certificate, and who ends within the next five minutes takes everything along.

Tried and dropped: a setting that an upgrade sets first (nobody remembers, and it rolls all agents for nothing); a file
from a ConfigMap (kubelet takes a minute to bring it); the operator as messenger (it may be what is broken).

No node keeps an uninstallation from going on: one that does not answer in TRIES is named, and what is on it goes with
its next boot. Exit status 0 also then, and where there are no certificates to tell anybody with. 1 where the API does
not say in LIST_TRIES whom to tell, so that the Job tries again, and helm stops if that fails too: nothing is deleted
yet then, and every node would keep its programs unnoticed. 2 for settings that cannot be.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import kopf
import structlog

from lboperator.api import Api, ApiError
from lboperator.handlers import make_settings
from lboperator.settings import Settings, SettingsError, read_settings
from lbpod.certs import CertsError, client_context, files_in, server_name
from lbpod.core import wire
from lbpod.core.limits import PEER_TIMEOUT_NS, SWEEP_PAGE
from lbpod.logs import configure_logs

TRIES: Final = 5
LIST_TRIES: Final = 3
PAUSE_SECONDS: Final = 2
_LOG: Final = structlog.get_logger()


@dataclass(frozen=True, order=True)
class Agent:
    """One agent that there is to tell."""

    node: str
    address: str


def agents_in(body: Mapping[str, Any]) -> frozenset[Agent]:
    """Those of a list of EndpointSlices."""
    return frozenset(
        Agent(endpoint["nodeName"], address)
        for item in body.get("items") or ()
        for endpoint in item.get("endpoints") or ()
        for address in endpoint.get("addresses") or ()
        if endpoint.get("nodeName")
    )


async def tell(session: aiohttp.ClientSession, agent: Agent, port: int) -> str:
    """Why it could not be told; empty: it was."""
    host = f"[{agent.address}]" if ":" in agent.address else agent.address
    url = f"https://{host}:{port}{wire.PATH_FAREWELL}"
    try:
        async with session.post(url, server_hostname=server_name(agent.node), allow_redirects=False) as response:
            return "" if response.status == 200 else f"status {response.status}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return str(error) or type(error).__name__


async def tell_all(settings: Settings, agents: frozenset[Agent]) -> dict[str, str]:
    """Node -> why it could not be told. Raises CertsError."""
    tls = client_context(files_in(settings.tls, "controller"))
    timeout = aiohttp.ClientTimeout(total=PEER_TIMEOUT_NS / 1e9)
    left = dict.fromkeys(agents, "not tried")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), timeout=timeout) as session:
        for attempt in range(TRIES):
            if not left:
                break
            await asyncio.sleep(PAUSE_SECONDS if attempt else 0)
            order = sorted(left)
            said = await asyncio.gather(*(tell(session, agent, settings.agent_port) for agent in order))
            left = {agent: why for agent, why in zip(order, said, strict=True) if why}
    return {agent.node: why for agent, why in left.items()}


async def list_agents(api: Api, settings: Settings) -> frozenset[Agent]:
    """All that the API tells of, page by page. Raises ApiError."""
    where = f"/apis/discovery.k8s.io/v1/namespaces/{settings.namespace}/endpointslices"
    query = f"labelSelector=kubernetes.io/service-name={settings.agent_service}&limit={SWEEP_PAGE}"
    agents, token = frozenset[Agent](), ""
    while True:
        page = await api.call("GET", f"{where}?{query}" + (f"&continue={token}" if token else ""))
        agents |= agents_in(page)
        token = (page.get("metadata") or {}).get("continue", "")
        if not token:
            return agents


async def find_agents(settings: Settings) -> frozenset[Agent]:
    """The same, tried LIST_TRIES times. Raises ApiError, kopf.LoginError."""
    api = Api(make_settings())
    try:
        for _ in range(LIST_TRIES - 1):
            try:
                return await list_agents(api, settings)
            except ApiError as error:
                _LOG.warning("not listed", why=str(error))
            await asyncio.sleep(PAUSE_SECONDS)
        return await list_agents(api, settings)
    finally:
        await api.close()


async def farewell(settings: Settings) -> None:
    """Tells all of them. Raises ApiError, CertsError, kopf.LoginError."""
    agents = await find_agents(settings)
    missed = await tell_all(settings, agents)
    for node, why in sorted(missed.items()):
        _LOG.warning("not told", node=node, why=why, sentence="what is on this node stays there until its next boot")
    _LOG.info("farewell", told=len(agents) - len(missed), not_told=len(missed))


def main() -> int:
    """The exit status."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    configure_logs(settings.log_level, "farewell")
    try:
        asyncio.run(farewell(settings))
    except CertsError as error:
        _LOG.warning("nobody told", sentence=str(error))
    except (ApiError, kopf.LoginError, OSError) as error:
        _LOG.error("nobody told", sentence=f"it is not known who is to be told: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
