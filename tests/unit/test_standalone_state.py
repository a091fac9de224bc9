"""The generation on disk: written whole, never backwards, and never guessed where the file is damaged."""

import threading
from pathlib import Path

import pytest

from lbpod.core.model import NextIds
from lbpod.standalone.state import StateError, StateFile, Written


def test_nothing_is_generation_nought(tmp_path: Path) -> None:
    assert Written(0) == StateFile(tmp_path / "state").read()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state")
    wanted = Written(7, NextIds(1, 2, 3, 4))
    assert state.persist(wanted, 0) is None
    assert wanted == StateFile(tmp_path / "state").read()
    assert ["state", "state.lock"] == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("generation", [1, 7, 8])
def test_it_never_goes_back_nor_over_what_is_not_known(tmp_path: Path, generation: int) -> None:
    state = StateFile(tmp_path / "state")
    state.persist(Written(7), 0)
    assert Written(7) == state.persist(Written(generation, NextIds(9, 9, 9, 9)), min(generation - 1, 6))
    assert Written(7) == state.read()
    assert state.persist(Written(8), 7) is None


def test_of_many_at_once_each_generation_is_won_by_one(tmp_path: Path) -> None:
    won: list[int] = []

    def claim(number: int) -> None:
        state = StateFile(tmp_path / "state")
        for generation in range(1, 21):
            mine = Written(generation, NextIds(backend=number + 1))
            if state.persist(mine, generation - 1) is None:
                won.append(generation)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(set(won)) == sorted(won)
    assert 20 == StateFile(tmp_path / "state").read().generation


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"generation": "7"}', b'{"generation": -1}', b"\xff"])
def test_a_damaged_file_is_no_lost_one(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "state").write_bytes(data)
    state = StateFile(tmp_path / "state")
    with pytest.raises(StateError, match="is damaged; remove it"):
        state.read()
    with pytest.raises(StateError, match="is damaged; remove it"):
        state.persist(Written(1), 0)
    assert data == (tmp_path / "state").read_bytes()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be written: No such file or directory"):
        StateFile(tmp_path / "none" / "state").persist(Written(1), 0)
