"""The reader of object files: whatever it is given, it answers with the truth or with one sentence."""

import contextlib
import struct

import pytest
from hypothesis import example, given, strategies as st

from lbpod.datapath.layout import Btf, differences, prove
from lbpod.datapath.port import DatapathError

# strings: "", "hf_member", "addr", "node", "flags", "__u8", "int"
STRINGS = b"\0hf_member\0addr\0node\0flags\0__u8\0int\0"
AT = {
    name: STRINGS.index(b"\0" + name.encode() + b"\0") + 1
    for name in ("hf_member", "addr", "node", "flags", "__u8", "int")
}


def types(node_bits: int = 128, address_count: int = 16, size: int = 24) -> bytes:
    """struct hf_member { __u8 addr[16]; unsigned int node, flags; } as BTF, or something like it."""
    u8 = struct.pack("<IIII", AT["__u8"], 1 << 24, 1, 8)  # 1: an integer of one byte
    u32 = struct.pack("<IIII", AT["int"], 1 << 24, 4, 32)  # 2: one of four
    array = struct.pack("<IIIIII", 0, 3 << 24, 0, 1, 2, address_count)  # 3: bytes
    members = ((AT["addr"], 3, 0), (AT["node"], 2, node_bits), (AT["flags"], 2, 160))
    whole = struct.pack("<III", AT["hf_member"], 4 << 24 | len(members), size)
    return u8 + u32 + array + whole + b"".join(struct.pack("<III", *member) for member in members)


def image(blob: bytes) -> bytes:
    """An ELF file with a .BTF section of these types."""
    btf = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(blob), len(blob), len(STRINGS)) + blob + STRINGS
    names = b"\0.BTF\0.names\0"
    header_bytes, btf_at = 64, 64 + 3 * 64
    identity = b"\x7fELF\x02\x01" + bytes(10)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 1, 247, 1, 0, 0, header_bytes, 0, 64, 0, 0, 64, 3, 2)

    def section(name: int, at: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 0, 0)

    table = bytes(64) + section(1, btf_at, len(btf)) + section(6, btf_at + len(btf), len(names))
    return header + table + btf + names


def test_a_struct_is_read_with_its_offsets_and_sizes() -> None:
    found = Btf(image(types())).struct("hf_member")
    assert found is not None
    assert 24 == found[0]
    assert [("addr", 0, 16, 1), ("node", 16, 4, 4), ("flags", 20, 4, 4)] == [
        (member.name, member.offset, member.size, member.element_size) for member in found[1]
    ]
    assert [] == differences(Btf(image(types())), complete=False)


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (types(size=32), "struct hf_member has 32 bytes in the object and 24 in Python"),
        (types(node_bits=64), "struct hf_member.node is 4 bytes at 8 in the object and 4 bytes at 16 in Python"),
        (types(address_count=12), "struct hf_member.addr is 12 bytes at 0 in the object and 16 bytes at 0 in Python"),
    ],
    ids=["size", "offset", "array"],
)
def test_a_difference_is_named(blob: bytes, sentence: str) -> None:
    with pytest.raises(DatapathError, match=sentence):
        prove(image(blob), "an object")


@given(at=st.integers(0, len(image(types())) - 1), value=st.integers(0, 255), cut=st.integers(0, 600))
@example(at=47, value=128, cut=0)  # a section table beyond what any file can have
def test_a_damaged_object_is_a_sentence_and_never_another_error(at: int, value: int, cut: int) -> None:
    damaged = bytearray(image(types()))
    damaged[at] = value
    for each in (bytes(damaged), bytes(damaged[:cut])):
        with contextlib.suppress(DatapathError):
            prove(each, "an object")
