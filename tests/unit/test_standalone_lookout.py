"""When an edit may be used: whole files at once or nearly so, what is written in place when it has come to rest."""

import os
from pathlib import Path

import pytest

from lbpod.core.limits import CONFIG_BYTES_MAX, CONFIG_QUIET_NS, CONFIG_REPLACED_QUIET_NS
from lbpod.standalone.lookout import Lookout, look_at

START_NS = 5_000_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("one\n")
    return path


def replace(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


def test_what_is_in_use_is_no_edit_whatever_file_it_is_in(path: Path) -> None:
    lookout = Lookout(look_at(path))
    assert None is lookout.wait_ns(look_at(path), START_NS)
    replace(path, "one\n")
    assert None is lookout.wait_ns(look_at(path), START_NS)
    path.write_text("two\n")
    assert CONFIG_QUIET_NS == lookout.wait_ns(look_at(path), START_NS), "that one is written in place as well"
    path.write_text("one\n")
    assert None is lookout.wait_ns(look_at(path), 2 * START_NS)


def test_a_file_that_is_written_in_place_is_used_once_it_has_come_to_rest(path: Path) -> None:
    lookout = Lookout(look_at(path))
    path.write_text("two\n")
    assert CONFIG_QUIET_NS == lookout.wait_ns(look_at(path), START_NS)
    assert 1 == lookout.wait_ns(look_at(path), START_NS + CONFIG_QUIET_NS - 1)
    path.write_text("two\nthree\n")
    later_ns = START_NS + CONFIG_QUIET_NS
    assert CONFIG_QUIET_NS == lookout.wait_ns(look_at(path), later_ns)
    assert 0 == lookout.wait_ns(look_at(path), later_ns + CONFIG_QUIET_NS)
    assert None is lookout.wait_ns(look_at(path), later_ns + CONFIG_QUIET_NS), "this is said once"


def test_a_file_that_was_replaced_is_used_soon_unless_it_is_still_being_written(path: Path) -> None:
    lookout = Lookout(look_at(path))
    replace(path, "two\n")
    assert CONFIG_REPLACED_QUIET_NS == lookout.wait_ns(look_at(path), START_NS)
    assert 0 == lookout.wait_ns(look_at(path), START_NS + CONFIG_REPLACED_QUIET_NS)
    replace(path, "three\n")
    assert CONFIG_REPLACED_QUIET_NS == lookout.wait_ns(look_at(path), START_NS)
    path.write_text("three\nfour\n")
    assert CONFIG_QUIET_NS == lookout.wait_ns(look_at(path), START_NS + CONFIG_REPLACED_QUIET_NS)


def test_a_symlink_that_is_swapped_leads_to_another_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"{name}\n")
    link = tmp_path / "link"
    link.symlink_to("one")
    lookout = Lookout(look_at(link))
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", link)
    assert CONFIG_REPLACED_QUIET_NS == lookout.wait_ns(look_at(link), START_NS)


def test_a_file_that_is_gone_is_an_edit_and_so_is_its_return(path: Path) -> None:
    lookout = Lookout(look_at(path))
    path.rename(path.with_suffix(".old"))
    sight = look_at(path)
    assert (None, "No such file or directory") == (sight.file, sight.error)
    assert CONFIG_REPLACED_QUIET_NS == lookout.wait_ns(sight, START_NS)
    assert 0 == lookout.wait_ns(look_at(path), START_NS + CONFIG_REPLACED_QUIET_NS)
    path.with_suffix(".old").rename(path)
    assert CONFIG_REPLACED_QUIET_NS == lookout.wait_ns(look_at(path), 2 * START_NS)


def test_a_look_at_a_file_that_is_too_large_is_bounded(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * CONFIG_BYTES_MAX)
    assert CONFIG_BYTES_MAX + 1 == len(look_at(path).data)
