"""The chart: what helm and the API server say of it, with default values and with everything switched on; what its
schema refuses; and the promises about privileges, rights and upgrades, read from what is really rendered."""

import json
import re
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.apiserver import ApiError, ApiServer, Json
from tests.cluster.issuing import install_crds, remove_crds, why_no_cert_manager
from tests.tidy.sources import ROOT

CHART = str(ROOT / "charts/holdfast")
EVERYTHING = (
    "operator.replicas=2",
    "monitoring.kind=podMonitor",
    "loadBalancers.exposeHttp=true",
    "monitoring.prometheusRule.enabled=true",
    "monitoring.dashboard.enabled=true",
    "test.address=203.0.113.99",
    "diagnostics.redis.url=redis://redis.tools:6379/1",
    "diagnostics.redis.passwordSecret.name=redis",
    "allowedAddresses={203.0.113.0/24,198.51.100.7}",
    "loadBalancers.mapSizes.records=1048576",
    "loadBalancers.interface=bond0",
    "loadBalancers.seLinuxOptions.type=spc_t",
    "loadBalancers.lbNodeLabels.edge=yes",
    "image.registry=registry.example:5000",
    "image.pullSecrets[0].name=registry",
    f"operator.image.digest=sha256:{'0' * 64}",
    "operator.podLabels.team=net",
    "operator.podAnnotations.a=b",
    "operator.nodeSelector.role=infra",
    "operator.tolerations[0].operator=Exists",
    "operator.extraEnv[0].name=A",
    "operator.extraEnv[0].value=B",
)
OTHERS = ("monitoring.coreos.com",)
"""Groups of CRDs that are not ours, and not installed here."""


def render(api: ApiServer, *values: str, namespace: str = "default") -> list[Json]:
    flags = [flag for one in values for flag in ("--set-string" if one.endswith("=yes") else "--set", one)]
    text = api.helm("template", "holdfast", CHART, "--namespace", namespace, *flags)
    return [one for one in yaml.safe_load_all(text) if one]


def one(objects: list[Json], kind: str, name: str = "") -> Json:
    found = [each for each in objects if each["kind"] == kind and name in each["metadata"]["name"]]
    assert 1 == len(found), [each["metadata"]["name"] for each in found]
    return found[0]


def test_helm_has_nothing_to_complain_about(api: ApiServer) -> None:
    assert "0 chart(s) failed" in api.helm("lint", "--strict", CHART)


