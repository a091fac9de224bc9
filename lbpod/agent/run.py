"""Starting an agent on a real machine: probe, load, attach, run. Each step that cannot be done says why in one
sentence.

Decided here: the order. Certificates and features are looked at before anything is loaded; programs are attached
(those of an earlier agent replaced in place) last, once we know that we can work with them and with every map that
they use: what is refused has moved no packet. What fails after that, say a port in use, leaves forwarding as it was, or
on a fresh node programs that pass everything on. Nothing is taken off on the way out, unless that was asked for: by a
setting, or by the controller a short while before (``/v1/farewell``), which is how an uninstallation differs from a
restart, for SIGTERM says no reason.

SIGTERM leaves the ring first (``leave``), unless it is set to stay; a second one ends at once. SIGINT always ends at
once and leaves everything as it is: so a restart of one agent needs no other setting, and Ctrl-C does not wait.
SIGHUP, by which others are told to read their files again, is answered with one line of the log and nothing else.

The event loop starts last: netlink's synchronous calls and libbpf come before it.
"""

import asyncio
import signal
from types import MappingProxyType
from typing import Final

import structlog

from lbpod import __version__
from lbpod.agent.agent import Agent, Parts, StartError
from lbpod.agent.attachment import Attachment
from lbpod.agent.broken import BrokenError, is_ours, sentence_of
from lbpod.agent.heap import share_one_heap
from lbpod.agent.remembered import Memory
from lbpod.agent.settings import OnTerm, Settings
from lbpod.agent.start_times import StartTimes
from lbpod.agent.uplink import UplinkError, find_uplink
from lbpod.agent.view import Facts
from lbpod.certs import CertsError, Credentials, files_in
from lbpod.core.keeper import Keeper
from lbpod.core.model import format_address
from lbpod.datapath.attach import detach, forget_old_maps, forget_old_programs
from lbpod.datapath.features import Need, probe
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.loader import FastPath, LoadSettings, load
from lbpod.datapath.neighbours import Neighbours
from lbpod.datapath.port import DatapathError
from lbpod.datapath.rows import Uplink
from lbpod.logs import configure_logs

_LOG: Final = structlog.get_logger()


def run_agent(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT. Raises StartError with one sentence where it cannot start, BrokenError where a
    mistake of its own has stopped it."""
    times = StartTimes()
    times.took("imports")
    share_one_heap()
    configure_logs(settings.log_level, settings.node)
    # Until the event loop takes over, Ctrl-C ends the process at once, which is safe at any moment. As an exception it
    # would be lost where libbpf is calling back, and the agent would go on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        credentials = Credentials(files_in(settings.tls, settings.node))
        times.took("certificates")
        uplink = find_uplink(settings.interface, settings.node_address)
        times.took("uplink")
        _probe(settings, uplink)
        times.took("features")
        fast_path = load(LoadSettings(settings.pins, settings.bpf_object, settings.map_sizes, complete=True))
        times.took("load")
    except (CertsError, UplinkError, DatapathError) as error:
        raise StartError(str(error)) from error
    try:
        datapath = KernelDatapath(fast_path)
        times.took("maps")
        attachment = Attachment(fast_path, uplink, lambda: find_uplink(settings.interface, settings.node_address))
        _attach(attachment, fast_path, uplink)
        times.took("attach")
        hops = Neighbours(uplink.address)
        times.took("neighbours")
        parts = Parts(
            brain=Keeper(settings.node),
            datapath=datapath,
            hops=hops,
            uplink=uplink,
            memory=Memory(settings.state),
            credentials=credentials,
            listen=settings.listen,
            metrics_listen=settings.metrics_listen,
            facts=_facts(fast_path, uplink),
            node=settings.node,
            substitutes=lambda: _substitutes(attachment, datapath, hops),
            redis=settings.redis_url,
            times=times,
            withdraw_ns=round(settings.withdraw_seconds * 1e9) if settings.on_term is OnTerm.LEAVE else None,
            attachment=attachment,
        )
        is_farewell = serve(parts)
        if settings.detach_on_exit or is_farewell:
            Memory(settings.state).forget()
            _LOG.info("detached", interfaces=detach(fast_path.pins))
            fast_path.pins.remove()
        datapath.close()
    except DatapathError as error:
        raise StartError(str(error)) from error


def _probe(settings: Settings, uplink: Uplink) -> None:
    """Stops at the first thing that is needed and missing; says what would only be better."""
    for finding in probe(uplink.name, settings.pins):
        if finding.need is Need.REQUIRED:
            raise StartError(finding.sentence)
        _LOG.warning("missing", feature=finding.feature.value, sentence=finding.sentence)


def _attach(attachment: Attachment, fast_path: FastPath, uplink: Uplink) -> None:
    attachment.attach()
    _LOG.info(
        "attached",
        interface=uplink.name,
        address=format_address(uplink.address),
        mtu=uplink.mtu,
        xdp=attachment.mode,
        why=attachment.why,
        replaced=attachment.replaced,
        old_programs=forget_old_programs(fast_path),
        old_maps=forget_old_maps(fast_path),
    )


def _substitutes(attachment: Attachment, datapath: KernelDatapath, hops: Neighbours) -> list[str]:
    """What this machine lacks and what is done instead, as far as that has shown yet."""
    missed = datapath.misses | hops.misses
    if attachment.miss is not None:
        missed |= {attachment.miss}
    return sorted(miss.value for miss in missed)


def _facts(fast_path: FastPath, uplink: Uplink) -> Facts:
    return Facts(
        version=__version__,
        interface=uplink.name,
        address=format_address(uplink.address),
        maps=MappingProxyType({name: each.info.max_entries for name, each in fast_path.maps.items()}),
        taken_over=any(each.taken_over for each in fast_path.maps.values()),
    )


def serve(parts: Parts) -> bool:
    """Runs until SIGTERM or SIGINT; True: all that is on this node is to go with it.

    Raises StartError, DatapathError where only a new start can go on (the uplink has been made anew), or BrokenError
    where a mistake of ours has ended it.
    """
    try:
        return asyncio.run(_serve(parts))
    except (StartError, DatapathError):
        raise
    except Exception as error:
        if not is_ours(error):
            raise
        sentence = sentence_of(error)
        _LOG.critical("broken", sentence=sentence, exc_info=True)
        raise BrokenError(sentence) from error


async def _serve(parts: Parts) -> bool:
    agent = Agent(parts)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, agent.terminate)
    loop.add_signal_handler(signal.SIGINT, agent.stop)
    loop.add_signal_handler(
        signal.SIGHUP, _LOG.info, "SIGHUP: certificates are watched, settings are fixed; nothing to do"
    )
    await agent.run()
    is_farewell = agent.driver.is_farewell
    _LOG.info("stopped", forwarding="ends with it" if is_farewell else "goes on without the agent")
    return is_farewell
