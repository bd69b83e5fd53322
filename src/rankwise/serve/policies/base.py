"""The seam of admission: in which order waiting requests are tried, and what becomes of each.

A policy sees plain data and a clock, never a tensor, so it runs on a virtual clock as well.  Whether a request *fits*
(cache blocks, LoRA pages) is the engine's to say; a policy decides order, deferral, refusal and abortion.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence

from rankwise.errors import OptionError

#: policies that only the simulator follows (:mod:`rankwise.serve.simulate`) → what an engine would have to do for them
SIMULATED = {"merge_mode": "merge an adapter into the base's weights while others wait"}


class Verdict(enum.Enum):
    """What a policy says of a waiting request now.  ``REJECT``: never served; ``ABORT``: too late to be of use."""

    ADMIT = "admit"
    DEFER = "defer"
    REJECT = "reject"
    ABORT = "abort"


@dataclasses.dataclass(slots=True)
class RequestInfo:
    """What a policy may know of a request.

    Attributes:
        arrival, deadline, started: seconds on the engine's clock (deadline: of the first token; None: none).
        adapter: digest or None for the base; ``resident``: it is in a slot now; ``lora_pages``: what it takes.
        prompt: prompt tokens not yet in the cache index; ``bound``: most new tokens; ``generated`` so far.
        ready: its adapter's numbers are on this host (an adapter that is still being read keeps nobody waiting).
    """

    id: str
    arrival: float
    prompt: int
    bound: int
    tenant: str = ""
    adapter: str | None = None
    resident: bool = True
    lora_pages: int = 0
    deadline: float | None = None
    generated: int = 0
    started: float | None = None
    ready: bool = True

    @property
    def remaining(self) -> int:
        """Tokens it may still make."""
        return max(self.bound - self.generated, 0)


@dataclasses.dataclass(slots=True)
class State:
    """The engine as a policy sees it at an admission.

    Attributes:
        now: seconds on the engine's clock.
        running, waiting: requests, the waiting ones in order of arrival.
        free_blocks, total_blocks, page: of the cache, ``page`` tokens each; ``free_cells``: LoRA pages.
        step_seconds, seconds_per_prompt_token: of a step as it is, and predicted for each token more.
        chunk: most prompt tokens that join one step (0: no limit).
    """

    now: float
    running: Sequence[RequestInfo]
    waiting: Sequence[RequestInfo]
    free_blocks: int
    total_blocks: int
    page: int
    free_lora_pages: int
    step_seconds: float = 0.0
    seconds_per_prompt_token: float = 0.0
    chunk: int = 0

    def seconds(self, prompt_tokens: int) -> float:
        """Predicted seconds until the first token of a request with that many prompt tokens, were it let in now."""
        steps = -(-prompt_tokens // self.chunk) if self.chunk else 1
        return max(steps, 1) * self.step_seconds + prompt_tokens * self.seconds_per_prompt_token

    def adapters(self) -> set[str]:
        """The adapters of the running batch (the base not among them)."""
        return {j.adapter for j in self.running if j.adapter is not None}


class Policy:
    """One rule of admission.  The defaults: in order of arrival, everybody let in, nothing remembered.

    ``blocking``: a request that does not fit keeps those behind it waiting (strict order); otherwise they are tried.
    It is read after each :meth:`order`, which may set it: a request that has waited too long is given what becomes free.
    """

    name = "policy"
    blocking = False
    #: what an engine would have to do for it and does not ("": nothing); such a policy is for the simulator alone
    unserved = ""

    def order(self, state: State) -> list[RequestInfo]:
        """The waiting jobs in the order in which they are to be tried (a subset where some must wait)."""
        return list(state.waiting)

    def verdict(self, job: RequestInfo, state: State) -> Verdict:
        """What becomes of ``job`` now.  Asked at arrival too, before it is among ``state.waiting``."""
        return Verdict.ADMIT

    def admitted(self, job: RequestInfo, now: float) -> None:
        """``job`` has entered the running batch."""

    def stepped(self, produced: Mapping[str, int], jobs: Sequence[RequestInfo], now: float) -> None:
        """After a step: new tokens of each running request."""

    def finished(self, job: RequestInfo, now: float) -> None:
        """``job`` has ended, in whatever way."""


def tried(policy: Policy, state: State, fits: Callable[[RequestInfo], bool | None]) -> Iterator[tuple[RequestInfo, Verdict]]:
    """One admission: every job with what becomes of it, as the policy says and room allows.

    ``fits`` is asked of a job the policy lets in, in order, and takes the room where it says yes (None: the job has ended, which
    keeps nobody waiting).  Jobs that wait on are not named.
    """
    for job in policy.order(state):
        verdict = policy.verdict(job, state)
        if verdict is Verdict.DEFER:
            continue
        room = fits(job) if verdict is Verdict.ADMIT else True
        if room:
            yield job, verdict
        elif room is not None and policy.blocking:
            return


def oldest_first(order: Sequence[RequestInfo], state: State, max_wait: float) -> tuple[list[RequestInfo], bool]:
    """``order`` with those that have waited ``max_wait`` seconds at its head in order of arrival, and whether there are any.

    A policy that sets ``blocking`` to the second value has no starvation: from then on what becomes free is theirs.
    """
    aged = sorted((j for j in state.waiting if j.ready and state.now - j.arrival >= max_wait), key=lambda j: j.arrival)
    ids = {j.id for j in aged}
    return [*aged, *(j for j in order if j.id not in ids)], bool(aged)


def refuse_unserved(name: str, unserved: str) -> None:
    """OptionError where an engine would have to do for the policy what it does not (``unserved``; "": nothing)."""
    if unserved:
        raise OptionError(f"The policy {name!r} is for the simulator: it wants the engine to {unserved}; use 'default'.")


def need(policy: str, **checks: tuple[float, bool, str]) -> None:
    """OptionError naming the first option whose check fails: option=(value, right?, what is expected)."""
    for option, (value, right, expected) in checks.items():
        if not right:
            raise OptionError(f"{policy} got {option} = {value}; it is {expected}.")
