"""Attaching on a real interface: the mode is found by itself, replacing loses no packet, strangers are left alone."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core import layout
from lbpod.core.layout import PROTOCOL_ICMP, PROTOCOL_UDP, vip_index
from lbpod.core.packets import checksum
from lbpod.core.verdicts import Verdict
from lbpod.datapath import libbpf
from lbpod.datapath.attach import (
    TC_HANDLE,
    XdpMode,
    XdpWish,
    attach_tc,
    attach_xdp,
    detach,
    forget_old_programs,
    interface_index,
)
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.libbpf import XdpFlag
from lbpod.datapath.loader import LoadSettings, load
from lbpod.datapath.pins import PinFolder
from lbpod.datapath.port import ArrayName, DatapathError
from tests.bpf.datapaths import SIZES, another_build, bpffs, built, settings
from tests.integration.attach_spaces import Space, command, need_namespaces, wire

VIP = "203.0.113.10"
POD, CLIENT = ("10.99.0.1", 7_000), ("10.99.0.2", 7_001)
REPLACEMENTS = 8
WINDOW = 32
"""Echo requests under way at a time: a gap of a few microseconds would swallow some of them."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    need_namespaces()
    with bpffs(tmp_path / "bpffs") as mounted:
        yield mounted


@pytest.fixture
def spaces(folder: Path) -> Iterator[tuple[Space, Space]]:
    with wire() as both:
        yield both


def mapped(address: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytes(10) + b"\xff\xff" + socket.inet_aton(address), np.uint8)


def serve_echo(datapath: KernelDatapath) -> None:
    """Makes VIP an address that answers ICMP echo."""
    row = np.zeros(1, layout.VIP)
    row["addr"], row["protocol"], row["used"] = mapped(VIP), PROTOCOL_ICMP, 1
    datapath.write(ArrayName.VIPS, np.array([vip_index(row["addr"][0].tobytes(), 0, PROTOCOL_ICMP)], np.uint32), row)


def echo_request(number: int) -> bytes:
    body = struct.pack("!HH", 4_711, number)
    return struct.pack("!BBH", 8, 0, checksum(b"\x08\x00\x00\x00" + body)) + body


