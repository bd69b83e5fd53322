"""AdamW, the default: one fused kernel call for all tensors that have taken the same number of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rankwise import catalogue
from rankwise.optim.base import GradTransform, OptimizerMethod, Param, check_betas
from rankwise.optim.fused import adamw_chain


@catalogue.register("optimizer", "adamw", title="AdamW", paper="Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization")
@dataclasses.dataclass(frozen=True)
class AdamW(OptimizerMethod):
    """Adam with decoupled weight decay.

    p ← p − η·λ·p − η·m̂/(√v̂ + ε), as ``torch.optim.AdamW``: the same bits as its fused form, 1e-7 of the others.
    Moments are fp32 whatever the parameter's dtype.  State: 2 elements per trained element.

    Raises:
        OptionError: a β outside [0, 1), a negative ε.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", check_betas(self.betas, self.eps))

    def transform(self, params: Mapping[str, Param]) -> GradTransform:
        return adamw_chain(*self.betas, self.eps)
