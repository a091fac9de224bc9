"""What the lab raises when the machine does not play along.

One family only: the world (a missing right, tool or kernel feature). A mistake of the caller is a ``ValueError`` with
a sentence, a mistake of ours an ``assert``.
"""

from __future__ import annotations


class LabError(RuntimeError):
    """The lab cannot be built, used or removed. The message is one sentence: what, where, what to do."""
