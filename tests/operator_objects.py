"""Kubernetes objects as the API server would hand them out, for tests of the operator: only what matters is said."""

from collections.abc import Sequence
from typing import Any

Body = dict[str, Any]


def virtual_service(
    name: str = "web",
    *,
    namespace: str = "shop",
    address: str = "203.0.113.10",
    ports: Sequence[Body] = ({"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080},),
    service: str = "web",
    created: str = "2026-01-01T00:00:00Z",
    generation: int = 1,
    **spec: Any,
) -> Body:
    """A VirtualService."""
    return {
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": f"vs-{namespace}-{name}",
            "creationTimestamp": created,
            "generation": generation,
        },
        "spec": {"address": address, "ports": [dict(one) for one in ports], "backendRef": {"name": service}, **spec},
    }


def service(
    name: str = "web",
    *,
    namespace: str = "shop",
    uid: str = "uid-1",
    ports: Sequence[Body] = ({"name": "http", "port": 80, "targetPort": "http"},),
    kind: str = "ClusterIP",
) -> Body:
    """A Service."""
    return {
        "metadata": {"namespace": namespace, "name": name, "uid": uid},
        "spec": {"type": kind, "ports": [dict(one) for one in ports], "selector": {"app": name}},
    }


def endpoint(address: str, node: str = "n1", /, **conditions: bool) -> Body:
    """An endpoint; conditions: those that are set."""
    return {"addresses": [address], "nodeName": node, "conditions": conditions}


def endpoint_slice(
    *endpoints: Body,
    name: str = "web-abc",
    namespace: str = "shop",
    service: str = "web",
    owner: str = "uid-1",
    ports: Sequence[Body] = ({"name": "http", "protocol": "TCP", "port": 8080},),
    address_type: str = "IPv4",
) -> Body:
    """An EndpointSlice; owner '': nobody's."""
    owners = [{"apiVersion": "v1", "kind": "Service", "name": service, "uid": owner}] if owner else []
    return {
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": f"slice-{name}",
            "labels": {"kubernetes.io/service-name": service},
            "ownerReferences": owners,
        },
        "addressType": address_type,
        "ports": [dict(one) for one in ports],
        "endpoints": [dict(one) for one in endpoints],
    }


def node(name: str, address: str, **labels: str) -> Body:
    """A Node."""
    return {
        "metadata": {"name": name, "uid": f"node-{name}", "labels": labels},
        "status": {"addresses": [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": address}]},
    }
