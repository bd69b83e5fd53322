"""The seam of admission: in which order waiting requests are tried, and what becomes of each.

A policy sees plain data and a clock, never a tensor, so it runs on a virtual clock as well.  Whether a request *fits*
(cache blocks, adapter cells) is the engine's to say; a policy decides order, deferral, refusal and abortion.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Protocol


class Verdict(enum.Enum):
    """What a policy says of a waiting request now.  ``REJECT``: never served; ``ABORT``: too late to be of use."""

    ADMIT = "admit"
    DEFER = "defer"
    REJECT = "reject"
    ABORT = "abort"


@dataclasses.dataclass(slots=True)
class Job:
    """What a policy may know of a request.

    Attributes:
        arrival, deadline, started: seconds on the engine's clock (deadline: of the first token; None: none).
        adapter: digest or None for the base; ``resident``: it is in a slot now; ``cells``: what it takes.
        prompt: prompt tokens not yet in the cache index; ``bound``: most new tokens; ``generated`` so far.
    """

    id: str
    arrival: float
    prompt: int
    bound: int
    tenant: str = ""
    adapter: str | None = None
    resident: bool = True
    cells: int = 0
    deadline: float | None = None
    generated: int = 0
    started: float | None = None


@dataclasses.dataclass(slots=True)
class State:
    """The engine as a policy sees it at an admission.

    ``seconds(prompt_tokens)``: predicted time of the next step if that many prompt tokens joined it.
    """

    now: float
    running: Sequence[Job]
    waiting: Sequence[Job]
    free_blocks: int
    total_blocks: int
    page: int
    free_cells: int
    step_seconds: float = 0.0
    seconds_per_prompt_token: float = 0.0


class Policy(Protocol):
    """One rule of admission.

    ``blocking``: a request that does not fit keeps those behind it waiting (strict order); otherwise they are tried.
    """

    name: str
    blocking: bool

    def order(self, state: State) -> list[Job]:
        """The waiting jobs in the order in which they are to be tried (a subset where some must wait)."""
        ...

    def verdict(self, job: Job, state: State) -> Verdict: ...

    def admitted(self, job: Job, now: float) -> None:
        """``job`` has entered the running batch."""
        ...

    def stepped(self, produced: Mapping[str, int], jobs: Sequence[Job], now: float) -> None:
        """After a step: new tokens of each running request."""
        ...

    def finished(self, job: Job, now: float) -> None: ...
