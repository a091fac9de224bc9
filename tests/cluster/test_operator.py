"""The operator on a real API server, with real agents: objects become slots, statuses become true, and whatever stops,
starts or is wrong, nothing that serves stops serving."""

import asyncio
import itertools
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.cluster.apiserver import ApiServer, free_port
from tests.cluster.site import VIRTUAL_SERVICES, Site, conditions_of, until
from tests.operator_objects import endpoint

_NUMBERS = itertools.count(1)

SLICES = 500
"""Of one Service. An operator that looked at what its watch has told of first would know some of them: about a second's
worth of events."""


@pytest.fixture
async def site(api: ApiServer, namespace: str, tmp_path: Path) -> AsyncIterator[Site]:
    """Two nodes with agents, a Service with two backends, and the operator, which has made the certificates."""
    prefix = f"op-{next(_NUMBERS)}"
    site = Site(api, tmp_path, namespace, prefix)
    api.call("POST", "/api/v1/namespaces", {"metadata": {"name": site.system}})
    site.install()
    await site.add_nodes(2)
    await site.list_agents(1, 2)
    await site.put_service()
    await site.web(1, 2)
    site.start_operator()
    try:
        async with AsyncExitStack() as stack:
            for number in (1, 2):
                await stack.enter_async_context(site.agent(number))
            yield site
    finally:
        await site.stop_operator()
        for number in (1, 2):
            await site.delete(f"/api/v1/nodes/{site.node_name(number)}")


async def ready(site: Site, backends: int, name: str = "web") -> None:
    """It is in force everywhere."""

    async def said() -> bool:
        status = await site.status(name)
        words = conditions_of(status)
        return bool(words) and words["Converged"][0] == "True" and status["backends"]["ready"] == backends

    try:
        await until("", said)
    except AssertionError:
        assert site.operator is not None
        raise AssertionError(f"{await site.status(name)}\n{site.operator.log.read_text()[-6000:]}") from None


