"""What every way of training is told alike: learning rate, schedule, decay, clipping, length; checked in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from rankwise.errors import OptionError

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The numbers of one run, with transformers' meaning where TrainingArguments has them too.

    Attributes:
        lr: peak learning rate, above 0 (``learning_rate``).
        steps: optimiser steps of the whole run (``max_steps``); None: by ``epochs``.
        epochs: passes over the data (``num_train_epochs``); ``steps`` overrules it.
        schedule: linear or cosine decay to 0, or constant, after the warm-up (``lr_scheduler_type``).
        warmup: optimiser steps in which the rate rises to its peak, or a share of the run below 1 (``warmup_steps``).
        weight_decay: decoupled, as AdamW's.
        max_grad_norm: the global gradient norm is clipped to it; None: not clipped.
        seed: of random draws; None: the recipe's.

    Raises:
        OptionError: a number out of its range.
    """

    lr: float
    steps: int | None = None
    epochs: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise OptionError for a number that cannot be."""
        checks = (
            ("lr", 0 < self.lr < math.inf, "a finite number above 0, or nothing would be learnt"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or None (epochs count)"),
            ("epochs", 0 < self.epochs <= 1e6, "a number above 0, or nothing would be learnt"),
            ("schedule", self.schedule in SCHEDULES, "linear, cosine or constant"),
            ("warmup", 0 <= self.warmup < math.inf, "a number of steps within the run, or a share of it below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number, 0 or more"),
            ("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "a positive number, or None for no clipping"),
        )
        for name, right, expected in checks:
            if not right:
                raise OptionError(f"{name} = {getattr(self, name)!r}; it is {expected}.")

    def steps_over(self, rows: int, batch: int) -> int:
        """Optimiser steps of the whole run over ``rows`` rows, ``batch`` of them a step."""
        return self.steps or max(1, math.ceil(self.epochs * rows / batch))

    def lr_lambda(self, total: int) -> Callable[[int], float]:
        """Multiple of the peak rate at optimiser step n (from 0) of ``total``, as torch's LambdaLR takes it.

        Raises:
            OptionError: a warm-up that is longer than the run.
        """
        first = round(self.warmup * total) if 0 < self.warmup < 1 else int(self.warmup)
        if first > total:
            raise OptionError(f"warmup = {self.warmup!r}; it lies within the run of {total} steps.")

        def at(n: int) -> float:
            if n < first:
                return (n + 1) / (first + 1)
            left = max(0.0, (total - n) / max(1, total - first))
            if self.schedule == "constant":
                return 1.0
            return left if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))

        return at

    def for_session(self, total: int) -> dict[str, Any]:
        """The arguments of a :class:`~rankwise.train.session.Session` over ``total`` optimiser steps."""
        names = ("lr", "schedule", "warmup", "weight_decay", "max_grad_norm", "seed")
        return {"total_steps": total, **{n: getattr(self, n) for n in names}}
