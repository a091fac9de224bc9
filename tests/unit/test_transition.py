"""The words of a VIP's slots, move by move: the legal ones, and what the illegal ones leave alone."""

import numpy as np
import numpy.typing as npt
import pytest

from lbpod.core.layout import SLOT_ROUND_ONE, SLOT_SETTLING, SLOT_TRACKING
from lbpod.core.limits import BACKEND_IDS_MAX, EARLIER_MAX, SLOT_COUNT
from lbpod.core.transition import Slots, base_of, current_of, is_agreed, is_settling, is_tracking, round_of

NOW_NS = 10**12
U32 = npt.NDArray[np.uint32]
ONE = np.array([7], dtype=np.uint32)


def table(*backends: int) -> U32:
    """The first slots have these backends, all others the last one."""
    made = np.full(SLOT_COUNT, backends[-1], dtype=np.uint32)
    made[: len(backends)] = backends
    return made


def alive(*backends: int) -> npt.NDArray[np.bool_]:
    made = np.zeros(BACKEND_IDS_MAX, dtype=np.bool_)
    made[list(backends)] = True
    return made


def steady(*backends: int) -> Slots:
    """Slots after a first commit."""
    slots = Slots()
    slots.commit(table(*backends), alive(*backends), NOW_NS)
    return slots


def at(slots: Slots, slot: int) -> tuple[int, int, bool]:
    """(current, base, tracking) of a slot."""
    word = slots.words[slot : slot + 1]
    return int(current_of(word)[0]), int(base_of(word)[0]), bool(is_tracking(word)[0])


def possible(slots: Slots, slot: int, *living: int) -> list[int]:
    rows = slots.possible(np.array([slot], dtype=np.uint32), alive(*living))
    return sorted(set(rows[0].tolist()) - {0})


def test_a_first_table_is_steady() -> None:
    slots = steady(1, 2)
    assert (1, 1, False) == at(slots, 0)
    assert (2, 2, False) == at(slots, 1)
    assert slots.track is None


def test_prepare_tracks_what_will_differ_and_keeps_current() -> None:
    slots = steady(1, 2, 2)
    changed = slots.prepare(table(3, 2, 3), None, alive(1, 2, 3), NOW_NS)
    assert (1, 1, True) == at(slots, 0)
    assert (2, 2, False) == at(slots, 1)
    assert (2, 2, True) == at(slots, 2)
    assert SLOT_COUNT - 1 == len(changed) == slots.tracking_count


def test_preparing_the_same_table_changes_nothing() -> None:
    slots = steady(1, 2)
    assert 0 == len(slots.prepare(table(1, 2), None, alive(1, 2), NOW_NS))
    assert slots.track is None


def test_commit_moves_current_and_leaves_base() -> None:
    slots = steady(1, 2)
    slots.prepare(table(3, 2), None, alive(1, 2, 3), NOW_NS)
    assert [0] == slots.commit(table(3, 2), alive(1, 2, 3), NOW_NS + 5).tolist()
    assert (3, 1, True) == at(slots, 0)
    assert slots.track is not None
    assert NOW_NS + 5 == slots.track.changed_at_ns[0]
    assert not slots.track.touched.any()


def test_commit_repeated_changes_nothing() -> None:
    slots = steady(1, 2)
    slots.prepare(table(3, 2), None, alive(1, 2, 3), NOW_NS)
    slots.commit(table(3, 2), alive(1, 2, 3), NOW_NS)
    assert 0 == len(slots.commit(table(3, 2), alive(1, 2, 3), NOW_NS + 9))
    assert slots.track is not None
    assert NOW_NS == slots.track.changed_at_ns[0]


def test_a_base_that_is_gone_is_given_up() -> None:
    slots = steady(1, 2)
    slots.prepare(table(3, 2), None, alive(1, 2, 3), NOW_NS)
    slots.commit(table(3, 2), alive(2, 3), NOW_NS)
    assert (3, 3, True) == at(slots, 0)
    assert [] == possible(slots, 0, 2, 3)


def test_a_second_change_keeps_base_and_remembers_what_was_current() -> None:
    slots = steady(1)
    living = alive(1, 2, 3)
    for wanted in (2, 3):
        slots.prepare(table(wanted), None, living, NOW_NS)
        slots.commit(table(wanted), living, NOW_NS)
    assert (3, 1, True) == at(slots, 0)
    assert [1, 2] == possible(slots, 0, 1, 2, 3)
    assert [2] == possible(slots, 0, 2, 3)


