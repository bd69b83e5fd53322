"""GaLore: Adam on a low-rank projection of each weight's gradient, with bases from the gradient's own SVD."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from rankwise import catalogue
from rankwise.errors import RecipeError
from rankwise.optim.base import GradTransform, OptimizerMethod, Param, check_betas, refuse_sharded
from rankwise.optim.combine import chain, partition
from rankwise.optim.fused import adamw_chain
from rankwise.optim.moments import scale_by_adam
from rankwise.optim.projectors import SvdProjector
from rankwise.optim.subspace import in_subspace
from rankwise.optim.transforms import decoupled_decay, scale_by_lr


@catalogue.register(
    "optimizer",
    "galore",
    title="GaLore (gradient low-rank projection)",
    paper="Zhao et al. 2024, GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    reference="087",
    requires=("weight",),
)
@dataclasses.dataclass(frozen=True)
class GaLore(OptimizerMethod):
    """Train full weights, with Adam's moments in a rank-r subspace of the gradient.

    For W out×in with out ≥ in (a square one too): Q = first r rows of Vᵀ of SVD(G) (r×in), R = G·Qᵀ; else
    P = first r columns of U, R = Pᵀ·G.  With m, v Adam's moments of R and N = m/(√v + ε),

        W ← W − η·√(1−β2ᵗ)/(1−β1ᵗ)·scale·up(N),  then  W ← W − η·λ·W.

    The basis is renewed at the first step and every ``every`` steps from that step's gradient.
    State per projected matrix: r·min + 2·r·max elements, against 2·out·in.  Between two renewals the change is
    exactly B·Q, so that one period is LoRA with A = Q frozen and rate scale·η.

    Args:
        r: rank of the subspace.
        scale: factor on the projected step.
        every: steps between two SVDs.
        moments: at a new basis "keep" the moments as they are (the authors' way), "rotate" them into it, or "zero" them.
        betas, eps: Adam's.
        skip: parts of names (embeddings, head) that take AdamW.

    A tensor with min(out, in) ≤ r, a vector, and every name in ``skip`` take AdamW, unscaled.  A 3-D weight is a stack of matrices; convolutions are not projected (the paper's
    Tucker form is not built).  Published: t is kept at a renewal; the side is guessed anew from the small
    tensor's shape in code, stored here.

    Raises:
        RecipeError: no trained weight would be projected; a sharded weight.
        OptionError: r < 1, every < 1, an unknown policy.
    """

    example: ClassVar[Mapping[str, Any]] = {
        "form": "full",
        "targets": "all-linear",
        "optimizer": {"name": "galore", "r": 8, "every": 5},
    }
    r: int = 128
    scale: float = 0.25
    every: int = 200
    moments: str = "keep"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    skip: tuple[str, ...] = ("embed", "wte", "wpe", "lm_head")

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", check_betas(self.betas, self.eps))
        object.__setattr__(self, "skip", tuple(self.skip))
        self._projector()

    def _projector(self) -> SvdProjector:
        return SvdProjector(self.r, self.every, self.moments)

    def projects(self, param: Param) -> bool:
        """Whether ``param`` is trained in a subspace."""
        wanted = param.role == "weight" and not any(part in param.name for part in self.skip)
        return wanted and self._projector().side(param.tensor.shape) is not None

    def transform(self, params: Mapping[str, Param]) -> GradTransform:
        projected = [p for p in params.values() if self.projects(p)]
        if not projected:
            raise RecipeError(
                f"optimizer 'galore' with r={self.r} would project nothing: it needs weights whose smaller side "
                "is more than r; use form 'full' and a smaller r, or optimizer 'adamw'."
            )
        for p in projected:
            refuse_sharded(p, "optimizer 'galore'")
        adam = scale_by_adam(*self.betas, self.eps, eps_hat=True)
        thin = chain(in_subspace(self._projector(), adam, self.scale), scale_by_lr(), decoupled_decay("after"))
        return partition(
            lambda p: "thin" if self.projects(p) else "plain",
            {"thin": thin, "plain": adamw_chain(*self.betas, self.eps)},
        )
