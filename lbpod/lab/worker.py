"""One thread per lab through which every change of the kernel's state goes.

Why one thread: a network namespace is a property of a *thread*, and three things depend on which thread it is.
A netlink socket of pyroute2 belongs to the thread that opened it (used from another one, it silently opens a second
socket in *that* thread's namespace). A child started with ``PR_SET_PDEATHSIG`` is killed when the *thread* that forked
it ends, so a short-lived pool thread must never start programs. And a Ctrl-C lands in the main thread between any two
lines: a job that runs here goes on to its end, and whatever it made is known to the lab when cleaning starts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from lbpod.lab.errors import LabError

T = TypeVar("T")


class Worker:
    """Runs jobs one after the other in a thread of its own, from :meth:`start` to :meth:`stop`."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"{name}-lab", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, job: Callable[[], T]) -> T:
        """Run ``job`` in the worker, wait for it, hand on its result or exception. A job may call further jobs."""
        if threading.current_thread() is self._thread:
            return job()
        if not self._thread.is_alive():
            raise LabError("the lab is closed (or was never entered); use it inside its with block")
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future.result()

    def stop(self) -> None:
        """End the thread after the jobs already queued. Children that still live get SIGKILL by PR_SET_PDEATHSIG."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - handed on to the caller, who waits for it
                future.set_exception(error)
            del item, future, job