def test_what_does_not_fit_into_memory_makes_the_slot_unknown() -> None:
    slots = steady(1)
    living = alive(*range(1, 20))
    for wanted in range(2, 4 + EARLIER_MAX):
        slots.prepare(table(wanted), None, living, NOW_NS)
        slots.commit(table(wanted), living, NOW_NS)
        assert slots.track is not None
        assert (wanted > 2 + EARLIER_MAX) == bool(slots.track.unknown[0])
    assert list(range(1, 2 + EARLIER_MAX)) == possible(slots, 0, *range(1, 20))


def test_dead_ones_make_room_in_memory() -> None:
    slots = steady(1)
    for wanted in range(2, 12):
        slots.prepare(table(wanted), None, alive(1, wanted - 1, wanted), NOW_NS)
        slots.commit(table(wanted), alive(1, wanted), NOW_NS)
    assert slots.track is not None
    assert not slots.track.unknown.any()
    assert [1] == possible(slots, 0, 1, 11)


def test_a_superseded_change_leaves_what_it_tracked_and_is_possible() -> None:
    slots = steady(1, 1)
    living = alive(1, 2, 3)
    slots.prepare(table(2, 1), None, living, NOW_NS)
    slots.prepare(table(1, 3, 1), table(2, 1), living, NOW_NS)
    assert (1, 1, True) == at(slots, 0)
    assert (1, 1, True) == at(slots, 1)
    assert [2] == possible(slots, 0, 1, 2, 3)
    assert [] == possible(slots, 1, 1, 2, 3)
    slots.commit(table(1, 3, 1), living, NOW_NS + 7)
    assert slots.track is not None
    assert [NOW_NS + 7] * 2 == slots.track.changed_at_ns[:2].tolist()


def test_slots_without_a_backend_need_no_tracking() -> None:
    slots = Slots()
    assert 0 == len(slots.prepare(table(1), None, alive(1), NOW_NS))
    slots.commit(table(1), alive(1), NOW_NS)
    assert (1, 1, False) == at(slots, 0)


def test_a_new_vip_whose_creation_was_superseded_tracks_what_others_may_serve() -> None:
    slots = Slots()
    slots.prepare(table(1, 2), None, alive(1, 2), NOW_NS)
    slots.prepare(table(1, 3, 2), table(1, 2), alive(1, 2, 3), NOW_NS)
    assert (0, 0, False) == at(slots, 0)
    assert (0, 2, True) == at(slots, 1)
    slots.commit(table(1, 3, 2), alive(1, 2, 3), NOW_NS)
    assert (1, 1, False) == at(slots, 0)
    assert (3, 2, True) == at(slots, 1)


def test_all_backends_gone_tracks_and_gives_up() -> None:
    slots = steady(1)
    slots.prepare(table(0), None, alive(1), NOW_NS)
    assert (1, 1, True) == at(slots, 0)
    slots.commit(table(0), alive(), NOW_NS)
    assert (0, 0, True) == at(slots, 0)
    assert [] == possible(slots, 0)


def test_flags_touch_tracking_slots_only() -> None:
    slots = steady(1, 2)
    slots.prepare(table(3, 2), None, alive(1, 2, 3), NOW_NS)
    assert [0] == slots.flag(np.array([0, 1], dtype=np.uint32)).tolist()
    assert [True, False] == is_settling(slots.words[:2]).tolist()
    assert SLOT_TRACKING | SLOT_SETTLING == int(slots.words[0]) & (SLOT_TRACKING | SLOT_SETTLING)
    assert [0] == slots.unflag(np.array([0, 1], dtype=np.uint32)).tolist()


