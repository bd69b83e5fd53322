"""LoRA-XS: freeze A and B from W's SVD, train only the r×r core."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.delta.solve import randomized_svd
from rankwise.forms.base import AdapterLayer, Form, Plan, lead

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class LoraXsLayer(AdapterLayer):
    """Δ = s·B·R·A with A, B frozen (buffers) and R: r×r trained."""

    components: ClassVar[Mapping[str, int]] = {}
    fills: ClassVar[tuple[str, ...]] = ("A", "B", "core")
    roles: ClassVar[Mapping[str, str]] = {"core": "core"}
    A: Tensor
    B: Tensor

    def __init__(self, site: Site, r: int, plan: Plan, *, iterations: int, std: float):
        super().__init__(site, scale=plan.scales[site.name], dropout=plan.dropout)
        W = site.read()
        stacked = W if site.spec.stack else W[None]
        g = plan.generator("xs", site.name)
        factors = [randomized_svd(w.double(), r, niter=iterations, generator=g) for w in stacked]
        A = torch.stack([S[:, None] * Vh for _, S, Vh in factors]).float().reshape(*lead(site), r, site.spec.inp)
        B = torch.stack([U for U, _, _ in factors]).float().reshape(*lead(site), site.spec.out, r)
        self.register_buffer("A", A.to(site.device))
        self.register_buffer("B", B.to(site.device))
        self.core = nn.Parameter(
            (torch.randn(*lead(site), r, r, generator=plan.generator("core", site.name)) * std).to(site.device)
        )

    def delta(self) -> LowRank:
        return LowRank(self.A, self.B, self.scale, core=self.core)

    def complete(self, filled: Mapping[str, Tensor]) -> None:
        """From a given A alone, B is W's image of it: B = orthonormal basis of W·Aᵀ."""
        if "A" in filled and "B" not in filled:
            Q, _ = torch.linalg.qr((self.site.read() @ self.A.mT).double())
            self.B.copy_(Q.float())


@register("form", "lora_xs", title="LoRA-XS: a trained r×r core between frozen singular vectors of W", paper="arXiv 2405.17604")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAXS(Form):
    """ΔW = s·B·R·A, A = S_r·V_rᵀ: r×in, B = U_r: out×r from W's truncated SVD (frozen, stored), R: r×r trained.

    R ~ N(0, (10⁻⁵)²), so the first output is displaced by about 10⁻⁵.  Trains r² numbers a site whatever its width.
    A and B are stored with the adapter: an SVD is not unique across machines.  W is not changed.

    Source: MohammadrezaBanaei/LoRA-XS (randomised SVD, 10 iterations, seed 42 there; ours is seeded by the site's name).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"fill:A", "fill:B", "fill:core", "core:dense", "constant", "lowrank"})
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "experts")
    start_gap: ClassVar[float] = 1e-4  # R starts at 1e-5, not at zero
    iterations: int = 10
    std: float = 1e-5

    def build(self, site: Site, plan: Plan) -> LoraXsLayer:
        return LoraXsLayer(site, plan.ranks[site.name], plan, iterations=self.iterations, std=self.std)
