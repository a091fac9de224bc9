"""The pure parts of the lab: right answers, checksums, and how many flows ECMP moves."""

import random

import pytest
from hypothesis import given, strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Dot1Q, Ether

from lbpod.lab.check_rules import FlowError, Histogram, Incomplete, Reason, read_echo, read_http_answer
from lbpod.lab.checksums import Fault, frame_faults, inet_checksum, ipv4_faults
from lbpod.lab.ecmp import NextHop, best_shuffle, moved_share

ANSWER = b"HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Length: 9\r\n\r\nweb1 abc\n"

# --------------------------------------------------------------------------------------------------------- answers


@given(st.integers(0, len(ANSWER) - 1))
def test_a_beginning_of_the_right_answer_is_incomplete(length: int) -> None:
    assert read_http_answer(ANSWER[:length], "abc") is Incomplete.MORE


def test_the_right_answer_names_its_backend() -> None:
    assert "web1" == read_http_answer(ANSWER, "abc")
    assert "web1" == read_echo(b"web1 abc", b"abc")


@given(st.integers(ANSWER.index(b"abc"), len(ANSWER) - 1), st.integers(1, 255))
def test_one_wrong_byte_in_the_body_is_seen(position: int, flip: int) -> None:
    wrong = bytearray(ANSWER)
    wrong[position] ^= flip
    with pytest.raises(FlowError, match="wrong_bytes"):
        read_http_answer(bytes(wrong), "abc")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 502 Bad Gateway\r\n",
        ANSWER + b"x",
        ANSWER + ANSWER,
        ANSWER.replace(b"Content-Length: 9", b"Content-Length: x"),
        ANSWER.replace(b"Content-Length: 9", b"X: 9"),
        ANSWER.replace(b"Content-Length: 9", b"Content-Length: 999999999"),
        b"HTTP/1.1 200 OK\r\n" + b"x" * 20_000,
    ],
)
def test_wrong_answers_are_wrong_bytes(data: bytes) -> None:
    with pytest.raises(FlowError) as caught:
        read_http_answer(data, "abc")
    assert Reason.WRONG_BYTES is caught.value.reason


# ------------------------------------------------------------------------------------------------------ durations


@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_percentiles_are_at_most_one_sixteenth_too_high(durations: list[int], share: float) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    needed = next(n for n in range(1, len(durations) + 1) if n >= share * len(durations))
    exact = sorted(durations)[needed - 1]
    assert exact <= histogram.percentile(share) <= exact + exact // 16


# ------------------------------------------------------------------------------------------------------- checksums


def test_the_example_of_rfc_1071() -> None:
    assert 0x220D == inet_checksum(bytes.fromhex("0001f203f4f5f6f7"))


LAYERS = [TCP(sport=1, dport=2), UDP(sport=1, dport=2), ICMP()]


@given(st.sampled_from(LAYERS), st.binary(max_size=80), st.booleans())
def test_packets_as_scapy_makes_them_are_right(layer: object, payload: bytes, tagged: bool) -> None:
    packet = IP(src="10.0.0.1", dst="10.0.0.2") / layer / payload
    assert [] == ipv4_faults(bytes(packet))
    assert [] == ipv4_faults(bytes(packet) + b"padding")
    ethernet = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    assert [] == frame_faults(bytes(ethernet / Dot1Q(vlan=3) / packet if tagged else ethernet / packet))


@given(st.sampled_from(LAYERS), st.binary(min_size=2, max_size=80), st.data())
def test_one_flipped_bit_is_a_fault(layer: object, payload: bytes, data: st.DataObject) -> None:
    packet = bytearray(bytes(IP(src="10.0.0.1", dst="10.0.0.2") / layer / payload))
    position = data.draw(st.integers(len(packet) - len(payload), len(packet) - 1))
    packet[position] ^= 1 << data.draw(st.integers(0, 7))
    assert 1 == len(ipv4_faults(bytes(packet)))


@given(st.binary(max_size=120))
def test_any_bytes_have_an_answer(data: bytes) -> None:
    frame_faults(data)
    ipv4_faults(data)


def test_the_packet_inside_geneve_is_checked() -> None:
    inner = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=1, dport=2) / b"hello")
    geneve = bytes([0x01, 0, 0x08, 0x00, 0, 0, 7, 0]) + b"\x01\x02\x03\x00"
    outer = IP(src="10.1.0.1", dst="10.1.0.2") / UDP(sport=9, dport=6081, chksum=0)
    assert [] == ipv4_faults(bytes(outer / (geneve + inner)))
    assert [Fault.TCP] == ipv4_faults(bytes(outer / (geneve + inner[:-1] + b"x")))


# ------------------------------------------------------------------------------------------------------------ ECMP


def test_moved_share_follows_the_intervals() -> None:
    a, b = NextHop("a"), NextHop("b")
    assert 0.0 == moved_share([a, b], [a, b])
    assert 1.0 == moved_share([a, b], [b, a])
    assert 0.25 == moved_share([a, b], [NextHop("a", 3), b])


@given(st.integers(2, 8), st.integers(0, 2**32))
def test_a_shuffle_of_equal_weights_moves_most_flows(count: int, seed: int) -> None:
    before = [NextHop(name) for name in "abcdefgh"[:count]]
    after, moved = best_shuffle(before, random.Random(seed), None)
    assert sorted(hop.node for hop in before) == sorted(hop.node for hop in after)
    assert moved > 0.5


@pytest.mark.parametrize("weight", [0, 257])
def test_a_weight_that_the_kernel_cannot_hold_is_refused(weight: int) -> None:
    with pytest.raises(ValueError, match="weight"):
        NextHop("a", weight)
