"""What the compiled fast path may consist of, judged without running it, and that this kernel's verifier takes it.

Why beside the differential test: that one says what the programs do, this one what they are made of. Older kernels
(5.15) know fewer helpers and no kfuncs, and look at fewer instructions before they give up; and the promise about the
steady path ("arrays and one helper call") is a property of the code, which a
benchmark on a noisy machine only hints at.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from lbpod.datapath.loader import PACKAGED_OBJECT, LoadSettings, load
from lbpod.datapath.pins import PinFolder

CALL: Final = 0x85
"""BPF_JMP | BPF_CALL; src_reg says what is called: 0 a helper, 1 a function of ours, 2 a kfunc."""
HELPER, OURS, KFUNC = 0, 1, 2
MAP_LOOKUP, TAIL_CALL, REDIRECT, ADJUST_HEAD = 1, 12, 23, 44
LAST_HELPER_OF_5_15: Final = 175
"""bpf_task_pt_regs, in enum bpf_func_id of Linux 5.15."""
INSTRUCTIONS_MAX: Final = 6_650
"""Of all programs and functions together, as compiled."""
ARRAYS: Final = frozenset(
    {"config", "vips", "slots", "backends", "nodes", "members", "own", "next", "prev", "counters"}
)
"""All that hf_xdp itself may read; everything else is a call away."""
INSTRUCTION_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Section:
    """One section of an ELF file. info: of a section of relocations, the section that they are for."""

    name: str
    data: bytes
    info: int


def sections_of(image: bytes) -> list[Section]:
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", image, table + entry * at) for at in range(count)]
    names_at = headers[names_index][4]

    def name(at: int) -> str:
        return image[names_at + at : image.index(b"\0", names_at + at)].decode()

    nobits = 8
    return [Section(name(h[0]), b"" if h[1] == nobits else image[h[4] : h[4] + h[5]], h[7]) for h in headers]


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    assert PACKAGED_OBJECT.exists(), "`make objects` has been run"
    return sections_of(PACKAGED_OBJECT.read_bytes())


def code(sections: list[Section]) -> dict[str, bytes]:
    """Section name -> instructions."""
    return {s.name: s.data for s in sections if s.name in ("xdp", "tc", "syscall", ".text")}


def calls(instructions: bytes, kind: int) -> list[int]:
    """What is called: helper numbers, or relative addresses."""
    found = []
    for opcode, registers, _, immediate in struct.iter_unpack("<BBhi", instructions):
        if opcode == CALL and registers >> 4 == kind:
            found.append(immediate)
    return found


def symbols_used(sections: list[Section], by: str) -> set[str]:
    """Names of maps and functions that a section's relocations refer to."""
    target = next(at for at, s in enumerate(sections) if s.name == by)
    symbols = next(s.data for s in sections if s.name == ".symtab")
    strings = next(s.data for s in sections if s.name == ".strtab")
    used = set()
    for section in sections:
        if section.name == f".rel{by}" and section.info == target:
            for _, info in struct.iter_unpack("<QQ", section.data):
                (at,) = struct.unpack_from("<I", symbols, (info >> 32) * 24)
                used.add(strings[at : strings.index(b"\0", at)].decode())
    return used


def test_helpers_are_those_of_linux_5_15(sections: list[Section]) -> None:
    for name, instructions in code(sections).items():
        assert [] == calls(instructions, KFUNC), f"{name} calls no kfunc"
        helpers = calls(instructions, HELPER)
        assert [] == [h for h in helpers if h > LAST_HELPER_OF_5_15], f"{name} calls helpers that 5.15 has"
        assert TAIL_CALL not in helpers, f"{name} is one program: replacing it is one step"


def test_steady_path_reads_arrays_and_calls_one_helper(sections: list[Section]) -> None:
    helpers = calls(code(sections)["xdp"], HELPER)
    assert {MAP_LOOKUP, ADJUST_HEAD, REDIRECT} == set(helpers), "no clock, no writes to maps"
    assert (1, 1) == (helpers.count(ADJUST_HEAD), helpers.count(REDIRECT)), "room is made once, and out it goes"
    maps = {s for s in symbols_used(sections, "xdp") if not s.startswith("hf_") and s != ".text"}
    assert ARRAYS >= maps > {"vips", "slots", "backends", "nodes", "counters"}, "array look-ups are inlined by kernels"


def test_programs_are_small(sections: list[Section]) -> None:
    count = sum(len(instructions) for instructions in code(sections).values()) // INSTRUCTION_BYTES
    assert INSTRUCTIONS_MAX >= count


@pytest.mark.root
def test_verifier_accepts_every_program() -> None:
    if os.geteuid() != 0:
        pytest.skip("missing feature: root")
    folder = Path(f"/sys/fs/bpf/holdfast-verifier-{os.getpid()}")
    fast_path = load(LoadSettings(pin_folder=folder))
    try:
        assert ["hf_drop", "hf_forget", "hf_lookup", "hf_tc", "hf_xdp"] == sorted(fast_path.programs)
    finally:
        fast_path.close()
        pins = PinFolder(folder)
        pins.remove()
        pins.close()
