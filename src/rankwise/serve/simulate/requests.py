"""What the simulator is sent, and its limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.errors import OptionError

if TYPE_CHECKING:
    from rankwise.serve.simulate.trace import Arrival


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A request that a client sends.

    Attributes:
        id, tenant, adapter, rank: of the request; rank 0 for the base.
        at, leaves: seconds when it comes, and when its client goes away.
        prompt, output: tokens it has and makes; ``bound``: asked for (None: ``output``).
        deadline: seconds on the clock, or None.
    """

    id: str
    at: float
    prompt: int
    output: int
    tenant: str = ""
    adapter: str | None = None
    rank: int = 0
    bound: int | None = None
    deadline: float | None = None
    leaves: float = math.inf


def sent(trace: Sequence[Arrival], tenants: int = 0) -> list[Sent]:
    """The requests of a trace; adapters belong to ``tenants`` tenants in turn (0: one tenant)."""
    return [
        Sent(f"r{i}", a.at, a.prompt, a.output, f"t{a.adapter % tenants}" if tenants else "", f"a{a.adapter}", a.rank)
        for i, a in enumerate(trace)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class SimOptions:
    """Limits of the simulated engine.

    Attributes:
        page: tokens of a block; ``max_num_seqs``: requests in a step; ``max_num_batched_tokens``: most tokens of a step.
        slo: seconds to the first token, for the figures (a request's own deadline comes first).
        step_slo: seconds of a step that prompts and training are cut to, None for no limit.
        admit_every: steps between admissions where nobody has come or gone since the last.
        fetch_seconds: until an adapter asked for the first time is on the host; ``page_seconds``: to put a cell of it in a slot.
        train: whether training fills what is left of each step.
    """

    page: int = 16
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 256
    slo: float = 6.0
    step_slo: float | None = None
    admit_every: int = 8
    fetch_seconds: float = 0.0
    page_seconds: float = 0.0
    train: bool = False

    def __post_init__(self) -> None:
        for name in ("page", "max_num_seqs", "max_num_batched_tokens", "admit_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"The simulator got {name} = {getattr(self, name)}; it is at least 1.")
