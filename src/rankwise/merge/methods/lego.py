"""LoRA-LEGO: cluster the rank-one units of all sources; each cluster becomes one unit of the merged LoRA."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from rankwise.allocation import by_energy
from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.errors import OptionError
from rankwise.merge.engine.base import Merge
from rankwise.merge.engine.result import Merged

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import FactorStack, Stack


@register(
    "merge", "lego", title="LoRA-LEGO: clusters of rank-one units", paper="arXiv 2409.16167", reference="003", exports_to_peft=True
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LEGO(Merge):
    """Pool the units u = [a; b] ∈ R^{in+out} of all sources, k-means them into k clusters, take each centroid (ā, b̄) of raw
    units as one unit: Â: k×in, B̂: out×k, a LoRA of any rank k.

    Units are put in a canonical gauge first (‖a‖ = ‖b‖, sign fixed within a cluster by its largest unit), for (a, b),
    (c·a, b/c) and (−a, −b) are the same unit and would cancel.  Clustering feature: both halves normalised ("halves") or
    raw.  Parameter reweighting gives each centroid the mean ν of its members (ν: largest entry or 2-norm); output
    reweighting multiplies by √(r/k), r the sources' mean rank.  k: ``rank``, or the ``energy`` share of Σ w·ΔW's
    spectrum, or the mean source rank.  Fewer distinct units
    than k give fewer clusters, and empty ones are dropped.  Weights scale a source's units by √w each side.

    No official code was found; the details follow a third-party re-implementation.  With k = all units and no output
    reweighting it is exactly the weighted sum (negative weights by flipping b).

    Args:
        rank: k.
        energy: k by the share of the spectrum, where no rank is given.
        nu: a unit's size, "linf" or "l2".
        feature: what is clustered, "halves" or "raw".
        reweigh_output: multiply by √(r/k).
        reweigh_parameters: give centroids their members' mean size.
        iterations: of k-means.
    """

    checkpoints: ClassVar[bool] = False
    gauge_invariant: ClassVar[bool] = False  # its units are those of the factors
    rank: int | None = None
    energy: float | None = None
    nu: Literal["linf", "l2"] = "linf"
    feature: Literal["halves", "raw"] = "halves"
    reweigh_output: bool = True
    reweigh_parameters: bool = True
    iterations: int = 10

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or self.iterations < 1 or (self.rank is not None and self.energy is not None):
            raise OptionError("The merge 'lego' takes rank ≥ 1 or energy in (0, 1], not both, and iterations ≥ 1.")

    def combine(self, stack: Stack, seed: int) -> Merged:
        stack = stack.factors()
        a, b = self._units(stack)
        k = min(self._k(stack), len(a))
        label = self._cluster(a, b, k)
        A, B = zip(*(self._centroid(a[label == c], b[label == c]) for c in label.unique()), strict=True)
        A_, B_ = torch.stack(A), torch.stack(B, dim=1)
        r = len(a) / len(stack.sources())
        return Merged(LowRank(A_, B_ * math.sqrt(r / len(A_)) if self.reweigh_output else B_))

    def _units(self, stack: FactorStack) -> tuple[Tensor, Tensor]:
        """(N, in) and (N, out): balanced units, weights folded in, sign of the largest entry of a made positive."""
        a = torch.cat([A * math.sqrt(abs(w)) for A, _, w in stack.sources()])
        b = torch.cat([(B * math.copysign(math.sqrt(abs(w)), w)).mT for _, B, w in stack.sources()])
        na, nb = a.norm(dim=1, keepdim=True).clamp_min(1e-30), b.norm(dim=1, keepdim=True).clamp_min(1e-30)
        ratio = (nb / na).sqrt()
        sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
        return a * ratio * sign, b / ratio * sign

    def _k(self, stack: FactorStack) -> int:
        if self.rank is not None:
            return self.rank
        if self.energy is not None:
            return by_energy(stack.total().singular_values().tolist(), self.energy)
        return round(sum(len(A) for A, _, _ in stack.sources()) / len(stack.sources()))

    def _cluster(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        """Lloyd's iterations from the largest unit and those farthest from all chosen so far; distances by the Gram identity."""
        x = torch.cat([a, b], 1)
        if self.feature == "halves":
            x = torch.cat([torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1)], 1)
        if k >= len(x):
            return torch.arange(len(x))
        chosen = [int((a.norm(dim=1) * b.norm(dim=1)).argmax())]
        nearest = (x - x[chosen[0]]).square().sum(1)
        while len(chosen) < k and nearest.max() > 1e-12 * x.square().sum(1).mean():
            chosen.append(int(nearest.argmax()))
            nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
        centre = x[chosen].clone()
        label = torch.zeros(len(x), dtype=torch.long)
        for _ in range(self.iterations):
            label = (centre.square().sum(1) - 2 * x @ centre.mT).argmin(1)
            for c in range(len(centre)):
                if (label == c).any():
                    centre[c] = x[label == c].mean(0)
        return label

    def _centroid(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        units = torch.cat([a, b], 1)
        flip = torch.where((units @ units[units.norm(dim=1).argmax()]) < 0, -1.0, 1.0)[:, None]
        units = units * flip  # (−a, −b) is the same unit
        mean = units.mean(0)
        if self.reweigh_parameters:
            mean = mean * (self._size(units).mean() / self._size(mean[None]).clamp_min(1e-30))
        return mean[: a.shape[1]], mean[a.shape[1] :]

    def _size(self, units: Tensor) -> Tensor:
        return units.abs().amax(1) if self.nu == "linf" else units.norm(dim=1)
