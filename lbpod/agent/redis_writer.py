"""Writing to Redis, in a thread of its own that nobody waits for: whatever Redis does, it does to this thread alone.

A thread and not a task in the agent's loop, because names are resolved in the loop's pool of threads, and so are tables
built: while a DNS server is silent, the attempts of half a minute would hold most of the pool, and a commit would wait
for them. A daemon, because a thread that waits for a resolver cannot be told to stop; the agent ends without it.

Decided here: **no entry is written twice.** Entries are taken only when Redis has answered a PING on this connection;
what was sent and is not confirmed is counted as dropped, and not sent again. What waits meanwhile waits in the outbox,
within its bound. After a failure the connection is closed and the next attempt comes later and later; it reads the
password anew, so that one that was put right is taken up. The log has one line when writing stops (and when the reason
changes) and one when it goes on, never one an entry.

Streams are trimmed with ``MAXLEN ~`` (by whole blocks, which costs Redis next to nothing), and go a week after the last
entry; the state goes seconds after its LB has stopped saying it. So nobody has to clean up after an LB that is gone.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from lbpod.agent.outbox import Entry, Loss, Outbox
from lbpod.agent.settings import RedisTarget
from lbpod.core.limits import (
    DIAGNOSTICS_BATCH_MAX,
    DIAGNOSTICS_CLOSE_NS_MAX,
    DIAGNOSTICS_KEEP_SECONDS,
    DIAGNOSTICS_PAUSE_NS,
    DIAGNOSTICS_RETRY_NS_MAX,
    DIAGNOSTICS_STATE_SECONDS,
    DIAGNOSTICS_STREAM_MAX,
    DIAGNOSTICS_TIMEOUT_NS,
    RETRY_NS,
    SENTENCE_BYTES_MAX,
)

_LOG: Final = structlog.get_logger()
_NS: Final = 1e-9
PREFIX: Final = "holdfast"
"""Of every key: holdfast:NODE:STREAM, holdfast:NODE:state."""


class _TroubleError(Exception):
    """Redis did not take it. str(): one sentence."""

    def __init__(self, why: Loss, sentence: str) -> None:
        super().__init__(sentence)
        self.why: Final = why


class RedisWriter:
    """Empties an outbox into Redis from `start` until `stop`."""

    def __init__(self, outbox: Outbox, node: str, target: RedisTarget) -> None:
        self._outbox = outbox
        self._node = node
        self._target = target
        self._client: redis.Redis | None = None
        self._stop: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run, name="redis", daemon=True)

    def start(self) -> None:
        """Begins to write; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """What waits is tried once more, for DIAGNOSTICS_CLOSE_NS_MAX at the most; then it is given up."""
        self._stop.set()
        if not self._outbox.standing().trouble:
            self._thread.join(DIAGNOSTICS_CLOSE_NS_MAX * _NS)

    def _run(self) -> None:
        pause_ns = DIAGNOSTICS_PAUSE_NS
        trouble_pause_ns = RETRY_NS
        while True:
            stopping = self._stop.wait(pause_ns * _NS)
            if stopping and self._client is None:
                return
            try:
                self._empty()
            except _TroubleError as trouble:
                self._disconnect()
                if self._outbox.stand_in_the_way(trouble.why, str(trouble)):
                    _LOG.warning("diagnostics not written", why=trouble.why.value, reason=str(trouble))
                pause_ns, trouble_pause_ns = trouble_pause_ns, min(2 * trouble_pause_ns, DIAGNOSTICS_RETRY_NS_MAX)
            else:
                pause_ns, trouble_pause_ns = DIAGNOSTICS_PAUSE_NS, RETRY_NS
            if stopping:
                self._disconnect()
                return

    def _empty(self) -> None:
        """Writes until nothing waits. Raises _TroubleError."""
        client = self._connected()
        entries, state = self._outbox.take(DIAGNOSTICS_BATCH_MAX)
        if not entries and state is None:
            return
        while entries or state is not None:
            self._write(client, entries, state)
            entries, state = self._outbox.take(DIAGNOSTICS_BATCH_MAX)
        # Not before: a Redis that is full answers a PING, and takes an entry now and then, as if nothing were wrong.
        if self._outbox.stand_in_the_way(None, ""):
            _LOG.info("diagnostics written", redis=str(self._target), dropped=_dropped(self._outbox))

    def _write(self, client: redis.Redis, entries: Sequence[Entry], state: Any) -> None:
        """One round trip. Raises _TroubleError, with the entries counted."""
        pipe = client.pipeline(transaction=False)
        for entry in entries:
            fields = {"n": str(entry.number), "at": entry.at.isoformat(timespec="milliseconds"), **entry.fields}
            pipe.xadd(self._key(entry.stream), fields, maxlen=DIAGNOSTICS_STREAM_MAX)  # type: ignore[arg-type]
        for stream in sorted({entry.stream for entry in entries}):
            pipe.expire(self._key(stream), DIAGNOSTICS_KEEP_SECONDS)
        if state is not None:
            pipe.hset(self._key("state"), mapping=state)
            pipe.expire(self._key("state"), DIAGNOSTICS_STATE_SECONDS)
        try:
            results = self._at_the_border(lambda: pipe.execute(raise_on_error=False))
        except _TroubleError as trouble:
            self._outbox.note(0, {trouble.why: len(entries)})
            raise
        failed = Counter(_why(each) for each in results[: len(entries)] if isinstance(each, Exception))
        self._outbox.note(len(entries) - failed.total(), failed)
        for each in results:
            if isinstance(each, Exception):
                raise _TroubleError(_why(each), self._sentence(each))

    def _key(self, last: str) -> str:
        return f"{PREFIX}:{self._node}:{last}"

    # --- The border -----------------------------------------------------------------------------------------------

    def _connected(self) -> redis.Redis:
        """A client that has just, or not long ago, answered. Raises _TroubleError."""
        if self._client is None:
            target = self._target
            client = redis.Redis(
                host=target.host,
                port=target.port,
                db=target.database,
                username=target.user or None,
                password=self._password(target.password_file),
                ssl=target.tls,
                socket_timeout=DIAGNOSTICS_TIMEOUT_NS * _NS,
                socket_connect_timeout=DIAGNOSTICS_TIMEOUT_NS * _NS,
                retry=Retry(NoBackoff(), 0),
                single_connection_client=False,
                max_connections=1,
            )
            try:
                self._at_the_border(client.ping)
            except _TroubleError:
                client.close()
                raise
            self._client = client
        return self._client

    def _disconnect(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.close()

    def _password(self, file: Path | None) -> str | None:
        if file is None:
            return None
        try:
            return file.read_text().strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise _TroubleError(Loss.REFUSED, f"the password cannot be read from {file}: {error}") from error

    def _at_the_border(self, call: Any) -> Any:
        """Raises _TroubleError, whatever is raised inside."""
        try:
            return call()
        except Exception as error:  # what a stranger's answers make redis-py raise, no list of its own names
            raise _TroubleError(_why(error), self._sentence(error)) from error

    def _sentence(self, error: Exception) -> str:
        said = " ".join(str(error).split())[:SENTENCE_BYTES_MAX] or type(error).__name__
        return f"{self._target} does not take it: {said}"


def _why(error: Exception) -> Loss:
    """The family of what redis-py raises."""
    match error:
        case redis.OutOfMemoryError():
            return Loss.FULL
        case redis.AuthenticationError() | redis.exceptions.NoPermissionError():
            return Loss.REFUSED
        case redis.TimeoutError():
            return Loss.SLOW
        case redis.ResponseError() if str(error).startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
            return Loss.REFUSED
        case redis.ConnectionError() | OSError():
            return Loss.GONE
        case _:
            return Loss.ERROR


def _dropped(outbox: Outbox) -> int:
    return sum(outbox.standing().dropped.values())
