"""Straight lines between values, scored along the way; and the two recipes that use other tasks' fine-tunes again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from rankwise._renamed import renamed_argument
from rankwise.catalogue import register
from rankwise.delta.state import AdapterState
from rankwise.errors import MergeError, OptionError
from rankwise.merge.engine.base import Merge, Source, merge_states
from rankwise.merge.engine.result import Merged

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import Stack
    from rankwise.merge.judge.evaluator import Evaluator

#: λ of the published sweeps
GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@register(
    "merge",
    "interpolation",
    title="Interpolation; what a source lacks is the first one's",
    paper="arXiv 2307.16184",
    reference="014",
    exports_to_peft=True,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation(Merge):
    """θ = Σ w_t·θ_t with Σ w_t = 1 (default 1/T); a site that source t lacks is taken from the first source, so that the
    coefficients still sum to one there.  What the first adapter lacks too counts as zero; of whole models it is refused.

    Between two, weights (λ, 1 − λ), or ``share`` = λ, give θ(λ) = λ·θ_1 + (1 − λ)·θ_2, affine in λ, with exact ends.  Exact,
    of rank Σ r_t.  ``average`` is the same with zero for what is lacking.  The reported error is the distance from Σ w_t·ΔW_t, so it is
    0 but where a site was filled in.

    Source: mshukor/UnIVAL, preprocess/average_save_models.py.  Errors: weights that do not sum to one; ``share`` beside
    weights, or between other than two.
    """

    breaks: ClassVar[frozenset[str]] = frozenset({"missing sites"})
    works_on: ClassVar[str] = "weights"
    missing: ClassVar[str] = "first"
    share: float | None = None

    @property
    def uses_weights(self) -> bool:  # type: ignore[override]
        """Where ``share`` does not say it all."""
        return self.share is None

    def combine(self, stack: Stack, seed: int) -> Merged:
        if self.share is not None:
            if len(stack.weights) != 2:
                raise OptionError(f"share is between two sources; the merge 'interpolation' got {len(stack.weights)}.")
            stack = dataclasses.replace(stack, weights=(self.share, 1 - self.share))
        if abs(sum(stack.weights) - 1) > 1e-6:
            raise OptionError(
                f"The merge 'interpolation' needs weights that sum to one; they sum to {sum(stack.weights):.6g}. For other sums use 'task_arithmetic'."
            )
        return Merged(stack.filled().total())


@dataclasses.dataclass(frozen=True)
class PathPoint:
    """One place of a sweep: λ and the score on each split."""

    lam: float
    scores: dict[str, float]


def between(first: Source, second: Source, lam: float) -> AdapterState:
    """θ(λ) = λ·first + (1 − λ)·second."""
    return merge_states([first, second], [lam, 1 - lam], "interpolation")


@renamed_argument("oracle", "evaluator")
def sweep(evaluator: Evaluator, first: Source, second: Source, grid: Sequence[float] = GRID) -> list[PathPoint]:
    """The scores of θ(λ) on every split of the evaluator, for each λ of ``grid``, on one model.

    Args:
        evaluator: scores on its model.
        first: the value at λ = 1.
        second: the value at λ = 0.
        grid: of λ.
    """
    return [PathPoint(lam, scored(evaluator, between(first, second, lam))) for lam in grid]


@renamed_argument("oracle", "evaluator")
def path(evaluator: Evaluator, state: AdapterState, grid: Sequence[float] = GRID) -> list[PathPoint]:
    """The scores from the base to a fine-tune, θ₀ + λ·ΔW (WiSE-FT; its example takes λ = 0.75)."""
    return [PathPoint(lam, scored(evaluator, state.scaled(lam))) for lam in grid]


@renamed_argument("oracle", "evaluator")
def scored(evaluator: Evaluator, state: AdapterState) -> dict[str, float]:
    """The score on every split."""
    return {s: evaluator.score(state, s) for s in evaluator.scores}


#: fine-tune on the target task from a value (an empty one is the base), and give the adapter against the base
FineTune = Callable[[AdapterState], AdapterState]


def ratatouille(auxiliaries: Sequence[AdapterState], finetune: FineTune) -> AdapterState:
    """Fine-tune each auxiliary adapter again on the target task, then average uniformly.

    With one auxiliary that is the base itself it is ordinary fine-tuning.  Source: arXiv 2212.10445, as UnIVAL uses it.
    """
    return merge_states([finetune(a) for a in _some(auxiliaries)], None, "interpolation")


def fusing(auxiliaries: Sequence[AdapterState], finetune: FineTune) -> AdapterState:
    """Average the auxiliary adapters first, then fine-tune once on the target task.  Source: arXiv 2204.03044, as UnIVAL uses it."""
    return finetune(merge_states(_some(auxiliaries), None, "interpolation"))


def _some(auxiliaries: Sequence[AdapterState]) -> Sequence[AdapterState]:
    if not auxiliaries:
        raise MergeError("There is no auxiliary adapter; give at least one, or AdapterState({}) for the base.")
    return auxiliaries
