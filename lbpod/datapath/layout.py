"""Proof that Python and C mean the same bytes: core's dtypes against the BTF of the compiled programs.

Why: two definitions kept equal by a comment drift. The compiler writes down what it made of ``types.h`` (BTF: names,
offsets, sizes), so the object file itself can be asked. ``prove`` does that for every map whose key or value is one of
our structs; the loader calls it before it loads (a few milliseconds), so that an object built from other headers is
refused before it touches a packet. What it leaves to others: the version of maps that are already pinned (``pins``).

The reader below knows just enough ELF and BTF (Documentation/bpf/btf.rst) for that. It is our own and not libbpf's,
because then neither root nor the library is needed to check a build. pyelftools would be a dependency for two headers.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lbpod.core import layout
from lbpod.datapath.port import DatapathError

U32: Final = np.dtype("<u4")
U64: Final = np.dtype("<u8")
ADDRESS: Final = np.dtype(("u1", (16,)))

STRUCTS: Final[dict[str, np.dtype[Any]]] = {
    "hf_vip": layout.VIP,
    "hf_backend": layout.BACKEND,
    "hf_node": layout.NODE,
    "hf_member": layout.MEMBER,
    "hf_flow": layout.FLOW,
    "hf_record": layout.RECORD,
    "hf_lease": layout.LEASE,
    "hf_pending": layout.PENDING,
    "hf_nat_key": layout.NAT_KEY,
    "hf_nat": layout.NAT,
    "hf_config": layout.CONFIG,
    "hf_counter": layout.COUNTER,
    "hf_vip_stat": layout.VIP_STAT,
}
"""Every struct of ``types.h``."""

MAPS: Final[dict[str, tuple[np.dtype[Any], np.dtype[Any]]]] = {
    "vips": (U32, layout.VIP),
    "slots": (U32, U64),
    "other_seen": (U32, U64),
    "backends": (U32, layout.BACKEND),
    "nodes": (U32, layout.NODE),
    "members": (U32, layout.MEMBER),
    "own": (U32, U32),
    "next": (U32, U32),
    "prev": (U32, U32),
    "vip_stats": (U32, layout.VIP_STAT),
    "cache": (layout.FLOW, layout.LEASE),
    "embryonic": (layout.FLOW, layout.RECORD),
    "pending": (layout.FLOW, layout.PENDING),
    "nat": (layout.NAT_KEY, layout.NAT),
    "unassured": (layout.NAT_KEY, layout.NAT),
    "member_by_addr": (ADDRESS, U32),
    "records": (layout.FLOW, layout.RECORD),
    "counters": (U32, layout.COUNTER),
    "lookup_keys": (U32, layout.FLOW),
    "lookup_values": (U32, layout.RECORD),
    "stale_keys": (U32, layout.NAT_KEY),
    "stale_stamps": (U32, U64),
    "config": (U32, layout.CONFIG),
}
"""Every map of ``maps.h``: key, value. ``slots`` and ``other_seen`` hold one inner array of such values per VIP."""

PER_VIP: Final = ("slots", "other_seen")

# Kinds of BTF types, as far as C structs need them.
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF, _VOLATILE, _CONST = 1, 2, 3, 4, 5, 6, 8, 9, 10
_FUNC_PROTO, _VAR, _DATASEC, _FLOAT, _DECL_TAG, _TYPE_TAG, _ENUM64 = 13, 14, 15, 16, 17, 18, 19
_TRAILER_BYTES: Final = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}
"""What follows the 12 bytes of a type, fixed part ..."""
_MEMBER_BYTES: Final = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
"""... or per member."""


_DAMAGE: Final = (struct.error, IndexError, ValueError, OverflowError, RecursionError)
"""What reading a damaged file comes to; `prove` turns all of it into one sentence."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a struct: where it is and how it is laid out."""

    name: str
    offset: int
    size: int
    element_size: int
    type_name: str


@dataclass(frozen=True, slots=True)
class _Type:
    """One entry of the BTF type section. `size_or_type` is a size or a type id, as the kind says."""

    name: str
    kind: int
    size_or_type: int
    members: tuple[tuple[str, int, int], ...] = ()
    """(name, type id, bit offset); for an array one (element type, length); for DATASEC (variable, 0)."""


