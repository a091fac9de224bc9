"""The controller's file: what it means, and for each mistake the one sentence with file, line and field."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbpod.certs import CertsError
from lbpod.core.model import (
    Affinity,
    BackendState,
    Cluster,
    Protocol,
    World,
    WorldBackend,
    format_address,
    parse_address,
)
from lbpod.minting import mint
from lbpod.standalone.config import Settings, check, load, parse
from lbpod.standalone.marks import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HEAD = """\
cluster: {vni: 7, seed: 11}
tls: tls
nodes:
- {name: lb-1, address: 10.0.0.1, lb: true}
- {name: web-1, address: 10.0.0.2, control: "agent.internal:9000"}
backends:
  shop/web:
  - {address: 10.1.0.1, port: 8080, node: web-1}
"""
SERVICE = """\
---
apiVersion: holdfast.dev/v1alpha1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  address: 203.0.113.10
  ports:
  - {name: http, protocol: TCP, port: 80, targetPort: 8080}
  backendRef: {name: web}
"""


def read(text: str) -> tuple[World, Settings]:
    return parse("demo.yaml", text.encode(), Path("/etc/holdfast"))


def sentence(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(old: str, new: str, text: str = HEAD + SERVICE) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_a_file_becomes_a_world() -> None:
    world, settings = read(HEAD + SERVICE)
    assert Cluster(7, 11) == settings.cluster
    assert Path("/etc/holdfast/demo.yaml.state") == settings.state
    assert Path("/etc/holdfast/tls/controller.key") == settings.tls.key
    assert [("lb-1", "10.0.0.1:9900", True), ("web-1", "agent.internal:9000", False)] == [
        (node.name, node.control, node.lb) for node in world.nodes
    ]
    (vip,) = world.vips
    assert ("shop/web/http", "203.0.113.10", 80) == (vip.name, format_address(vip.address), vip.port)
    assert (Protocol.TCP, Affinity.NONE, 3600 * 10**9, 3600 * 10**9) == (
        vip.protocol,
        vip.affinity,
        vip.idle_ns,
        vip.drain_ns,
    )
    assert (WorldBackend(parse_address("10.1.0.1"), 8080, "web-1"),) == vip.backends


def test_the_example_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == check(ROOT / "examples/standalone.yaml")
    assert "good: 3 VIPs, 5 backends, 4 nodes, 2 of them LBs" in capsys.readouterr().out
    world, _ = load(ROOT / "examples/standalone.yaml")
    ports = {vip.name: (vip.protocol, [one.port for one in vip.backends]) for vip in world.vips}
    assert (Protocol.UDP, [5353]) == ports["shop/dns/dns"]
    assert (Protocol.TCP, [5354]) == ports["shop/dns/dns-tcp"]
    web = next(vip for vip in world.vips if vip.name == "shop/web/http")
    assert [BackendState.READY, BackendState.READY, BackendState.DRAINING] == [one.state for one in web.backends]
    assert [1, 2, 1] == [one.weight for one in web.backends]


def test_the_walk_in_the_docs_has_a_good_file_and_shell_that_is_shell(tmp_path: Path) -> None:
    text = (ROOT / "docs/standalone.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (config,) = [block for kind, block in blocks if kind == "yaml"]
    (tmp_path / "holdfast.yaml").write_text(config)
    world, settings = load(tmp_path / "holdfast.yaml")
    assert ["lb-1", "lb-2", "web-1", "web-2"] == [node.name for node in world.nodes]
    assert Path("/var/lib/holdfast/controller.state") == settings.state
    scripts = [block for kind, block in blocks if kind == "sh"]
    assert [] == [one for one in scripts if subprocess.run(["sh", "-n", "-c", one], check=False, timeout=10).returncode]


def test_virtual_services_may_stand_in_a_list_or_in_documents() -> None:
    documents = list(yaml.safe_load_all(HEAD + SERVICE))
    inside: dict[str, Any] = {**documents[0], "virtualServices": documents[1:]}
    assert read(HEAD + SERVICE) == read(yaml.safe_dump(inside))
    assert read(HEAD + SERVICE) == read(yaml.safe_dump_all([documents[0], documents[1:]]))
    assert read(HEAD + SERVICE) == read(SERVICE + "---\n" + HEAD)


def test_udp_has_an_idle_timeout_of_its_own() -> None:
    text = changed("protocol: TCP", "protocol: UDP")
    assert 60 * 10**9 == read(text)[0].vips[0].idle_ns
    text += "  udpIdleTimeoutSeconds: 30\n  idleTimeoutSeconds: 600\n"
    assert 30 * 10**9 == read(text)[0].vips[0].idle_ns


def test_which_port_of_a_backend_is_meant() -> None:
    """Its only one, or one by the target's or the port's name, or the target's number."""
    backend = "port: 8080, node"
    only = changed(", targetPort: 8080", "")
    assert 8081 == read(changed(backend, "port: 8081, node", only))[0].vips[0].backends[0].port
    assert 8080 == read(changed("targetPort: 8080", "targetPort: web"))[0].vips[0].backends[0].port
    assert 8080 == read(changed(backend, "node"))[0].vips[0].backends[0].port
    assert 8082 == read(changed(backend, "ports: {http: 8082}, node"))[0].vips[0].backends[0].port
    named = changed("targetPort: 8080", "targetPort: web")
    assert 8083 == read(changed(backend, "ports: {http: 1, web: 8083}, node", named))[0].vips[0].backends[0].port
    assert 8084 == read(changed(backend, 'ports: {"8080": 8084}, node'))[0].vips[0].backends[0].port
    assert 80 == read(changed(", targetPort: 8080", "", changed(backend, "node")))[0].vips[0].backends[0].port


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("port: 80,", "port: 70000,", "demo.yaml:16: spec.ports[0].port: 70000 is not a port; use 1 to 65535"),
        (
            "targetPort: 8080",
            "targetPort: 0",
            "demo.yaml:16: spec.ports[0].targetPort: 0 is not a port; use 1 to 65535",
        ),
        ("targetPort: 8080", "targetPort: ''", "demo.yaml:16: spec.ports[0].targetPort: an empty text is not text"),
        (
            "address: 203.0.113.10",
            "address: 2001:db8::1",
            "demo.yaml:14: spec.address: 2001:db8::1 is IPv6, which is not",
        ),
        (
            "address: 203.0.113.10",
            "address: 203.0.113.256",
            "demo.yaml:14: spec.address: 203.0.113.256 is not an IP addr",
        ),
        ("address: 203.0.113.10", "address: 0.0.0.0", "demo.yaml:14: spec.address: 0.0.0.0 is not the address of one"),
        ("address: 203.0.113.10", "address: 127.0.0.1", "demo.yaml:14: spec.address: 127.0.0.1 is not the address of"),
        ("address: 203.0.113.10", "address: 0.1.2.3", "demo.yaml:14: spec.address: 0.1.2.3 is not the address of one"),
        ("address: 203.0.113.10", "address: 240.0.0.1", "demo.yaml:14: spec.address: 240.0.0.1 is not the address of"),
        ("port: 80,", "port: 0120,", "demo.yaml:16: spec.ports[0].port: 0120 is not a port; use 1 to 65535"),
        ("port: 80,", 'port: !!int "+-80",', "demo.yaml:16: spec.ports[0].port: +-80 is not a port"),
        ("address: 203.0.113.10", "address: [1]", "demo.yaml:14: spec.address: a list is not text"),
        ("backendRef", "backendref", "demo.yaml:17: spec.backendref: unknown field; known here: address, affinity,"),
        ("kind: Virtual", "kind: Other", "demo.yaml:11: kind: OtherService is not known; use VirtualService"),
        ("v1alpha1", "v2", "demo.yaml:10: apiVersion: holdfast.dev/v2 is not known; use holdfast.dev/v1alpha1"),
        (
            "{name: web}",
            "{name: shop}",
            "demo.yaml:17: spec.backendRef.name: no backends are listed for shop/shop; list",
        ),
        ("protocol: TCP", "protocol: SCTP", "demo.yaml:16: spec.ports[0].protocol: SCTP is not known; use TCP or UDP"),
        (", node: web-1", "", "demo.yaml:8: backends.shop/web[0]: node is missing; name the node that it runs on"),
        (
            "node: web-1",
            "node: web-2",
            "demo.yaml:8: backends.shop/web[0].node: web-2 is not one of the nodes; list it",
        ),
        ("port: 8080, node", "port: x, node", "demo.yaml:8: backends.shop/web[0].port: x is not a port"),
        (
            "port: 8080, node",
            "weight: 1001, node",
            "demo.yaml:8: backends.shop/web[0].weight: 1001 is not a weight; use 0",
        ),
        (
            "port: 8080, node",
            "state: gone, node",
            "demo.yaml:8: backends.shop/web[0].state: gone is not known; use ready or",
        ),
        (
            "port: 8080, node",
            "port: 1, ports: {a: 1}, node",
            "demo.yaml:8: backends.shop/web[0].ports: give either port or",
        ),
        ("shop/web:", "Shop/web:", "demo.yaml:7: backends.Shop/web: Shop/web is not the name of a Service"),
        ("vni: 7", "vni: 16777216", "demo.yaml:1: cluster.vni: 16777216 is not a VNI; use 0 to 16777215"),
        ("vni: 7", "vni: 1.5", "demo.yaml:1: cluster.vni: 1.5 is not a VNI"),
        ("{vni: 7, seed: 11}", "{vni: 7}", "demo.yaml:1: cluster: seed is missing; choose a random number"),
        ("tls: tls", "tls: {ca: x}", "demo.yaml:2: tls: certificate is missing; name the file"),
        ("tls: tls", "tsl: tls", "demo.yaml:2: tsl: unknown field; known here: backends, cluster, nodes, state, tls,"),
        ("lb: true", "lb: maybe", "demo.yaml:4: nodes[0].lb: maybe is neither true nor false"),
        ("lb: true", "lb: false", "demo.yaml:3: nodes: no node is an LB; set lb: true for those that are"),
        ("name: web-1", "name: lb-1", "demo.yaml:5: nodes[1].name: lb-1 is listed twice; remove one"),
        ("10.0.0.2", "10.0.0.1", "demo.yaml:5: nodes[1].address: 10.0.0.1 is already the address of lb-1"),
        ('"agent.internal:9000"', "agent", "demo.yaml:5: nodes[1].control: agent is not of the form host:port"),
        ("agent.internal:9000", "agent/x:9000", "demo.yaml:5: nodes[1].control: agent/x:9000 is not of the form"),
        ("agent.internal:9000", "me@agent:9000", "demo.yaml:5: nodes[1].control: me@agent:9000 is not of the form"),
        ("agent.internal:9000", "agent:\u0669", "demo.yaml:5: nodes[1].control: agent:\u0669 is not of the form"),
        ("name: web-1", 'name: "\\e[2J\\n"', "demo.yaml:5: nodes[1].name: \\x1b[2J\\n is not a name"),
        (
            "{name: web, namespace: shop}",
            "{name: web, namespace: shop, lables: {a: b}}",
            "demo.yaml:12: metadata.lables: unknown field; known here: annotations, creationTimestamp, ",
        ),
        ("tls: tls", 'tls: tls\n"\\e[2J\\n": 1', "demo.yaml:3: \\x1b[2J\\n: unknown field; known here: backends,"),
        ("tls: tls", "tls: tls\ntls: tls", "demo.yaml:3: tls: given twice, first on line 2; remove one"),
        ("tls: tls", "tls: [", "demo.yaml:4: this is not YAML: "),
        (
            "  - {name: http",
            "  - {port: 81}\n  - {port: 81, name: http",
            "demo.yaml:17: spec.ports[1].port: given twice",
        ),
        (
            "metadata: {name: web, ",
            "metadata: {",
            "demo.yaml:12: metadata: name is missing; give the VirtualService one",
        ),
    ],
)
def test_each_mistake_is_one_sentence_with_file_line_and_field(old: str, new: str, wanted: str) -> None:
    assert sentence(changed(old, new)).startswith(wanted)


