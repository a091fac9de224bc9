"""Who may say what: one CA per cluster, and certificates that carry a role and a name.

Why not DNS names and public CAs: the parts call each other by address, and what has to be known of a caller is its role
(a viewer must not commit), and of a server that it is the very node that was meant. Both are in the certificate: in
the subject (``O=holdfast:lb, CN=node-1``, read by servers with ``role_of``), and once more as a SAN of the form
``node-1.lb.holdfast``, which OpenSSL itself compares during the handshake, before a byte of a call is sent. So role and
name are checked on both sides, with no list of names anywhere.

Decided here: TLS 1.3 only, certificates required on both sides, nothing trusted but our own CA. Left to others: making
certificates (``minting``), who may call what (the agent's server), and distribution of the files. This module lies
beside the shells because both sides of each call use it.
"""

import os
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from lbpod.core.errors import RemoteError
from lbpod.core.limits import CERTIFICATE_WARN_NS
from lbpod.expiry import Life, life_of

ORGANIZATION: Final = "holdfast:"
_NODE_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
_RESERVED: Final = ("ca", "controller", "viewer")
NODE_NAME_RULE: Final = f"a-z, 0-9, '-' and '.', 63 characters at most, and none of {', '.join(_RESERVED)}"
"""In words, for sentences."""


class CertsError(Exception):
    """Certificates cannot be made or used. str(): one sentence with the file."""


class Role(Enum):
    """What a caller is. LB: the agent of any node, whether it runs an LB or only a host agent."""

    CONTROLLER = "controller"
    LB = "lb"
    VIEWER = "viewer"


@dataclass(frozen=True)
class Caller:
    """Who is at the other end, as its certificate says. name: of the node, where the role is LB."""

    role: Role
    name: str


@dataclass(frozen=True)
class TlsFiles:
    """Three files in PEM: the cluster's CA, and one's own certificate and key."""

    ca: Path
    certificate: Path
    key: Path


def files_in(directory: Path, name: str) -> TlsFiles:
    """The files that ``mint`` made for this name: a node's, ``controller`` or ``viewer``."""
    return TlsFiles(directory / "ca.crt", directory / f"{name}.crt", directory / f"{name}.key")


def is_node_name(name: str) -> bool:
    """Whether a node may be called so: the name becomes a file's, and is held in a certificate, which bounds it."""
    return _NODE_NAME.fullmatch(name) is not None and name not in _RESERVED


def server_name(name: str, role: Role = Role.LB) -> str:
    """What a client passes as ``server_hostname`` to reach this one and nobody else."""
    return f"{name}.{role.value}.holdfast"


# --- Use --------------------------------------------------------------------------------------------------------------
def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For the side that is called. The caller is known after the handshake: ``role_of``. Raises CertsError."""
    return _context(ssl.PROTOCOL_TLS_SERVER, files)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For the side that calls, with ``server_hostname=server_name(node)``: nobody else gets in. Raises CertsError."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, files)
    context.check_hostname = True
    return context


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    for path in (files.ca, files.certificate, files.key):
        try:
            there = path.is_file()
        except OSError as error:
            raise CertsError(
                f"{path} cannot be read: {error.strerror}; run this as who may read it, root say"
            ) from error
        if not there:
            raise CertsError(
                f"{path} is not there; make certificates with `holdfast certs DIR` on one machine, and copy "
                f"{files.ca.name}, {files.certificate.name} and {files.key.name} from there"
            )
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        _load_into(context, files)
    except (OSError, ValueError) as error:
        raise _unusable(files, error) from error
    return context


def _load_into(context: ssl.SSLContext, files: TlsFiles) -> None:
    """Raises OSError (ssl.SSLError is one) or ValueError."""
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.certificate, files.key)


def _unusable(files: TlsFiles, error: Exception) -> CertsError:
    return CertsError(f"{files.certificate} with {files.key.name} and {files.ca.name} cannot be used: {error}")


class Credentials:
    """One's own certificate, in the two contexts that live as long as the process, renewed when the files are.

    A new certificate is used for every handshake from then on; connections that stand go on with the old one. A CA that
    is added to ca.crt is trusted from then on; one that is taken out is trusted until the process ends.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises CertsError."""
        self._files: Final = files
        # First, so that what changes while the contexts are made is read again.
        self._stamps = _stamps(files)
        self.server: Final = server_context(files)
        self.server.sslobject_class = self._counted()
        self.strangers = 0
        """Callers without a certificate of this cluster, turned away in the handshake."""
        self.client: Final = client_context(files)
        self._life = _life_in(files)
        self._reminded_s: float | None = None

    @property
    def expires_s(self) -> float | None:
        """When one's own certificate ends, in seconds since 1970; None where its dates cannot be read."""
        return self._life.until_s if self._life is not None else None

    def reminder(self, now_s: float) -> str:
        """One sentence where one's own certificate is about to end, or has ended; empty: it is not, or that was said
        less than a day ago. now_s: since 1970."""
        if self._life is None or not self._life.ends_soon(now_s):
            return ""
        if self._reminded_s is not None and 0 <= now_s - self._reminded_s < CERTIFICATE_WARN_NS * 1e-9:
            return ""
        self._reminded_s = now_s
        return (
            f"{self._files.certificate} {self._life.said(now_s)}; renew it where it was made (`holdfast certs DIR`), "
            "and copy it and its key here: they are taken up without a restart"
        )

    def _counted(self) -> type[ssl.SSLObject]:
        """Handshakes that fail never get as far as HTTP, and asyncio tells nobody of them."""

        credentials = self

        class Counted(ssl.SSLObject):
            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    raise
                except ssl.SSLError:
                    credentials.strangers += 1
                    raise

        return Counted

    def renew(self) -> bool:
        """Takes the files up where they have changed; True: they had. Raises CertsError where they are of no use (half
        replaced, say); then everything stays as it was, and the next call tries again."""
        stamps = _stamps(self._files)
        if stamps == self._stamps:
            return False
        with _frozen(self._files) as frozen:
            # In a context of its own: a pair that does not match would leave a context without any.
            try:
                _load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), frozen)
                for context in (self.server, self.client):
                    _load_into(context, frozen)
            except (OSError, ValueError) as error:
                raise _unusable(self._files, error) from error
            self._life, self._reminded_s = _life_in(frozen), None
        self._stamps = stamps
        return True