@pytest.mark.parametrize(
    "values", [(), EVERYTHING, ("tls.mode=own", "loadBalancerClass=")], ids=["default", "all", "own"]
)
def test_the_api_server_takes_every_object(api: ApiServer, namespace: str, values: tuple[str, ...]) -> None:
    api.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "default"}})
    objects = render(api, *values, namespace=namespace)
    known = [each for each in objects if each["apiVersion"].split("/")[0] not in OTHERS]
    text = yaml.safe_dump_all(known)
    said = api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
    assert len(known) == said.count("(server dry run)"), said
    accounts = [each for each in known if each["kind"] == "ServiceAccount"]
    assert 2 == len(accounts)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("replicas=1", "additional properties 'replicas' not allowed"),
        ("operator.replica=1", "additional properties 'replica' not allowed"),
        ("operator.replicas=3", "at '/operator/replicas': maximum: got 3, want 2"),
        ("operator.logLevel=loud", "at '/operator/logLevel': value must be one of 'debug', 'info', 'warning', 'error'"),
        ("monitoring.kind=both", "at '/monitoring/kind': value must be one of 'none', 'serviceMonitor', 'podMonitor'"),
        ("allowedAddresses={203.0.113.0/33}", "at '/allowedAddresses/0'"),
        ("allowedAddresses={web}", "at '/allowedAddresses/0'"),
        ("allowedAddresses={203.0.113.08}", "at '/allowedAddresses/0'"),
        ("allowedAddresses={203.00.113.0/24}", "at '/allowedAddresses/0'"),
        ("test.address=203.0.113.08", "at '/test/address'"),
        ("vni=16777216", "at '/vni': maximum"),
        ("loadBalancers.port=0", "at '/loadBalancers/port': minimum"),
        ("loadBalancers.httpPort=9900", "loadBalancers.port and loadBalancers.httpPort have to differ"),
        ("loadBalancers.onTerm=die", "at '/loadBalancers/onTerm': value must be one of 'leave', 'stay'"),
        ("loadBalancers.mapSizes.slots=1", "additional properties 'slots' not allowed"),
        ("loadBalancers.seLinuxOptions.domain=spc_t", "additional properties 'domain' not allowed"),
        ("operator.image.digest=sha256:abc", "at '/operator/image/digest'"),
        ("monitoring.prometheusRule.disabled={Other}", "at '/monitoring/prometheusRule/disabled/0'"),
        ("diagnostics.redis.url=http://redis:6379", "at '/diagnostics/redis/url'"),
        ("diagnostics.redis.url=redis://:secret@redis:6379", "at '/diagnostics/redis/url'"),
        ("diagnostics.redis.passwordSecret.name=Not-A-Name", "at '/diagnostics/redis/passwordSecret/name'"),
        ("tls.mint=false", "additional properties 'mint' not allowed"),
        ("tls.nodesSecret=holdfast-ca", "tls.caSecret and tls.nodesSecret have to differ"),
        ("tls.mode=own,tls.caSecret=holdfast-lb-tls", "tls.caSecret and tls.nodesSecret have to differ"),
        ("tls.mode=certmanager", "at '/tls/mode': value must be one of 'mint', 'certManager', 'own'"),
        ("tls.certManager.issuer=x", "additional properties 'issuer' not allowed"),
        ("tls.certManager.issuerRef.namespace=x", "additional properties 'namespace' not allowed"),
        ("tls.certManager.issuerRef.name=Not-A-Name", "at '/tls/certManager/issuerRef/name'"),
        ("tls.certManager.issuerRef.kind=issuer", "at '/tls/certManager/issuerRef/kind'"),
        ("tls.certManager.hours=2160h", "at '/tls/certManager/hours': got string, want integer"),
        ("tls.certManager.renewHours=0", "at '/tls/certManager/renewHours': minimum: got 0, want 1"),
        ("tls.certManager.issuerRef.name=x", "set tls.mode to certManager"),
        ("tls.mode=certManager,tls.certManager.hours=720", "renewHours has to be less than tls.certManager.hours"),
        (
            "tls.mode=certManager,tls.certManager.issuerRef.name=x,tls.certManager.issuerRef.kind=Other",
            "kind is Issuer or ClusterIssuer",
        ),
        ("crds.enabled=maybe", "at '/crds/enabled': got string, want boolean"),
        ("monitoring.kind=podMonitor", "set loadBalancers.exposeHttp to true"),
    ],
)
def test_a_bad_value_is_refused_with_its_place(api: ApiServer, value: str, sentence: str) -> None:
    with pytest.raises(AssertionError) as refused:
        api.helm("template", "holdfast", CHART, "--set", value)
    assert sentence in str(refused.value)


def test_all_octets_that_there_are_may_be_allowed(api: ApiServer) -> None:
    octets = ",".join(f"{octet}.{octet}.0.{octet}/32" for octet in range(256))
    assert render(api, f"allowedAddresses={{{octets}}}", "test.address=203.0.113.108")


def test_load_balancers_have_three_capabilities_and_no_token(api: ApiServer) -> None:
    objects = render(api)
    pod = one(objects, "DaemonSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {
        "runAsUser": 0,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "BPF", "PERFMON"]},
        "seccompProfile": {"type": "RuntimeDefault"},
        "appArmorProfile": {"type": "Unconfined"},  # the runtimes' default one lets nobody pin below /sys/fs/bpf
    } == container["securityContext"]
    assert (True, False) == (pod["hostNetwork"], pod["automountServiceAccountToken"])
    assert "hostPID" not in pod
    assert {"/sys/fs/bpf", "/run/holdfast"} == {
        each["hostPath"]["path"] for each in pod["volumes"] if "hostPath" in each
    }
    assert False is one(objects, "ServiceAccount", "-lb")["automountServiceAccountToken"]
    bound = [
        subject["name"] for each in objects if each["kind"].endswith("RoleBinding") for subject in each["subjects"]
    ]
    assert {"holdfast-operator"} == set(bound), "load balancers have no role"


