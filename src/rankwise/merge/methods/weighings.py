"""One number a source: average, task_arithmetic, slerp, nuslerp, multislerp, karcher, model_stock.

The numbers are found from inner products and applied exactly.  A named method is a row of a table.
A combination Σ c_t·x_t of low-rank changes is low-rank, so nothing is formed and nothing is lost; the numbers come from
the sources' Gram matrix G = [⟨x_s, x_t⟩] alone.  A vector of span{x_t} is its coordinates c, with ⟨c, d⟩ = cᵀ·G·d.
Interpolations of whole models work on the weights themselves (``works_on="weights"``), of adapters on their changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.errors import Option, OptionError
from rankwise.merge.engine.base import Merge, at_least_one

if TYPE_CHECKING:
    from rankwise.merge.engine.result import Merged
    from rankwise.merge.engine.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighing(Merge):
    """Base: ``rank`` cuts an adapter's result (default: the exact sum of rank Σ r_t); ``products``: it reads the inner products."""

    products: ClassVar[bool] = True
    rank: int | None = None

    def __post_init__(self) -> None:
        at_least_one(self.info.name, self.rank)

    def coefficients(self, gram: Tensor, w: Tensor) -> Tensor:
        """(T, T) inner products and (T,) weights, fp64 → (T,)."""
        raise NotImplementedError

    def combine(self, stack: Stack, seed: int) -> Merged:
        gram = stack.gram() if self.products else torch.empty(0)
        c = self.coefficients(gram, torch.tensor(stack.weights, dtype=torch.float64)).tolist()
        return stack.combined(c, self.rank)


def plain(rule: Any, gram: Tensor, w: Tensor) -> Tensor:
    if not rule.normalize:
        return rule.lam * w
    if abs(float(w.sum())) < 1e-8:
        raise OptionError(
            f"The merge {rule.info.name!r} divides by the sum of the weights, which is 0; give ", Option("normalize", False), "."
        )
    return rule.lam * w / w.sum()


def _pair(gram: Tensor, t: float, flat: float = 0.9995) -> Tensor:
    """Along the great circle from x_0 (t = 0) to x_1 (t = 1); straight where they are nearly parallel or one vanishes."""
    size = gram.diagonal().clamp_min(0).sqrt()
    cos = float(gram[0, 1] / (size[0] * size[1])) if float(size.min()) > 0 else 1.0
    if abs(cos) > flat:
        return torch.tensor([1 - t, t], dtype=torch.float64)
    angle = math.acos(cos)
    return torch.tensor([math.sin((1 - t) * angle), math.sin(t * angle)], dtype=torch.float64) / math.sin(angle)


def slerp(rule: Any, gram: Tensor, w: Tensor) -> Tensor:
    return _pair(gram, rule.t)


def nuslerp(rule: Any, gram: Tensor, w: Tensor) -> Tensor:
    if abs(float(w.sum())) < 1e-8:
        raise OptionError("The merge 'nuslerp' divides by the sum of the weights, which is 0.")
    return _pair(gram, float(w[1] / w.sum()), flat=1 - 1e-15)  # mergekit's nuslerp goes straight only where the two are parallel


