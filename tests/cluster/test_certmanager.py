"""Certificates from cert-manager, with cert-manager's own controllers: asked for by the operator, collected for the
load balancers, spoken by both, renewed without a restart; and whatever is missing, the last good ones stay."""

import asyncio
import itertools
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from lbpod.certs import client_context, files_in, server_name
from lbpod.minting import mint
from tests.cluster.apiserver import ApiServer, Json
from tests.cluster.issuing import (
    GROUP,
    cert_manager,
    install_crds,
    remove_crds,
    renewal_asked_for,
    why_no_cert_manager,
)
from tests.cluster.site import Site, until
from tests.cluster.test_operator import ready

LOOK_S = 90
"""The operator looks every 30 s where nothing is missing."""
_NUMBERS = itertools.count(1)
pytestmark = pytest.mark.skipif(bool(why_no_cert_manager()), reason=why_no_cert_manager())


@asynccontextmanager
async def serving(api: ApiServer, namespace: str, folder: Path, *values: str) -> AsyncIterator[Site]:
    """Two nodes with agents, a Service with two backends, cert-manager and the operator."""
    site = Site(api, folder, namespace, f"cm-{next(_NUMBERS)}")
    api.call("POST", "/api/v1/namespaces", {"metadata": {"name": site.system}})
    with cert_manager(api, folder / "cert-manager.log"):
        install(site, *values)
        await site.add_nodes(2)
        await site.list_agents(1, 2)
        await site.put_service()
        await site.web(1, 2)
        site.start_operator()
        try:
            yield site
        finally:
            await site.stop_operator()
            site.uninstall()  # whoever plays the end-to-end tests on this cluster wants one without it
            for number in (1, 2):
                await site.delete(f"/api/v1/nodes/{site.node_name(number)}")


def install(site: Site, *values: str) -> None:
    """The chart; what the downward API would tell the operator, the test does."""
    site.install(*(values or ("tls.mode=certManager",)))
    site.settings |= {"HOLDFAST_POD": "operator-0", "HOLDFAST_POD_UID": "0000"}


@pytest.fixture
async def site(api: ApiServer, namespace: str, tmp_path: Path) -> AsyncIterator[Site]:
    """All of it, with a CA that the chart has made, and a VirtualService in force."""
    async with serving(api, namespace, tmp_path) as site, AsyncExitStack() as stack:
        await every_pair(site, 1, 2)
        for number in (1, 2):
            await stack.enter_async_context(site.agent(number))
        await site.put_virtual_service()
        await ready(site, 2)
        yield site


async def every_pair(site: Site, *numbers: int) -> None:
    """The nodes' Secret has those of these nodes and no others."""
    wanted = {f"{site.node_name(number)}.crt" for number in numbers} | {"ca.crt"}

    async def there() -> bool:
        return wanted == {file for file in await site.secret("holdfast-lb-tls") if file.endswith(".crt")}

    await told(site, f"certificates of {numbers}", there)


async def told(site: Site, what: str, said: Callable[[], Awaitable[object]]) -> None:
    """Waits for it, and shows what the operator said where it does not come."""
    try:
        await until(what, said, LOOK_S)
    except AssertionError as error:
        assert site.operator is not None
        raise AssertionError(f"{error}\n{site.operator.log.read_text()[-4000:]}") from None


async def certificates(site: Site) -> dict[str, Json]:
    """All Certificates of the operator's namespace."""
    listed = await site.call("GET", f"{GROUP}/namespaces/{site.system}/certificates")
    return {one["metadata"]["name"]: one for one in listed["items"]}


async def warnings(site: Site) -> dict[str, str]:
    """Events about the operator's pod, reason -> message."""
    found = await site.call("GET", f"/api/v1/namespaces/{site.system}/events")
    return {one["reason"]: one["message"] for one in found["items"] if one["involvedObject"]["name"] == "operator-0"}


async def shown(site: Site, number: int) -> int:
    """The serial number of the certificate that an agent shows to whoever calls it now."""
    tls = client_context(files_in(site.folder / "tls", "viewer"))
    name = server_name(site.node_name(number))
    _, writer = await asyncio.open_connection(site.node_address(number), site.agent_port, ssl=tls, server_hostname=name)
    connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
    serial = int(str((connection.getpeercert() or {})["serialNumber"]), 16)
    writer.close()
    return serial


