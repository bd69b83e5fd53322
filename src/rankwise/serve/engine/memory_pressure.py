"""When the computer's memory runs out: how much smaller the next steps are.

What is reserved (cache blocks, LoRA pages) is the scheduler's to share out and never runs out unforeseen.  What a step
allocates beside it may: then idle adapters are let go, recent requests are preempted, and a request that finds no memory even
alone is answered 429 with Retry-After.  Steps grow again as they go well.
"""

from __future__ import annotations

import dataclasses

TRIES = 3  #: times that a request alone may find no memory before it is turned away
CALM = 8  #: steps that go well before the next ones may be twice as large


@dataclasses.dataclass(slots=True)
class OomBackoff:
    """What steps are held to since memory ran out: ``requests``, ``tokens`` (None: nothing but their usual limits)."""

    requests: int | None = None
    tokens: int | None = None
    calm: int = 0

    def failed(self, requests: int, tokens: int) -> None:
        """A step of so many requests and tokens found no memory: the next are half as large."""
        self.requests, self.tokens, self.calm = max(requests // 2, 1), max(tokens // 2, 1), 0

    def went_well(self, most_requests: int, most_tokens: int) -> None:
        """A step went through; ``most_…`` are the usual limits."""
        if self.requests is None or self.tokens is None:
            return
        self.calm += 1
        if self.calm >= CALM:
            self.requests, self.tokens, self.calm = 2 * self.requests, 2 * self.tokens, 0
        if self.requests >= most_requests and self.tokens >= most_tokens:
            self.requests = self.tokens = None

    def of_requests(self, most: int) -> int:
        """The limit of requests beside the usual one."""
        return most if self.requests is None else min(most, self.requests)

    def of_tokens(self, most: int) -> int:
        """The limit of prompt tokens beside the usual one."""
        return most if self.tokens is None else min(most, self.tokens)