def test_a_second_port_moves_no_backend_silently() -> None:
    """A backend's only port meant the only port; now it could mean either."""
    second = "  - {name: http, protocol: TCP, port: 80}\n  - {name: https, port: 443, targetPort: 8443}\n"
    text = changed("  - {name: http, protocol: TCP, port: 80, targetPort: 8080}\n", second)
    assert (
        "demo.yaml:8: backends.shop/web[0]: port 8080 could mean any of several ports (one is on line 16); "
        "use ports, by name"
    ) == sentence(text)
    vips = read(changed("port: 8080, node", "ports: {http: 8080}, node", text))[0].vips
    assert [8080, 8443] == [vip.backends[0].port for vip in vips]


def test_a_backend_and_its_virtual_service_do_not_contradict_each_other() -> None:
    assert (
        "demo.yaml:8: backends.shop/web[0]: port 9090 is not the targetPort on line 16, 8080; remove one of them"
    ) == sentence(changed("port: 8080, node", "port: 9090, node"))


def test_a_name_that_no_port_has_is_a_misspelt_one() -> None:
    text = changed("port: 8080, node", "ports: {htpp: 8080}, node", changed(", targetPort: 8080", ""))
    assert (
        "demo.yaml:8: backends.shop/web[0].ports.htpp: no port of a VirtualService is meant by that name; "
        "known here: 80, http"
    ) == sentence(text)
    other = SERVICE.replace("name: web, name", "name: other, name").replace("port: 80,", "port: 81,")
    both = changed("port: 8080, node", "ports: {http: 8080, metrics: 9090}, node") + other.replace("http", "metrics")
    assert [8080, 9090] == [vip.backends[0].port for vip in read(both)[0].vips], "each asks for its own"
    unused = changed(
        "  shop/web:\n", "  shop/later:\n  - {address: 10.1.0.9, ports: {x: 1}, node: web-1}\n  shop/web:\n"
    )
    assert 1 == len(read(unused)[0].vips), "nothing is known yet of what nobody serves"


