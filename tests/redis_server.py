"""Debian's redis-server as tests need it: a process of their own on a free port of the loopback, with nothing on disk,
that may be killed, stopped like a machine that hangs, and started again where it was."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import redis

from lbpod.agent.settings import RedisTarget

START_SECONDS: Final = 10


class RedisServer:
    """`start` and `kill` as often as wanted; the port stays."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: Final = int(free.getsockname()[1])
        self._folder = folder
        self._options = options
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None

    def target(self, password_file: Path | None = None) -> RedisTarget:
        """As an agent is told of it."""
        return RedisTarget("127.0.0.1", self.port, tls=self._tls, password_file=password_file)

    def client(self, password: str | None = None) -> "redis.Redis":
        """A client that reads text."""
        return redis.Redis(
            port=self.port, password=password, decode_responses=True, ssl=self._tls, ssl_cert_reqs="none", protocol=2
        )

    def start(self, password: str | None = None) -> None:
        """Runs it; returns when it answers."""
        ports = ("--port", "0", "--tls-port", str(self.port)) if self._tls else ("--port", str(self.port))
        auth = ("--requirepass", password) if password is not None else ()
        nothing_kept = ("--save", "", "--appendonly", "no", "--dir", str(self._folder))
        command = ["redis-server", "--bind", "127.0.0.1", *ports, *nothing_kept, *auth, *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + START_SECONDS
        with self.client(password) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < until, "redis-server does not start"
                    time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """SIGSTOP: it hangs, its connections stay; SIGCONT: it goes on."""
        assert self._process is not None, "it runs"
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """As a machine ends that loses its power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def redis_server(folder: Path, *options: str, password: str | None = None, tls: bool = False) -> Iterator[RedisServer]:
    """One that runs, until the block ends."""
    server = RedisServer(folder, *options, tls=tls)
    try:
        server.start(password)
        yield server
    finally:
        server.kill()


def entries(client: Any, node: str, stream: str) -> list[dict[str, str]]:
    """All of a stream, oldest first."""
    return [fields for _, fields in client.xrange(f"holdfast:{node}:{stream}")]
