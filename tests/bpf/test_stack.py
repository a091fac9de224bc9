"""How much stack the deepest chain of calls takes, as kernels count that are older than the one that runs the tests.

The verifier here accepts more: it rounds the frame of each function up to 16 bytes where the JIT compiles it, and older
ones (Linux 5.15, 6.1) up to 32. So what is too much for them has to be found by reading the instructions.
"""

import struct
from dataclasses import dataclass, field
from typing import Final

import pytest

from lbpod.datapath.loader import PACKAGED_OBJECT
from tests.bpf.test_verifier import CALL, INSTRUCTION_BYTES, sections_of

STACK_BYTES_MAX: Final = 512
"""MAX_BPF_STACK."""
FRAME_ROUND: Final = 32
FRAMES_MAX: Final = 8
"""MAX_CALL_FRAMES."""

FRAME_POINTER: Final = 10
CLASS_MASK, LDX, ST, STX = 0x07, 0x01, 0x02, 0x03
MOVE_REGISTER, ADD_IMMEDIATE = 0xBF, 0x07
TO_FUNCTION: Final = 1
KIND_MASK, FUNCTION, SECTION = 0xF, 2, 3


@dataclass
class Frame:
    """One function. bytes: how far below the frame pointer it reaches."""

    bytes: int = 0
    calls: set[str] = field(default_factory=set)


def frames_of(image: bytes) -> dict[str, Frame]:
    """Function -> frame."""
    sections = sections_of(image)
    strings = next(s.data for s in sections if s.name == ".strtab")
    symbols = list(struct.iter_unpack("<IBBHQQ", next(s.data for s in sections if s.name == ".symtab")))
    functions = {
        (at, value): (strings[name : strings.index(b"\0", name)].decode(), size)
        for name, kind, _, at, value, size in symbols
        if kind & KIND_MASK == FUNCTION
    }
    targets: dict[tuple[int, int], tuple[int, int]] = {}
    """Where a call is -> section that it goes to, and what to add to the instruction's own number."""
    for section in sections:
        if section.name.startswith(".rel") and sections[section.info].name in ("xdp", "tc", "syscall", ".text"):
            for offset, info in struct.iter_unpack("<QQ", section.data):
                _, kind, _, at, value, _ = symbols[info >> 32]
                if kind & KIND_MASK in (FUNCTION, SECTION):
                    targets[section.info, offset] = at, value
    found = {}
    for (at, start), (name, size) in functions.items():
        frame = found[name] = Frame()
        copy = -1
        for offset in range(start, start + size, INSTRUCTION_BYTES):
            opcode, registers, reach, immediate = struct.unpack_from("<BBhi", sections[at].data, offset)
            to, by = registers & 0xF, registers >> 4
            if opcode == CALL and by == TO_FUNCTION:
                section_at, base = targets.get((at, offset), (at, offset))
                place = base + (immediate + 1) * INSTRUCTION_BYTES
                frame.calls.add(functions[section_at, place][0])
            kind = opcode & CLASS_MASK
            if (kind == LDX and by == FRAME_POINTER) or (kind in (ST, STX) and to == FRAME_POINTER):
                frame.bytes = max(frame.bytes, -reach)
            if opcode == ADD_IMMEDIATE and to == copy:
                frame.bytes = max(frame.bytes, -immediate)
            copy = to if opcode == MOVE_REGISTER and by == FRAME_POINTER else -1
    return found


def deepest(frames: dict[str, Frame], name: str) -> tuple[int, list[str]]:
    """Bytes of stack, and the chain of calls that takes them."""
    below = max((deepest(frames, callee) for callee in sorted(frames[name].calls)), default=(0, []))
    own = -(-max(frames[name].bytes, 1) // FRAME_ROUND) * FRAME_ROUND
    return own + below[0], [f"{name} {own}", *below[1]]


@pytest.fixture(scope="module")
def frames() -> dict[str, Frame]:
    return frames_of(PACKAGED_OBJECT.read_bytes())


@pytest.mark.parametrize("program", ["hf_xdp", "hf_tc", "hf_lookup", "hf_drop", "hf_forget"])
def test_the_stack_is_enough_for_kernels_that_round_frames_up_to_32_bytes(
    frames: dict[str, Frame], program: str
) -> None:
    count, chain = deepest(frames, program)
    assert STACK_BYTES_MAX >= count, f"{count} bytes: {' > '.join(chain)}"
    assert len(chain) <= FRAMES_MAX


def test_functions_and_their_calls_are_all_found(frames: dict[str, Frame]) -> None:
    """What the test above rests on."""
    assert {"hf_tunnel", "hf_chain_link", "hf_track"} <= frames["hf_xdp"].calls
    assert "hf_deliver" in frames["hf_send"].calls
    assert all(8 <= frames[name].bytes <= STACK_BYTES_MAX for name in ("hf_xdp", "hf_deliver", "hf_tc"))
