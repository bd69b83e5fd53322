"""Changes that are no low-rank pair, as functions of a module's input rows x and the base's output y without bias.

Each gives Δy over the whole module's output (n×out); a part of a fused projection fills its rows and leaves zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.delta.affine import Scale

if TYPE_CHECKING:
    from rankwise.delta.base import Delta
    from rankwise.forms.base import AdapterLayer
    from rankwise.serve.adapters.base import NonLoraChange
    from rankwise.sites.site import Site


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """Δy = ``value.apply(x, y)`` at one site (its rows of y, where it is a part)."""

    site: Site
    value: Delta
    rows: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        d = self.value if self.value.dtype == y.dtype else self.value.to(dtype=y.dtype)
        mine = y if self.rows is None else y[:, self.rows]
        outputs = isinstance(d, Scale) and d.axis == "out" and d.gain.dim() == 1  # needs the base's output, never its weight
        weight = self.site.weight().to(y.dtype) if d.needs_weight and not outputs else None
        return _spread(d.apply(x, mine if d.needs_output else None, op=self.site.op, weight=weight), self.rows, y)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.value.tensors().values()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """Δy by the form's own forward: a mixture whose gate depends on x."""

    module: AdapterLayer
    rows: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        mine = y if self.rows is None else y[:, self.rows]
        bias = self.module.site.bias
        with torch.no_grad():
            return _spread(self.module(x, mine if bias is None else mine + bias.to(y.dtype)), self.rows, y)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Offset:
    """The same for every row: the change of a bias, (out,)."""

    value: Tensor

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.value.to(y.dtype).expand_as(y)

    def tensors(self) -> Iterator[Tensor]:
        yield self.value


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """Another change times a number: a part of a mix."""

    inner: NonLoraChange
    weight: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, y) * self.weight

    def tensors(self) -> Iterator[Tensor]:
        yield from self.inner.tensors()  # type: ignore[attr-defined]


def tensors_of(changes: Iterable[NonLoraChange]) -> Iterator[Tensor]:
    """Every tensor that these hold; one that says nothing of its tensors holds none."""
    for change in changes:
        if hasattr(change, "tensors"):
            yield from change.tensors()


def _spread(change: Tensor, rows: Tensor | None, y: Tensor) -> Tensor:
    return change if rows is None else torch.zeros_like(y).index_copy(-1, rows.to(y.device), change)
