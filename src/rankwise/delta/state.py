"""An adapter as one immutable value: a ΔW for each adapted weight, ready to be merged, stored or served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import OptionError

if TYPE_CHECKING:
    from rankwise.delta.base import Delta


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Names, shapes and dtypes of a flattened state, in canonical (sorted) order."""

    entries: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    @property
    def numel(self) -> int:
        return sum(torch.Size(s).numel() for _, s, _ in self.entries)


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterState:
    """The weights of an adapter, detached from any model.

    Names are always in sorted order.  ``scaled``, ``inner``, ``norm`` and ``cos`` are of the ΔW's; full tensors (heads,
    norms) are values, not differences, and stay as they are.

    Attributes:
        sites: site name → ΔW.
        full: parameter name → tensor that is stored in full, as ``modules_to_save`` does.
        meta: JSON-able data (errors made, provenance).
    """

    sites: Mapping[str, Delta]
    full: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", {n: self.sites[n] for n in sorted(self.sites)})
        object.__setattr__(self, "full", {n: self.full[n] for n in sorted(self.full)})

    def map(self, fn: Callable[[Delta], Delta]) -> AdapterState:
        return AdapterState({n: fn(d) for n, d in self.sites.items()}, self.full, self.meta)

    def scaled(self, c: float) -> AdapterState:
        return self.map(lambda d: d.scaled(c))

    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> AdapterState:
        """The same state in another dtype (floating tensors) or on another device."""
        full = {n: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for n, t in self.full.items()}
        return dataclasses.replace(self.map(lambda d: d.to(dtype, device)), full=full)

    def detach(self) -> AdapterState:
        return dataclasses.replace(self.map(lambda d: d.detach()), full={n: t.detach() for n, t in self.full.items()})

    def clone(self) -> AdapterState:
        return dataclasses.replace(self.map(lambda d: d.clone()), full={n: t.clone() for n, t in self.full.items()})

    def __add__(self, other: AdapterState) -> AdapterState:
        if self.full or other.full:
            raise OptionError(
                "States with whole tensors (heads, norms) are not added: they may stand for different labels. Merge them by hand."
            )
        names = {**self.sites, **other.sites}
        both = {n: self.sites[n] + other.sites[n] if n in self.sites and n in other.sites else names[n] for n in names}
        return AdapterState(both)

    def lower(self, rank: int | None = None, energy: float | None = None) -> AdapterState:
        """Every ΔW factored to low rank (:meth:`Delta.to_lowrank`); relative errors by site in ``meta["errors"]``."""
        pairs = {n: d.to_lowrank(rank=rank, energy=energy) for n, d in self.sites.items()}
        return AdapterState(
            {n: d for n, (d, _) in pairs.items()}, self.full, {**self.meta, "errors": {n: e for n, (_, e) in pairs.items()}}
        )

    def truncate(self, rank: int | None = None, energy: float | None = None) -> tuple[AdapterState, dict[str, float]]:
        low = self.lower(rank, energy)
        return low, dict(low.meta["errors"])

    def inner(self, other: AdapterState) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n, d in self.sites.items():
            if n in other.sites:
                total = total + d.inner(other.sites[n])
        return total

    def norm(self) -> Tensor:
        return self.inner(self).clamp_min(0).sqrt()

    def cos(self, other: AdapterState) -> Tensor:
        size = self.norm() * other.norm()
        return self.inner(other) / size if size > 0 else torch.zeros((), dtype=torch.float64)

    def numel(self) -> int:
        return sum(d.numel() for d in self.sites.values()) + sum(t.numel() for t in self.full.values())

    def tensors(self) -> dict[str, Tensor]:
        """Floating tensors by ``site::field``, in canonical order, then the full ones; integer indices are left out."""
        out = {f"{n}::{k}": t for n, d in self.sites.items() for k, t in sorted(d.tensors().items()) if t.is_floating_point()}
        return {**out, **self.full}

    def spec(self) -> TensorSpec:
        return TensorSpec(tuple((n, tuple(t.shape), t.dtype) for n, t in self.tensors().items()))

    def flatten(self, spec: TensorSpec | None = None) -> Tensor:
        """All floating tensors as one vector in the order of ``spec`` (:meth:`spec`); fp32, or fp64 where a tensor is; differentiable.

        Raises:
            OptionError: ``spec`` is another state's.
        """
        self._checked(spec)
        parts = list(self.tensors().values())
        wide = torch.float64 if any(t.dtype == torch.float64 for t in parts) else torch.float32
        return torch.cat([t.to(wide).reshape(-1) for t in parts]) if parts else torch.zeros(0)

    def _checked(self, spec: TensorSpec | None) -> TensorSpec:
        mine = self.spec()
        if spec is not None and spec != mine:
            odd = sorted({e[0] for e in set(spec.entries) ^ set(mine.entries)})
            raise OptionError(f"The spec is not this state's: they differ at {odd[:3]}; flatten with the state's own spec().")
        return mine

    def unflatten(self, vector: Tensor, spec: TensorSpec | None = None) -> AdapterState:
        """Inverse of :meth:`flatten`: this state with the elements of ``vector``, in this state's dtypes; differentiable."""
        spec = self._checked(spec)
        if vector.numel() != spec.numel:
            raise OptionError(f"The vector has {vector.numel():,} numbers; this state has {spec.numel:,}.")
        values: dict[str, Tensor] = {}
        at = 0
        for name, shape, dtype in spec.entries:
            n = torch.Size(shape).numel()
            values[name] = vector[at : at + n].view(shape).to(dtype)
            at += n

        def swap(site: str, d: Delta) -> Delta:
            fresh = {k: values.get(f"{site}::{k}", t) for k, t in d.tensors().items()}
            return type(d).from_tensors(fresh, d.meta())

        return AdapterState({n: swap(n, d) for n, d in self.sites.items()}, {k: values[k] for k in self.full}, self.meta)
