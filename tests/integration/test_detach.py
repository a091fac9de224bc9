"""`holdfast detach`: a machine is freed of what an agent has left, also of a layout that no agent here understands."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lbpod.agent.remembered import Memory
from lbpod.cli.detach import take_off
from lbpod.core.layout import CONFIG, LAYOUT_VERSION
from lbpod.core.messages import Remember
from lbpod.datapath import libbpf
from lbpod.datapath.attach import attach_tc, attach_xdp
from lbpod.datapath.loader import load
from lbpod.datapath.port import DatapathError
from tests.bpf.datapaths import bpffs, settings
from tests.integration.attach_spaces import need_namespaces, wire


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    need_namespaces()
    with bpffs(tmp_path / "bpffs") as mounted:
        yield mounted


def of_another_layout(pins: Path) -> None:
    """As an agent of another version would have left it."""
    assert CONFIG.fields is not None
    at = CONFIG.fields["version"][1]
    fd = libbpf.pinned(str(pins / "maps" / "config"))
    assert fd is not None
    row = bytearray(libbpf.map_lookup(fd, "config", bytes(4), libbpf.map_info(fd).value_size) or b"")
    row[at : at + 4] = (LAYOUT_VERSION + 1).to_bytes(4, "little")
    libbpf.map_update(fd, "config", bytes(4), bytes(row))


def test_a_machine_is_freed_of_maps_that_no_agent_here_understands(folder: Path, tmp_path: Path) -> None:
    pins, state = folder / "holdfast", tmp_path / "state"
    Memory(state).keep(Remember(None, None))
    with wire() as (here, _):
        with closing(load(settings(folder))) as fast_path:
            here.run(lambda: attach_xdp(fast_path, "hfa0"))
            here.run(lambda: attach_tc(fast_path, "hfa0"))
            with pytest.raises(DatapathError, match=r"another process is using the maps in .*: stop it first"):
                here.run(lambda: take_off(pins, state))
        of_another_layout(pins)
        with pytest.raises(DatapathError, match="start anew after `holdfast detach`"):
            load(settings(folder))
        assert "xdp" in here.ip("-d link show hfa0")
        said = here.run(lambda: take_off(pins, state))
        assert f"taken off hfa0; the maps in {pins} are gone" == said
        assert "xdp" not in here.ip("-d link show hfa0")
        assert not pins.exists()
        assert [] == list(state.iterdir())
        assert f"there is nothing in {pins}" == here.run(lambda: take_off(pins, state))
        fast_path = load(settings(folder))
        assert not here.run(lambda: attach_xdp(fast_path, "hfa0")).replaced, "the next agent starts anew"
        fast_path.close()
        here.run(lambda: take_off(pins, state))