def test_load_balancers_get_the_selinux_label_that_is_asked_for(api: ApiServer) -> None:
    (container,) = one(render(api, *EVERYTHING), "DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert {"type": "spc_t"} == container["securityContext"]["seLinuxOptions"]


def test_diagnostics_are_off_until_there_is_a_url(api: ApiServer) -> None:
    def told(*values: str) -> tuple[dict[str, str], list[str]]:
        pod = one(render(api, *values), "DaemonSet")["spec"]["template"]["spec"]
        env = {each["name"]: each.get("value", "") for each in pod["containers"][0]["env"]}
        optional = [each["name"] for each in pod["volumes"] if each.get("secret", {}).get("optional")]
        return {name: value for name, value in env.items() if "REDIS" in name}, optional

    secret, url = "diagnostics.redis.passwordSecret.name=redis", "diagnostics.redis.url=redis://10.0.0.9"
    assert ({}, []) == told(secret)
    assert ({"HOLDFAST_REDIS_URL": "redis://10.0.0.9"}, []) == told(url)
    env, optional = told(url, secret)
    assert ("/etc/holdfast/redis/password", ["redis"]) == (env["HOLDFAST_REDIS_PASSWORD_FILE"], optional)


def test_the_operator_is_nobody_and_reads_its_own_secrets_only(api: ApiServer) -> None:
    objects = render(api)
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    context = container["securityContext"]
    assert (True, True, ["ALL"]) == (
        context["runAsNonRoot"],
        context["readOnlyRootFilesystem"],
        context["capabilities"]["drop"],
    )
    everywhere = one(objects, "ClusterRole")["rules"]
    assert not any("secrets" in rule["resources"] or "pods" in rule["resources"] for rule in everywhere)
    assert not any("*" in rule["verbs"] + rule["resources"] for rule in everywhere)
    own = [rule for rule in one(objects, "Role")["rules"] if "secrets" in rule["resources"]]
    assert [None, ["holdfast-ca", "holdfast-lb-tls"]] == [rule.get("resourceNames") for rule in own]
    assert ["create"] == own[0]["verbs"]


def rules_of(objects: list[Json], kind: str, group: str) -> list[tuple[str, list[str], list[str]]]:
    """Resource, verbs and names of each rule of the operator's role about a group."""
    found = [each for each in one(objects, kind)["rules"] if group in each["apiGroups"]]
    return [(name, each["verbs"], each.get("resourceNames", [])) for each in found for name in each["resources"]]


def test_rights_about_cert_manager_only_where_it_is_asked(api: ApiServer) -> None:
    group, mode, issuer = "cert-manager.io", "tls.mode=certManager", "tls.certManager.issuerRef"
    asked: tuple[str, list[str], list[str]] = ("certificates", ["list", "create", "patch", "delete"], [])
    for values in ((), ("tls.mode=own",)):
        objects = render(api, *values)
        assert [] == rules_of(objects, "Role", group) + rules_of(objects, "ClusterRole", group)
        assert not any(each["apiVersion"].startswith(group) for each in objects)
    own = render(api, mode)
    assert [asked, ("issuers", ["get"], ["holdfast-ca"])] == rules_of(own, "Role", group)
    assert [] == rules_of(own, "ClusterRole", group)
    assert ["Certificate", "Issuer", "Issuer"] == sorted(
        each["kind"] for each in own if each["apiVersion"].startswith(group)
    )
    wide = render(api, mode, f"{issuer}.name=corp", f"{issuer}.kind=ClusterIssuer")
    assert [asked] == rules_of(wide, "Role", group)
    assert [("clusterissuers", ["get"], ["corp"])] == rules_of(wide, "ClusterRole", group)
    assert not any(each["apiVersion"].startswith(group) for each in wide), "the Issuer is somebody else's"
    foreign = render(api, mode, f"{issuer}.name=pca", f"{issuer}.kind=PcaIssuer", f"{issuer}.group=pca.example")
    assert [asked] == rules_of(foreign, "Role", group)
    assert [] == rules_of(foreign, "ClusterRole", group)


@pytest.mark.skipif(bool(why_no_cert_manager()), reason=why_no_cert_manager())
def test_the_api_server_takes_what_cert_manager_is_asked(api: ApiServer, namespace: str) -> None:
    install_crds(api)
    try:
        objects = render(api, "tls.mode=certManager", namespace=namespace)
        asked = [each for each in objects if each["apiVersion"] == "cert-manager.io/v1"]
        text = yaml.safe_dump_all(asked)
        said = api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
        assert 3 == said.count("(server dry run)"), said
    finally:
        remove_crds(api)


def test_without_a_load_balancer_class_services_are_read_only(api: ApiServer) -> None:
    rules = one(render(api, "loadBalancerClass="), "ClusterRole")["rules"]
    assert not any("services/status" in rule["resources"] for rule in rules)
    assert not any(
        {"create", "delete"} & set(rule["verbs"]) for rule in rules if "virtualservices" in rule["resources"]
    )


def test_a_budget_only_where_there_is_somebody_to_stay(api: ApiServer) -> None:
    assert not [each for each in render(api) if each["kind"] == "PodDisruptionBudget"]
    assert {"type": "Recreate"} == one(render(api), "Deployment")["spec"]["strategy"]
    two = render(api, "operator.replicas=2")
    assert 1 == one(two, "PodDisruptionBudget")["spec"]["minAvailable"]


def test_the_network_policy_covers_whoever_asks_the_api_server(api: ApiServer) -> None:
    objects = render(api)
    chosen = one(objects, "NetworkPolicy")["spec"]["podSelector"]
    (among,) = chosen["matchExpressions"]
    assert ("app.kubernetes.io/component", "In") == (among["key"], among["operator"])
    pods = [
        each["spec"]["template"]
        for each in objects
        if each.get("spec", {}).get("template", {}).get("spec", {}).get("automountServiceAccountToken")
    ]
    assert len(pods) == 2, "the operator's, and the farewell's"
    for pod in pods:
        labels = pod["metadata"]["labels"]
        assert chosen["matchLabels"].items() <= labels.items()
        assert labels[among["key"]] in among["values"]


def test_monitors_exclude_each_other(api: ApiServer) -> None:
    def kinds(*values: str) -> set[str]:
        return {each["kind"] for each in render(api, *values)} & {"ServiceMonitor", "PodMonitor"}

    assert set() == kinds()
    assert {"ServiceMonitor"} == kinds("monitoring.kind=serviceMonitor")
    assert {"PodMonitor"} == kinds("monitoring.kind=podMonitor", "loadBalancers.exposeHttp=true")


def test_alerts_and_dashboard_use_metrics_that_there_are(api: ApiServer) -> None:
    objects = render(api, *EVERYTHING)
    rules = one(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]
    schema = json.loads(Path(CHART, "values.schema.json").read_text())
    disabled = schema["properties"]["monitoring"]["properties"]["prometheusRule"]["properties"]["disabled"]
    assert [rule["alert"] for rule in rules] == disabled["items"]["enum"]
    sources = "".join(
        (ROOT / file).read_text()
        for file in ("lbpod/agent/metrics.py", "lbpod/controller/metrics.py", "operator/lboperator/metrics.py")
    )
    dashboard = one(objects, "ConfigMap", "dashboard")["data"]["holdfast.json"]
    asked = " ".join([*(rule["expr"] for rule in rules), dashboard])
    names = set(re.findall(r"holdfast_[a-z_]+", asked))
    assert [] == sorted(name for name in names if f'"{name.removesuffix("_total")}"' not in sources)
    assert json.loads(dashboard)["panels"]
    fewer = render(api, *EVERYTHING, "monitoring.prometheusRule.disabled={HoldfastNotNative}")
    assert len(rules) - 1 == len(one(fewer, "PrometheusRule")["spec"]["groups"][0]["rules"])


def test_every_value_is_explained() -> None:
    bare = []
    lines = Path(CHART, "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        key = re.match(r"( *)([A-Za-z]+):(?: *(.*))?$", line)
        if key is None or (not key[3] and number + 1 < len(lines) and lines[number + 1].lstrip().startswith("#")):
            continue  # a group, whose members are explained
        is_group = not key[3]
        if (
            not is_group
            and not lines[number - 1].lstrip().startswith("#")
            and "updateStrategy" not in lines[number - 1]
        ):
            bare.append(line)
    assert [] == [
        line
        for line in bare
        if line.strip()
        not in {
            "rollingUpdate: {maxUnavailable: 1}",
            "requests: {cpu: 50m, memory: 128Mi}",
            "limits: {memory: 512Mi}",
            "limits: {memory: 1Gi}",
        }
    ]


def play_kubelet(api: ApiServer, namespace: str, names: Collection[str], ended: threading.Event) -> None:
    """Pods of these names end well as soon as they are there; every other one goes on for ever."""
    done = {"status": {"phase": "Succeeded"}}
    while not ended.wait(0.2):
        for pod in api.call("GET", f"/api/v1/namespaces/{namespace}/pods")["items"]:
            name = pod["metadata"]["name"]
            if name in names and pod["status"].get("phase") != "Succeeded":
                with suppress(ApiError):  # deleted in between
                    api.merge(f"/api/v1/namespaces/{namespace}/pods/{name}/status", done)


def test_a_test_ends_although_its_server_does_not_and_leaves_nothing(api: ApiServer, namespace: str) -> None:
    """Helm's own waiting, with the pods' ends played here, as there is no kubelet."""
    api.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "default"}})
    release = ("holdfast", "--namespace", namespace)
    ours = ("--set", f"test.address=203.0.113.99,fullnameOverride={namespace}", "--take-ownership", "--force-conflicts")
    api.helm("install", *release[:1], CHART, *release[1:], *ours)
    fetching, ended = {f"{namespace}-test-page", f"{namespace}-test-ready"}, threading.Event()
    kubelet = threading.Thread(target=play_kubelet, args=(api, namespace, fetching, ended))
    kubelet.start()
    try:
        said = api.helm("test", *release, "--timeout", "60s")
    finally:
        ended.set()
        kubelet.join()
        api.helm("uninstall", *release, "--no-hooks")
    assert 5 == said.count("Succeeded"), said
    kinds = ("pods", "deployments.apps", "services", "virtualservices.holdfast.dev")
    assert "" == api.kubectl("-n", namespace, "get", ",".join(kinds), "-o", "name")


