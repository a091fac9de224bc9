"""What a kernel before 6.1 needs otherwise. It is told apart by its release; what is done for it works on any other."""

from pathlib import Path

import numpy as np
import pytest

from lbpod.core.layout import RECORD
from lbpod.datapath import loader
from lbpod.datapath.kernel import KernelDatapath
from lbpod.datapath.libbpf import F_NO_PREALLOC
from lbpod.datapath.port import FlowMap
from tests.bpf.datapaths import bpffs, flows, need_kernel, settings


@pytest.mark.root
@pytest.mark.parametrize(("version", "allocates"), [((5, 15), False), ((6, 0), False), ((6, 1), True), (None, False)])
def test_records_take_their_memory_at_once_where_a_sleepable_program_may_not_meet_a_map_that_allocates(
    version: tuple[int, int] | None, allocates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_kernel()
    monkeypatch.setattr(loader, "kernel_version", lambda release: version)
    with bpffs(tmp_path / "bpffs") as folder:
        for _ in range(2):  # the second takes over what the first has pinned
            fast_path = loader.load(settings(folder))
            datapath = KernelDatapath(fast_path)
            try:
                assert allocates == bool(fast_path.map("records").info.flags & F_NO_PREALLOC)
                datapath.flows_put(FlowMap.RECORDS, flows(5), np.ones(5, RECORD))
                assert (datapath.records_lookup(flows(5)) == np.ones(5, RECORD)).all()
                datapath.records_drop(flows(5), np.ones(5, RECORD))
                assert 0 == len(datapath.flows_dump(FlowMap.RECORDS)[0])
            finally:
                datapath.close()


@pytest.mark.parametrize(
    ("release", "version"),
    [("5.15.0-91-generic", (5, 15)), ("6.1.0-18-amd64", (6, 1)), ("6.18.5", (6, 18)), ("odd", None)],
)
def test_a_release_begins_with_the_version(release: str, version: tuple[int, int] | None) -> None:
    assert version == loader.kernel_version(release)
