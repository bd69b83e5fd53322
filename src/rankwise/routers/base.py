"""Base classes of routers: ``route`` is pure; losses and updates without gradient read the records of a training step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.delta.gated import Gated
from rankwise.delta.lowrank import LowRank
from rankwise.errors import RecipeError
from rankwise.forms.base import AdapterLayer, Form, Plan
from rankwise.routers.decision import Decision, execute
from rankwise.runtime.context import forward_context

if TYPE_CHECKING:
    from rankwise.catalogue import MethodInfo
    from rankwise.delta.base import Delta
    from rankwise.sites.site import Site


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """What one forward of one router leaves for its losses: the decision, and which rows are not padding."""

    decision: Decision
    mask: Tensor | None = None


class RouterModule(nn.Module):
    """A router's tensors at one site (or block).  ``route`` writes nothing; ``records`` fill only while ``recording``."""

    pool: Hashable = (
        None  # routers with the same value compute their losses over all their records together; None: each over its own
    )

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        self.records: list[RoutingRecord] = []
        self._read = 0  # records whose losses were collected

    def route(self, x: Tensor, z: Tensor | None = None) -> Decision:
        """The decision for rows x (N, in); z = x·Aᵀ (N, R) where the executor has it."""
        raise NotImplementedError(f"{type(self).__name__} must decide.")

    def losses(self, records: Sequence[RoutingRecord]) -> dict[str, Tensor]:
        """Named scalars of the records of one micro-batch."""
        return {}

    def after_step(self, records: Sequence[RoutingRecord]) -> None:
        """Updates without gradient, once per optimiser step, with the records of all its micro-batches."""

    def note(self, decision: Decision) -> None:
        """Keep a record, in training forwards only (not in recomputation, evaluation or reference passes)."""
        if self.recording and self.training and torch.is_grad_enabled():
            self.records.append(RoutingRecord(decision, row_mask(decision.weight.shape[0], decision.weight.device)))


def row_mask(n: int, device: torch.device) -> Tensor | None:
    """(n,) bool: which of n rows are no padding, from the forward's (B, T) attention mask; None where there is no mask."""
    mask = forward_context.padding
    if mask is None or mask.numel() != n:
        return None
    return mask.reshape(-1).bool().to(device)


class Routed(AdapterLayer):
    """LoRA whose rank-one components a router gates for each row of x."""

    row_wise: ClassVar[bool] = False  # its records are of the full batch

    def __init__(self, inner: AdapterLayer, router: RouterModule, scale: float):
        super().__init__(inner.site, scale=scale, dropout=inner.dropout)
        self.inner, self.router = inner, router
        self.components = {f"inner.{k}": v for k, v in inner.components.items()}  # type: ignore[misc]
        self.roles = {f"inner.{k}": v for k, v in inner.roles.items()}  # type: ignore[misc]
        self.fills = inner.fills  # type: ignore[misc]

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner.fill(tensors)

    def freeze_initial_delta(self) -> None:
        raise RecipeError(
            "An init that subtracts the initial s·B·A cannot be gated by a router, which would gate that part of W too; use an init with B = 0, or no router."
        )

    def low_rank(self) -> LowRank:
        d = self.inner.delta()
        assert isinstance(d, LowRank)
        return LowRank(d.A, d.B, self.scale, d.core)

    def delta(self) -> Delta:
        return Gated(self.low_rank(), None)

    def forward(self, x: Tensor, y: Tensor, strength: Tensor | None = None) -> Tensor:
        d = self.low_rank()
        A, B = (t.to(y.dtype) for t in d.factors())
        rows = self.inner.drop(x).reshape(-1, x.shape[-1]).to(y.dtype)
        decision = self.router.route(rows)
        self.router.note(decision)
        change = execute(rows, A, B, 1.0 if strength is None else strength, decision)
        return change.reshape(*x.shape[:-1], change.shape[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """Base of all routers; dataclass fields are options."""

    info: ClassVar[MethodInfo]

    def check(self, form: Form, part: Any) -> None:
        """Refuse what this router cannot be combined with, beyond what ``requires`` says."""

    def ranks(self, model: nn.Module, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, int]:
        """Components to build at each site (experts times r, where a site holds experts)."""
        return dict(ranks)

    def install(
        self, model: nn.Module, sites: Sequence[Site], made: dict[str, AdapterLayer], plan: Plan
    ) -> dict[str, AdapterLayer]:
        """The layers to use at the sites (and blocks) in place of the form's own.

        Args:
            model: the base.
            sites: the adapted weights.
            made: site name → the layer that the form has built.
            plan: ranks, scales and generators; ``notes["restoring"]`` where a file is being loaded.

        Returns:
            site name (or block path) → layer.
        """
        raise NotImplementedError(f"The router {type(self).__name__} must install itself.")


def routers_in(module: nn.Module) -> list[RouterModule]:
    """Every router below ``module``, in order."""
    return [m for m in module.modules() if isinstance(m, RouterModule)]


@contextlib.contextmanager
def recording(module: nn.Module) -> Iterator[None]:
    """While open, routers below ``module`` keep records of their training forwards."""
    found = routers_in(module)
    for r in found:
        r.recording = True
    try:
        yield
    finally:
        for r in found:
            r.recording = False


def collect_losses(module: nn.Module) -> dict[str, Tensor]:
    """The routers' losses over the records of the micro-batch, summed by name; records stay for ``after_step``."""
    pools: dict[Hashable, tuple[RouterModule, list[RoutingRecord]]] = {}
    for r in routers_in(module):
        fresh = r.records[r._read :]
        r._read = len(r.records)
        if fresh:
            pools.setdefault(r if r.pool is None else r.pool, (r, []))[1].extend(fresh)
    total: dict[str, Tensor] = {}
    for r, records in pools.values():
        for name, value in r.losses(records).items():
            total[name] = total[name] + value.to(total[name].device) if name in total else value
    return total


@torch.no_grad()
def finish_step(module: nn.Module) -> None:
    """Run every router's ``after_step``, then clear the step's records."""
    for r in routers_in(module):
        if r.records:
            r.after_step(r.records)
        r.records, r._read = [], 0
