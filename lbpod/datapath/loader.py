"""From an object file to maps and programs in the kernel, without losing what is there already.

What this file decides: which pinned maps are taken over, which are made new, and in which order things become visible,
so that a crash between any two steps leaves a folder that the next start can use: the object is proven and verified
first (nothing is pinned if the verifier refuses), ``config`` with its version is pinned before any other map, programs
before anything is attached. What it leaves to others: where pins lie (``pins``), attaching (``attach``), what goes into
the maps (``kernel``).

A pinned hash map keeps its size even where another one is asked for: its content is worth more, and a resize would
have to stop forwarding. ``counters`` and the look-up desk hold nothing that is missed, so they are made anew when they
change. Every other array has an index with a meaning, so that another size is another layout, and refused like one.

Programs that are pinned already, made of this very object and on these very maps, are taken over like the maps: the
verifier's look at them is the dearest step of a start, two thirds of a second, and it has been had. A restart replaces
nothing then; an upgrade finds another object and loads it.

A map that only a later release knows stays pinned until its programs are replaced (``attach.forget_old_maps``).
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from lbpod import bpf
from lbpod.core.layout import CONFIG, LAYOUT_VERSION
from lbpod.datapath import layout, libbpf
from lbpod.datapath.libbpf import BpfObject, MapInfo, MapType
from lbpod.datapath.pins import PinFolder
from lbpod.datapath.port import DatapathError

PACKAGED_OBJECT: Final = Path(bpf.__path__[0]) / "lb.bpf.o"
PIN_FOLDER: Final = Path("/sys/fs/bpf/holdfast")

ALLOCATES_SINCE: Final = (6, 1)
"""Before, a program that the agent runs (SEC("syscall"), which counts as sleepable) is refused on a hash map that
allocates entries as they come (kernel commit 96da3f7d489d). There `records` takes its memory at once: some 100 bytes
for each that it may hold."""

_REMADE: Final = frozenset({"counters", "lookup_keys", "lookup_values", "stale_keys", "stale_stamps"})
"""Maps that are made anew when their size changes. No verdict may go uncounted because an older agent had fewer."""

_BUILD_DIGITS: Final = 16
"""Of SHA-256, in hexadecimal: enough that no two objects that ever meet in a folder have the same."""

_HASHES: Final = frozenset({MapType.HASH, MapType.LRU_HASH})
"""Maps whose size is a matter of room."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What to load, and where to pin it."""

    pin_folder: Path = PIN_FOLDER
    """A folder in a BPF file system (the root mount's, where network namespaces come and go)."""

    object_file: Path = PACKAGED_OBJECT
    """The compiled programs."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Entries of maps that are to be larger or smaller than in the source. Only for maps that are made new."""

    complete: bool = False
    """Refuse an object that lacks one of the maps that this package knows. An agent asks for that: what it cannot work
    with must not come as far as an interface. Smaller programs may use fewer."""


@dataclass(frozen=True, slots=True)
class LoadedMap:
    """A map that the programs use."""

    fd: int
    info: MapInfo
    taken_over: bool


@dataclass(frozen=True, slots=True)
class LoadedProgram:
    """A program that the verifier has accepted."""

    fd: int
    id: int
    name: str


class FastPath:
    """Maps and programs of one node, loaded and pinned, attached or not. Owns the descriptors and the folder's lock.

    Invariants: every program in `programs` has a pin; every map in `maps` is the one that these programs use.
    """

    def __init__(self, pins: PinFolder, maps: dict[str, LoadedMap], programs: dict[str, LoadedProgram]) -> None:
        self.pins: Final = pins
        self.maps: Final[Mapping[str, LoadedMap]] = maps
        self.programs: Final[Mapping[str, LoadedProgram]] = programs

    def map(self, name: str) -> LoadedMap:
        """A map by name; DatapathError where the object has none."""
        if name not in self.maps:
            raise DatapathError(f"the loaded programs have no map {name!r}")
        return self.maps[name]

    def program(self, name: str) -> LoadedProgram:
        """A program by name; DatapathError where the object has none."""
        if name not in self.programs:
            raise DatapathError(f"the loaded object has no program {name!r}")
        return self.programs[name]

    def test_run(self, name: str, data: bytes, repeat: int = 1, ifindex: int | None = None) -> libbpf.TestRun:
        """Runs a program on a frame without a network: see libbpf.prog_test_run."""
        return libbpf.prog_test_run(self.program(name).fd, data, repeat, ifindex)

    def close(self) -> None:
        """Closes descriptors and gives up the lock. Pins and attachments stay: forwarding goes on."""
        for fd in [each.fd for each in self.maps.values()] + [each.fd for each in self.programs.values()]:
            os.close(fd)
        self.pins.close()


