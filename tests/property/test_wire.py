"""Promises of the border: what is sent arrives equal, and no bytes get a wrong body or another exception in."""

from contextlib import suppress

from hypothesis import given, strategies as st

from lbpod.core import wire
from lbpod.core.errors import RemoteError
from lbpod.core.messages import LbStatus, PrepareCall, QuietAnswer, ResolveAnswer, ResolveCall, SettleCall
from lbpod.core.model import Cluster, Node, Ring, Snapshot, parse_address

KINDS = st.sampled_from(sorted([*wire.ROUTES, *wire.ANSWERS.values()], key=lambda kind: kind.__name__))
SOUND = wire.encode(
    Snapshot(Cluster(1, 2), 3, Ring(1, (0,)), (Node(1, "n1", parse_address("10.0.0.1"), "n1:9900", 0),)),
)


@given(kind=KINDS, data=st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_remote_error(kind: type[wire.Body], data: bytes) -> None:
    with suppress(RemoteError):
        wire.decode(kind, bytes([wire.VERSION]) + data)


@given(at=st.integers(0, len(SOUND) - 1), byte=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_another_sound_snapshot(at: int, byte: int) -> None:
    data = bytearray(SOUND)
    data[at] = byte
    with suppress(RemoteError):
        sound = wire.decode(Snapshot, bytes(data))
        assert sound == wire.decode(Snapshot, wire.encode(sound))


U32 = st.integers(0, 131_071)


@given(pairs=st.lists(st.tuples(U32, st.integers(0, 30_000)), max_size=50))
def test_answers_arrive_equal(pairs: list[tuple[int, int]]) -> None:
    backends = b"".join(one.to_bytes(4, "little") for one, _ in pairs)
    leases = b"".join(one.to_bytes(4, "little") for _, one in pairs)
    body = ResolveAnswer(backends, leases)
    assert body == wire.decode(ResolveAnswer, wire.encode(body))


SPOKEN: list[type[wire.Body]] = [PrepareCall, LbStatus, ResolveCall, QuietAnswer, SettleCall]
STRUCTS = st.sampled_from(SPOKEN).flatmap(st.from_type)


@given(value=STRUCTS)
def test_any_struct_is_refused_or_arrives_equal(value: wire.Body) -> None:
    """OverflowError: the sender's own encoder knows no integers of more than 64 bits."""
    with suppress(RemoteError, OverflowError):
        assert value == wire.decode(type(value), wire.encode(value))