@pytest.mark.parametrize(
    ("vip", "whose"),
    [("10.0.0.1", "the node lb-1"), ("10.0.0.2", "the node web-1"), ("10.1.0.1", "a backend of shop/web")],
)
def test_a_vip_is_the_address_of_no_machine(vip: str, whose: str) -> None:
    """An LB would take for the VIP's what is for that machine, its own agent's port, say."""
    assert f"demo.yaml:14: spec.address: {vip} is {whose}; a VIP is the address of no machine" == sentence(
        changed("203.0.113.10", vip)
    )


@pytest.mark.parametrize("name", ["viewer", "controller", "ca", "n" * 64, "N1", "-"])
def test_a_node_has_a_name_that_a_certificate_can_have(tmp_path: Path, name: str) -> None:
    said = sentence(changed("name: web-1", f"name: {name}"))
    assert said.startswith(
        f"demo.yaml:5: nodes[1].name: {name} is not a name for a node; use a-z, 0-9, '-' and '.', 63"
    )
    with pytest.raises(CertsError, match="cannot be the name"):
        mint(tmp_path, [name])


def test_a_vip_is_served_once() -> None:
    again = HEAD + SERVICE + SERVICE.replace("name: web, name", "name: other, name")
    assert (
        "demo.yaml:25: spec.ports[0].port: 203.0.113.10:80/TCP is already served by shop/web/http (line 16); "
        "a VIP is served once"
    ) == sentence(again)
    elsewhere = SERVICE.replace("port: 80,", "port: 81,").replace("name: web, name", "name: other, name")
    assert 2 == len(read(elsewhere + "---\n" + HEAD + SERVICE)[0].vips)


