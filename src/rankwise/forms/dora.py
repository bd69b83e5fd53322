"""DoRA: learn the magnitude of each row of the adapted weight apart from its direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise._renamed import old_names
from rankwise.catalogue import make, register
from rankwise.delta.affine import Scale
from rankwise.delta.dense import Sum
from rankwise.delta.lowrank import LowRank
from rankwise.errors import RecipeError
from rankwise.forms.base import AdapterLayer, Form, Plan, lead
from rankwise.forms.foreign import takes_foreign

if TYPE_CHECKING:
    from rankwise.delta.base import Delta
    from rankwise.sites.site import Site


class DoraLayer(AdapterLayer):
    """W + Δ = diag(m/n)·(W + inner), n = row norms of W + inner; inner is any low-rank form's delta."""

    roles: ClassVar[Mapping[str, str]] = {"m": "magnitude"}

    def __init__(self, site: Site, inner: AdapterLayer):
        super().__init__(site, scale=inner.scale, dropout=inner.dropout)
        self.inner = inner
        self.components = {f"inner.{k}": v for k, v in inner.components.items()}  # type: ignore[misc]
        self.roles = {"m": "magnitude", **{f"inner.{k}": v for k, v in inner.roles.items()}}  # type: ignore[misc]
        self.fills = inner.fills  # type: ignore[misc]
        self.m = nn.Parameter(torch.ones(*lead(site), site.spec.out, device=site.device))
        self._norms: Tensor | None = None
        self.complete({})

    @torch.no_grad()
    def complete(self, filled: Mapping[str, Tensor]) -> None:
        self._norms = None
        self.m.copy_(self.row_norms(self.inner.total_delta()))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner.fill(tensors)
        self.complete(tensors)

    def freeze_initial_delta(self) -> None:
        self.inner.freeze_initial_delta()
        self.complete({})

    def row_norms(self, d: Delta) -> Tensor:
        """‖W_j + Δ_j‖ of each row of the adapted weight, (…, out), without gradient."""
        W = self.site.untouched()
        if not isinstance(d, LowRank):
            with torch.no_grad():
                return (W + d.dense()).norm(dim=-1)
        return self._norms_of(W, *d.factors())

    @torch.no_grad()
    def _norms_of(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """‖W_j + (B·A)_j‖ without forming W + B·A: ‖W_j‖² + 2⟨W_j, (BA)_j⟩ + ‖(BA)_j‖², the last two from r-wide products."""
        if self._norms is None or self._norms.device != W.device:
            self._norms = W.square().sum(-1)
        A, B = A.to(W.dtype), B.to(W.dtype)
        cross = ((W @ A.mT) * B).sum(-1)
        own = ((B @ (A @ A.mT)) * B).sum(-1)
        return (self._norms + 2 * cross + own).clamp_min(1e-24).sqrt()

    def forward(self, x: Tensor, y: Tensor, strength: float | Tensor | None = None) -> Tensor:
        """Δy = c·((m/n − 1)⊙(y − bias) + (m/n)⊙(drop(x)·Aᵀ)·Bᵀ) at a plain linear, by its own few products.

        The reference is :meth:`AdapterLayer.forward`, by way of :meth:`delta`; it runs at every other site, and over inner forms
        that are no sum of plain pairs.
        """
        W = self.site.plain_weight()
        pairs = None if W is None else self.inner.fused_factors()
        if W is None or pairs is None:
            return super().forward(x, y, strength)  # type: ignore[arg-type]
        A, B, s = pairs[0]
        B = B if s == 1.0 else B * s
        for C, D, t in pairs[1:]:  # the frozen initial delta
            A, B = torch.cat([A, C]), torch.cat([B, D * t], -1)
        gain = (self.m / self._norms_of(W if W.dtype == torch.float64 else W.float(), A, B))[:, None]
        h = nn.functional.linear((self.drop(x) if self.dropout and self.training else x).to(y.dtype), A.to(y.dtype))
        bias = self.site.bias
        plain = y if bias is None else y - bias.to(y.dtype)
        change = plain * (gain[:, 0] - 1).to(y.dtype) + nn.functional.linear(h, (gain * B).to(y.dtype))
        return change if strength is None or (isinstance(strength, float) and strength == 1.0) else change * strength

    def delta(self) -> Delta:
        d = self.inner.total_delta()
        gain = self.m / self.row_norms(d)  # n is a constant in backward
        A, B = d.factors()  # type: ignore[attr-defined]
        return Sum((Scale(gain, other=A.shape[-1]), LowRank(A, gain[..., None] * B)))

    def for_peft(self) -> tuple[Delta, Tensor | None]:
        return self.inner.total_delta(), self.m

    def file_state(self) -> dict[str, Any]:
        return self.inner.file_state()

    def restore_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
        renamed = {k.replace("::inner.", "::"): v for k, v in tensors.items()}
        self.inner.restore_state(state, renamed, name)


@takes_foreign(A="inner.A", B="inner.B", magnitude="m")
@register("form", "dora", title="DoRA: magnitude and direction apart", paper="arXiv 2402.09353", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(Form):
    """V = W + s·B·A, n_j = ‖V_j‖₂, W_eff = diag(m/n)·V with m: out, A: r×in, B: out×r trained; n has no gradient.

    As an addition: Δy = (m/n − 1)⊙(x·Wᵀ) + (m/n)⊙s·(x·Aᵀ)·Bᵀ; the bias is never rescaled.  m starts at ‖W_j + s·B₀A₀‖,
    so the first output is the base's.  Stores r·(in + out) + out numbers a site.

    ``inner`` may be any form with a low-rank delta (DVoRA and the like).  n comes from r-wide products and the cached
    ‖W_j‖² instead of a materialised W + BA, as published code does.  Dropout acts on the low-rank term's input only;
    published code drops the base term's input too, which would make the base itself noisy.

    Source: NVlabs/DoRA.  Errors: embeddings and convolutions are refused (their rows are not outputs of a product).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"fill:A", "fill:B", "pair", "components", "constant"})
    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts")
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"use_dora": True}
    inner: str = "lora"

    def build(self, site: Site, plan: Plan) -> DoraLayer:
        form = make("form", self.inner)
        if "lowrank" not in form.provides:
            raise RecipeError(
                f"The form 'dora' needs an inner form with a low-rank delta, but {self.inner!r} has none; use lora, lora_xs or mos."
            )
        return DoraLayer(site, form.build(site, plan))

    def scaling(self) -> str | None:
        return make("form", self.inner).scaling()  # type: ignore[no-any-return]

    def plan(self, sites: Any, plan: Plan) -> Plan:
        return make("form", self.inner).plan(sites, plan)


__getattr__ = old_names(__name__, "Magnitude")
