"""Plain gradient descent, with momentum if asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from rankwise import catalogue
from rankwise.optim.base import GradTransform, OptimizerMethod, Param
from rankwise.optim.combine import chain
from rankwise.optim.moments import trace
from rankwise.optim.transforms import decoupled_decay, scale_by_lr


@catalogue.register("optimizer", "sgd", title="SGD with momentum")
@dataclasses.dataclass(frozen=True)
class SGD(OptimizerMethod):
    """p ← p − η·u with u = g, or the momentum buf ← μ·buf + g (``nesterov``: g + μ·buf), as ``torch.optim.SGD``.

    Weight decay is decoupled (p ← p − η·λ·p − …), where torch's SGD adds λ·p to the gradient; without momentum
    the two are the same.  State: one element per trained element with momentum, else none.

    Raises:
        OptionError: a momentum outside [0, 1).
    """

    example_lr: ClassVar[float] = 1.0  # without moments a factor beside a zero one moves by lr², which fp32 rounds away below this
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        trace(self.momentum, self.nesterov)

    def transform(self, params: Mapping[str, Param]) -> GradTransform:
        links = [trace(self.momentum, self.nesterov)] if self.momentum else []
        return chain(*links, scale_by_lr(), decoupled_decay())
