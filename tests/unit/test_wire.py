"""What passes the border and what does not, with the sentence that the sender gets."""

import itertools

import msgspec
import numpy as np
import pytest

from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.layout import FLOW
from lbpod.core.limits import BACKEND_IDS_MAX, BACKENDS_MAX, BATCH_MAX, BODY_BYTES_MAX
from lbpod.core.messages import (
    CommitCall,
    ForgetAnswer,
    LbStatus,
    PrepareCall,
    QuietAnswer,
    QuietCall,
    ResolveAnswer,
    ResolveCall,
    SettleAnswer,
    SettleCall,
    SettleKind,
    SettleStep,
)
from lbpod.core.model import (
    Affinity,
    Backend,
    BackendState,
    Cluster,
    NextIds,
    Node,
    Protocol,
    Ring,
    Snapshot,
    Vip,
    parse_address,
)

DIGEST = bytes(range(16))
NODE = Node(1, "n1", parse_address("10.0.0.1"), "10.0.0.1:9900", 0)


def flows(count: int, vip: int = 1) -> bytes:
    rows = np.zeros(count, dtype=FLOW)
    rows["vip"] = vip
    return rows.tobytes()


def ids(*values: int) -> bytes:
    return np.array(values, dtype="<u4").tobytes()


def snapshot(backends: tuple[Backend, ...] = ()) -> Snapshot:
    vip = Vip(
        id=1,
        name="shop/web/http",
        address=parse_address("203.0.113.1"),
        port=80,
        protocol=Protocol.TCP,
        affinity=Affinity.NONE,
        idle_ns=3_600_000_000_000,
        drain_ns=0,
        created=1,
        epoch=2,
        digest=DIGEST,
        backends=backends,
    )
    return Snapshot(Cluster(1, 2), 3, Ring(1, (0,)), (NODE,), (vip,), NextIds(2, 2, 1, 1))


def refused(kind: type[wire.Body], data: bytes) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        wire.decode(kind, data)
    assert "\n" not in caught.value.sentence
    return caught.value


SETTLE = SettleCall(0, SettleStep.ASK, SettleKind.SETTLE, 1, 1, b"\x01\x00")


@pytest.mark.parametrize(
    "body",
    [
        snapshot((Backend(1, parse_address("10.1.0.1"), 80, 1, 0, BackendState.DRAINING),)),
        PrepareCall(1, DIGEST),
        CommitCall(1, DIGEST),
        LbStatus("n1", 0, 1, 0, 2, DIGEST, 1, 17),
        LbStatus("n1", 0xFFFF, 0, 0, 0, b"", 0, 0, problem="no snapshot yet"),
        LbStatus("n1", 0, 1, 0, 3, DIGEST, 1, 17, snapshot=snapshot()),
        LbStatus("n1", 0, 3, 0, 4, DIGEST, 1, 17, in_force=snapshot()),
        LbStatus("n1", 0, 3, 0, 4, DIGEST, 1, 17, given_up=(0, 7)),
        LbStatus("n1", 0, 3, 0, 4, DIGEST, 1, 17, tracking=((1, 16), (4_095, 1))),
        ResolveCall(3, flows(2)),
        ResolveAnswer(ids(1, 2), ids(1000, 0)),
        ForgetAnswer(b"\x00\x01"),
        SETTLE,
        SettleAnswer(b"\x01\x00", ids(4)),
        QuietCall(1, b"\x00\x01", ids(1, 2)),
        QuietAnswer(False, b""),
    ],
    ids=lambda body: type(body).__name__,
)
def test_what_is_sound_comes_back(body: wire.Body) -> None:
    assert body == wire.decode(type(body), wire.encode(body))


def test_the_largest_snapshot_fits_into_a_body() -> None:
    places = itertools.islice(itertools.product(range(200), range(250), range(250)), BACKENDS_MAX)
    crowd = tuple(
        Backend(BACKEND_IDS_MAX - BACKENDS_MAX + i, parse_address(f"10.{a}.{b}.{c}"), 65_535, 1, 1_000)
        for i, (a, b, c) in enumerate(places)
    )
    data = wire.encode(snapshot(crowd))
    assert len(data) < BODY_BYTES_MAX // 4
    assert crowd == wire.decode(Snapshot, data).vips[0].backends


