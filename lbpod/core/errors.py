"""The errors that the core raises, by whose fault they are.

Three families (h11's idea: an error says *whose* it is). Our mistakes are ``assert`` with a sentence and have no class.
The world's mistakes (a silent peer, a full map) are events, not exceptions. What is left are theirs: something that was
handed to us and is wrong. Such an error carries one plain sentence that says what, where, and what to do about it, and
leaves the state as it was.
"""


class SnapshotError(ValueError):
    """A World that cannot become a Snapshot, or a Snapshot that breaks an invariant. str(): one sentence."""


class RemoteError(ValueError):
    """A body or a call of another process is wrong. The server answers with ``status`` and ``sentence``.

    status: 400 malformed or against an invariant, 403 not their role, 404 no such thing, 408 it comes too late,
    409 not from where we stand, 413 too large. Whoever is refused by one of these knows that nobody has acted.
    """

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        assert 400 <= status < 500, f"{status} is not a status that says 'your mistake'"
        self.sentence = sentence
        self.status = status