def ping_until(stop: threading.Event, counted: list[int]) -> None:
    """Keeps WINDOW echo requests under way; a lost one ends in a TimeoutError."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, PROTOCOL_ICMP) as sock:
        sock.settimeout(3)
        sent = received = 0
        while received < sent or not stop.is_set():
            while sent - received < WINDOW and not stop.is_set():
                sock.sendto(echo_request(sent & 0xFFFF), (VIP, 0))
                sent += 1
            if received < sent:
                sock.recv(2_048)
                received += 1
        counted += [sent, received]


@pytest.mark.parametrize("wish", [XdpWish.NATIVE, XdpWish.GENERIC])
def test_replacing_xdp_loses_no_packet(
    folder: Path, tmp_path: Path, spaces: tuple[Space, Space], wish: XdpWish
) -> None:
    here, there = spaces
    there.ip(f"route add {VIP} via 10.99.0.1")
    if wish is XdpWish.NATIVE:  # a veth delivers XDP_TX only to a peer that runs native XDP, too
        peer = load(LoadSettings(folder / "peer", built("foreign")))
        there.run(lambda: attach_xdp(peer, "hfb0", XdpWish.NATIVE))
        peer.close()
    first = load(settings(folder))
    assert not here.run(lambda: attach_xdp(first, "hfa0", wish)).replaced
    with closing(KernelDatapath(first)) as datapath:
        serve_echo(datapath)
    stop, counted, failed = threading.Event(), list[int](), list[BaseException]()

    def traffic() -> None:
        try:
            there.run(lambda: ping_until(stop, counted))
        except BaseException as error:  # noqa: BLE001 - looked at below
            failed.append(error)

    thread = threading.Thread(target=traffic, daemon=True)
    thread.start()
    for number in range(REPLACEMENTS):
        with closing(load(settings(folder, another_build(tmp_path, number)))) as following:
            attachment = here.run(lambda following=following: attach_xdp(following, "hfa0"))  # type: ignore[misc]
            assert (wish.value, True) == (attachment.mode.value, attachment.replaced)
            here.run(lambda following=following: forget_old_programs(following))  # type: ignore[misc]
    stop.set()
    thread.join(30)
    assert [] == failed
    assert counted[0] == counted[1] > 0
    with closing(KernelDatapath(load(settings(folder)))) as datapath:
        assert counted[0] == datapath.counters()[Verdict.ICMP_ECHO][0], "the old and the new programs answered them all"


def test_replacing_tc_lets_no_reply_out_unchanged(folder: Path, tmp_path: Path, spaces: tuple[Space, Space]) -> None:
    here, there = spaces
    here.ip("neigh replace 10.99.0.2 lladdr " + mac(there, "hfb0") + " dev hfa0")
    first = load(settings(folder))
    here.run(lambda: attach_tc(first, "hfa0"))
    with closing(KernelDatapath(first)) as datapath:
        put_nat(datapath, POD, (VIP, 80))
    receiver = there.run(lambda: bound(CLIENT))
    sender = here.run(lambda: bound(POD))
    sources: dict[tuple[str, int], int] = {}
    with receiver, sender:
        for number in range(REPLACEMENTS * 20):
            if number % 20 == 0:
                with closing(load(settings(folder, another_build(tmp_path, number)))) as following:
                    replaced = here.run(lambda following=following: attach_tc(following, "hfa0"))  # type: ignore[misc]
                    assert replaced.replaced
                    here.run(lambda following=following: forget_old_programs(following))  # type: ignore[misc]
            sender.sendto(b"reply", CLIENT)
            _, source = receiver.recvfrom(100)
            sources[source] = sources.get(source, 0) + 1
    assert {(VIP, 80): REPLACEMENTS * 20} == sources
    listed = command(f"tc -n {here.name} filter show dev hfa0 egress")
    assert 1 == listed.count(f"handle {TC_HANDLE:#x}")


def put_nat(datapath: KernelDatapath, pod: tuple[str, int], vip: tuple[str, int]) -> None:
    """Has hf_tc give what this pod sends to CLIENT by UDP the VIP as its source."""
    key, value = np.zeros(1, layout.NAT_KEY), np.zeros(1, layout.NAT)
    key["client"], key["pod"] = mapped(CLIENT[0]), mapped(pod[0])
    key["client_port_be"], key["pod_port_be"], key["protocol"] = CLIENT[1], pod[1], PROTOCOL_UDP
    value["vip"], value["vip_port_be"] = mapped(vip[0]), vip[1]
    assert 1 == datapath._put("nat", key, value)


def test_a_filter_behind_ours_sees_all_that_leaves(folder: Path, spaces: tuple[Space, Space]) -> None:
    """A stranger's filter at a later priority. It shows what it sees by counting it, and by changing the source."""
    here, there = spaces
    here.ip("neigh replace 10.99.0.2 lladdr " + mac(there, "hfb0") + " dev hfa0")
    other, seen_reply, seen_other = (POD[0], 7_002), ("203.0.113.98", 98), ("203.0.113.99", 99)
    stranger, ours = load(LoadSettings(folder / "stranger", sizes=SIZES)), load(settings(folder))
    with closing(KernelDatapath(ours)) as our_maps, closing(KernelDatapath(stranger)) as their_maps:
        put_nat(our_maps, POD, (VIP, 80))
        put_nat(their_maps, (VIP, 80), seen_reply)
        put_nat(their_maps, other, seen_other)
        here.run(lambda: attach_tc(ours, "hfa0"))
        ifindex = here.run(lambda: interface_index("hfa0"))
        fd = stranger.program("hf_tc").fd
        here.run(lambda: libbpf.tc_attach(ifindex, fd, handle=1, priority=7, replace=False))
        sources: dict[tuple[str, int], int] = {}
        with there.run(lambda: bound(CLIENT)) as receiver:
            for pod in (POD, other):
                with here.run(lambda pod=pod: bound(pod)) as sender:  # type: ignore[misc]
                    for _ in range(10):
                        sender.sendto(b"packet", CLIENT)
                        _, source = receiver.recvfrom(100)
                        sources[source] = sources.get(source, 0) + 1
        assert {seen_reply: 10, seen_other: 10} == sources, "replies with the VIP as source, and all other packets"
        assert (10, 20) == (our_maps.counters()[Verdict.REPLY][0], their_maps.counters()[Verdict.REPLY][0])


