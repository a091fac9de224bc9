"""Minting: the cluster's CA and the certificates of its parts, made or renewed in a folder.

Apart from ``certs``, which every agent and controller needs when it starts: the library that makes certificates takes
longer to import than all that reads them, and only `holdfast certs` and the operator make any. Decided here: ECDSA
P-256 (every TLS library speaks it; Ed25519 was dropped for curl builds that do not), how long each certificate lives,
and that nothing which is still good is ever replaced.
"""

import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lbpod.certs import (
    NODE_NAME_RULE,
    ORGANIZATION,
    CertsError,
    Role,
    TlsFiles,
    files_in,
    is_node_name,
    server_name,
)
from lbpod.core.limits import CA_DAYS, CERTIFICATE_DAYS, CERTIFICATE_RENEW_DAYS, CLOCK_SKEW_DAYS

_CA_NAME: Final = x509.Name(
    [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION + "ca"),
        x509.NameAttribute(NameOID.COMMON_NAME, "holdfast cluster CA"),
    ]
)


def mint(directory: Path, nodes: Sequence[str]) -> list[Path]:
    """Make what is missing, and renew what is invalid or about to expire: the files written, nothing else touched.

    A CA that exists is never replaced: that would cut off every node that trusts it. Raises CertsError.
    """
    for name in nodes:
        if not is_node_name(name):
            raise CertsError(f"{name!r} cannot be the name of a node's certificate: use {NODE_NAME_RULE}")
    try:
        return _mint(directory, nodes)
    except OSError as error:
        raise CertsError(f"{error.filename or directory} cannot be written: {error.strerror}") from error


def minted_nodes(directory: Path) -> list[str]:
    """Names of the nodes that a certificate of this directory's CA is in it for, whether it is still valid or not."""
    names = []
    try:
        ca = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
        paths = sorted(directory.glob("*.crt"))
    except (OSError, ValueError):  # `mint` says what is wrong with it
        return []
    for path in paths:
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            certificate.verify_directly_issued_by(ca)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
            continue
        if is_node_name(path.stem) and certificate.subject == _subject(path.stem, Role.LB):
            names.append(path.stem)
    return names


def _mint(directory: Path, nodes: Sequence[str]) -> list[Path]:
    """Raises OSError, too."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    written: list[Path] = []
    ca, ca_key = _ca(directory, written)
    wanted = [
        ("controller", Role.CONTROLLER),
        ("viewer", Role.VIEWER),
        *((name, Role.LB) for name in sorted(set(nodes))),
    ]
    for name, role in wanted:
        files = files_in(directory, name)
        if not _still_good(files, ca, name, role):
            key = ec.generate_private_key(ec.SECP256R1())
            _write(files.key, _key_pem(key), 0o600, written)
            _write(files.certificate, _pem(_leaf(key, ca, ca_key, name, role)), 0o644, written)
    return written


def _ca(directory: Path, written: list[Path]) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    files = TlsFiles(directory / "ca.crt", directory / "ca.crt", directory / "ca.key")
    if not files.ca.exists() and not files.key.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        _write(files.key, _key_pem(key), 0o600, written)
        _write(files.ca, _pem(_self_signed(key)), 0o644, written)
    try:
        ca, key = _load(files)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise CertsError(
            f"{directory}: ca.crt and ca.key are not a pair that can sign ({error}); "
            "restore both, or remove both to start anew"
        ) from error
    if not _in_time(ca, timedelta(days=CERTIFICATE_RENEW_DAYS)):
        raise CertsError(f"{files.ca} expires on {ca.not_valid_after_utc:%Y-%m-%d}; make a new CA in another directory")
    return ca, key


def _still_good(files: TlsFiles, ca: x509.Certificate, name: str, role: Role) -> bool:
    try:
        certificate, _ = _load(files)
        certificate.verify_directly_issued_by(ca)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return certificate.subject == _subject(name, role) and _in_time(certificate, timedelta(days=CERTIFICATE_RENEW_DAYS))


def _load(files: TlsFiles) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Raises ValueError where certificate and key do not belong together."""
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise ValueError("the key is not the certificate's")
    return certificate, key


def _in_time(certificate: x509.Certificate, reserve: timedelta) -> bool:
    now = datetime.now(UTC)
    return certificate.not_valid_before_utc <= now and now + reserve < certificate.not_valid_after_utc


def _subject(name: str, role: Role) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION + role.value),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _builder(key: ec.EllipticCurvePrivateKey, subject: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_CA_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=CLOCK_SKEW_DAYS))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return (
        _builder(key, _CA_NAME, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _leaf(
    key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, name: str, role: Role
) -> x509.Certificate:
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is Role.LB:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
    return (
        _builder(key, _subject(name, role), CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(server_name(name, role))]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int, written: list[Path]) -> None:
    """Whole or not at all, and a key is never readable by others, not even for a moment."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise CertsError(f"{path} cannot be written: {error.strerror}") from error
    written.append(path)
