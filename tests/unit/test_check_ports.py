"""The checking client's ports: which comes next, and how long one rests."""

from pathlib import Path
from random import Random

from lbpod.lab.check_ports import Ports, local_ports
from lbpod.lab.limits import CHECK_PORT_REST_NS

PORTS = range(10_000, 10_010)


def test_a_port_rests_however_soon_it_is_given_back() -> None:
    ports = Ports(PORTS, Random(1))
    first = ports.take(0)
    ports.give_back(first, 5)
    others = [ports.take(10) for _ in range(len(PORTS) - 1)]
    assert {first, *others} == set(PORTS)
    assert 0 == ports.hurried_count
    for port in others:
        ports.give_back(port, 20)
    assert first == ports.take(5 + CHECK_PORT_REST_NS)
    assert 0 == ports.hurried_count


def test_where_none_has_rested_the_one_that_did_for_longest_is_taken_and_counted() -> None:
    ports = Ports(PORTS, Random(2))
    taken = [ports.take(0) for _ in PORTS]
    assert 0 == ports.take(0), "all are in use"
    assert 1 == ports.hurried_count
    for now_ns, port in enumerate(taken):
        ports.give_back(port, now_ns)
    assert taken[0] == ports.take(CHECK_PORT_REST_NS - 1)
    assert taken[1] == ports.take(CHECK_PORT_REST_NS + 1)
    assert 2 == ports.hurried_count


def test_what_the_kernel_has_chosen_is_not_kept() -> None:
    ports = Ports([], Random(3))
    ports.give_back(0, 0)
    assert 0 == ports.take(CHECK_PORT_REST_NS)


def test_the_ports_are_those_that_the_kernel_would_choose_from() -> None:
    first, last = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert (first, last) == (local_ports()[0], local_ports()[-1])