def test_a_slot_that_begins_to_track_is_in_another_round_and_stays_in_it_until_it_begins_again() -> None:
    slots, both = steady(1, 2), np.array([0, 1], dtype=np.uint32)

    def rounds() -> list[int]:
        return (round_of(slots.words[:2]) // np.uint32(SLOT_ROUND_ONE)).tolist()  # type: ignore[no-any-return]

    assert [0, 0] == rounds()
    slots.prepare(table(3, 2), None, alive(1, 2, 3), NOW_NS)
    assert [1, 0] == rounds()
    slots.commit(table(3, 2), alive(1, 2, 3), NOW_NS)
    slots.flag(both)
    slots.agree(both)
    assert [1, 0] == rounds()
    slots.prepare(table(1, 2), None, alive(1, 2, 3), NOW_NS)
    assert [1, 0] == rounds(), "it tracks already"
    slots.commit(table(1, 2), alive(1, 2, 3), NOW_NS)
    slots.finish(both)
    assert [1, 0] == rounds(), "what came through a chain meanwhile counts until then"
    slots.track_all(NOW_NS)
    assert [2, 1] == rounds()
    again = Slots(slots.words)
    again.restore(table(1, 2), None, alive(1, 2), False, NOW_NS)
    assert (slots.words == again.words).all()
    for _ in range(63):
        slots.finish(both)
        slots.track_all(NOW_NS)
    assert [1, 0] == rounds(), "modulo 64"


def test_a_page_has_the_senders_words_and_the_receivers_round() -> None:
    sender, receiver = changed_once(), changed_once()
    sender.finish(ONE)
    sender.track_all(NOW_NS)
    receiver.take_page(ONE, ONE, sender.words[ONE], alive(1, 2), NOW_NS)
    assert [2, 1] == [int(round_of(one.words[ONE])[0]) // SLOT_ROUND_ONE for one in (sender, receiver)]


def changed_once() -> Slots:
    slots = steady(1)
    slots.prepare(table(2), None, alive(1, 2), NOW_NS)
    slots.commit(table(2), alive(1, 2), NOW_NS)
    return slots


def test_the_backup_agrees_and_goes_on_tracking() -> None:
    slots = changed_once()
    assert ONE.tolist() == slots.agree(ONE).tolist()
    assert (2, 2, True) == at(slots, 7)
    assert is_agreed(slots.words)[7]
    assert 0 == len(slots.agree(ONE)), "agreeing twice is agreeing once"


def test_a_new_change_of_the_slot_ends_an_agreement() -> None:
    slots = changed_once()
    slots.agree(ONE)
    slots.prepare(table(1), None, alive(1, 2), NOW_NS)
    assert slots.track is not None
    assert not is_agreed(slots.words)[7]
    assert bool(slots.track.unknown[7]), "what was recorded before it may be met by a five-tuple that is used again"


def test_the_owner_takes_over_the_agreed_base_and_its_flag_stays_until_taken() -> None:
    slots = changed_once()
    slots.flag(ONE)
    slots.take_over(ONE, np.array([2], dtype=np.uint32), alive(1, 2))
    assert (2, 2, True) == at(slots, 7)
    assert bool(is_settling(slots.words)[7])


def test_an_agreed_base_that_has_died_is_current() -> None:
    slots = changed_once()
    slots.take_over(ONE, np.array([3], dtype=np.uint32), alive(1, 2))
    assert (2, 2, True) == at(slots, 7)


def test_a_rebase_keeps_tracking_and_what_was_base_stays_possible() -> None:
    slots = changed_once()
    slots.rebase(ONE, np.array([2], dtype=np.uint32), alive(1, 2), NOW_NS + 3)
    assert (2, 2, True) == at(slots, 7)
    assert [1] == possible(slots, 7, 1, 2)
    assert slots.track is not None
    assert NOW_NS + 3 == slots.track.changed_at_ns[7]


def test_finish_forgets_everything_and_the_last_one_frees_the_memory() -> None:
    slots = changed_once()
    slots.rebase(ONE, np.array([2], dtype=np.uint32), alive(1, 2), NOW_NS)
    slots.flag(ONE)
    assert ONE.tolist() == slots.finish(ONE).tolist()
    assert (2, 2, False) == at(slots, 7)
    assert not is_settling(slots.words)[7]
    slots.check_invariants(alive(1, 2))
    slots.finish(np.arange(SLOT_COUNT, dtype=np.uint32))
    assert slots.track is None


@pytest.mark.parametrize("move", ["agree", "take_over", "rebase", "finish", "flag", "unflag"])
def test_nothing_moves_a_steady_slot(move: str) -> None:
    slots = changed_once()
    slots.finish(ONE)
    before = slots.words.copy()
    moves = {
        "agree": lambda: slots.agree(ONE),
        "take_over": lambda: slots.take_over(ONE, np.array([1], dtype=np.uint32), alive(1, 2)),
        "rebase": lambda: slots.rebase(ONE, np.array([1], dtype=np.uint32), alive(1, 2), NOW_NS),
        "finish": lambda: slots.finish(ONE),
        "flag": lambda: slots.flag(ONE),
        "unflag": lambda: slots.unflag(ONE),
    }
    assert 0 == len(moves[move]())
    assert (before == slots.words).all()
    slots.check_invariants(alive(1, 2))


def test_an_lb_without_state_tracks_everything_and_knows_nothing() -> None:
    slots = Slots()
    slots.adopt(table(1, 2), True, NOW_NS)
    assert SLOT_COUNT == slots.tracking_count
    assert (1, 1, True) == at(slots, 0)
    assert slots.track is not None
    assert slots.track.unknown.all()


def test_restoring_what_was_written_changes_nothing() -> None:
    slots = changed_once()
    slots.finish(ONE)
    again = Slots(slots.words)
    assert 0 == len(again.restore(table(2), None, alive(1, 2), False, NOW_NS))
    assert (slots.words == again.words).all()
    assert again.track is not None
    assert bool(again.track.unknown[0])
    assert not again.track.unknown[7]


def test_what_was_agreed_is_so_after_a_restart() -> None:
    slots = changed_once()
    slots.agree(ONE)
    again = Slots(slots.words)
    assert 0 == len(again.restore(table(2), None, alive(1, 2), False, NOW_NS))
    assert ONE.tolist() == again.agreed.tolist()


def test_restoring_in_the_middle_of_a_commit_keeps_both_halves() -> None:
    slots = steady(1, 1)
    slots.prepare(table(2, 2, 1), None, alive(1, 2), NOW_NS)
    words = slots.words.copy()
    slots.commit(table(2, 2, 1), alive(1, 2), NOW_NS)
    words[0] = slots.words[0]
    again = Slots(words)
    assert 0 == len(again.restore(table(1), table(2, 2, 1), alive(1, 2), True, NOW_NS))
    assert [(2, 1, True), (1, 1, True), (1, 1, False)] == [at(again, slot) for slot in range(3)]


def test_restoring_a_steady_slot_that_fits_nothing_tracks_it() -> None:
    again = Slots(steady(1, 2).words)
    assert [0] == again.restore(table(3, 2), None, alive(1, 2, 3), False, NOW_NS).tolist()
    assert (3, 1, True) == at(again, 0)


@pytest.mark.parametrize(("backends", "bytes_a_slot"), [(3, 1), (256, 1), (257, 2), (BACKEND_IDS_MAX // 4, 2)])
def test_folded_slots_say_the_same_in_less_memory(backends: int, bytes_a_slot: int) -> None:
    ids = np.arange(1, backends + 1, dtype=np.uint32)
    slots = Slots()
    slots.commit(ids[np.arange(SLOT_COUNT) % backends], alive(*ids), NOW_NS)
    words, some = slots.words.copy(), np.array([0, 7, 7, SLOT_COUNT - 1], dtype=np.uint32)
    slots.fold()
    assert bytes_a_slot * SLOT_COUNT + 8 * backends == slots.kept_bytes
    assert (words[some] == slots.at(some)).all()
    assert not slots.is_foldable, "a question about some slots leaves all folded"
    assert (words == slots.words).all()
    assert slots.is_foldable


def test_what_changes_nothing_leaves_slots_folded() -> None:
    slots = steady(1, 2)
    slots.fold()
    assert 0 == len(slots.commit(None, alive(1, 2), NOW_NS)) == len(slots.leave(alive(1, 2)))
    assert not slots.is_foldable
    assert 0 == slots.tracking_count


def test_a_change_of_folded_slots_is_like_any_other() -> None:
    folded, whole = steady(1, 2), steady(1, 2)
    folded.fold()
    assert (
        whole.prepare(table(3, 2), None, alive(1, 2, 3), NOW_NS)
        == folded.prepare(table(3, 2), None, alive(1, 2, 3), NOW_NS)
    ).all()
    assert (whole.words == folded.words).all()


def test_slots_that_track_are_not_folded() -> None:
    slots = changed_once()
    assert not slots.is_foldable
    with pytest.raises(AssertionError, match="steady"):
        slots.fold()
