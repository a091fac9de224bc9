"""One plain sentence for each thing that a machine lacks, and silence on a machine that lacks nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lbpod.datapath.features import (
    KERNEL_MIN,
    Capability,
    Facts,
    Feature,
    InterfaceFacts,
    Need,
    judge,
    look,
    probe,
)
from tests.bpf.datapaths import bpffs, need_kernel

UPLINK = InterfaceFacts("eth0", True, 1_600, True, None)
COMPLETE = Facts(
    capabilities=1 << Capability.NET_ADMIN | 1 << Capability.BPF | 1 << Capability.PERFMON,
    release="6.1.0-18-amd64",
    libbpf_error=None,
    bpf_error=None,
    bpffs=True,
    pin_folder="/sys/fs/bpf/holdfast",
    btf=True,
    map_types_missing=(),
    program_types_missing=(),
    coarse_clock=True,
    client_mtu=1_500,
    interface=UPLINK,
)
NET_ADMIN_AND_SYS_ADMIN = 1 << Capability.NET_ADMIN | 1 << Capability.SYS_ADMIN


@pytest.mark.parametrize(
    "facts",
    [
        COMPLETE,
        replace(COMPLETE, release="5.15.0"),
        replace(COMPLETE, capabilities=NET_ADMIN_AND_SYS_ADMIN),
        replace(COMPLETE, interface=None),
        replace(COMPLETE, interface=replace(UPLINK, native_xdp=None)),
        replace(COMPLETE, interface=replace(UPLINK, mtu=1_564)),
    ],
    ids=["complete", "oldest", "sys_admin", "no interface", "unknown driver", "just wide enough"],
)
def test_a_machine_that_lacks_nothing_hears_nothing(facts: Facts) -> None:
    assert () == judge(facts)


@pytest.mark.parametrize(
    ("facts", "feature", "need", "said"),
    [
        (replace(COMPLETE, capabilities=0), Feature.PRIVILEGES, Need.REQUIRED, "run it as root"),
        (
            replace(COMPLETE, capabilities=1 << Capability.BPF),
            Feature.PRIVILEGES,
            Need.REQUIRED,
            "capabilities BPF and NET_ADMIN",
        ),
        (
            replace(COMPLETE, capabilities=COMPLETE.capabilities & ~(1 << Capability.PERFMON)),
            Feature.PRIVILEGES,
            Need.ADVISED,
            "PERFMON",
        ),
        (replace(COMPLETE, release="5.14.21"), Feature.KERNEL, Need.REQUIRED, "runs Linux 5.14.21: 5.15 or newer"),
        (replace(COMPLETE, release="4.19.0"), Feature.KERNEL, Need.REQUIRED, "5.15 or newer"),
        (replace(COMPLETE, release="odd"), Feature.KERNEL, Need.REQUIRED, "runs Linux odd"),
        (
            replace(COMPLETE, libbpf_error="libbpf.so.1 is missing: apt-get install libbpf1"),
            Feature.LIBBPF,
            Need.REQUIRED,
            "apt-get install libbpf1",
        ),
        (replace(COMPLETE, bpf_error="Function not implemented"), Feature.BPF, Need.REQUIRED, "CONFIG_BPF_SYSCALL"),
        (replace(COMPLETE, bpffs=False), Feature.BPFFS, Need.REQUIRED, "mount -t bpf bpf /sys/fs/bpf"),
        (replace(COMPLETE, btf=False), Feature.BTF, Need.ADVISED, "/sys/kernel/btf/vmlinux"),
        (replace(COMPLETE, map_types_missing=("lru_hash",)), Feature.MAP_TYPES, Need.REQUIRED, "map types lru_hash"),
        (replace(COMPLETE, program_types_missing=("syscall",)), Feature.PROGRAM_TYPES, Need.REQUIRED, "types syscall"),
        (replace(COMPLETE, coarse_clock=False), Feature.COARSE_CLOCK, Need.REQUIRED, "bpf_ktime_get_coarse_ns"),
        (
            replace(COMPLETE, interface=InterfaceFacts("eth9", False)),
            Feature.INTERFACE,
            Need.REQUIRED,
            "no interface 'eth9'",
        ),
        (
            replace(COMPLETE, interface=replace(UPLINK, native_xdp=False)),
            Feature.NATIVE_XDP,
            Need.ADVISED,
            "driver of eth0 has no native XDP",
        ),
        (
            replace(COMPLETE, interface=replace(UPLINK, clsact_error="No such file or directory")),
            Feature.CLSACT,
            Need.REQUIRED,
            "CONFIG_NET_SCH_INGRESS",
        ),
        (
            replace(COMPLETE, interface=replace(UPLINK, mtu=1_563)),
            Feature.UNDERLAY_MTU,
            Need.ADVISED,
            "MTU of 1563.*1564 or more",
        ),
    ],
)
def test_each_lack_is_one_sentence(facts: Facts, feature: Feature, need: Need, said: str) -> None:
    (finding,) = judge(facts)
    assert (feature, need) == (finding.feature, finding.need)
    assert re.search(said, finding.sentence), finding.sentence
    assert finding.sentence.endswith(".")
    assert "\n" not in finding.sentence


def test_this_machine_can_run_it(tmp_path: Path) -> None:
    need_kernel()
    with bpffs(tmp_path / "bpffs") as folder:
        required = [finding.sentence for finding in probe(pin_folder=folder) if finding.need is Need.REQUIRED]
        assert [] == required
        facts = look("lo", folder, 1_500)
    assert facts.interface is not None
    assert (True, False) == (facts.interface.exists, bool(facts.interface.native_xdp))
    assert facts.interface.mtu > 1_500
    assert tuple(int(part) for part in facts.release.split(".")[:2]) >= KERNEL_MIN


def test_a_folder_that_is_no_bpffs_and_an_interface_that_is_not_there_are_named(tmp_path: Path) -> None:
    need_kernel()
    lacking = {finding.feature for finding in probe("hf-nowhere", tmp_path)}
    assert {Feature.BPFFS, Feature.INTERFACE} <= lacking