def test_the_page_is_fetched_from_another_node_than_it_is_on(api: ApiServer) -> None:
    objects = render(api, "test.address=203.0.113.99")
    server = one(objects, "Deployment", "test-web")["spec"]
    pod = one(objects, "Pod", "test-page")["spec"]
    (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert ("kubernetes.io/hostname", server["selector"]) == (apart["topologyKey"], apart["labelSelector"])
    assert pod["hostNetwork"]
    agents = one(objects, "DaemonSet")["spec"]["template"]["spec"]["nodeSelector"]
    assert agents == server["template"]["spec"]["nodeSelector"] == pod["nodeSelector"]


def test_the_crd_that_stays_is_taken_over_by_another_release_or_left_alone(api: ApiServer, namespace: str) -> None:
    def install(name: str, *flags: str) -> None:
        api.helm("install", f"{namespace}-{name}", CHART, "--namespace", namespace, *flags)
        api.helm("uninstall", f"{namespace}-{name}", "--namespace", namespace, "--no-hooks")

    install("first", "--take-ownership", "--force-conflicts")  # before, it was kubectl's
    with pytest.raises(AssertionError, match="invalid ownership metadata"):
        install("second")
    install("second", "--take-ownership")
    install("third", "--set", "crds.enabled=false")
    install("second")


def test_an_installation_is_upgraded_rolled_back_and_removed(api: ApiServer, namespace: str) -> None:
    """Without controllers no pod runs here; what is looked at is what helm does with the objects."""
    crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/virtualservices.holdfast.dev"
    said = api.helm("install", namespace, CHART, "--namespace", namespace, "--take-ownership", "--force-conflicts")
    assert "kubectl wait --for=condition=Ready virtualservice/web" in said
    assert "WARNING: allowedAddresses is empty" in said
    labels = {"metadata": {"labels": {"app.kubernetes.io/part-of": "something-older"}}}
    api.merge(crd, labels)
    api.helm(
        "upgrade", namespace, CHART, "--namespace", namespace, "--set", "operator.logLevel=debug", "--force-conflicts"
    )
    assert "holdfast" == api.call("GET", crd)["metadata"]["labels"]["app.kubernetes.io/part-of"], "CRDs are upgraded"
    deployment = f"/apis/apps/v1/namespaces/{namespace}/deployments/{namespace}-holdfast-operator"

    def level() -> str:
        env = api.call("GET", deployment)["spec"]["template"]["spec"]["containers"][0]["env"]
        return str(next(each["value"] for each in env if each["name"] == "HOLDFAST_LOG_LEVEL"))

    assert "debug" == level()
    api.helm("rollback", namespace, "1", "--namespace", namespace, "--force-conflicts")
    assert "info" == level()

    def strategy() -> str:
        return str(api.call("GET", deployment)["spec"]["strategy"]["type"])

    flags = ("--namespace", namespace, "--force-conflicts")
    assert "Recreate" == strategy()
    api.helm("upgrade", namespace, CHART, *flags, "--set", "operator.replicas=2")
    assert "RollingUpdate" == strategy()
    api.helm("upgrade", namespace, CHART, *flags, "--set", "operator.replicas=1")
    assert "Recreate" == strategy(), "and what the API server had filled in for the other one is no obstacle"
    api.helm("uninstall", namespace, "--namespace", namespace, "--no-hooks")
    with pytest.raises(ApiError, match="404"):
        api.call("GET", deployment)
    assert api.call("GET", crd)["metadata"]["name"], "with it, every VirtualService stays"
    left: dict[str, Any] = api.call("GET", f"/apis/apps/v1/namespaces/{namespace}/daemonsets")
    assert [] == left["items"]
