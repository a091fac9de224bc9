"""Events, as kubectl shows them under the object that they are about: the body of one, the same for every kind.

When one is worth telling is decided by whoever tells it: on transitions only, never for each look.
"""

from datetime import UTC, datetime
from typing import Final

from lboperator.api import Json
from lboperator.nouns import OPERATOR

_MESSAGE_MAX: Final = 1_024
"""Characters that the API takes."""


def reference(api_version: str, kind: str, namespace: str, name: str, uid: str) -> Json:
    """The object that an event is about. Without its uid, `kubectl describe` would not show the event."""
    return {"apiVersion": api_version, "kind": kind, "namespace": namespace, "name": name, "uid": uid}


def event(about: Json, reason: str, message: str, *, is_warning: bool) -> tuple[str, Json]:
    """Where to POST it, and its body; it lies in the namespace of what it is about, and happens now."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    body: Json = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{about['name']}-", "namespace": about["namespace"]},
        "involvedObject": about,
        "reason": reason,
        "message": message[:_MESSAGE_MAX],
        "type": "Warning" if is_warning else "Normal",
        "source": {"component": OPERATOR},
        "reportingComponent": "holdfast.dev/operator",
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    return f"/api/v1/namespaces/{about['namespace']}/events", body
