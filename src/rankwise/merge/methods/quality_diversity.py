"""A knob between a quality fine-tune and a diversity one.

θ(λ) = (1 − λ)·θ_q + λ·θ_d: θ_q is distilled towards classifier-free guidance (the loss ``cfg_distillation``), θ_d towards
it with a reward for two samples of one prompt that differ (a policy gradient, not built here).  Both from one base.
After arXiv 2410.06084, whose code is not published; the loss's details, γ and the reward's weight are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise._renamed import renamed_argument
from rankwise.errors import OptionError
from rankwise.merge.engine.base import Source, merge_states
from rankwise.merge.methods.interpolation import GRID, PathPoint, scored
from rankwise.merge.methods.weighings import row

if TYPE_CHECKING:
    from rankwise.delta.state import AdapterState
    from rankwise.merge.judge.evaluator import Evaluator


def _knob(rule: Any, gram: Tensor, w: Tensor) -> Tensor:
    if not 0 <= rule.lam <= 1:
        raise OptionError(f"The knob runs from 0 (quality) to 1 (diversity); it got {rule.lam}.")
    return torch.tensor([1 - rule.lam, rule.lam], dtype=torch.float64)


row(
    "quality_diversity",
    "A knob between a quality and a diversity fine-tune",
    _knob,
    reference="182",
    count=2,
    works_on="weights",
    uses_weights=False,
    breaks=("order",),
    lam=0.5,
    doc="""(1 − λ)·θ_q + λ·θ_d, exact, λ (``lam``) in [0, 1] at run time: the first source is the fine-tune for quality (guidance distilled, the
    loss ``cfg_distillation``), the second the one with a reward for diversity.  Both from one base.  No code is published; a
    reconstruction.  Errors: other than two sources; λ outside [0, 1].""",
)


def knob(quality: Source, diversity: Source, lam: float) -> AdapterState:
    """(1 − λ)·θ_q + λ·θ_d, exact, λ in [0, 1]."""
    return merge_states([quality, diversity], None, "quality_diversity", lam=lam)


@renamed_argument("oracle", "evaluator")
def frontier(evaluator: Evaluator, quality: Source, diversity: Source, grid: Sequence[float] = GRID) -> list[PathPoint]:
    """The scores on every split of the evaluator (say one of quality, one of diversity) along the knob.

    Args:
        evaluator: scores on its model.
        quality: the value at λ = 0.
        diversity: the value at λ = 1.
        grid: of λ.
    """
    return [PathPoint(lam, scored(evaluator, knob(quality, diversity, lam))) for lam in grid]
