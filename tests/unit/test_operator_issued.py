"""What is asked of cert-manager, and what becomes of what it has issued: pairs of real CAs, merged step by step."""

from pathlib import Path

import pytest

from lboperator.issued import (
    Bundle,
    Issuer,
    Pair,
    Terms,
    cas_in,
    certificate,
    differs,
    holders,
    merge,
    revision,
    why_not_ready,
)
from lbpod.certs import Role
from lbpod.core.limits import CA_SPREAD_NS, SECRET_BYTES_MAX
from lbpod.minting import mint

NODES = ("n1", "n2")
WANTED = holders(NODES)
ISSUER = Issuer("cert-manager.io", "Issuer", "ours")
TERMS = Terms(ISSUER, "holdfast-ca", "holdfast-lb-tls", 2_160, 720)
NOW = 1_800_000_000 * 1_000_000_000


def issue(folder: Path) -> dict[str, Pair]:
    """A pair for everybody; one CA for each folder."""
    mint(folder, NODES)
    read = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: Pair(read[f"{name}.crt"], read[f"{name}.key"], read["ca.crt"]) for name in WANTED}


def certificates_of(bundle: Bundle) -> dict[str, bytes]:
    return {name: pair.certificate for name, pair in bundle.pairs.items()}


def certificates_in(issued: dict[str, Pair]) -> dict[str, bytes]:
    return {name: pair.certificate for name, pair in issued.items()}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return issue(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return issue(tmp_path_factory.mktemp("new"))


def test_a_certificate_is_asked_for_with_what_agents_look_at() -> None:
    body = certificate(WANTED["n1"], TERMS)
    assert "holdfast-lb-tls-n1" == body["metadata"]["name"] == body["spec"]["secretName"]
    spec = body["spec"]
    assert ("n1", ["holdfast:lb"], ["n1.lb.holdfast"]) == (
        spec["commonName"],
        spec["subject"]["organizations"],
        spec["dnsNames"],
    )
    assert ["digital signature", "client auth", "server auth"] == spec["usages"]
    assert ("2160h0m0s", "720h0m0s") == (spec["duration"], spec["renewBefore"])
    viewer = certificate(WANTED["viewer"], TERMS)
    assert "holdfast-ca-viewer" == viewer["metadata"]["name"]
    assert ["digital signature", "client auth"] == viewer["spec"]["usages"], "nobody can pose as an LB with it"


def test_what_others_have_added_to_a_certificate_is_no_difference() -> None:
    wanted = certificate(WANTED["n1"], TERMS)
    assert not differs(wanted, {**wanted, "spec": {**wanted["spec"], "revisionHistoryLimit": 1}})
    other = certificate(WANTED["n1"], Terms(Issuer("cert-manager.io", "Issuer", "theirs"), "a", "b", 2_160, 720))
    assert differs(wanted, other)


def test_a_revision_is_what_was_issued_and_none_before() -> None:
    metadata = {"uid": "u"}
    assert None is revision({"metadata": metadata})
    assert None is revision({"metadata": metadata, "status": {"conditions": []}})
    first = revision({"metadata": metadata, "status": {"revision": 1, "notAfter": "2026-01-01T00:00:00Z"}})
    again = revision({"metadata": metadata, "status": {"revision": 2, "notAfter": "2026-01-01T00:00:00Z"}})
    found = revision({"metadata": metadata, "status": {"notAfter": "2026-01-01T00:00:00Z"}})
    assert 3 == len({first, again, found} - {None}), "one that was made anew finds its old Secret, and has no number"


def test_why_it_is_not_ready_is_what_cert_manager_says() -> None:
    assert why_not_ready({}).endswith("is its controller running?")
    ready = {"type": "Ready", "status": "False", "reason": "DoesNotExist", "message": "the Secret does not exist"}
    assert "the Secret does not exist" == why_not_ready({"status": {"conditions": [ready]}})
    assert "" == why_not_ready({"status": {"conditions": [{**ready, "status": "True"}]}})


def test_the_first_pairs_are_taken_as_they_come(old: dict[str, Pair]) -> None:
    first = merge(Bundle(), {"controller": old["controller"]}, WANTED, NOW)
    assert {"controller"} == first.bundle.pairs.keys()
    assert (0, frozenset(), {}) == (first.bundle.grown_ns, first.waits, first.refused)
    rest = merge(first.bundle, old, WANTED, NOW)
    assert certificates_in(old) == certificates_of(rest.bundle)
    assert (cas_in(old["n1"].ca), 0) == (rest.bundle.cas, rest.bundle.grown_ns)


def test_a_renewal_by_the_same_ca_is_taken_at_once(old: dict[str, Pair], tmp_path: Path) -> None:
    folder = tmp_path / "renewed"
    mint(folder, NODES)
    before = issue(folder)
    for end in ("crt", "key"):
        (folder / f"n1.{end}").unlink()
    after = issue(folder)
    bundle = merge(Bundle(), before, WANTED, NOW).bundle
    renewed = merge(bundle, after, WANTED, NOW)
    assert before["n1"].certificate != renewed.bundle.pairs["n1"].certificate == after["n1"].certificate
    assert frozenset() == renewed.waits


def test_a_new_ca_is_known_everywhere_before_its_pairs_are_shown(old: dict[str, Pair], new: dict[str, Pair]) -> None:
    bundle = merge(Bundle(), old, WANTED, NOW).bundle
    begun = merge(bundle, new, WANTED, NOW)
    assert certificates_in(old) == certificates_of(begun.bundle)
    assert (*cas_in(old["n1"].ca), *cas_in(new["n1"].ca)) == begun.bundle.cas
    assert (NOW, frozenset(WANTED)) == (begun.bundle.grown_ns, begun.waits)
    early = merge(begun.bundle, new, WANTED, NOW + CA_SPREAD_NS - 1)
    assert begun == early, "the old pairs need the old CA, too"
    done = merge(early.bundle, new, WANTED, NOW + CA_SPREAD_NS)
    assert certificates_in(new) == certificates_of(done.bundle)
    assert (begun.bundle.cas, frozenset()) == (done.bundle.cas, done.waits)
    assert NOW + CA_SPREAD_NS == done.bundle.idle_ns, "some may show the old ones for a while"
    still = merge(done.bundle, new, WANTED, NOW + 2 * CA_SPREAD_NS - 1)
    assert done == still
    rid = merge(done.bundle, new, WANTED, NOW + 2 * CA_SPREAD_NS).bundle
    assert (cas_in(new["n1"].ca), 0) == (rid.cas, rid.idle_ns)
    assert rid == merge(rid, new, WANTED, NOW + 3 * CA_SPREAD_NS).bundle


def test_a_pair_that_is_missing_or_bad_does_not_wait(old: dict[str, Pair], new: dict[str, Pair]) -> None:
    without = {name: pair for name, pair in old.items() if name != "n2"}
    bundle = merge(Bundle(), {**without, "n1": old["n1"]}, WANTED, NOW).bundle
    broken = Bundle(bundle.cas, {**bundle.pairs, "n1": Pair(old["n1"].certificate, old["n2"].key)})
    merged = merge(broken, new, WANTED, NOW)
    assert {"controller", "viewer"} == merged.waits
    assert [new[name].certificate for name in NODES] == [merged.bundle.pairs[name].certificate for name in NODES]


@pytest.mark.parametrize("case", ["another's key", "another's name", "no ca", "another's ca", "nonsense"])
def test_what_would_not_work_is_refused_and_what_was_good_stays(
    old: dict[str, Pair], new: dict[str, Pair], case: str
) -> None:
    bundle = merge(Bundle(), old, WANTED, NOW).bundle
    bad, sentence = {
        "another's key": (Pair(new["n1"].certificate, new["n2"].key, new["n1"].ca), "cannot be used"),
        "another's name": (new["n2"], "n1.lb.holdfast"),
        "no ca": (Pair(new["n1"].certificate, new["n1"].key), "does not tell its CA"),
        "another's ca": (Pair(new["n1"].certificate, new["n1"].key, old["n1"].ca), "verify failed"),
        "nonsense": (Pair(b"x", b"y", b"z"), "cannot be used"),
    }[case]
    merged = merge(bundle, {**old, "n1": bad}, WANTED, NOW)
    assert sentence in merged.refused["n1"]
    assert bundle == merged.bundle


def test_a_viewers_certificate_does_not_make_a_controller(new: dict[str, Pair]) -> None:
    merged = merge(Bundle(), {"controller": new["viewer"]}, WANTED, NOW)
    assert merged.refused["controller"] == "it is of viewer in the role viewer, not of controller as controller"
    assert {} == merged.bundle.pairs


def test_what_is_not_issued_now_stays_as_it_was(old: dict[str, Pair]) -> None:
    bundle = merge(Bundle(), old, WANTED, NOW).bundle
    merged = merge(bundle, {}, WANTED, NOW)
    assert bundle == merged.bundle
    assert {"controller", "viewer", "n2"} == merge(bundle, {}, holders(["n2"]), NOW).bundle.pairs.keys()


def test_a_secret_is_never_too_large(old: dict[str, Pair]) -> None:
    long = Pair(old["n2"].certificate + b"\n" * SECRET_BYTES_MAX, old["n2"].key, old["n2"].ca)
    merged = merge(Bundle(), {**old, "n2": long}, WANTED, NOW)
    assert {"controller", "viewer", "n1"} == merged.bundle.pairs.keys()


def test_only_cert_managers_own_issuers_say_whether_they_are_ready() -> None:
    assert ISSUER.path("ns").endswith("/namespaces/ns/issuers/ours")
    assert Issuer("cert-manager.io", "ClusterIssuer", "x").path("ns").endswith("/v1/clusterissuers/x")
    assert not Issuer("awspca.cert-manager.io", "AWSPCAIssuer", "x").is_ours_to_ask
    assert {Role.LB} == {WANTED[name].role for name in NODES}
