"""Mixture of LoRA experts over a block (an MLP): the wrapper of the block, and the layers at its linears."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rankwise.delta.gated import Gated
from rankwise.delta.lowrank import LowRank
from rankwise.errors import TargetError
from rankwise.forms.block import BlockDelta, Masks
from rankwise.routers.base import Routed, RouterModule
from rankwise.routers.decision import Decision, execute
from rankwise.runtime.context import forward_context

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer
    from rankwise.routers.gates import Gate
    from rankwise.sites.site import Site


class Expanded(NamedTuple):
    """Rows of a block's input, repeated for each chosen expert and sorted by expert."""

    decision: Decision  # one expert per row, weight 1
    x: Tensor  # (P, in) expanded rows
    h: Tensor  # (N, in) the rows they came from
    rows: Tensor  # (P,) indices into h


#: the block runs as the base: the layers inside add nothing
QUIET: Any = Expanded(*[None] * 4)  # type: ignore[arg-type]


class ExpertBlock(BlockDelta):
    """The block's forward over (row, expert) pairs; its linears find their Decision in the forward context."""

    replaces: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {}

    def __init__(self, site: Site, router: Gate, key: str):
        super().__init__(site)
        self.router, self.key = router, key

    def delta(self) -> Any:
        return Gated(LowRank(torch.zeros(1, self.site.spec.inp), torch.zeros(self.site.spec.out, 1)), None)

    def block(self, base: Callable[..., Any], args: Any, kwargs: Any, y: Tensor | None, strength: Tensor, masks: Masks) -> Tensor:
        h = args[0] if args else kwargs["hidden_states"]
        decision = self.router.route(h)
        self.router.note(decision)
        mixed = self._mixed(base, h, decision)
        if self.router.sums_to_one:
            return mixed
        mask = masks(mixed)  # unlike a top-k, this is not the base where the layers add nothing
        if mask is None and float(strength.detach()) == 1:
            return mixed
        share = strength.to(mixed) if mask is None else strength.to(mixed) * mask
        return torch.lerp(self.plain(base, (h,), {}), mixed, share.expand_as(mixed))

    def plain(self, base: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._inside(QUIET, forward_context.rows):
            return base(*args, **kwargs)

    def _mixed(self, base: Callable[..., Any], h: Tensor, decision: Decision) -> Tensor:
        """Σ_e w_e·F_e(h) of h's shape; a row that no expert takes passes unchanged."""
        flat = h.reshape(-1, h.shape[-1])
        rows, experts, weight = decision.pairs()
        hard = Decision(torch.ones(len(rows), 1, device=h.device), self.router.experts, index=experts[:, None])
        x = flat[rows]
        with self._inside(Expanded(hard, x, flat, rows), rows // max(flat.shape[0] // h.shape[0], 1)):
            out = base(x)
        y = torch.zeros(len(flat), out.shape[-1], dtype=out.dtype, device=out.device)
        y = y.index_add(0, rows, out * weight[:, None].to(out.dtype))
        if decision.index is None:
            y = torch.where((decision.weight != 0).any(-1, keepdim=True), y, flat.to(y.dtype))
        return y.reshape(*h.shape[:-1], -1)

    @contextlib.contextmanager
    def _inside(self, context: Expanded, rows: Tensor | None) -> Iterator[None]:
        before = forward_context.decisions, forward_context.rows
        forward_context.decisions, forward_context.rows = {**(forward_context.decisions or {}), self.key: context}, rows
        try:
            yield
        finally:
            forward_context.decisions, forward_context.rows = before


class ExpertSite(Routed):
    """E LoRAs at one linear of an expert block: each expanded row takes its own expert's.

    Args:
        inner: LoRA of E·r components.
        key: of the block in the forward context.
        experts: E.
        scale: s of each expert's s·B·A.
    """

    def __init__(self, inner: AdapterLayer, key: str, experts: int, scale: float):
        super().__init__(inner, RouterModule(), scale)
        self.key, self.experts = key, experts

    def forward(self, x: Tensor, y: Tensor, strength: Tensor | None = None) -> Tensor:
        context = (forward_context.decisions or {}).get(self.key)
        if context is None:
            raise TargetError(
                f"{self.site.name!r} holds experts of the block {self.key.split('::')[1]!r}, but was called outside it."
            )
        if context is QUIET:
            return torch.zeros_like(y)
        d = self.low_rank()
        A, B = (t.to(y.dtype) for t in d.factors())
        decision = dataclasses.replace(context.decision, sizes=[A.shape[0] // self.experts] * self.experts)
        rows = self.inner.drop(x).reshape(-1, x.shape[-1]).to(y.dtype)
        return execute(rows, A, B, 1.0 if strength is None else strength, decision, plan="segments").reshape(*x.shape[:-1], -1)
