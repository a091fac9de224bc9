"""The CRD before a real API server: what is good is taken, with defaults; each rule refuses what it is there for, with
the very sentence that users see.

Rules that a schema keyword expresses (bounds, enums) say what Kubernetes says; those in CEL say what we wrote.
"""

import copy
from typing import Any

import pytest
import yaml

from tests.cluster.apiserver import ApiError, ApiServer
from tests.tidy.sources import ROOT

GOOD: dict[str, Any] = {
    "apiVersion": "holdfast.dev/v1alpha1",
    "kind": "VirtualService",
    "metadata": {"name": "web"},
    "spec": {
        "address": "203.0.113.10",
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
        "backendRef": {"name": "web"},
    },
}


def path(namespace: str, name: str = "") -> str:
    base = f"/apis/holdfast.dev/v1alpha1/namespaces/{namespace}/virtualservices"
    return f"{base}/{name}" if name else base


def with_spec(**changes: Any) -> dict[str, Any]:
    """The good one, with these fields of its spec; None removes one."""
    made = copy.deepcopy(GOOD)
    for field, value in changes.items():
        if value is None:
            made["spec"].pop(field, None)
        else:
            made["spec"][field] = value
    return made


def refusal(api: ApiServer, namespace: str, body: dict[str, Any]) -> str:
    """The sentence with which an object is refused."""
    with pytest.raises(ApiError) as refused:
        api.call("POST", path(namespace) + "?fieldValidation=Strict", body)
    assert refused.value.status in {400, 422}
    return str(refused.value.body["message"])


def test_the_least_that_can_be_said_is_enough_and_gets_the_defaults(api: ApiServer, namespace: str) -> None:
    made = api.call("POST", path(namespace), with_spec(ports=[{"port": 80}]))
    assert {
        "address": "203.0.113.10",
        "ports": [{"port": 80, "protocol": "TCP"}],
        "backendRef": {"name": "web"},
        "affinity": "None",
        "idleTimeoutSeconds": 3600,
        "udpIdleTimeoutSeconds": 60,
        "drainTimeoutSeconds": 3600,
    } == made["spec"]


@pytest.mark.parametrize(
    "changes",
    [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}]},
        {"ports": [{"port": 80, "targetPort": "http"}, {"port": 443, "targetPort": "8443-tls"}]},
        {"ports": [{"port": number} for number in range(1, 33)]},
        {"affinity": "ClientIP", "idleTimeoutSeconds": 4, "udpIdleTimeoutSeconds": 604_800, "drainTimeoutSeconds": 0},
        {"address": "169.254.1.1"},
    ],
    ids=["one port, two protocols", "names", "as many ports as may be", "bounds", "link-local"],
)
def test_good_objects_are_taken(api: ApiServer, namespace: str, changes: dict[str, Any]) -> None:
    assert api.call("POST", path(namespace), with_spec(**changes))["metadata"]["uid"]


