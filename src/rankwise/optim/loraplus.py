"""LoRA+: the outer factor learns faster than the inner one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rankwise import catalogue
from rankwise.errors import OptionError, RecipeError
from rankwise.optim.base import GradTransform, OptimizerMethod, Param, check_betas
from rankwise.optim.fused import adamw_chain


@catalogue.register(
    "optimizer",
    "loraplus",
    title="LoRA+ (a larger rate for B)",
    paper="Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models",
    requires=("pair",),
)
@dataclasses.dataclass(frozen=True)
class LoraPlus(OptimizerMethod):
    """AdamW with η_B = ratio·η_A, because at large width A (r×in) and B (out×r) want different rates.

    The faster group holds B and a matrix core M; vectors (magnitudes, diagonal cores) keep the base rate, where
    published code lets a 1-D DoRA magnitude fall into B's group.  ``ratio=1`` is AdamW step for step; lower the
    base rate about 2× for large ratios, and use 1 with inits that start with a large B (PiSSA).  PEFT's separate
    rate for embedding adapters is not offered: give embeddings a part of their own.

    Raises:
        OptionError: ratio < 1.
        RecipeError: nothing would be trained faster.
    """

    ratio: float = 16.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", check_betas(self.betas, self.eps))
        if not self.ratio >= 1.0:
            raise OptionError(f"The ratio of LoRA+ is {self.ratio!r}; expected a number ≥ 1, usually 16.")

    def transform(self, params: Mapping[str, Param]) -> GradTransform:
        if not any(_fast(p) for p in params.values()):
            raise RecipeError(
                "optimizer 'loraplus' raises the rate of B, but the form trains no B (nor a matrix core); use 'adamw'."
            )
        return adamw_chain(*self.betas, self.eps)

    def lr_multiplier(self, param: Param) -> float:
        return self.ratio if _fast(param) else 1.0


def _fast(param: Param) -> bool:
    return param.role in ("B", "core") and param.tensor.ndim >= 2
