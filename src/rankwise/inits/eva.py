"""EVA: rows of A are the directions along which a site's inputs vary most; ranks go where a direction explains more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from rankwise.allocation import top_k
from rankwise.calibration.pca import StreamingPCA
from rankwise.catalogue import register
from rankwise.errors import OptionError
from rankwise.inits.base import Fill, Init

if TYPE_CHECKING:
    from rankwise.calibration.base import Stats
    from rankwise.sites.site import Site


@register(
    "init", "eva", title="EVA: explained-variance adaptation", paper="arXiv 2410.07170", reference="046", requires=("fill:A",)
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class EVA(Init):
    """A = [c_1 … c_r]: r×in, the top principal components of the site's (centred, unmasked) token inputs; B = 0.

    K = round(ρ·r) components are followed a site; each has e_k = σ_k²/(total variance), and of all (site, k) the
    Σ r largest are kept: a site's rank is the number of its own (0 drops it).  s stays what it was at rank r.  Sites fed
    by the very same tensor share one PCA.  W is untouched; afterwards it is an ordinary LoRA of uneven ranks.
    ``whiten`` divides row k by √σ_k.  The pass stops early once every component has a cosine ≥ τ with its predecessor.

    Invariants: A·Aᵀ = I; ranks sum to the budget.  Source: ml-jku/EVA, src/svd.py.
    Errors: batches with fewer than K unmasked tokens carry nothing and are refused where no other came.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    rho: float = 2.0
    tau: float = 0.99
    whiten: bool = False

    def __post_init__(self) -> None:
        if self.rho < 1 or not 0 < self.tau <= 1:
            raise OptionError(f"The init 'eva' needs rho ≥ 1 and 0 < tau ≤ 1; it got rho = {self.rho}, tau = {self.tau}.")

    def requests(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, StreamingPCA]:
        shared: dict[str, int] = {}
        for s in sites:  # one PCA a group follows as many components as its neediest member
            k = min(round(self.rho * ranks[s.name]), s.spec.max_rank)
            key = s.spec.input_group or s.name
            shared[key] = max(shared.get(key, 0), k)
        return {s.name: StreamingPCA(shared[s.spec.input_group or s.name], self.tau) for s in sites}

    def allocate(self, sites: Sequence[Site], stats: Stats, ranks: Mapping[str, int]) -> dict[str, int]:
        scores: dict[tuple[str, int], float] = {}
        for s in sites:
            k = min(round(self.rho * ranks[s.name]), s.spec.max_rank)
            scores |= {(s.name, i): float(e) for i, e in enumerate(stats[s.name].ratios()[:k])}
        kept = top_k(scores, sum(ranks[s.name] for s in sites))
        return {s.name: sum(1 for name, _ in kept if name == s.name) for s in sites}

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        pca: StreamingPCA = stats[site.name]
        assert pca.components is not None and pca.sigma is not None
        A = pca.components[:rank]
        return Fill({"A": A / pca.sigma[:rank, None].clamp_min(1e-12).sqrt() if self.whiten else A})
