"""ALLoRA: each output row of an adapter gets a step that shrinks as the row of its product grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise import catalogue
from rankwise.errors import OptionError, RecipeError
from rankwise.optim.base import Context, GradTransform, OptimizerMethod, Param, State, check_betas, choose, pairs, refuse_sharded
from rankwise.optim.combine import chain, partition
from rankwise.optim.fused import adamw_chain
from rankwise.optim.moments import scale_by_adam
from rankwise.optim.transforms import decoupled_decay, scale_by_lr

NORMS = ("BA", "B", "factor")


@catalogue.register(
    "optimizer",
    "allora",
    title="ALLoRA (adaptive rate per output row)",
    paper="Huang & Balestriero 2024, ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws (arXiv 2410.09692)",
    reference="031",
    requires=("pair",),
)
@dataclasses.dataclass(frozen=True)
class ALLoRA(OptimizerMethod):
    """c_i = 1/√(‖(B·A)_i‖₂ + 1/η²) multiplies row i of B's step, in place of dropout and α/r.

    c_i is ``eta`` while row i is zero (B = 0 at the start) and falls as it grows; no gradient flows through it.
    The norms come from diag(B·(AAᵀ)·Bᵀ), out×in is never formed.  Use it with s = 1 (alpha = r) and dropout 0.

    Args:
        eta: c of a zero row.
        norm_of: "BA"; "B" (row norms of B); "factor" (third-party ports: A and B each by its own row norms).
        apply_to: "update" scales Adam's direction; "gradient" scales what Adam sees, as the paper's formula reads, but Adam
            divides a per-row constant away, so little is left of it.  Weight decay is never scaled.
        every: steps between two computations of c (1: none is stored; else ``out`` elements per LoRA layer).
        betas, eps: Adam's.

    A reconstruction from the abstract and ports: no program of the authors was found, eta = 2 is the ports' value.
    In the paper the gate sits on the output signal, so that A's gradient becomes s·Bᵀ·diag(c)·G; that is not a
    function of the factors' gradients, so here A's step is not scaled (except with norm_of="factor").  Tensors that
    belong to no A and B take AdamW; in a stack every expert has its own rows.

    Raises:
        RecipeError: the form trains no A and B, or one is sharded.
        OptionError: eta ≤ 0, every < 1, an unknown choice.
    """

    eta: float = 2.0
    norm_of: str = "BA"
    apply_to: str = "update"
    every: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", check_betas(self.betas, self.eps))
        choose("norm_of", self.norm_of, NORMS)
        choose("apply_to", self.apply_to, ("update", "gradient"))
        if not self.eta > 0 or self.every < 1:
            raise OptionError(f"ALLoRA takes eta > 0 and every ≥ 1; got eta {self.eta!r} and every {self.every!r}.")

    def transform(self, params: Mapping[str, Param]) -> GradTransform:
        found = pairs(params)
        if not found:
            raise RecipeError("optimizer 'allora' gates the rows of B of a pair, but none is trained; use 'adamw'.")
        partner = {b.name: a for _, a, b, _ in found}
        gated = set(partner) | ({a.name for _, a, _, _ in found} if self.norm_of == "factor" else set())
        for name in gated | {a.name for a in partner.values()}:
            refuse_sharded(params[name], "optimizer 'allora'")
        gate, adam = RowGate(self, {b: a.name for b, a in partner.items()}), scale_by_adam(*self.betas, self.eps)
        first, second = (adam, gate) if self.apply_to == "update" else (gate, adam)
        return partition(
            lambda p: "gated" if p.name in gated else "plain",
            {
                "gated": chain(first, second, scale_by_lr(), decoupled_decay()),
                "plain": adamw_chain(*self.betas, self.eps),
            },
        )


class RowGate(GradTransform):
    """u_i = c_i·g_i over rows; ``partner`` maps the name of a B to that of its A."""

    reads_params = True

    def __init__(self, method: ALLoRA, partner: Mapping[str, str]) -> None:
        self.method, self.partner = method, dict(partner)

    def init(self, params: Mapping[str, Param]) -> State:
        return {name: {"rows": None} for name in params} if self.method.every > 1 else {}

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        return {name: g * self._rows(name, state, ctx).to(g.dtype)[..., None] for name, g in grads.items()}

    def _rows(self, name: str, state: State, ctx: Context) -> Tensor:
        """c (…×out) of this step, computed or remembered."""
        if self.method.every == 1:
            return self.compute(name, ctx.params)
        kept = state[name]
        if kept["rows"] is None or (ctx.step - 1) % self.method.every == 0:
            kept["rows"] = self.compute(name, ctx.params)
        return kept["rows"]

    def compute(self, name: str, params: Mapping[str, Param]) -> Tensor:
        """c of the tensor ``name`` in fp64, one number a row."""
        t = params[name].tensor.detach().double()
        if self.method.norm_of == "BA":
            a = params[self.partner[name]].tensor.detach().double()
            norm = ((t @ (a @ a.mT)) * t).sum(-1).clamp(min=0).sqrt()
        else:
            norm = torch.linalg.vector_norm(t, dim=-1)
        return (norm + self.method.eta**-2).rsqrt()