async def test_certificates_are_issued_collected_and_spoken(site: Site, tmp_path: Path) -> None:
    names = [site.node_name(number) for number in (1, 2)]
    mint(tmp_path / "minted", names)
    lbs, own = await site.secret("holdfast-lb-tls"), await site.secret("holdfast-ca")
    assert lbs["ca.crt"] == own["ca.crt"]
    assert {"ca.crt", "controller.crt", "controller.key", "viewer.crt", "viewer.key"} == own.keys(), "and no CA's key"
    for name in ("controller", "viewer", *names):
        issued = x509.load_pem_x509_certificate({**lbs, **own}[f"{name}.crt"])
        minted = x509.load_pem_x509_certificate((tmp_path / f"minted/{name}.crt").read_bytes())
        for kind in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME):
            assert minted.subject.get_attributes_for_oid(kind) == issued.subject.get_attributes_for_oid(kind)
        for extension in (x509.SubjectAlternativeName, x509.KeyUsage):
            mine, theirs = (one.extensions.get_extension_for_class(extension).value for one in (minted, issued))
            assert mine == theirs
        uses = [set(one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) for one in (minted, issued)]
        assert uses[0] == uses[1]
    asked = await certificates(site)
    expected = {*(f"holdfast-lb-tls-{name}" for name in names), "holdfast-ca-controller", "holdfast-ca-viewer"}
    assert expected == asked.keys() - {f"{site.prefix}-issuer-ca"}
    states = await site.states()
    assert {2} == {len(one.snapshot.ring.members) for one in states.values() if one.snapshot is not None}
    assert site.operator is not None
    assert "KEY-----" not in site.operator.log.read_text()


async def test_a_node_that_comes_has_a_certificate_and_one_that_goes_has_none(site: Site) -> None:
    await site.add_nodes(3)
    await every_pair(site, 1, 2, 3)
    await site.delete(f"/api/v1/nodes/{site.node_name(3)}")
    await every_pair(site, 1, 2)
    assert f"holdfast-lb-tls-{site.node_name(3)}" not in await certificates(site)


async def test_a_renewal_needs_no_restart(site: Site) -> None:
    before = {number: await shown(site, number) for number in (1, 2)}
    pods = dict(site.agents)
    for name, certificate in (await certificates(site)).items():
        if not name.endswith("-issuer-ca"):
            path = f"{GROUP}/namespaces/{site.system}/certificates/{name}/status"
            await asyncio.to_thread(site.api.merge, path, renewal_asked_for(certificate))

    async def renewed() -> bool:
        await site.lay_out_certificates()  # as kubelet does
        return not set(before.values()) & {await shown(site, number) for number in (1, 2)}

    await told(site, "new certificates to be shown", renewed)

    async def operators_too() -> bool:
        assert site.operator is not None
        return '"event": "certificates renewed"' in site.operator.log.read_text()

    await told(site, "the operator to take its own", operators_too)
    await site.web(1, 2, 3)
    await ready(site, 3)
    assert pods == site.agents
    assert 0 == sum(agent.view.credentials.strangers for agent in site.agents.values())


async def test_an_issuer_that_is_not_there_is_named_and_what_was_good_stays(site: Site) -> None:
    before, name = await site.secret("holdfast-lb-tls"), f"{site.prefix}-corp"
    await site.stop_operator()
    issuer_ref = (f"tls.certManager.issuerRef.name={name}", "tls.certManager.issuerRef.kind=ClusterIssuer")
    # The chart's own Issuer goes with this; the Secret of its CA stays.
    await asyncio.to_thread(install, site, "tls.mode=certManager", *issuer_ref)
    site.start_operator()
    sentence = f"the ClusterIssuer {name} does not exist; make it, or correct tls.certManager.issuerRef"

    async def said() -> bool:
        return (await warnings(site)).get("IssuerNotFound") == sentence

    await told(site, "an event", said)
    assert before == await site.secret("holdfast-lb-tls")
    assert 'certificates_trouble{reason="IssuerNotFound"} 1.0' in (await site.http("/metrics"))[1]
    await site.web(1, 2, 3)
    await ready(site, 3)
    await put_ca(site, f"{name}-none", "holdfast-ca-viewer")
    await put_cluster_issuer(site, name, f"{name}-none")

    async def not_ready() -> bool:
        return f"{name} is not ready: " in (await warnings(site)).get("IssuerNotReady", "")

    await told(site, "a CA that is none to be named", not_ready)
    await put_ca(site, f"{name}-ca", f"{site.prefix}-issuer-ca")
    await put_cluster_issuer(site, name, f"{name}-ca")

    async def healed() -> bool:
        return "CertificatesIssued" in await warnings(site)

    await told(site, "the end of it to be told", healed)
    after = await site.secret("holdfast-lb-tls")
    assert before["ca.crt"] == after["ca.crt"]
    assert [] == [file for file in before if file != "ca.crt" and before[file] == after[file]]


