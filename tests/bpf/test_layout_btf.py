"""Python and C mean the same bytes: core's dtypes against the BTF of the packaged object, and of one that differs."""

import re
from pathlib import Path

from lbpod.core.limits import VIPS_MAX
from lbpod.datapath import libbpf, loader
from lbpod.datapath.layout import MAPS, PER_VIP, STRUCTS, Btf, differences
from tests.bpf.datapaths import built, need_kernel


def test_every_struct_and_map_of_the_packaged_object_is_as_python_has_it() -> None:
    btf = Btf(loader.PACKAGED_OBJECT.read_bytes())
    assert [] == differences(btf, complete=True)
    assert sorted(MAPS) == sorted(btf.maps())


def test_python_knows_every_struct_that_the_header_declares() -> None:
    header = (Path(__file__).parents[2] / "lbpod" / "bpf" / "types.h").read_text()
    declared = set(re.findall(r"^struct (hf_\w+) {$", header, re.MULTILINE))
    assert declared == set(STRUCTS)


def test_what_differs_is_named() -> None:
    assert [
        "struct hf_node has 56 bytes in the object and 48 in Python",
        "struct hf_flow has the members addr, pad, port_be, vip in the object and addr, port_be, pad, vip in Python",
        "the value of map nodes is hf_node of 56 bytes in the object and hf_node of 48 bytes in Python",
    ] == differences(Btf(built("other_layout").read_bytes()), complete=False)


def test_an_object_that_uses_fewer_maps_is_no_lie_but_not_complete() -> None:
    btf = Btf(built("foreign").read_bytes())
    assert [] == differences(btf, complete=False)
    assert len(STRUCTS) + len(MAPS) == len(differences(btf, complete=True))


def test_libbpf_and_our_own_reader_agree_on_sizes() -> None:
    need_kernel()
    opened = libbpf.BpfObject(str(loader.PACKAGED_OBJECT))
    btf = Btf(loader.PACKAGED_OBJECT.read_bytes())
    try:
        for name, (_, key_size, _, value_size) in sorted(btf.maps().items()):
            declared = opened.declared(name)
            inner = 4 if name in PER_VIP else value_size
            assert (key_size, inner) == (declared.key_size, declared.value_size), name
        assert VIPS_MAX == opened.declared("slots").max_entries
    finally:
        opened.close()