def test_a_virtual_service_is_described_once() -> None:
    """In Kubernetes nobody can; two of one name would be one name for two things in every status and metric."""
    again = HEAD + SERVICE + SERVICE.replace("203.0.113.10", "203.0.113.11")
    assert "demo.yaml:21: metadata.name: shop/web is already described on line 12; remove one" == sentence(again)


def test_what_kubernetes_writes_into_metadata_may_stay() -> None:
    exported = "labels: {app: web}, annotations: {}, uid: 1-2, resourceVersion: '7', generation: 2, managedFields: []"
    assert read(HEAD + SERVICE) == read(changed("{name: web, namespace", f"{{name: web, {exported}, namespace"))


def test_a_sentence_is_bounded_whatever_the_file_says() -> None:
    for text in (f"tls: tls\n? {'k' * 9_000}\n: 1", f"tls: tls\nstate: [{'k' * 9_000}]", f"tls: [{'k' * 9_000}]"):
        assert 1_100 > len(sentence(changed("tls: tls", text)))


def test_a_named_target_needs_a_named_port() -> None:
    assert (
        "demo.yaml:8: backends.shop/web[0]: port web is not among its ports, but it is the targetPort on line 16"
    ) == sentence(changed("port: 8080, node", "node", changed("targetPort: 8080", "targetPort: web")))


