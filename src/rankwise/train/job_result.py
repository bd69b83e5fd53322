"""What one job of a sweep gave, and which job is best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class JobResult:
    """One job of a sweep.

    Attributes:
        settings: all that made it what it is: recipe, lr, steps, batch, seed, data.
        before, after: loss (nats a learnt token), perplexity and, of texts, bits a byte on the held-out rows.
        seconds: its share of the training time.
        note: why it was trained apart from the others, if it was.
        error: why it was stopped or refused; ``after`` is then empty.
        kept: it stood in the folder already.
    """

    name: str
    settings: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float] = dataclasses.field(default_factory=dict)
    trainable: int = 0
    seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    note: str = ""
    error: str = ""
    kept: bool = False

    def score(self) -> float:
        """Held-out loss; infinite where there is none."""
        return self.after.get("loss", math.inf)


def best(outcomes: Sequence[JobResult]) -> JobResult | None:
    """The finished job of the lowest held-out loss; None where none finished."""
    finished = [o for o in outcomes if o.after and math.isfinite(o.score())]
    return min(finished, key=JobResult.score, default=None)
