"""`holdfast status`: what agents say about themselves, as one table or as JSON.

Asked with the viewer's certificate, all at once, each with its own time limit: one silent agent does not hide the
others. Which node answers is read from its answer; that it belongs to this cluster is what TLS has checked (the host
name is not compared, for a person types an address, not a node's name).
"""

import asyncio
import json
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lbpod.certs import client_context, files_in
from lbpod.core import wire
from lbpod.core.limits import MEMBER_NONE, PEER_TIMEOUT_NS, SENTENCE_BYTES_MAX

_VIEWER: Final = "viewer"
_COLUMNS_MAX: Final = 1_000
"""More than a table ever needs: a figure that is cut off is a wrong one, a line that a terminal wraps is not."""


def show(addresses: Sequence[str], folder: Path, *, as_json: bool) -> bool:
    """Prints; True if all agents answered and are ready. Raises ValueError for an address that is none, CertsError."""
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"{address!r} is no HOST:PORT")
    tls = client_context(files_in(folder, _VIEWER))
    tls.check_hostname = False
    answers = asyncio.run(_ask_all(addresses, tls))
    if as_json:
        print(json.dumps(dict(zip(addresses, answers, strict=True)), indent=2))
    else:
        _print(addresses, answers)
    return all(answer.get("ready") == "yes" for answer in answers)


async def _ask_all(addresses: Sequence[str], tls: ssl.SSLContext) -> list[dict[str, Any]]:
    timeout = aiohttp.ClientTimeout(total=PEER_TIMEOUT_NS * 1e-9)
    connector = aiohttp.TCPConnector(ssl=tls)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await asyncio.gather(*(_ask(session, address) for address in addresses))


async def _ask(session: aiohttp.ClientSession, address: str) -> dict[str, Any]:
    url = f"https://{address}{wire.PATH_STATE}"
    try:
        async with session.get(url, headers={"Accept": "application/json"}) as response:
            text = await response.text()
            if response.status != 200:
                return {"error": f"{response.status}: {text.strip()[:SENTENCE_BYTES_MAX]}"}
            answer: dict[str, Any] = json.loads(text)
            return answer
    except TimeoutError:
        return {"error": f"no answer within {PEER_TIMEOUT_NS // 1_000_000_000} s"}
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return {"error": str(error)}


def _print(addresses: Sequence[str], answers: Sequence[dict[str, Any]]) -> None:
    """A table with one row for each agent; what is wrong stands below it, in whole sentences."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("agent", "node", "member", "generation", "tracking", "VIPs", "XDP", "packets", "ready"):
        right = column in {"member", "generation", "tracking", "VIPs", "packets"}
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    sentences = []
    for address, answer in zip(addresses, answers, strict=True):
        if "error" in answer:
            table.add_row(address, *[""] * 7, "silent")
            sentences.append(f"{address}: {answer['error']}")
            continue
        table.add_row(
            address,
            answer["node"],
            "-" if answer["member"] == MEMBER_NONE else str(answer["member"]),
            f"{answer['committed']}" + (f" (+{answer['staged']})" if answer["staged"] > answer["committed"] else ""),
            str(answer["tracking_slots"]),
            str(len(answer["vips"])),
            answer["xdp"]["mode"],
            f"{sum(answer['packets'].values()):,}",
            "yes" if answer["ready"] == "yes" else "no",
        )
        if answer["ready"] != "yes":
            sentences.append(f"{address}: {answer['ready']}")
    console = Console(highlight=False, width=_COLUMNS_MAX)
    console.print(table)
    for sentence in sentences:
        console.print(sentence)