async def test_objects_become_slots_and_statuses_true(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    names = [site.node_name(number) for number in (1, 2)]
    assert [[1, 2], [1, 2]] == [site.backends(name) for name in names]
    status = await site.status()
    assert {"ready": 2, "draining": 0} == status["backends"]
    assert {"ready": 2, "atEpoch": 2} == status["loadBalancers"]
    assert (1, "80/TCP") == (status["observedGeneration"], status["ports"])
    words = await site.conditions()
    assert ["True", "True", "True", "True", "False", "True"] == [
        words[kind][0] for kind in ("Accepted", "ResolvedRefs", "Programmed", "Converged", "Degraded", "Ready")
    ]
    assert "condition met" in await asyncio.to_thread(
        site.api.kubectl, "-n", site.shop, "wait", "--for=condition=Ready", "--timeout=10s", "virtualservice/web"
    )

    await site.web(1, 2, 3)
    await ready(site, 3)
    assert [[1, 2, 3], [1, 2, 3]] == [site.backends(name) for name in names]
    assert (await site.status())["epoch"] > status["epoch"]
    await until("slots that track to be shown", lambda: _shows_tracking(site, some=True))
    await until("them to settle", lambda: _shows_tracking(site, some=False))
    assert [("Normal", "Ready")] == await site.events(), "one transition, one event"
    assert (200, "ok\n") == await site.http("/readyz")
    metrics = (await site.http("/metrics"))[1]
    assert "holdfast_virtualservices 1.0" in metrics
    assert 'holdfast_controller_calls_total{call="CommitCall",outcome="answered"}' in metrics

    await site.delete(f"{VIRTUAL_SERVICES.format(site.shop)}/web")

    async def gone() -> bool:
        return not any(one.snapshot.vips for one in (await site.states()).values() if one.snapshot is not None)

    await until("the VIP to go", gone)


async def test_a_killed_operator_comes_back_and_changes_no_slot(site: Site) -> None:
    await site.stop_operator()
    for first in range(0, SLICES, 20):
        some = range(first, first + 20)
        await asyncio.gather(*(site.web(10 + one, name=f"more-{one}") for one in some))
    site.start_operator()
    await site.put_virtual_service()
    await ready(site, 2 + SLICES)
    names = [site.node_name(number) for number in (1, 2)]
    before = {name: (site.slots(name), (await site.states())[name].snapshot) for name in names}
    await site.stop_operator(signal.SIGKILL)
    site.start_operator()
    await until("the operator to be ready", lambda: _is_ready(site))
    await asyncio.sleep(1)
    states = await site.states()
    assert before == {name: (site.slots(name), states[name].snapshot) for name in names}
    await site.web(1, 2, 3)
    await ready(site, 3 + SLICES)


async def _shows_tracking(site: Site, *, some: bool) -> bool:
    return bool((await site.status())["trackingSlots"]) is some


async def _is_ready(site: Site) -> bool:
    return (await site.http("/readyz"))[0] == 200


async def test_what_is_wrong_is_said_and_the_last_good_state_stays(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    before = site.slots(site.node_name(1))

    await site.put_virtual_service(ports=[{"name": "http", "port": 80, "targetPort": "metrics"}])
    await site.until_condition("ResolvedRefs", "False", "PortNotFound")
    await site.delete(f"/api/v1/namespaces/{site.shop}/services/web")
    await site.until_condition("ResolvedRefs", "False", "ServiceNotFound")
    await site.until_condition("Ready", "False", "ServiceNotFound")
    words = await site.conditions()
    assert {"Programmed": ("True", "Programmed"), "Degraded": ("True", "LastGoodState")} == {
        kind: words[kind] for kind in ("Programmed", "Degraded")
    }
    assert 'not_served{reason="ServiceNotFound"} 1.0' in (await site.http("/metrics"))[1]
    assert before == site.slots(site.node_name(1))

    async def told() -> bool:
        return ("Warning", "ServiceNotFound") in await site.events()

    await until("the event, which follows the status", told)
    # Not even a restart forgets it.
    await site.stop_operator(signal.SIGKILL)
    site.start_operator()
    await until("the operator to be ready", lambda: _is_ready(site))
    await asyncio.sleep(1)
    assert before == site.slots(site.node_name(1))

    await site.put_service()
    await site.put_virtual_service()
    await ready(site, 2)
    assert before == site.slots(site.node_name(1))
    assert ["PortNotFound", "Ready", "Ready", "ResolvedRefsHealed", "ServiceNotFound"] == sorted(
        reason for _, reason in await site.events()
    )


async def test_a_lost_state_object_is_made_anew_from_what_load_balancers_know(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    path = f"/api/v1/namespaces/{site.system}/configmaps/{site.prefix}-state"
    data = (await site.call("GET", path))["data"]
    before = site.slots(site.node_name(1))
    await site.stop_operator()
    await site.delete(path)
    site.start_operator()
    await until("the operator to be ready", lambda: _is_ready(site))
    again = (await site.call("GET", path))["data"]
    assert (data["seed"], data["vni"]) == (again["seed"], again["vni"])
    assert before == site.slots(site.node_name(1))
    await site.web(1)
    await ready(site, 1)
    assert int((await site.call("GET", path))["data"]["generation"]) > int(data["generation"])


async def test_the_api_server_restarts_and_what_was_deleted_meanwhile_is_gone(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    before = site.slots(site.node_name(1))
    await asyncio.to_thread(site.api.apiserver.stop, signal.SIGKILL)
    await asyncio.sleep(2)
    assert before == site.slots(site.node_name(1)), "load balancers go on without it"
    site.api.apiserver.start()
    await asyncio.to_thread(site.api.wait)
    await site.web(2, 3, 4)
    await ready(site, 3)


async def test_terminating_endpoints_drain(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    name = site.node_name(1)
    going = endpoint("10.1.0.1", name, ready=False, serving=True, terminating=True)
    await site.put_slice(going, endpoint("10.1.0.2", site.node_name(2), ready=True))
    await ready(site, 1)
    assert {"ready": 1, "draining": 1} == (await site.status())["backends"]
    assert [2] == site.backends(name), "new connections go to the other"


async def test_of_two_that_want_one_address_the_younger_is_told(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    await asyncio.sleep(1.1)  # ages are in seconds
    await site.put_virtual_service("second")
    await site.until_condition("Accepted", "False", "AddressConflict", "second")
    assert [("Warning", "AddressConflict")] == await site.events("second")
    await site.delete(f"{VIRTUAL_SERVICES.format(site.shop)}/web")
    await ready(site, 2, "second")


async def test_the_ring_follows_the_agents(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    site.agents[site.node_name(2)].stop()

    async def lbs() -> int:
        return int((await site.status())["loadBalancers"]["ready"])

    await until("the silent one to be given up", lambda: _equals(lbs, 1))
    del site.agents[site.node_name(2)]
    async with site.agent(2):
        await until("it to join again", lambda: _equals(lbs, 2))
        await ready(site, 2)


async def _equals(said: object, wanted: int) -> bool:
    assert callable(said)
    return bool(await said() == wanted)


async def test_logs_are_json_line_by_line(site: Site) -> None:
    await site.put_virtual_service()
    await ready(site, 2)
    assert site.operator is not None
    lines = [json.loads(line) for line in site.operator.log.read_text().splitlines()]
    assert all({"event", "level", "timestamp"} <= one.keys() for one in lines)
    assert "phase" in {one["event"] for one in lines}
    secrets = await site.secret("holdfast-ca")
    assert secrets["ca.key"].decode() not in site.operator.log.read_text()


async def test_a_service_of_our_class_gets_a_virtual_service_and_says_where_it_is(site: Site) -> None:
    services = f"/api/v1/namespaces/{site.shop}/services"
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    spec = {"type": "LoadBalancer", "loadBalancerClass": "holdfast.dev/holdfast", "ports": ports}
    await site.call("POST", services, {"metadata": {"name": "shop"}, "spec": spec})
    path = f"/api/v1/namespaces/{site.shop}/events"

    async def told(reason: str) -> bool:
        events = (await site.call("GET", path))["items"]
        return reason in {one["reason"] for one in events if one["involvedObject"]["kind"] == "Service"}

    async def ask(address: str) -> None:
        annotation = {"metadata": {"annotations": {"holdfast.dev/address": address}}}
        await asyncio.to_thread(site.api.merge, f"{services}/shop", annotation)

    await until("the missing address to be said", lambda: told("NoAddressRequested"))
    await site.put_slice(endpoint("10.1.0.7", site.node_name(1), ready=True), name="shop-1", service="shop")
    await ask("203.0.113.20")

    async def ingress(*wanted: str) -> bool:
        status = (await site.call("GET", f"{services}/shop"))["status"]["loadBalancer"]
        return bool(status.get("ingress", []) == [{"ip": one, "ipMode": "VIP"} for one in wanted])

    await until("the address to be told", lambda: ingress("203.0.113.20"))
    assert "True" == (await site.conditions("shop"))["Ready"][0]
    assert [1] == site.backends(site.node_name(1))
    made = (await site.call("GET", f"{VIRTUAL_SERVICES.format(site.shop)}/shop"))["metadata"]["uid"]
    await ask("203.0.113.2O")
    await until("the mistake to be said", lambda: told("Invalid"))
    assert await ingress("203.0.113.20"), "a mistake takes nothing away"
    assert made == (await site.call("GET", f"{VIRTUAL_SERVICES.format(site.shop)}/shop"))["metadata"]["uid"]
    await site.put_virtual_service(address="203.0.113.30")
    await asyncio.sleep(1.1)  # creation times are whole seconds, and of two equal ones the names decide
    await ask("203.0.113.30")
    await until("the conflict to be said of the Service", lambda: told("AddressConflict"))
    assert await ingress()
    await ask("203.0.113.20")
    await until("the address to be told again", lambda: ingress("203.0.113.20"))
    await site.delete(f"{VIRTUAL_SERVICES.format(site.shop)}/web")
    await site.delete(f"{services}/shop")

    async def gone() -> bool:
        return not (await site.call("GET", VIRTUAL_SERVICES.format(site.shop)))["items"]

    await until("its VirtualService to go with it", gone)


async def test_of_two_operators_one_works_and_the_other_takes_over(site: Site) -> None:
    await site.stop_operator()
    await asyncio.to_thread(site.install, "operator.replicas=2")
    site.settings["HOLDFAST_LEASE"] = f"{site.prefix}-operator"
    site.start_operator()
    await site.put_virtual_service()
    await ready(site, 2)
    before = site.slots(site.node_name(1))
    second_port = free_port()
    second = site.make_operator("second", second_port)
    second.start()
    try:
        lease = f"/apis/coordination.k8s.io/v1/namespaces/{site.system}/leases/{site.prefix}-operator"
        holder = (await site.call("GET", lease))["spec"]["holderIdentity"]
        await asyncio.sleep(3)
        assert "lease acquired" not in second.log.read_text()
        await site.stop_operator(signal.SIGKILL)

        async def taken_over() -> bool:
            return bool((await site.call("GET", lease))["spec"]["holderIdentity"] != holder)

        await until("the second to take over", taken_over)
        await site.web(1, 2, 3)
        await ready(site, 3)
        assert before != site.slots(site.node_name(1))
    finally:
        await asyncio.to_thread(second.stop)
    assert "" == (await site.call("GET", lease))["spec"].get("holderIdentity", ""), "given back at the end"
