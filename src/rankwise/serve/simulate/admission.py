"""Whether a request can be let in and all run to their bounds without the cache overflowing (S-LoRA's test, by blocks)."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from rankwise.serve.policies.base import RequestInfo, need


def peak_blocks(held: Sequence[int], left: Sequence[int], page: int) -> int:
    """Most blocks that requests hold together at any time, if each has held_i tokens now and makes left_i more, one a step.

    With requests sorted by what is left, descending, the last to end is the first: when request i ends, those before it are
    still there, so the peak is max_i Σ_{j≤i} ⌈(held_j + left_i)/page⌉.  The ceiling depends on held_j only through its
    remainder, so one count of remainders gives all i: O(b·page) for b requests.
    """
    if not held:
        return 0
    c, m = np.asarray(held, np.int64), np.asarray(left, np.int64)
    order = np.argsort(-m, kind="stable")
    c, m = c[order], m[order]
    remainders = np.arange(page)
    counts = np.cumsum(c[:, None] % page == remainders, axis=0)
    ceilings = -(-(remainders + m[:, None]) // page)
    return int((np.cumsum(c // page) + (counts * ceilings).sum(1)).max())


@dataclasses.dataclass
class PeakTest:
    """Lets a request in if the peak of future blocks, its own among them, fits what there is.

    Every request is assumed to run to ``multiplier()`` of its bound: 1 with ``learn`` unset (then nothing is ever
    put back), else the ``learn`` quantile of what the last ``window`` requests used of theirs.  Where that was too bold, the
    engine puts a request back and calls :meth:`preempted`: caution (0.1 each) is added and wears off with each request that ends.
    For the simulator, and for engines where being put back is dear.  The server's own scheduler asks for a block more than each
    running request has instead: what is put back there finds its keys and values in the prefix index, as far as nobody took the
    blocks, and this test would leave room empty for bounds (``max_tokens``) that most requests do not reach.
    A prompt that is not computed yet comes late by as many steps as the pending prompts take in chunks, and is counted as
    having that many tokens more.

    Attributes:
        page: tokens of a block.
        learn: the quantile; None: bounds are trusted.
        window: requests that are remembered.
        least: remembered requests from which on they count.
    """

    page: int
    learn: float | None = None
    window: int = 256
    least: int = 16
    _used: deque[float] = dataclasses.field(default_factory=deque, init=False, repr=False)
    caution: float = dataclasses.field(default=0.0, init=False)

    def __post_init__(self) -> None:
        need(
            "The peak test",
            page=(self.page, self.page >= 1, "at least 1 token"),
            learn=(
                self.learn or 0.0,
                self.learn is None or 0 < self.learn <= 1,
                "a quantile in (0, 1], or None to trust bounds alone",
            ),
            window=(self.window, self.window >= self.least >= 1, f"at least `least` = {self.least} requests"),
        )
        self._used = deque(maxlen=self.window)

    def multiplier(self) -> float:
        """The share of its bound that a request is taken to use."""
        if self.learn is None or len(self._used) < self.least:
            return 1.0
        return min(1.0, float(np.quantile(self._used, self.learn)) + self.caution)

    def finished(self, job: RequestInfo) -> None:
        """A request has ended of itself: what it used is learned."""
        self._used.append(min(job.generated / max(job.bound, 1), 1.0))
        self.caution = max(self.caution - 0.01, 0.0)

    def preempted(self) -> None:
        """A request was put back for want of room."""
        self.caution = min(self.caution + 0.1, 1.0)

    def fits(self, running: Sequence[RequestInfo], job: RequestInfo, blocks: int, chunk: int = 0) -> bool:
        """Whether ``job`` can join ``running``.

        Args:
            blocks: what the running requests hold and what is free, together.
            chunk: prompt tokens that surely join each step; 0: a whole prompt does.
        """
        jobs = [*running, job]
        pending = sum(j.prompt for j in jobs if not j.generated)
        delay = -(-pending // chunk) if chunk else 1
        share = self.multiplier()
        left = [math.ceil(j.remaining * share) + (0 if j.generated else delay) for j in jobs]
        return peak_blocks([j.prompt + j.generated for j in jobs], left, self.page) <= blocks
