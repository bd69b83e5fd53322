"""The seam of budgets: a loop observe → score → budget(step) → allocate → actuate → resync.

An :class:`~rankwise.allocation.Allocation` is plain data, saved with the run, so a checkpoint can be read without
the scorer.  The Session calls the hooks in the one documented order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rankwise.allocation import Allocation

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.catalogue import MethodInfo
    from rankwise.optim.optimizer import TransformOptimizer


@dataclasses.dataclass
class Run:
    """What a budget or loss sees of the run.

    Args:
        adapter: in training.
        optimizer: its optimiser.
        total_steps: optimiser steps of the whole run.
        seed: of the budget's draws.
        step: the optimiser step being taken (the first is 1, from its ``step_begin`` on).
        ddp: True where ``requires_grad`` must not be touched and masks are used instead.
        logs: figures that are logged beside the loss.
    """

    adapter: Adapter
    optimizer: TransformOptimizer
    total_steps: int
    seed: int = 0
    step: int = 0
    ddp: bool = False
    logs: dict[str, float] = dataclasses.field(default_factory=dict)


def agreed(run: Run, allocation: Allocation) -> Allocation:
    """Rank 0's allocation, on every rank of a data-parallel run (``run.ddp``); the same one where there is one process.

    Every budget's decision goes through here: scores or seeds that differ by a rank must not let their adapters drift apart.
    """
    parallel = run.ddp and torch.distributed.is_available() and torch.distributed.is_initialized()
    if not parallel or torch.distributed.get_world_size() == 1:
        return allocation
    sent = [allocation.to_json()]
    torch.distributed.broadcast_object_list(sent, src=0)
    return Allocation.from_json(sent[0])


@dataclasses.dataclass(kw_only=True)
class Budget:
    """Base of all budgets; dataclass fields are options, state lives in ``state_dict``."""

    info: ClassVar[MethodInfo]

    def check(self, forms: Sequence[Any], recipe: Any) -> None:
        """Refuse what this budget cannot live with beyond its declared needs."""

    def start(self, run: Run) -> None:
        """Once, before the first step."""

    def step_begin(self, run: Run) -> None:
        """Before the step's first forward: allocate, sample, probe (restoring everything it touched)."""

    def observe(self, run: Run) -> None:
        """After the gradients are final (unscaled, reduced, clipped), before the update: sees p and its gradient."""

    def after_update(self, run: Run) -> None:
        """After the update: actuate (masks, ranks) and resync the optimiser."""

    def finish(self, run: Run) -> None:
        """Once, after the last step: leave nothing switched."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, as tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
