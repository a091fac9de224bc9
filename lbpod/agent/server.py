"""The agent's HTTP: calls of controller and peers behind mutual TLS, health and metrics for the node itself without.

Decided here: who may call what (the role in the certificate: a table below), how large a body may be, and which status
says what: 400 malformed, 403 not your role, 404 no such path, 405 no such method, 409 refused by the Keeper, 413 too
large, 503 too busy or stopping; each with one plain sentence as text. Whatever is refused has changed nothing: a body
is read, bounded and validated whole before the Keeper hears of it.

Left to others: what a call means (the Keeper), what may stand in a body (``core.wire``), certificates (``certs``).
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from lbpod.agent.age import HEADER_CLOCK, read_clock
from lbpod.agent.beats import Answer, BeatServer
from lbpod.agent.clock import now_ns
from lbpod.agent.view import View
from lbpod.certs import Role, role_of
from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.limits import (
    BEAT_DOWN_NS,
    BODY_BYTES_MAX,
    FAREWELL_NS,
    PEER_BODY_BYTES_MAX,
    QUESTION_AGE_NS_MAX,
    SENTENCE_BYTES_MAX,
)
from lbpod.core.messages import (
    BeatCall,
    CommitCall,
    ControlCall,
    ControllerSeen,
    ForgetCall,
    HandoverCall,
    MissedCall,
    PeerCall,
    PrepareCall,
    QuietCall,
    Refuse,
    Reply,
    ResolveCall,
    RingDoneCall,
    RingPrepareCall,
    RingSwitchCall,
    SettleCall,
    SettleStep,
    StateCall,
)
from lbpod.core.model import Snapshot
from lbpod.datapath.port import DatapathError

if TYPE_CHECKING:
    from lbpod.agent.metrics import Metrics

PATH_TRACE: Final = "/v1/trace"
JSON: Final = "application/json"
METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Call = ControlCall | PeerCall
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LOG: Final = structlog.get_logger()
_ANYBODY: Final = frozenset(Role)
_MAY: Final[dict[type[Call], frozenset[Role]]] = {
    Snapshot: frozenset({Role.CONTROLLER}),
    PrepareCall: frozenset({Role.CONTROLLER}),
    CommitCall: frozenset({Role.CONTROLLER}),
    RingPrepareCall: frozenset({Role.CONTROLLER}),
    HandoverCall: frozenset({Role.CONTROLLER}),
    RingSwitchCall: frozenset({Role.CONTROLLER}),
    RingDoneCall: frozenset({Role.CONTROLLER}),
    ResolveCall: frozenset({Role.LB}),
    SettleCall: frozenset({Role.LB}),
    ForgetCall: frozenset({Role.LB}),
    QuietCall: frozenset({Role.LB}),
    StateCall: frozenset({Role.LB}),
    MissedCall: frozenset({Role.LB}),
    BeatCall: frozenset({Role.LB}),
}
"""Which role a caller needs for each body."""


def control_app(view: View) -> web.Application:
    """What is served behind mutual TLS."""
    app = web.Application(middlewares=[_counting(view), _plain_sentences], client_max_size=BODY_BYTES_MAX)
    beats = BeatServer(partial(_beat, view))
    app.on_shutdown.append(beats.close)
    for kind in _MAY:
        method, path = wire.ROUTES[kind]
        app.router.add_route(method, path, _beats(beats) if kind is BeatCall else _calls(view, kind))
    app.router.add_get(wire.PATH_STATE, _states(view))
    app.router.add_get(PATH_TRACE, _traces(view))
    app.router.add_post(wire.PATH_FAREWELL, _farewells(view))
    app.on_response_prepare.append(_show_clock)
    return app


async def _show_clock(_: web.Request, response: web.StreamResponse) -> None:
    response.headers[HEADER_CLOCK] = str(now_ns())


def node_app(view: View) -> web.Application:
    """What is served without TLS, to the node itself."""

    @cache
    def metrics() -> "Metrics":
        # Imported at the first scrape: what Prometheus' library takes would be a part of every start.
        from lbpod.agent.metrics import Metrics

        return Metrics(view)

    async def healthz(_: web.Request) -> web.Response:
        return _text(200, "ok")

    async def readyz(_: web.Request) -> web.Response:
        why_not = await view.why_not_ready_now()
        return _text(503, why_not) if why_not else _text(200, "ok")

    async def metricsz(_: web.Request) -> web.Response:
        return web.Response(body=metrics().render(), headers={hdrs.CONTENT_TYPE: METRICS_CONTENT_TYPE})

    app = web.Application(middlewares=[_plain_sentences])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metricsz)
    return app


def _counting(view: View) -> Middleware:
    """Whatever is answered by 4xx or 5xx is counted, by path (those that exist) and status."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if response.status >= 400:
            resource = request.match_info.route.resource
            view.refused[resource.canonical if resource is not None else "elsewhere", response.status] += 1
        return response

    return count


def _text(status: int, sentence: str) -> web.Response:
    return web.Response(status=status, text=sentence + "\n")


