"""The few calls to the Kubernetes API that kopf does not make for us: state and Secrets, statuses, events, lists.

Why not kopf's own client: it is private, and bound to handlers; the Planner's loop is none. Why not the official one:
it is synchronous, and more than half of a small operator's memory. This one uses the credentials that kopf finds
(service account or kubeconfig), and looks at them again when the API says 401, for tokens are short-lived.

Errors come out as ``ApiError`` with the HTTP status, 0 where nobody has answered.
"""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

import aiohttp
import kopf

from lbpod.core.limits import API_TIMEOUT_NS, SENTENCE_BYTES_MAX, SWEEP_PAGE

Json = dict[str, Any]

_SECOND_NS: Final = 1_000_000_000
_NAMES_ONLY: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


class ApiError(Exception):
    """A call that failed. status: HTTP's, 0: no answer. str(): one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def login(settings: kopf.OperatorSettings) -> kopf.ConnectionInfo:
    """The credentials of this process: a pod's, or a person's. Raises kopf.LoginError.

    A pod is told the API server's address, as all clients in pods are; kopf would ask for its name, and the operator
    would then need the cluster's DNS, which may be what has just gone.
    """
    found = kopf.login_with_service_account(settings=settings)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if found is not None and host:
        found = replace(found, server=f"https://{f'[{host}]' if ':' in host else host}:{port}")
    found = found or kopf.login_with_kubeconfig(settings=settings)
    if found is None:
        raise kopf.LoginError("there is neither a service account nor a kubeconfig; set KUBECONFIG")
    return found


class Api:
    """Make it inside the event loop; close it there."""

    def __init__(self, settings: kopf.OperatorSettings) -> None:
        self._settings = settings
        self._info = login(settings)
        self._tls: ssl.SSLContext = self._info.as_ssl_context()
        timeout = aiohttp.ClientTimeout(total=API_TIMEOUT_NS / _SECOND_NS)
        self._session = aiohttp.ClientSession(timeout=timeout)

    async def close(self) -> None:
        """Ends all connections."""
        await self._session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content_type: str = "application/json",
        accept: str = "",
    ) -> Json:
        """One call. Raises ApiError."""
        for last in (False, True):
            try:
                return await self._once(method, path, body, content_type, accept or "application/json")
            except ApiError as error:
                if error.status != 401 or last:
                    raise
            self._info = await asyncio.to_thread(login, self._settings)
            self._tls = self._info.as_ssl_context()
        raise AssertionError("the second try has returned or raised")

    async def _once(self, method: str, path: str, body: Json | None, content_type: str, accept: str) -> Json:
        headers = {**self._info.as_http_headers(), "Accept": accept}
        data = None
        if body is not None:
            headers["Content-Type"] = content_type
            data = json.dumps(body).encode()
        url = self._info.server.rstrip("/") + path
        try:
            async with self._session.request(method, url, data=data, headers=headers, ssl=self._tls) as response:
                text = await response.read()
        except TimeoutError as error:
            raise ApiError(0, f"{method} {path}: no answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(0, f"{method} {path}: {str(error) or type(error).__name__}") from error
        try:
            found = json.loads(text) if text else {}
        except ValueError:
            found = {"message": text[:SENTENCE_BYTES_MAX].decode(errors="replace")}
        if response.status >= 400:
            sentence = str(found.get("message", ""))[:SENTENCE_BYTES_MAX]
            raise ApiError(response.status, f"{method} {path}: {response.status}: {sentence}")
        return dict(found)

    async def get(self, path: str) -> Json | None:
        """None: there is no such object. Raises ApiError."""
        try:
            return await self.call("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def merge(self, path: str, patch: Json) -> Json:
        """A merge patch. Raises ApiError."""
        return await self.call("PATCH", path, patch, content_type="application/merge-patch+json")

    async def names(self, path: str) -> AsyncIterator[tuple[str, str]]:
        """Namespace and name of all objects of a list, page by page. Raises ApiError."""
        token = ""
        while True:
            more = f"&continue={token}" if token else ""
            page = await self.call("GET", f"{path}?limit={SWEEP_PAGE}{more}", accept=_NAMES_ONLY)
            for one in page.get("items") or ():
                metadata = one["metadata"]
                yield metadata.get("namespace", ""), metadata["name"]
            token = (page.get("metadata") or {}).get("continue", "")
            if not token:
                return