def load(settings: LoadSettings) -> FastPath:
    """Loads and pins, taking over what is pinned already. Attaches nothing.

    Raises DatapathError with one sentence where it cannot; then nothing that was there has changed.
    """
    try:
        image = settings.object_file.read_bytes()
    except OSError as error:
        raise DatapathError(f"cannot read {settings.object_file} ({error.strerror}): run `make objects`") from error
    layout.prove(image, str(settings.object_file), complete=settings.complete)
    pins = PinFolder(settings.pin_folder)
    opened: BpfObject | None = None
    found: dict[str, int] = {}
    maps: dict[str, LoadedMap] = {}
    programs: dict[str, LoadedProgram] = {}
    fast_path = FastPath(pins, maps, programs)
    try:
        found = pins.maps()
        opened = BpfObject(str(settings.object_file))
        if (kernel_version(os.uname().release) or (0, 0)) < ALLOCATES_SINCE:
            opened.preallocate()
        reused = _reuse(opened, found, settings)
        build = _build_of(image)
        if reused.issuperset(opened.map_names()):
            programs.update(_verified(pins, build, opened.program_names(), [found[name] for name in reused]))
        if programs:
            for name in sorted(reused):
                maps[name] = LoadedMap(os.dup(found[name]), libbpf.map_info(found[name]), True)
            return fast_path
        opened.load()
        _pin_maps(opened, pins, reused, found, maps)
        _pin_programs(opened, pins, build, programs)
        return fast_path
    except DatapathError:
        fast_path.close()
        raise
    finally:
        for fd in found.values():
            os.close(fd)
        if opened is not None:
            opened.close()


def kernel_version(release: str) -> tuple[int, int] | None:
    """Of a release as uname has it; None where it says nothing."""
    version = re.match(r"(\d+)\.(\d+)", release)
    return (int(version[1]), int(version[2])) if version is not None else None


def _reuse(opened: BpfObject, found: Mapping[str, int], settings: LoadSettings) -> frozenset[str]:
    """Puts pinned maps in the place of the declared ones, sizes the others; names of the maps taken over."""
    names = opened.map_names()
    for name, size in sorted(settings.sizes.items()):
        opened.resize(name, size)
    reused: set[str] = set()
    for name in names:
        if name not in found:
            continue
        there, wanted = libbpf.map_info(found[name]), opened.declared(name)
        same_shape, same_size = _shape(there) == _shape(wanted), there.max_entries == wanted.max_entries
        if name in _REMADE and not (same_shape and same_size):
            continue
        if not same_shape:
            raise DatapathError(
                f"the pinned map {name} in {settings.pin_folder} has another shape (type, key, value, flags"
                f" {_shape(there)}) than the programs need {_shape(wanted)}: start anew after `holdfast detach`"
            )
        if not same_size and there.type not in _HASHES:
            raise DatapathError(
                f"the pinned map {name} in {settings.pin_folder} has {there.max_entries} entries and the programs need"
                f" {wanted.max_entries}, which is another layout: it goes on forwarding untouched; run the agent that"
                " made it, or start anew after `holdfast detach`"
            )
        opened.reuse(name, found[name])
        reused.add(name)
    return frozenset(reused)


def _shape(info: MapInfo) -> tuple[int, int, int, int]:
    return info.type, info.key_size, info.value_size, info.flags


def _pin_maps(
    opened: BpfObject, pins: PinFolder, reused: frozenset[str], found: Mapping[str, int], maps: dict[str, LoadedMap]
) -> None:
    """Fills `maps`; pins the new ones, `config` and its version first."""
    names = sorted(opened.map_names(), key=lambda name: (name != "config", name))
    for name in names:
        fd = opened.map_fd(name)
        maps[name] = LoadedMap(fd, libbpf.map_info(fd), name in reused)
        if name in reused:
            continue
        if name == "config":
            row = np.zeros(1, CONFIG)
            row["version"] = LAYOUT_VERSION
            libbpf.map_update(fd, name, bytes(4), row.tobytes())
        pins.pin_map(name, fd, replace=name in found)


def _build_of(image: bytes) -> str:
    """What names a pinned program's origin: the object file, and the libbpf that made instructions of it."""
    return hashlib.sha256(libbpf.version().encode() + b"\0" + image).hexdigest()[:_BUILD_DIGITS]


def _verified(pins: PinFolder, build: str, names: Sequence[str], map_fds: Sequence[int]) -> dict[str, LoadedProgram]:
    """The pinned programs of this build, if all of them are there and use no other maps than these; else nothing."""
    map_ids = {libbpf.map_info(fd).id for fd in map_fds}
    found: dict[str, LoadedProgram] = {}
    try:
        for name in names:
            for program_id in pins.built_programs(name, build):
                fd = pins.program_fd(program_id)
                if fd is not None and libbpf.program_map_ids(fd) <= map_ids:
                    found[name] = LoadedProgram(fd, program_id, name)
                    break
                if fd is not None:
                    os.close(fd)
    finally:
        if len(found) < len(names):
            for each in found.values():
                os.close(each.fd)
    return found if len(found) == len(names) else {}


def _pin_programs(opened: BpfObject, pins: PinFolder, build: str, programs: dict[str, LoadedProgram]) -> None:
    for name in opened.program_names():
        fd = opened.program_fd(name)
        programs[name] = LoadedProgram(fd, libbpf.program_info(fd).id, name)
        pins.pin_program(name, build, programs[name].id, fd)
