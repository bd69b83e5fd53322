"""What several tests of faults share."""

from __future__ import annotations


class FailingAt:
    """Asked before each allocation: counts them, and says that the ``k``-th fails, or all from it on where it is ``lasting``.

    With ``k`` = 0 none fails and ``calls`` says how many there are to fail.
    """

    def __init__(self, k: int = 0, lasting: bool = False):
        self.k, self.lasting, self.calls = k, lasting, 0

    def __call__(self) -> bool:
        self.calls += 1
        return bool(self.k) and (self.calls == self.k or (self.lasting and self.calls > self.k))
