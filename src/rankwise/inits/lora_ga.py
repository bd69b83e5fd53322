"""LoRA-GA: choose A₀, B₀ so that the first step of the product points along the full gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rankwise.calibration.gradients import MeanGradient
from rankwise.catalogue import register
from rankwise.delta.solve import randomized_svd
from rankwise.errors import OptionError
from rankwise.inits.base import Fill, Init

if TYPE_CHECKING:
    from rankwise.calibration.base import Stats
    from rankwise.sites.site import Site

_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "unit", "gd", "weight_svd")


@register(
    "init",
    "lora_ga",
    title="LoRA-GA: gradient approximation",
    paper="arXiv 2407.05000",
    reference="027",
    requires=("fill:A", "fill:B"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAGA(Init):
    """G = mean ∂L/∂W over the calibration batches = U·S·Vᵀ; A = ζ·V_{:r}ᵀ: r×in, B = ζ·U_{r:2r}: out×r, base ← W − s·B·A.

    With ζ = out^¼/√γ ("stable") one plain SGD step moves the product by −lr·s²ζ²·G_{2r}, G_{2r} the best rank-2r part of
    G: the identity that the tests check.  G is formed at each site from x and ∂L/∂y, and only its randomised range of
    4r columns is worked on; the sites of one pass can be bounded by a memory limit.

    ``direction``: ArB2r (above), A2rBr (swapped), ArBr (B even, A odd indices), random.  ``size``: stable, unit (ζ = 1),
    gd (1/s on both), weight_svd (mean root of W's top r singular values, over s).
    ``variant="peft"`` follows HF PEFT 0.21 instead, where A has unit rows and B = ζ·U_{r:2r}·S_{r:2r}; the identity fails there.

    Source: Outsider565/LoRA-GA (lora_ga_init).  Errors: 2r > min(out, in); a gradient that is zero everywhere.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    size: Literal["stable", "unit", "gd", "weight_svd"] = "stable"
    gamma: float = 16.0
    niter: int = 4
    variant: Literal["authors", "peft"] = "authors"

    def __post_init__(self) -> None:
        if self.direction not in _DIRECTIONS or self.size not in _SCALES or self.variant not in ("authors", "peft"):
            raise OptionError(
                f"The init 'lora_ga' has direction in {_DIRECTIONS}, size in {_SCALES} and variant 'authors' or 'peft'; "
                f"it got {self.direction!r}, {self.size!r}, {self.variant!r}."
            )
        if not self.gamma > 0:
            raise OptionError(f"The init 'lora_ga' needs gamma > 0; it got {self.gamma}.")

    def requests(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, MeanGradient]:
        for s in sites:
            if 2 * ranks[s.name] > s.spec.max_rank:
                raise OptionError(
                    f"The init 'lora_ga' takes 2r = {2 * ranks[s.name]} directions at {s.name!r}, which has {s.spec.max_rank}; "
                    f"lower r to {s.spec.max_rank // 2} there with rank_pattern, or exclude it."
                )
        return {s.name: MeanGradient() for s in sites}

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        G: Tensor = stats[site.name]
        if not G.any():
            raise OptionError(
                f"The gradient at {site.name!r} is zero on all calibration batches, so 'lora_ga' has no direction there; exclude it."
            )
        flat = G.reshape(-1, *G.shape[-2:])
        q = min(4 * rank, *G.shape[-2:])
        pairs = [self._factors(*randomized_svd(M, q, oversample=0, niter=self.niter, generator=g), rank, g) for M in flat]
        A = torch.stack([a for a, _ in pairs]).reshape(*G.shape[:-2], rank, G.shape[-1])
        B = torch.stack([b for _, b in pairs]).reshape(*G.shape[:-1], rank)
        zeta = self._zeta(site, rank, scale)
        return Fill({"A": A if self.variant == "peft" else zeta * A, "B": zeta * B}, "subtract")

    def _factors(self, U: Tensor, S: Tensor, Vh: Tensor, r: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.direction == "ArB2r":
            a, b = torch.arange(r), torch.arange(r, 2 * r)
        elif self.direction == "A2rBr":
            a, b = torch.arange(r, 2 * r), torch.arange(r)
        elif self.direction == "ArBr":
            a, b = torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
        else:
            a, b = torch.randperm(2 * r, generator=g).split(r)
        B = U[:, b] * S[b] if self.variant == "peft" else U[:, b]
        return Vh[a].float(), B.float()

    def _zeta(self, site: Site, r: int, scale: float) -> float:
        if self.size == "stable":
            return site.spec.out**0.25 / self.gamma**0.5
        if self.size == "gd":
            return 1 / scale
        if self.size == "weight_svd":
            W = site.read().reshape(-1, *site.spec.shape[-2:])
            return float(torch.linalg.svdvals(W)[:, :r].sqrt().mean()) / scale
        return 1.0