def _units(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the unit vectors as rows (zero where a source vanishes), and the norms."""
    size = gram.diagonal().clamp_min(0).sqrt()
    return torch.diag(torch.where(size > 0, 1 / size.clamp_min(1e-300), torch.zeros_like(size))), size


def _exp(m: Tensor, v: Tensor, gram: Tensor) -> Tensor:
    """The point reached from the unit vector m along the tangent v on the sphere."""
    length = float((v @ gram @ v).clamp_min(0).sqrt())
    return m if length < 1e-15 else math.cos(length) * m + math.sin(length) / length * v


def _normed(c: Tensor, gram: Tensor, name: str) -> Tensor:
    size = (c @ gram @ c).clamp_min(0).sqrt()
    if float(size) < 1e-12:
        raise OptionError(f"The merge {name!r} needs sources that do not cancel; their mean direction vanishes.")
    return c / size


def _sphere(rule: Any, gram: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Shares, unit vectors, their normalised mean and the mean norm; None where every source vanishes."""
    w = _shares(rule, w)
    units, size = _units(gram)
    if not bool(size.any()):
        return None
    return w, units, _normed(w @ units, gram, rule.info.name), float(w @ size)


def multislerp(rule: Any, gram: Tensor, w: Tensor) -> Tensor:
    if len(w) == 1:
        return torch.ones_like(w)  # not a rounded way round the sphere
    if (found := _sphere(rule, gram, w)) is None:
        return w
    w, units, m, size = found
    along = units @ gram @ m  # cosines to the mean
    return _exp(m, w @ (units - along[:, None] * m), gram) * size


def karcher(rule: Any, gram: Tensor, w: Tensor) -> Tensor:
    if len(w) == 1:
        return torch.ones_like(w)  # not a rounded way round the sphere
    if (found := _sphere(rule, gram, w)) is None:
        return w
    w, units, m, size = found
    for _ in range(rule.iterations):
        cos = (units @ gram @ m).clamp(-1, 1)
        angle = cos.acos()
        factor = torch.where(angle > 1e-12, angle / angle.sin().clamp_min(1e-12), torch.ones_like(angle))
        tangent = (w * factor) @ (units - cos[:, None] * m)
        m = _normed(_exp(m, tangent, gram), gram, rule.info.name)
        if float((tangent @ gram @ tangent).clamp_min(0).sqrt()) < rule.tol:
            break
    return m * size


def _shares(rule: Any, w: Tensor) -> Tensor:
    if abs(float(w.sum())) < 1e-8:
        raise OptionError(f"The merge {rule.info.name!r} divides by the sum of the weights, which is 0.")
    return w / w.sum()


def model_stock(rule: Any, gram: Tensor, w: Tensor) -> Tensor:
    n = len(w)
    if n < 2:
        raise OptionError("The merge 'model_stock' needs at least two sources; it got 1.")
    size = gram.diagonal().clamp_min(0).sqrt()
    both = size[:, None] * size[None]
    cos = torch.where(both > 0, gram / both.clamp_min(1e-300), torch.zeros_like(gram))
    mean = float((cos.sum() - cos.diagonal().sum()) / (n * (n - 1)))
    below = 1 + (n - 1) * mean
    t = n * mean / below if abs(below) > 1e-6 else 0.0  # changes that cancel say nothing: the base
    return torch.full((n,), t / n, dtype=torch.float64)


def row(
    name: str,
    title: str,
    weigh: Callable[[Any, Tensor, Tensor], Tensor],
    *,
    doc: str,
    paper: str | None = None,
    reference: str | None = None,
    breaks: tuple[str, ...] = (),
    count: int | None = None,
    works_on: str = "changes",
    uses_weights: bool = True,
    **options: Any,
) -> type[Weighing]:
    """A row of the table, registered: how it weighs, and its options with their defaults.

    Args:
        name: of the merge.
        title: one line for the list of methods.
        weigh: (rule, inner products T×T, weights (T,)) → (T,), all fp64.
        doc: the method's docstring.
        paper: where it is from.
        reference: its number in the method reference.
        breaks: laws that do not hold for it.
        count: exactly so many sources; None: any number.
        works_on: "changes" or "weights" of whole models.
        uses_weights: given weights mean something to it.
        options: with their defaults.
    """
    body = {
        "__doc__": doc,
        "__module__": weigh.__module__,
        "breaks": frozenset(breaks),
        "count": count,
        "works_on": works_on,
        "uses_weights": uses_weights,
        "products": weigh is not plain,
        "coefficients": lambda self, gram, w: weigh(self, gram, w),
        "__annotations__": {
            "breaks": ClassVar[frozenset[str]],
            "count": ClassVar[int | None],
            "works_on": ClassVar[str],
            "uses_weights": ClassVar[bool],
            "products": ClassVar[bool],
        },
    }
    fields = [(k, type(v), dataclasses.field(default=v)) for k, v in options.items()]
    made = dataclasses.make_dataclass(
        name.title().replace("_", ""), fields, bases=(Weighing,), namespace=body, frozen=True, kw_only=True
    )
    return register("merge", name, title=title, paper=paper, reference=reference, exports_to_peft=True)(made)


row(
    "task_arithmetic",
    "Task arithmetic: λ·Σ w_t·ΔW_t",
    plain,
    lam=1.0,
    normalize=False,
    paper="arXiv 2212.04089",
    doc="""Adds, subtracts (negative weights) and rescales changes: λ·Σ w_t·ΔW_t, divided by Σ w_t with ``normalize``.  The literature takes
    λ ≈ 0.3–0.4 with weight 1 for many tasks.  Source: mergekit; mlfoundations/task_vectors.""",
)
row(
    "average",
    "Weighted mean of weights",
    plain,
    lam=1.0,
    normalize=True,
    works_on="weights",
    doc="Σ w_t·x_t / Σ w_t: a uniform soup with equal weights.  mergekit calls it ``linear``; for adapters it is the exact mean of changes.",
)
row(
    "slerp",
    "Spherical interpolation between two",
    slerp,
    t=0.5,
    count=2,
    works_on="weights",
    breaks=("order",),
    uses_weights=False,
    doc="""[sin((1−t)Ω)·x_0 + sin(tΩ)·x_1]/sin Ω with Ω the angle between them; straight where |cos Ω| > 0.9995.  Weights are not used: t is.
    Source: mergekit, ``slerp``.  Errors: other than two sources.""",
)
row(
    "nuslerp",
    "Spherical interpolation by weights",
    nuslerp,
    count=2,
    works_on="weights",
    doc="``slerp`` with t = w_1/(w_0 + w_1), which does not depend on the order of the sources.  Source: mergekit, ``nuslerp``.",
)
row(
    "multislerp",
    "Spherical mean of many, one tangent step",
    multislerp,
    works_on="weights",
    doc="""Unit vectors u_t, their normalised weighted mean m, the weighted mean of the tangents u_t − (u_t·m)·m, the exponential map back, times
    the weighted mean norm.  Source: mergekit, ``multislerp``.  Errors: a mean that vanishes.""",
)
row(
    "karcher",
    "Riemannian mean on the sphere",
    karcher,
    iterations=10,
    tol=1e-5,
    works_on="weights",
    doc="""The point of the sphere with the least weighted squared angle to all sources, by repeated log and exp maps, times the weighted mean
    norm.  For two equal weights: the bisector.  Source: mergekit, ``karcher``.""",
)
row(
    "model_stock",
    "Model stock: how far to trust the mean",
    model_stock,
    paper="arXiv 2403.19522",
    uses_weights=False,
    doc="""t·mean(ΔW_t) with t = N·cos φ/(1 + (N−1)·cos φ), cos φ the mean cosine between changes: orthogonal changes give the base, equal ones
    their mean.  Weights are not used.  Source: mergekit, ``model_stock``.  Errors: fewer than two sources.""",
    breaks=("one source",),
)