def test_a_body_has_a_version() -> None:
    data = wire.encode(PrepareCall(1, DIGEST))
    assert wire.VERSION == data[0] == msgspec.msgpack.decode(data[:1])
    assert "PrepareCall: version 9 is unknown here" in refused(PrepareCall, b"\x09" + data[1:]).sentence
    assert "PrepareCall: the body is empty" == refused(PrepareCall, b"").sentence


def test_fields_of_a_newer_release_are_passed_over() -> None:
    data = bytes([wire.VERSION]) + msgspec.msgpack.encode({"generation": 1, "digest": DIGEST, "colour": "green"})
    assert PrepareCall(1, DIGEST) == wire.decode(PrepareCall, data)


def test_too_large_a_body_is_413() -> None:
    assert 413 == refused(Snapshot, bytes(BODY_BYTES_MAX + 1)).status


@pytest.mark.parametrize(
    "data",
    [b"\x01", b"\x01\xc1", b"\x01\xdf\xff\xff\xff\xff", b"\x01" + b"\x81\xa1x" * 5_000, b"\x01\x80", b"\x01\x90"],
    ids=["nothing", "never-used", "endless-map", "deep", "empty-map", "list"],
)
def test_what_is_malformed_is_400(data: bytes) -> None:
    error = refused(Snapshot, data)
    assert (400, True) == (error.status, error.sentence.startswith("Snapshot: malformed: "))


def test_cut_anywhere_it_is_malformed() -> None:
    data = wire.encode(snapshot((Backend(1, parse_address("10.1.0.1"), 80, 1),)))
    for end in range(len(data)):
        refused(Snapshot, data[:end])


@pytest.mark.parametrize(
    ("body", "status", "wanted"),
    [
        (PrepareCall(0, DIGEST), 400, "PrepareCall: generation is 0; it must be from 1"),
        (CommitCall(1, b"x"), 400, "CommitCall: the digest has 1 bytes instead of 16"),
        (ResolveCall(1_024, b""), 400, "ResolveCall: member is 1024"),
        (ResolveCall(0, bytes(23)), 400, "flows has 23 bytes, which 24 does not divide"),
        (ResolveCall(0, flows(BATCH_MAX + 1)), 413, "flows has 4097 items; the most is 4096"),
        (ResolveCall(0, flows(1, vip=4_096)), 400, "a flow names a VIP that is not from 1 to 4095"),
        (ResolveCall(0, flows(1, vip=0)), 400, "a flow names a VIP that is not from 1 to 4095"),
        (ResolveAnswer(ids(1), ids()), 400, "leases (0) and backends (1) do not fit together"),
        (ResolveAnswer(ids(BACKEND_IDS_MAX), ids(1)), 400, "backends names backend 131072"),
        (SettleAnswer(b"\x00\x00", b""), 400, "slots (1) and bases (0) do not fit together"),
        (QuietAnswer(True, b"\x02"), 400, "quiet has bytes other than 0 and 1"),
        (msgspec.structs.replace(SETTLE, vip=0), 400, "vip is 0"),
        (msgspec.structs.replace(SETTLE, slots=b"\x00"), 400, "slots has 1 bytes, which 2 does not divide"),
        (LbStatus("n1", 0, 2, 1, 3, DIGEST, 1, 0), 400, "committed <= prepared <= staged does not hold for 2, 1, 3"),
        (LbStatus("", 0, 0, 0, 0, b"", 1, 0), 400, "the node has no name"),
        (
            LbStatus("n1", 0, 0, 0, 2, DIGEST, 1, 0, snapshot=snapshot()),
            400,
            "newest (2) and generation of the snapshot (3)",
        ),
        (
            LbStatus("n1", 0, 2, 0, 4, DIGEST, 1, 0, in_force=snapshot()),
            400,
            "committed (2) and generation of that in force (3)",
        ),
        (msgspec.structs.replace(snapshot(), nodes=()), 400, "Snapshot: member 0 of the ring is no node's"),
    ],
)
def test_what_breaks_a_promise_is_refused(body: wire.Body, status: int, wanted: str) -> None:
    error = refused(type(body), wire.encode(body))
    assert status == error.status
    assert wanted in error.sentence


def test_every_call_has_a_route_and_an_answer() -> None:
    assert wire.ROUTES.keys() == wire.ANSWERS.keys()
    assert len(wire.ROUTES) == len({path for _, path in wire.ROUTES.values()})
