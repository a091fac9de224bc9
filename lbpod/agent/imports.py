"""Importing an agent: everything that it runs on, without what foreign packages would do on the way and nobody needs.

Why: imports are the larger half of a start, and three packages do work at import that is as much again. Decided here:
what is left out, and that it is left out only while they are being imported; whoever wants it later gets it. No module
of ours may rely on this having run: without it, a start is slower, and nothing else.

Left out are the threads of OpenBLAS, which NumPy would start and which spin (80 ms); rich, which structlog would import
for colourful tracebacks, and our logs are JSON (90 ms); the CAs of the system, which aiohttp would read for calls to
the world, and we call our own with contexts of our own (60 to 100 ms). The collector rests meanwhile: it would walk a
growing heap of modules, all of which stay, again and again.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def import_agent() -> None:
    """Before the first import of `lbpod.agent.run`, in a process that will be an agent and nothing else."""
    gc.disable()
    # NumPy's library for linear algebra starts threads that spin when it is loaded. We multiply no matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        with _without("rich"):
            import structlog  # noqa: F401
        with _without_system_cas():
            import aiohttp  # noqa: F401
        import lbpod.agent.run  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _without(package: str) -> Iterator[None]:
    """The package is as if it were not installed, unless somebody has it already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # how Python says: not importable
    try:
        yield
    finally:
        del sys.modules[package]


@contextmanager
def _without_system_cas() -> Iterator[None]:
    """OpenSSL finds no CAs in its default places, of which it learns from the environment."""
    names = ("SSL_CERT_FILE", "SSL_CERT_DIR")
    had = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, os.devnull))
    try:
        yield
    finally:
        for name, value in had.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