@web.middleware
async def _plain_sentences(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns what went wrong into a status and one sentence."""
    try:
        return await handler(request)
    except RemoteError as error:
        _LOG.warning("refused", path=request.path, status=error.status, reason=error.sentence, peer=request.remote)
        return _text(error.status, error.sentence)
    except AssertionError as error:
        asyncio.get_running_loop().call_exception_handler({"message": request.path, "exception": error})
        return _text(500, "this agent has made a mistake and stops")
    except DatapathError as error:
        return _text(503, f"the maps cannot be read: {error}")
    except web.HTTPRequestEntityTooLarge:
        return _text(413, f"the body is larger than the {BODY_BYTES_MAX} bytes that any body may have")
    except web.HTTPNotFound:
        return _text(404, f"there is no {request.path} here")
    except web.HTTPMethodNotAllowed as error:
        return _text(405, f"{request.path} takes {', '.join(sorted(error.allowed_methods))}, not {request.method}")


def _admit(request: web.Request, roles: frozenset[Role]) -> Role:
    """The caller's role. Raises RemoteError (403) where its certificate does not have one of these."""
    connection = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
    caller = role_of(connection)
    if caller.role not in roles:
        needed = " or ".join(sorted(role.value for role in roles))
        raise RemoteError(f"{caller.name} has the role {caller.role.value}; {request.path} takes {needed}", 403)
    return caller.role


async def _body(request: web.Request, bytes_max: int) -> bytes:
    """The whole body, read no further than it may be long."""
    if (request.content_length or 0) > bytes_max:
        raise RemoteError(f"the body has {request.content_length} bytes; {request.path} takes {bytes_max}", 413)
    parts, length_bytes = [], 0
    async for part in request.content.iter_any():
        length_bytes += len(part)
        if length_bytes > bytes_max:
            raise RemoteError(f"the body has more than the {bytes_max} bytes that {request.path} takes", 413)
        parts.append(part)
    return b"".join(parts)


def _calls(view: View, kind: type[Call]) -> Handler:
    bytes_max = BODY_BYTES_MAX if kind is Snapshot else PEER_BODY_BYTES_MAX

    async def handle(request: web.Request) -> web.Response:
        _admit(request, _MAY[kind])
        body = wire.decode(kind, await _body(request, bytes_max))
        answer = await view.driver.call(body, _until_ns(request, body))
        if isinstance(answer, Refuse):
            if answer.status not in {503, 408}:
                _LOG.warning("refused", path=request.path, status=answer.status, reason=answer.sentence)
            return _text(answer.status, answer.sentence)
        return _packed(wire.encode(answer.body))

    return handle


def _beats(beats: BeatServer) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        _admit(request, _MAY[BeatCall])
        return await beats.serve(request)

    return handle


async def _beat(view: View, asked_ns: int | None, data: bytes) -> Answer:
    """One beat. It says who is there until BEAT_DOWN_NS after it was asked."""
    try:
        call, until_ns = wire.decode(BeatCall, data), None if asked_ns is None else asked_ns + BEAT_DOWN_NS
        answer = await view.driver.call(call, until_ns)
    except RemoteError as error:
        answer = Refuse(0, error.status, error.sentence)
    if isinstance(answer, Reply):
        return 200, wire.encode(answer.body)
    view.refused[wire.PATH_BEATS, answer.status] += 1
    return answer.status, answer.sentence.encode()[:SENTENCE_BYTES_MAX]


def _until_ns(request: web.Request, body: Call) -> int | None:
    """Until when this may be acted upon, on our clock; None: whenever it arrives."""
    acted_upon = isinstance(body, ForgetCall | MissedCall)
    acted_upon |= isinstance(body, SettleCall) and body.step is SettleStep.ASK
    asked_ns = read_clock(request.headers.get(HEADER_CLOCK))
    if not acted_upon:
        return None
    if asked_ns is None:
        return 0  # nobody can tell how old it is; the refusal tells what our clock shows
    # What is ahead of our clock was reckoned by another one, before the last boot.
    return asked_ns + QUESTION_AGE_NS_MAX if asked_ns <= now_ns() + QUESTION_AGE_NS_MAX else 0


def _packed(data: bytes) -> web.Response:
    return web.Response(body=data, headers={hdrs.CONTENT_TYPE: wire.CONTENT_TYPE})


def _states(view: View) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        if _admit(request, _ANYBODY) is Role.CONTROLLER:
            view.driver.post(ControllerSeen())
        is_json, wants = JSON in request.headers.get(hdrs.ACCEPT, ""), request.query.get(wire.QUERY_SNAPSHOT) == "1"
        status = await view.driver.look(with_snapshot=is_json or wants)
        if is_json:
            return web.Response(body=msgspec.json.encode(view.state(status)), content_type=JSON)
        if not wants:
            status = msgspec.structs.replace(status, snapshot=None)
        return _packed(wire.encode(status))

    return handle


def _farewells(view: View) -> Handler:
    """Holdfast is about to be removed from this node: nothing ends now, but what ends soon takes everything along."""

    async def handle(request: web.Request) -> web.Response:
        _admit(request, frozenset({Role.CONTROLLER}))
        view.driver.farewell_until_ns = now_ns() + FAREWELL_NS
        _LOG.warning("farewell", seconds=FAREWELL_NS // 1_000_000_000)
        return _text(200, "ok")

    return handle


def _traces(view: View) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        _admit(request, _ANYBODY)
        return web.Response(body=msgspec.json.encode(view.trace()), content_type=JSON)

    return handle
