"""The agent's door to ``lbpod.certs``, which lies outside because the standalone controller uses it, too.

Agent and controller are layers side by side that must not know each other (pyproject.toml); certificates they share.
"""

from lbpod.certs import (
    Caller,
    CertsError,
    Role,
    TlsFiles,
    client_context,
    files_in,
    mint,
    role_of,
    server_context,
    server_name,
)

__all__ = [
    "Caller",
    "CertsError",
    "Role",
    "TlsFiles",
    "client_context",
    "files_in",
    "mint",
    "role_of",
    "server_context",
    "server_name",
]