def test_a_backend_stands_in_a_list_once() -> None:
    line = "  - {address: 10.1.0.1, port: 8080, node: web-1}\n"
    assert "demo.yaml:9: backends.shop/web[1]: 10.1.0.1:8080 is listed twice; remove one" == sentence(
        changed(line, line + line)
    )


def test_seventy_thousand_backends_are_too_many() -> None:
    lines = "".join(
        f"  - {{address: 10.{1 + number // 62_500}.{number // 250 % 250}.{number % 250}, node: web-1}}\n"
        for number in range(70_000)
    )
    said = sentence(changed("  - {address: 10.1.0.1, port: 8080, node: web-1}\n", lines))
    assert said.endswith("with the backends of this port there are 70000; the most is 65536")
    assert said.startswith("demo.yaml:70015: spec.ports[0].port: ")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "demo.yaml:1: there is no document with cluster, tls, nodes and backends in it"),
        (SERVICE, "demo.yaml:1: there is no document with cluster"),
        ("just words", "demo.yaml:1: just words is not a mapping of fields"),
        (HEAD + "---\n" + HEAD, "demo.yaml:10: a second document with settings; the first begins on line 1"),
        ("a: &x [*x]", "demo.yaml:1: "),
        ("\x00", "demo.yaml:1: this is not YAML"),
        ("{a: " * 5_000, "demo.yaml:"),
        ("a:\n- " + "[" * 200_000, "demo.yaml:2: nested deeper than 32 levels"),
    ],
)
def test_files_that_are_something_else(text: str, wanted: str) -> None:
    assert sentence(text).startswith(wanted)


def test_a_file_whose_last_line_does_not_end_is_not_used(tmp_path: Path) -> None:
    """Whatever has written so much of it may not be done."""
    file = tmp_path / "demo.yaml"
    file.write_text((HEAD + SERVICE).rstrip("\n"))
    with pytest.raises(
        ConfigError, match=r"demo\.yaml:17: the last line does not end, so the file may be half written"
    ):
        load(file)
    file.write_text(HEAD + SERVICE)
    assert read(HEAD + SERVICE)[0] == load(file)[0]


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(missing)
    assert 2 == check(missing)
    assert f"{missing}: cannot be read: No such file or directory\n" == capsys.readouterr().err
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa\x80")
    with pytest.raises(ConfigError, match=r"bytes\.yaml:1: "):
        load(tmp_path / "bytes.yaml")
