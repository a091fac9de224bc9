"""What is wrong with the certificates, said where people look: in the log at once, in a metric, and as an event of the
operator's own pod once it has lasted, for an issuer that is about to begin is no news.

Why the pod: there need be no other object yet that an event could be about, and `kubectl describe` of a pod that is not
ready is where everybody begins. Told on transitions only, by reason: the sentence may change while it lasts.
"""

import time
from typing import Final

import structlog

from lboperator.api import Api, ApiError, Json
from lboperator.certmanager import Trouble
from lboperator.events import event
from lboperator.metrics import OperatorMetrics
from lbpod.core.limits import ISSUED_TOLD_NS

_LOG: Final = structlog.get_logger()


class Complaint:
    """Invariant: ``_told`` (of ``_reason``, by an event) implies ``_owes`` (the end of what was told is to be told)."""

    def __init__(self, api: Api, metrics: OperatorMetrics, about: Json | None) -> None:
        """about: the pod; None: this is no pod, and nobody is told."""
        self._api = api
        self._metrics = metrics
        self._about = about
        self._reason = ""
        self._since_ns = 0
        self._told = False
        self._owes = False

    async def say(self, trouble: Trouble | None) -> None:
        """At each look. Raises nothing: what cannot be told is logged."""
        reason = trouble.reason if trouble is not None else ""
        if reason != self._reason:
            if trouble is not None:
                _LOG.warning("certificates", reason=reason, sentence=trouble.sentence)
            else:
                _LOG.info("certificates", sentence="all of them are issued and in use")
            if self._owes and trouble is None:
                self._owes = False
                await self._tell("CertificatesIssued", "all certificates are issued and in use", is_warning=False)
            self._metrics.troubled(self._reason, reason)
            self._reason, self._since_ns, self._told = reason, time.monotonic_ns(), False
        if trouble is not None and not self._told and time.monotonic_ns() - self._since_ns >= ISSUED_TOLD_NS:
            self._told = self._owes = True
            await self._tell(trouble.reason, trouble.sentence, is_warning=True)

    async def _tell(self, reason: str, sentence: str, *, is_warning: bool) -> None:
        """An event is worth one try."""
        if self._about is None:
            return
        path, body = event(self._about, reason, sentence, is_warning=is_warning)
        try:
            await self._api.call("POST", path, body)
        except ApiError as error:
            _LOG.warning("event not written", reason=str(error))