def bound(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(3)
    sock.bind(address)
    return sock


def mac(space: Space, device: str) -> str:
    return space.ip(f"-br link show {device}").split()[2]


def test_the_mode_is_found_and_the_reason_given(folder: Path) -> None:
    fast_path = load(settings(folder))
    with wire() as (here, _):
        native = here.run(lambda: attach_xdp(fast_path, "hfa0"))
        assert (XdpMode.NATIVE, "the driver has it", False) == (native.mode, native.reason, native.replaced)
        asked = here.run(lambda: attach_xdp(fast_path, "hfa0", XdpWish.GENERIC))
        assert (XdpMode.GENERIC, "asked for", True) == (asked.mode, asked.reason, asked.replaced)
        again = here.run(lambda: attach_xdp(fast_path, "hfa0"))
        assert (XdpMode.GENERIC, True) == (again.mode, again.replaced), "the mode is kept: a swap would leave a gap"
        assert "xdpgeneric" in here.ip("link show hfa0")
        assert ("hfa0",) == here.run(lambda: detach(fast_path.pins))
    # A veth runs native XDP only where its peer's frames fit into a page.
    with wire(mtu=9_000) as (here, _):
        generic = here.run(lambda: attach_xdp(fast_path, "hfa0"))
        assert XdpMode.GENERIC is generic.mode
        assert generic.reason.startswith("native XDP was refused: ")
        with pytest.raises(DatapathError, match="attaching XDP"):
            here.run(lambda: attach_xdp(fast_path, "hfa0", XdpWish.NATIVE))
        assert "xdpgeneric" in here.ip("link show hfa0"), "what was there is put back"
    fast_path.close()


def test_a_strangers_program_is_named_and_left_alone(folder: Path, spaces: tuple[Space, Space]) -> None:
    here, _ = spaces
    stranger = load(LoadSettings(folder / "stranger", built("foreign")))
    ours = load(settings(folder))
    here.run(lambda: attach_xdp(stranger, "hfa0"))
    here.run(lambda: attach_tc(stranger, "hfa0"))
    before = here.ip("-d link show hfa0"), command(f"tc -n {here.name} filter show dev hfa0 egress")
    known = f"id {stranger.program('hf_xdp').id}, 'hf_xdp'"
    with pytest.raises(DatapathError, match=rf"another program \({known}\) sits on hfa0 \(XDP\): detach it \(ip link"):
        here.run(lambda: attach_xdp(ours, "hfa0"))
    with pytest.raises(DatapathError, match=r"sits on hfa0 \(TC egress, our handle\): delete it \(tc filter del"):
        here.run(lambda: attach_tc(ours, "hfa0"))
    assert () == here.run(lambda: detach(ours.pins))
    assert before == (here.ip("-d link show hfa0"), command(f"tc -n {here.name} filter show dev hfa0 egress"))
    with pytest.raises(DatapathError, match="no interface 'hfz9'"):
        here.run(lambda: attach_xdp(ours, "hfz9"))
    stranger.close()
    ours.close()


def test_programs_outlive_their_agent_and_a_killed_one_leaves_no_stranger(
    folder: Path, tmp_path: Path, spaces: tuple[Space, Space]
) -> None:
    here, _ = spaces
    ids = []
    for number in range(3):  # each is "killed" after attaching: nothing is cleaned up
        with closing(load(settings(folder, another_build(tmp_path, number)))) as fast_path:
            here.run(lambda fast_path=fast_path: attach_xdp(fast_path, "hfa0"))  # type: ignore[misc]
            ids.append(fast_path.program("hf_xdp").id)
    assert f"prog/xdp id {ids[-1]}" in here.ip("-d link show hfa0")
    with closing(load(settings(folder))) as fast_path:
        here.run(lambda: attach_xdp(fast_path, "hfa0"))
        ours = len(fast_path.programs)
        assert 3 * ours == here.run(lambda: forget_old_programs(fast_path)), "all programs of three agents"
        assert ours == len(list(fast_path.pins.programs()))
    with closing(load(settings(folder))) as fast_path:  # killed without a new build: it has nothing to replace
        again = here.run(lambda: attach_xdp(fast_path, "hfa0"))
        assert (True, 0) == (again.replaced, here.run(lambda: forget_old_programs(fast_path)))
    pins = PinFolder(folder / "holdfast")
    assert ("hfa0",) == here.run(lambda: detach(pins))
    assert "xdp" not in here.ip("-d link show hfa0")
    pins.remove()
    pins.close()
    assert not (folder / "holdfast").exists()


@pytest.mark.parametrize("work", ["forget_old_programs", "detach"])
def test_an_interface_that_vanishes_between_two_questions_is_in_nobodys_way(
    folder: Path, tmp_path: Path, spaces: tuple[Space, Space], monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """A pod's veth, say, whose pod ends just then: it is listed, and gone before it is looked at."""
    here, _ = spaces
    listed = socket.if_nameindex

    def list_then_delete() -> list[tuple[int, str]]:
        found = listed()
        assert "hfz0" in {name for _, name in found}
        here.ip("link del hfz0")
        return found

    here.ip("link add hfz0 type veth peer name hfz1")
    with closing(load(settings(folder))) as first:
        here.run(lambda: (attach_xdp(first, "hfa0"), attach_tc(first, "hfa0")))
    with closing(load(settings(folder, another_build(tmp_path, 1)))) as second:
        here.run(lambda: (attach_xdp(second, "hfa0"), attach_tc(second, "hfa0")))
        monkeypatch.setattr(socket, "if_nameindex", list_then_delete)
        if work == "detach":
            assert ("hfa0",) == here.run(lambda: detach(second.pins))
        else:
            assert len(first.programs) == here.run(lambda: forget_old_programs(second))
    assert "hfz0" not in here.ip("-br link")


def test_an_interface_that_vanishes_before_it_is_detached_is_in_nobodys_way(
    folder: Path, spaces: tuple[Space, Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = spaces
    here.ip("link add hfz0 type veth peer name hfz1")
    really, gone = libbpf.xdp_detach, here.run(lambda: interface_index("hfz0"))

    def delete_then_detach(ifindex: int, mode: XdpFlag, expected_fd: int) -> None:
        if ifindex == gone:
            here.ip("link del hfz0")
        really(ifindex, mode, expected_fd)

    with closing(load(settings(folder))) as ours:
        for interface in ("hfz0", "hfa0"):
            here.run(lambda interface=interface: attach_xdp(ours, interface))  # type: ignore[misc]
        monkeypatch.setattr(libbpf, "xdp_detach", delete_then_detach)
        assert ("hfa0",) == here.run(lambda: detach(ours.pins))


def test_no_interface_is_looked_at_where_nothing_old_is_pinned(
    folder: Path, spaces: tuple[Space, Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = spaces
    looked_at: list[int] = []
    really = libbpf.xdp_query

    def noted(ifindex: int) -> libbpf.XdpQuery:
        looked_at.append(ifindex)
        return really(ifindex)

    with closing(load(settings(folder))) as ours:
        here.run(lambda: attach_xdp(ours, "hfa0"))
        monkeypatch.setattr(libbpf, "xdp_query", noted)
        assert (0, []) == (here.run(lambda: forget_old_programs(ours)), looked_at)


def test_clsact_goes_with_the_last_filter_and_stays_with_a_strangers(folder: Path, spaces: tuple[Space, Space]) -> None:
    here, _ = spaces
    with closing(load(settings(folder))) as fast_path:
        here.run(lambda: attach_tc(fast_path, "hfa0"))
        assert "clsact" in command(f"tc -n {here.name} qdisc show dev hfa0")
        assert ("hfa0",) == here.run(lambda: detach(fast_path.pins))
        assert "clsact" not in command(f"tc -n {here.name} qdisc show dev hfa0")
        for half in ("ingress", "egress"):
            here.run(lambda: attach_tc(fast_path, "hfa0"))
            (program,) = (folder / "holdfast" / "programs").glob(f"hf_tc_*_{fast_path.program('hf_tc').id}")
            command(f"tc -n {here.name} filter add dev hfa0 {half} pref 7 bpf da object-pinned {program}")
            assert ("hfa0",) == here.run(lambda: detach(fast_path.pins))
            assert "pref 7" in command(f"tc -n {here.name} filter show dev hfa0 {half}")
            command(f"tc -n {here.name} filter del dev hfa0 {half} pref 7")