def test_the_example_is_taken(api: ApiServer, namespace: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "examples/virtualservice.yaml").read_text()))
    ours = [one for one in documents if one["kind"] == "VirtualService"]
    for one in ours:
        one["metadata"]["namespace"] = namespace
    text = yaml.safe_dump_all(ours)
    assert "created" in api.kubectl("apply", "--validate=strict", "-f", "-", stdin=text)
    api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(ROOT / "examples/virtualservice.yaml"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"address": None}, "spec.address: Required value"),
        ({"ports": None}, "spec.ports: Required value"),
        ({"backendRef": None}, "spec.backendRef: Required value"),
        ({"backendRef": {}}, "spec.backendRef.name: Required value"),
        ({"backendRef": {"name": "Web"}}, "spec.backendRef.name in body should match"),
        ({"backendRef": {"name": "w" * 64}}, "spec.backendRef.name: Too long: may not be more than 63 bytes"),
        ({"address": "web.example"}, "address is not an IP address; use one like 203.0.113.10"),
        ({"address": "203.0.113.010"}, "address is not an IP address; use one like 203.0.113.10"),
        ({"address": "2001:db8::1"}, "address is IPv6, which is not supported yet; use an IPv4 address"),
        ({"address": "127.0.0.1"}, "address is not one that packets can be sent to"),
        ({"address": "0.1.2.3"}, "address is not one that packets can be sent to"),
        ({"address": "224.0.0.5"}, "address is not one that packets can be sent to"),
        ({"address": "255.255.255.255"}, "address is not one that packets can be sent to"),
        ({"ports": []}, "spec.ports in body should have at least 1 items"),
        ({"ports": [{"port": number} for number in range(1, 34)]}, "spec.ports: Too many: 33: must have at most 32"),
        ({"ports": [{"port": 80}, {"port": 80}]}, "spec.ports[1]: Duplicate value"),
        ({"ports": [{"port": 1, "name": "a"}, {"port": 2, "name": "a"}]}, "two ports have the same name"),
        ({"ports": [{}]}, "spec.ports[0].port: Required value"),
        ({"ports": [{"port": 0}]}, "spec.ports[0].port in body should be greater than or equal to 1"),
        ({"ports": [{"port": 65_536}]}, "spec.ports[0].port in body should be less than or equal to 65535"),
        ({"ports": [{"port": 80, "name": "HTTP"}]}, "spec.ports[0].name in body should match"),
        ({"ports": [{"port": 80, "protocol": "SCTP"}]}, 'supported values: "TCP", "UDP"'),
        ({"ports": [{"port": 80, "targetPort": 0}]}, "targetPort is neither a port (1 to 65535) nor the name of one"),
        ({"ports": [{"port": 80, "targetPort": 70_000}]}, "targetPort is neither a port (1 to 65535) nor the name"),
        ({"ports": [{"port": 80, "targetPort": "80"}]}, "targetPort is neither a port (1 to 65535) nor the name of"),
        ({"ports": [{"port": 80, "targetPort": "Http"}]}, "targetPort is neither a port (1 to 65535) nor the name of"),
        ({"ports": [{"port": 80, "targetPort": "h" * 16}]}, "spec.ports[0].targetPort: Too long"),
        ({"affinity": "Cookie"}, 'supported values: "None", "ClientIP"'),
        ({"idleTimeoutSeconds": 3}, "spec.idleTimeoutSeconds in body should be greater than or equal to 4"),
        ({"idleTimeoutSeconds": 604_801}, "spec.idleTimeoutSeconds in body should be less than or equal to 604800"),
        ({"udpIdleTimeoutSeconds": 3}, "spec.udpIdleTimeoutSeconds in body should be greater than or equal to 4"),
        ({"drainTimeoutSeconds": -1}, "spec.drainTimeoutSeconds in body should be greater than or equal to 0"),
        ({"drainTimeoutSeconds": 604_801}, "spec.drainTimeoutSeconds in body should be less than or equal to 604800"),
        ({"adress": "203.0.113.10"}, 'unknown field "spec.adress"'),
    ],
)
def test_bad_objects_are_refused_with_a_sentence(
    api: ApiServer, namespace: str, changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(api, namespace, with_spec(**changes))


def test_a_bad_address_is_refused_with_one_sentence(api: ApiServer, namespace: str) -> None:
    """Rules that would follow from the first mistake say nothing more."""
    said = refusal(api, namespace, with_spec(address="web.example"))
    assert 1 == said.count("spec.address"), said


def test_the_address_is_there_to_stay_and_the_rest_may_change(api: ApiServer, namespace: str) -> None:
    api.call("POST", path(namespace), GOOD)
    with pytest.raises(ApiError, match="address cannot be changed; make another VirtualService"):
        api.merge(path(namespace, "web"), {"spec": {"address": "203.0.113.11"}})
    changed = api.merge(path(namespace, "web"), {"spec": {"affinity": "ClientIP", "backendRef": {"name": "other"}}})
    assert (2, "ClientIP") == (changed["metadata"]["generation"], changed["spec"]["affinity"])


def test_status_is_a_door_of_its_own(api: ApiServer, namespace: str) -> None:
    api.call("POST", path(namespace), {**GOOD, "status": {"epoch": 7}})
    assert "status" not in api.call("GET", path(namespace, "web"))
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "message": "", "observedGeneration": 1}
    status = {"epoch": 17, "ports": "80/TCP", "backends": {"ready": 12, "draining": 1}, "conditions": [ready]}
    with pytest.raises(ApiError, match="lastTransitionTime: Required value"):
        api.merge(path(namespace, "web") + "/status", {"status": status})
    ready["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    patched = api.merge(path(namespace, "web") + "/status", {"status": status, "spec": {"affinity": "ClientIP"}})
    assert (1, "None") == (patched["metadata"]["generation"], patched["spec"]["affinity"])

    header, row = api.kubectl("-n", namespace, "get", "virtualservices").splitlines()
    assert ["NAME", "ADDRESS", "PORTS", "BACKENDS", "EPOCH", "READY", "AGE"] == header.split()
    assert ["web", "203.0.113.10", "80/TCP", "12", "17", "True"] == row.split()[:-1]
    wide = api.kubectl("-n", namespace, "get", "virtualservices", "-o", "wide").splitlines()[0]
    assert "DRAINING" in wide
    assert "REASON" in wide
    assert "condition met" in api.kubectl(
        "-n", namespace, "wait", "--for=condition=Ready", "--timeout=10s", "virtualservice/web"
    )
    assert "virtualservice.holdfast.dev/web" in api.kubectl("-n", namespace, "get", "holdfast", "-o", "name")


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ({"status": "true"}, 'supported values: "True", "False", "Unknown"'),
        ({"reason": ""}, "reason in body should be at least 1 chars long"),
        ({"reason": "not one word"}, "reason in body should match"),
        ({"type": ""}, "type in body should match"),
        ({"lastTransitionTime": "today"}, "must be of type date-time"),
    ],
)
def test_conditions_are_what_kubernetes_calls_conditions(
    api: ApiServer, namespace: str, condition: dict[str, str], sentence: str
) -> None:
    api.call("POST", path(namespace), GOOD)
    good = {"type": "Ready", "status": "True", "reason": "Ready", "message": "so it is"}
    good["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    with pytest.raises(ApiError) as refused:
        api.merge(path(namespace, "web") + "/status", {"status": {"conditions": [{**good, **condition}]}})
    assert sentence in str(refused.value)


def test_kubectl_explains_every_field(api: ApiServer) -> None:
    """Each field has a description, in the file, and so before whoever asks."""
    crd = yaml.safe_load((ROOT / "crds/virtualservices.holdfast.dev.yaml").read_text())
    version = crd["spec"]["versions"][0]

    def nameless(at: str, schema: dict[str, Any]) -> list[str]:
        found = [] if "description" in schema else [at]
        for name, inner in schema.get("properties", {}).items():
            if (at, name) != ("", "metadata"):
                found += nameless(f"{at}.{name}", inner)
        return found + (nameless_items(at, schema) if "items" in schema else [])

    def nameless_items(at: str, schema: dict[str, Any]) -> list[str]:
        inner = schema["items"].get("properties", {})
        return [one for name, each in inner.items() for one in nameless(f"{at}[].{name}", each)]

    assert [] == nameless("", version["schema"]["openAPIV3Schema"])
    said = api.kubectl("explain", "virtualservices.spec.drainTimeoutSeconds")
    assert "Seconds for which a backend that terminates" in " ".join(said.split())


def test_the_schema_is_structural_and_the_rules_are_cheap(api: ApiServer) -> None:
    """The API server says so by establishing it without a complaint."""
    crd = api.call("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/virtualservices.holdfast.dev")
    conditions = {one["type"]: one["status"] for one in crd["status"]["conditions"]}
    assert "True" == conditions["Established"]
    assert "True" == conditions["NamesAccepted"]
    assert "NonStructuralSchema" not in conditions