def _life_in(files: TlsFiles) -> Life | None:
    try:
        return life_of(files.certificate.read_bytes())
    except OSError:  # it was there just now; whoever uses it will say what is wrong
        return None


def _stamps(files: TlsFiles) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when a file is replaced, or what it links to; None: it cannot be looked at."""
    found: list[tuple[int, int, int] | None] = []
    for path in (files.ca, files.certificate, files.key):
        try:
            seen = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((seen.st_mtime_ns, seen.st_ino, seen.st_size))
    return tuple(found)


@contextmanager
def _frozen(files: TlsFiles) -> Iterator[TlsFiles]:
    """Copies in memory, for OpenSSL reads by name and more than once. Raises CertsError."""
    try:
        contents = [path.read_bytes() for path in (files.ca, files.certificate, files.key)]
    except OSError as error:
        raise CertsError(f"{error.filename or files.certificate} cannot be read: {error.strerror or error}") from error
    with _in_memory(contents) as frozen:
        yield frozen


@contextmanager
def _in_memory(contents: Sequence[bytes]) -> Iterator[TlsFiles]:
    """CA, certificate and key as files that OpenSSL can read and that never touch a disk. Raises CertsError."""
    handles: list[int] = []
    try:
        for content in contents:
            handles.append(os.memfd_create("holdfast", os.MFD_CLOEXEC))
            with os.fdopen(os.dup(handles[-1]), "wb") as copy:
                copy.write(content)
        yield TlsFiles(*(Path(f"/proc/self/fd/{handle}") for handle in handles))
    except OSError as error:
        raise CertsError(f"certificates cannot be held in memory: {error.strerror or error}") from error
    finally:
        for handle in handles:
            os.close(handle)


def prove(ca: bytes, certificate: bytes, key: bytes, who: Caller) -> None:
    """Raises CertsError where this pair would not let its owner in, or, of an LB, nobody to it: a handshake in memory,
    with itself at both ends, by the contexts that agents and controller use. For certificates that others have made."""
    with _in_memory((ca, certificate, key)) as files:
        try:
            server, client = server_context(files), client_context(files)
            if who.role is not Role.LB:  # it never answers a call, so its certificate need not be good for that
                client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
            known = role_of(_shaken(server, client, server_name(who.name, who.role)))
        except CertsError as error:
            raise CertsError(f"certificate, key and CA cannot be used: {error.__cause__}") from error
        except RemoteError as error:
            raise CertsError(error.sentence) from error
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise CertsError(str(error)) from error
    if known != who:
        raise CertsError(f"it is of {known.name} in the role {known.role.value}, not of {who.name} as {who.role.value}")


def _shaken(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """The server's end, once both ends have said that they are content. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(down, up, server_hostname=name)
    far = server.wrap_bio(up, down, server_side=True)
    for end in (near, far, near, far):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return far


def role_of(connection: ssl.SSLObject | ssl.SSLSocket | None) -> Caller:
    """The caller's role and name. Raises RemoteError (403) where there is no certificate of ours.

    connection: ``request.transport.get_extra_info("ssl_object")``.
    """
    shown = connection.getpeercert() if connection is not None else None
    if not shown:
        raise RemoteError("no client certificate was shown; use one that `holdfast certs` has made", 403)
    organization = _subject_part(shown, "organizationName")
    name = _subject_part(shown, "commonName")
    for role in Role:
        if organization == ORGANIZATION + role.value and name:
            return Caller(role, name)
    raise RemoteError(f"the certificate of {name or 'nobody'} has no role here (O={organization or 'nothing'})", 403)


def _subject_part(shown: Mapping[str, object], key: str) -> str:
    """From getpeercert(): ``{"subject": ((("organizationName", "holdfast:lb"),), (("commonName", "n1"),))}``."""
    parts = shown.get("subject")
    for part in parts if isinstance(parts, tuple) else ():
        for pair in part:
            if pair[0] == key:
                return str(pair[1])
    return ""
