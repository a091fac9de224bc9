"""Who is there: beats between LBs."""

from lbpod.core.keeper_state import Effects, State
from lbpod.core.messages import BeatAnswer, BeatCall, Reply


def asked(state: State, request: int, call: BeatCall, now_ns: int) -> Effects:
    """POST /v1/beat: where this LB stands."""
    epoch = state.newest.snapshot.ring.epoch if state.newest is not None else 0
    answer = BeatAnswer(state.member, state.generation, epoch, state.is_serving, tuple(sorted(state.down)))
    return [Reply(request, answer)]
