"""When a certificate ends, and when that is worth a word.

Why not ask the library that makes certificates: its import takes longer than the whole start of an agent. And `ssl`
tells what a peer has shown in a handshake, which fails once a certificate has ended: just when one wants to know. Two
dates are a few steps into DER, so these steps are taken here.

Decided here: what is soon. Left to others: saying it (agent and controller, in their logs and metrics), renewing
(``minting``, cert-manager).
"""

import binascii
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from lbpod.core.limits import CERTIFICATE_WARN_DAYS, CERTIFICATE_WARN_PART

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_DAY_S: Final = 86_400
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_TIMES: Final = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}
"""UTCTime and GeneralizedTime, as RFC 5280 has them in certificates: always in seconds, always in UTC."""


@dataclass(frozen=True)
class Life:
    """From when until when a certificate is valid, in seconds since 1970. since_s < until_s"""

    since_s: float
    until_s: float

    def ends_soon(self, now_s: float) -> bool:
        """Less than CERTIFICATE_WARN_DAYS are left, or less than a tenth of it where it does not live for long: those
        are renewed by a program, and earlier."""
        soon_s = min(CERTIFICATE_WARN_DAYS * _DAY_S, (self.until_s - self.since_s) / CERTIFICATE_WARN_PART)
        return now_s > self.until_s - soon_s

    def said(self, now_s: float) -> str:
        """Its end in words."""
        date = f"{datetime.fromtimestamp(self.until_s, UTC):%Y-%m-%d %H:%M} UTC"
        left_s = self.until_s - now_s
        if left_s <= 0:
            return f"ended on {date}"
        return f"ends on {date}, in {left_s / _DAY_S:.0f} days" if left_s > 2 * _DAY_S else f"ends on {date}"


def life_of(pem: bytes) -> Life | None:
    """Of the first certificate in a file; None where there is none that can be read."""
    found = _PEM.search(pem)
    try:
        der = binascii.a2b_base64(found[1]) if found is not None else b""
        (_, certificate), *_ = _parts(der)
        (_, body), *_ = _parts(certificate)
        fields = _parts(body)
        # Version (which may be missing), serial number, algorithm, issuer, validity.
        tag, validity = fields[4] if fields[0][0] == _VERSION else fields[3]
        since, until = (_seconds(kind, text) for kind, text in _parts(validity))
    except (ValueError, IndexError, KeyError):
        return None
    return Life(since, until) if tag == _SEQUENCE and since < until else None


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each value that stands here, side by side. Raises ValueError, IndexError."""
    parts, at = [], 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            octets = length & 0x7F
            length, at = int.from_bytes(der[at : at + octets], "big"), at + octets
        if at + length > len(der):
            raise ValueError("a value is longer than what it lies in")
        parts.append((tag, der[at : at + length]))
        at += length
    return parts


def _seconds(tag: int, text: bytes) -> float:
    """Raises ValueError, KeyError."""
    return datetime.strptime(text.decode(), _TIMES[tag]).replace(tzinfo=UTC).timestamp()
