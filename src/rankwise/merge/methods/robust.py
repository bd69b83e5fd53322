"""robust_interpolation: stop part of the way from the base, with the update of the straggler layers thinned out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.catalogue import make, register
from rankwise.errors import OptionError, nearest
from rankwise.merge.engine.base import Merge, Source, at_least_one, share, state_of
from rankwise.merge.engine.result import Merged
from rankwise.merge.methods.straggler import layers, profile, stragglers

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import Stack


@register(
    "merge",
    "robust_interpolation",
    title="Robust fine-tuning: part of the way, stragglers thinned",
    paper="arXiv 2109.01903",
    reference="212",
    exports_to_peft=True,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustInterpolation(Merge):
    """θ(α) = (1 − α)·θ_0 + α·θ_1 of one fine-tune (WiSE-FT), at the straggler layers with only the largest ``density`` of |θ_1 − θ_0|.

    ``stragglers`` names sites (of whole models: tensors).  Where none is named and ``density`` < 1, they are the layers whose
    path rises above the line between its ends like no other's (:mod:`rankwise.merge.methods.straggler`), found by the evaluator's
    score on 5 points a layer; where no layer does, nothing is thinned.  Density 1 is plain interpolation, exact; thinned
    changes, and no others, are lowered by an SVD, to ``rank`` or exactly.  α itself is found by a search on held-out data
    (``rankwise merge --search alpha=0:1:0.1``).

    Source: mlfoundations/model-soups, wise-ft-example.py (α = 0.75); the straggler rule is a reconstruction (no code is
    published).  Errors: other than one source; shares out of range; stragglers named at density 1.

    Args:
        alpha: how far from the base, in [0, 1].
        density: the share of entries kept at stragglers.
        stragglers: their names; default found by the evaluator.
        rank: of thinned changes; None: exact.
    """

    count: ClassVar[int | None] = 1
    alpha: float = 0.75
    density: float = 1.0
    stragglers: Sequence[str] = ()
    rank: int | None = None

    def __post_init__(self) -> None:
        share("robust_interpolation", "density", self.density)
        share("robust_interpolation", "alpha", self.alpha, zero=True)
        at_least_one("robust_interpolation", self.rank)
        if isinstance(self.stragglers, str):
            object.__setattr__(self, "stragglers", (self.stragglers,))
        if self.stragglers and self.density == 1:
            raise OptionError("The merge 'robust_interpolation' thins the stragglers it names by density below 1; it got 1.")

    @property
    def needs_evaluator(self) -> bool:
        return self.density < 1 and not self.stragglers

    def check(self, names: Collection[str]) -> None:
        if lost := [n for n in self.stragglers if n not in names]:
            raise OptionError(f"The stragglers name {lost[0]!r}, where nothing is changed; {nearest(lost[0], names)}")

    def fit(self, sources: Sequence[Source], evaluator: Any) -> Merge:
        if not self.needs_evaluator:
            return self
        state = state_of(sources[0])
        groups = layers(evaluator.model, state)
        found = stragglers({n: p.barrier for n, p in profile(evaluator, state, groups).items()})
        names = tuple(sorted(n for layer in found for n in groups[layer]))
        return dataclasses.replace(self, stragglers=names, density=self.density if names else 1.0)

    def combine(self, stack: Stack, seed: int) -> Merged:
        scaled = dataclasses.replace(stack, weights=tuple(self.alpha * w for w in stack.weights))
        if stack.name in self.stragglers:
            thin: Merge = make("merge", "magnitude_prune", density=self.density, rank=self.rank or min(stack.shape))
            return thin.combine(scaled, seed)
        return Merged(scaled.total())
