"""How many prompt and training tokens join a step, learnt from the steps that were taken.

Serving steps are fitted by :class:`~rankwise.serve.engine.step_time.StepTime`.  Training runs after a step's forward, on its own
tokens, so its price is a rate of its own; it takes what the limit of a step leaves.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from rankwise.serve.engine.step_time import StepBudget, StepLoad, StepTime

LEAST = 4  #: training tokens that are not worth a start below it
MEMORY = 0.9  #: weight of what was known of the training rate at each new measurement
FAR = 2.0  #: times what was known, above which a measurement counts half


class TrainingWork(Protocol):
    """Training in what a step leaves: see :mod:`rankwise.serve.finetune.queue`."""

    def ready(self) -> bool:
        """Whether it would take some now."""
        ...

    def run(self, tokens: int, seconds: float | None = None) -> int:
        """Work on up to ``tokens`` tokens, piece by piece until ``seconds`` have gone, or None: until a request is there; how many it was."""
        ...


@dataclasses.dataclass(slots=True)
class Pace:
    """The budget of each step.

    Attributes:
        max_num_batched_tokens: most tokens of a step; ``slo``: seconds a serving step may take, training included (None: no limit).
        train_tokens: training tokens beside a serving step where there is no ``slo``.
    """

    max_num_batched_tokens: int
    slo: float | None = None
    train_tokens: int = 32
    model: StepTime = dataclasses.field(default_factory=StepTime)
    train_second: float | None = None  # seconds a training token takes

    def prompt_tokens(self, decode: StepLoad, waiting: int) -> int:
        """Prompt tokens beside the decoding rows, so that the step stays within the limit; some always move."""
        budget = StepBudget(self.model.predict, self.max_num_batched_tokens)
        return budget.split(decode, waiting, 0, self.slo)[0]

    def token_seconds(self) -> float:
        """Predicted seconds of one prompt token more, the mean over a full step; 0 before the first step."""
        more = max(self.max_num_batched_tokens - 1, 1)
        return (self.model.predict(StepLoad(1 + more)) - self.model.predict(StepLoad(1))) / more

    def training_tokens(self, spent: float) -> int:
        """Training tokens that fit behind ``spent`` seconds of serving; a first few to learn their price."""
        if self.slo is None:
            return self.train_tokens
        left = self.slo - spent
        if left <= 0:
            return 0
        n = LEAST if self.train_second is None else int(left / self.train_second)
        return n if n >= LEAST else 0

    def served(self, load: StepLoad, seconds: float) -> float:
        """Learn from a step's forward; measured over predicted, 1 where nothing was predicted yet."""
        if seconds <= 0:  # a clock that stands still, as in tests
            return 1.0
        ratio = self.model.observe(load, seconds)
        return 1 / ratio if ratio > 0 else 1.0

    def trained(self, tokens: int, seconds: float) -> None:
        """Learn from a piece of training."""
        if tokens < 1 or seconds <= 0:
            return
        rate = seconds / tokens
        known = rate if self.train_second is None else self.train_second
        # another job may be several times dearer: that is believed in a few steps, a busy moment is not
        memory = MEMORY if rate < FAR * known else 0.5
        self.train_second = memory * known + (1 - memory) * rate