async def put_ca(site: Site, name: str, source: str) -> None:
    """The pair of a Secret of the operator's namespace, where ClusterIssuers have theirs."""
    made = await site.call("GET", f"/api/v1/namespaces/{site.system}/secrets/{source}")
    copy = {"metadata": {"name": name}, "type": made["type"], "data": made["data"]}
    await site.put("/api/v1/namespaces", {"metadata": {"name": "cert-manager"}})
    await site.put("/api/v1/namespaces/cert-manager/secrets", copy)


async def put_cluster_issuer(site: Site, name: str, secret: str) -> None:
    kind = {"apiVersion": "cert-manager.io/v1", "kind": "ClusterIssuer"}
    body = {**kind, "metadata": {"name": name}, "spec": {"ca": {"secretName": secret}}}
    await site.put(f"{GROUP}/clusterissuers", body)


async def test_without_cert_manager_the_last_good_ones_are_used(site: Site) -> None:
    before = await site.secret("holdfast-lb-tls")
    await asyncio.to_thread(remove_crds, site.api)
    await site.stop_operator(signal.SIGKILL)
    site.start_operator()

    async def said() -> bool:
        return (await warnings(site)).get("CertManagerMissing", "").startswith("cert-manager is not installed: ")

    await told(site, "an event", said)
    await site.web(1, 2, 3)
    await ready(site, 3)
    assert before == await site.secret("holdfast-lb-tls")
    await asyncio.to_thread(install_crds, site.api)
    await asyncio.to_thread(install, site)

    async def healed() -> bool:
        return "CertificatesIssued" in await warnings(site)

    await told(site, "the end of it to be told", healed)


async def test_from_minted_certificates_to_issued_ones_nobody_is_cut_off(
    api: ApiServer, namespace: str, tmp_path: Path
) -> None:
    async with serving(api, namespace, tmp_path, "tls.mode=mint") as site, AsyncExitStack() as stack:
        for number in (1, 2):
            await stack.enter_async_context(site.agent(number))
        await site.put_virtual_service()
        await ready(site, 2)
        minted = await site.secret("holdfast-lb-tls")
        await site.stop_operator()
        await asyncio.to_thread(install, site)
        site.start_operator()

        async def both() -> bool:
            return (await site.secret("holdfast-lb-tls"))["ca.crt"].count(b"BEGIN") == 2

        await told(site, "the new CA beside the old one", both)
        now = await site.secret("holdfast-lb-tls")
        assert {file: data for file, data in minted.items() if file != "ca.crt"} == {
            file: data for file, data in now.items() if file != "ca.crt"
        }, "a pair of a CA that is new waits"
        await site.lay_out_certificates()
        await site.web(1, 2, 3)
        await ready(site, 3)
        # Five minutes later, says the Secret.
        secret = f"/api/v1/namespaces/{site.system}/secrets/holdfast-lb-tls"
        note = {"metadata": {"annotations": {"holdfast.dev/ca-added-at": "2026-01-01T00:00:00Z"}}}
        await asyncio.to_thread(site.api.merge, secret, note)

        async def taken() -> bool:
            issued = await site.secret("holdfast-lb-tls")
            return all(issued[file] != minted[file] for file in minted)

        await told(site, "the new pairs", taken)
        serial, old_ca = await shown(site, 1), minted["ca.crt"].strip()
        assert old_ca in (await site.secret("holdfast-lb-tls"))["ca.crt"], "somebody may still show what it signed"
        await site.lay_out_certificates()

        async def changed() -> bool:
            return await shown(site, 1) != serial

        await told(site, "them to be shown", changed)
        # And five minutes later once more.
        note = {"metadata": {"annotations": {"holdfast.dev/ca-idle-since": "2026-01-01T00:00:00Z"}}}
        await asyncio.to_thread(site.api.merge, secret, note)

        async def gone() -> bool:
            return old_ca not in (await site.secret("holdfast-lb-tls"))["ca.crt"]

        await told(site, "the old CA to go", gone)
        await site.web(1, 2, 3, 4)
        await ready(site, 4)
        assert 0 == sum(agent.view.credentials.strangers for agent in site.agents.values())