def _section(image: bytes, wanted: bytes) -> bytes:
    """Contents of a section of a little-endian ELF64 file."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise DatapathError("not a little-endian 64-bit ELF object")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", image, table + entry * index) for index in range(count)]
    names_at = headers[names_index][4]
    for name, _, _, _, at, size in headers:
        if image[names_at + name : names_at + name + len(wanted) + 1] == wanted + b"\0":
            return image[at : at + size]
    raise DatapathError(f"the object has no section {wanted.decode()}: compile it with -g")


class Btf:
    """The types of an object file. A damaged one may raise any of `_DAMAGE`."""

    def __init__(self, image: bytes) -> None:
        blob = _section(image, b".BTF")
        magic, _, _, header, types_at, types_size, strings_at, strings_size = struct.unpack_from("<HBBIIIII", blob)
        if magic != 0xEB9F:
            raise ValueError("unknown magic number")
        self._strings = blob[header + strings_at : header + strings_at + strings_size]
        self._types = list(self._parse(blob[header + types_at : header + types_at + types_size]))

    def _name(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()

    def _parse(self, blob: bytes) -> Iterator[_Type]:
        yield _Type("void", 0, 0)
        at = 0
        while at < len(blob):
            name, info, size_or_type = struct.unpack_from("<III", blob, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            body, step = at + 12, _MEMBER_BYTES.get(kind, 0)
            members: list[tuple[str, int, int]] = []
            if kind == _ARRAY:
                element, _, length = struct.unpack_from("<III", blob, body)
                members.append(("", element, length))
            elif kind in (_STRUCT, _UNION):
                for index in range(count):
                    label, type_id, bits = struct.unpack_from("<III", blob, body + step * index)
                    members.append((self._name(label), type_id, bits & 0xFFFFFF if info >> 31 else bits))
            elif kind == _DATASEC:
                for index in range(count):
                    (variable,) = struct.unpack_from("<I", blob, body + step * index)
                    members.append(("", variable, 0))
            yield _Type(self._name(name), kind, size_or_type, tuple(members))
            at = body + _TRAILER_BYTES.get(kind, 0) + step * count

    def _bare(self, type_id: int) -> _Type:
        """The type behind typedefs and qualifiers."""
        for _ in self._types:  # no chain is longer, unless it goes in a circle
            found = self._types[type_id]
            if found.kind not in (_TYPEDEF, _VOLATILE, _CONST, _TYPE_TAG):
                return found
            type_id = found.size_or_type
        raise ValueError("a type leads back to itself")

    def _size(self, type_id: int) -> int:
        found = self._bare(type_id)
        if found.kind == _ARRAY:
            _, element, length = found.members[0]
            return length * self._size(element)
        return 8 if found.kind == _PTR else found.size_or_type

    def struct(self, name: str) -> tuple[int, list[Member]] | None:
        """Size and members of a struct, or None where the object does not have it in full."""
        found = next((each for each in self._types if each.kind == _STRUCT and each.name == name), None)
        if found is None:
            return None
        members = []
        for label, type_id, bits in found.members:
            bare = self._bare(type_id)
            element = bare.members[0][1] if bare.kind == _ARRAY else type_id
            size, one = self._size(type_id), self._size(element)
            members.append(Member(label, bits // 8, size, one, self._types[element].name))
        return found.size_or_type, members

    def maps(self) -> dict[str, tuple[str, int, str, int]]:
        """For each map of the section .maps: (name and size of the key type, name and size of the value type).

        For an array of maps the value is the inner map's. A name is "" where the type has none (an array).
        """
        found: dict[str, tuple[str, int, str, int]] = {}
        section = next((each for each in self._types if each.kind == _DATASEC and each.name == ".maps"), None)
        for _, variable_id, _ in section.members if section else ():
            variable = self._types[variable_id]
            fields = {label: type_id for label, type_id, _ in self._bare(variable.size_or_type).members}
            if "values" in fields:
                _, pointer, _ = self._bare(fields["values"]).members[0]
                inner = self._bare(self._bare(pointer).size_or_type)
                fields = {label: type_id for label, type_id, _ in inner.members}
            if "key" in fields and "value" in fields:
                key, value = (self._bare(fields[which]).size_or_type for which in ("key", "value"))
                found[variable.name] = (
                    self._bare(key).name,
                    self._size(key),
                    self._bare(value).name,
                    self._size(value),
                )
        return found


def _struct_differs(name: str, dtype: np.dtype[Any], size: int, members: list[Member]) -> str | None:
    """The first difference between a dtype and a struct, as a sentence, or None."""
    assert dtype.fields is not None, "only structured dtypes stand for structs"
    if dtype.itemsize != size:
        return f"struct {name} has {size} bytes in the object and {dtype.itemsize} in Python"
    here, there = list(dtype.names or ()), [member.name for member in members]
    if here != there:
        return f"struct {name} has the members {', '.join(there)} in the object and {', '.join(here)} in Python"
    for member in members:
        kind, offset = dtype.fields[member.name][:2]
        if (offset, kind.itemsize, kind.base.itemsize) != (member.offset, member.size, member.element_size):
            return (
                f"struct {name}.{member.name} is {member.size} bytes at {member.offset} in the object"
                f" and {kind.itemsize} bytes at {offset} in Python"
            )
        network_order = kind.base.byteorder == ">"
        if network_order != member.type_name.startswith("__be"):
            return f"struct {name}.{member.name} is {member.type_name} in the object, {kind.base.str} in Python"
    return None


def differences(btf: Btf, *, complete: bool) -> list[str]:
    """One sentence for each difference; none: proven.

    complete: every struct and map that Python knows must be there (true for the packaged object; a smaller program
    built with the same headers may use fewer of them).
    """
    found: list[str] = []
    for name, dtype in STRUCTS.items():
        known = btf.struct(name)
        if known is None:
            if complete:
                found.append(f"struct {name} is not in the object")
        elif sentence := _struct_differs(name, dtype, *known):
            found.append(sentence)
    names = {id(dtype): name for name, dtype in STRUCTS.items()}
    maps = btf.maps()
    for name, (key, value) in MAPS.items():
        if name not in maps:
            if complete:
                found.append(f"the map {name} is not in the object")
            continue
        key_name, key_size, value_name, value_size = maps[name]
        for what, dtype, said, size in (("key", key, key_name, key_size), ("value", value, value_name, value_size)):
            expected = names.get(id(dtype))
            if dtype.itemsize != size or (expected is not None and expected != said):
                found.append(
                    f"the {what} of map {name} is {said or 'an array'} of {size} bytes in the object"
                    f" and {expected or dtype} of {dtype.itemsize} bytes in Python"
                )
    return found


def prove(image: bytes, path: str, *, complete: bool = False) -> None:
    """Raises DatapathError where the object (at `path`, contents `image`) was built from other headers than ours."""
    try:
        found = differences(Btf(image), complete=complete)
    except DatapathError as error:
        raise DatapathError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise DatapathError(f"{path}: the object is damaged ({error}): run `make objects`") from error
    if found:
        raise DatapathError(f"{path} was built from other headers than this package's ({found[0]}): run `make objects`")
