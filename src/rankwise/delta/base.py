"""ΔW as an immutable value: apply it to an input, make it dense, add, scale, compare, factor it to low rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rankwise.delta.geometry import LINEAR, Geometry
from rankwise.errors import Option, OptionError, unknown

#: kind → class, filled as subclasses are defined; this file reaches the kinds that it returns (sum, dense, lowrank) through it
KINDS: dict[str, type[Delta]] = {}


class Delta:
    """ΔW of shape (…, out, in), added to a weight W; leading axes are a stack of experts.

    A subclass is a frozen dataclass whose tensor fields are its data.  It defines ``shape``, ``apply``, ``dense`` and
    ``scaled``, and overrides whatever else it can compute without the dense matrix.

    Attributes:
        kind: the name it is stored under.
        needs_weight: ``dense`` and ``apply`` need the base weight.
        needs_output: ``apply`` uses the base's output (without bias) where that saves a matrix product.
        indices: names of integer fields (positions, not values).

    >>> from rankwise.delta import Entries, LowRank
    >>> low = LowRank(torch.ones(1, 3), torch.ones(2, 1))  # A: 1×3, B: 2×1
    >>> total = low + Entries(torch.tensor([0]), torch.tensor([9.0]), size=(2, 3))
    >>> total.kind, total.dense().tolist()
    ('sum', [[10.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    >>> total.add_into(torch.zeros(2, 3)).equal(total.dense()), low.to_lowrank()[0].r
    (True, 1)
    """

    kind: ClassVar[str] = ""
    indices: ClassVar[tuple[str, ...]] = ()
    needs_weight: bool = False
    needs_output: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            KINDS[cls.kind] = cls

    # --- what every kind defines ----------------------------------------------------------------------------
    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        """Δy, what ΔW adds to the module's output.

        Args:
            x: the module's input, (…, in) for a linear layer; ids (int64) for an embedding.
            y: the base's output without bias, (…, out); only used where ``needs_output``.
            op: how a 2-D weight acts on x; default a linear layer.
            weight: the base weight, (out, in); required where ``needs_weight``.
        """
        return op.linear(x, self.dense(weight))

    def dense(self, weight: Tensor | None = None) -> Tensor:
        """(…, out, in)."""
        raise NotImplementedError

    def scaled(self, c: float | Tensor) -> Delta:
        """c·ΔW for a number or a 0-d tensor."""
        raise NotImplementedError

    @property
    def exact_rank(self) -> int | None:
        """The rank of an exact factorisation B·A, or None where there is none."""
        return None

    @property
    def constant(self) -> bool:
        """False where ΔW depends on the input x, so that it is no single weight."""
        return True

    def _exact(self) -> Any:
        """The exact factorisation as a :class:`LowRank`, or None."""
        return None

    # --- what follows -------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """The tensor data by field name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {n: v for n, v in fields.items() if isinstance(v, Tensor)}

    def meta(self) -> dict[str, Any]:
        """What :func:`rebuild` needs beside the tensors, JSON-able."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return {n: v for n, v in fields.items() if not isinstance(v, Tensor) and v is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Delta:
        return cls(**{**meta, **tensors})

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same value with ``fn`` applied to every floating tensor (indices are left alone)."""
        changed = {n: fn(t) for n, t in self.tensors().items() if n not in self.indices}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        moved = self.map(lambda t: t.to(device=device, dtype=dtype))
        where = {n: t.to(device) for n, t in self.tensors().items() if n in self.indices} if device is not None else {}
        return dataclasses.replace(moved, **where) if where else moved  # type: ignore[type-var]

    def detach(self) -> Self:
        return self.map(lambda t: t.detach())

    def clone(self) -> Self:
        return self.map(lambda t: t.clone())

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for n, t in self.tensors().items() if n not in self.indices)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    def numel(self, *, indices: bool = False) -> int:
        """Number of stored elements; ``indices=True`` counts the integer indices instead of the values."""
        return sum(t.numel() for n, t in self.tensors().items() if (n in self.indices) == indices)

    def add_into(self, W: Tensor, weight: Tensor | None = None) -> Tensor:
        """W + ΔW as a new tensor, computed in fp32 (fp64 where W is) and cast once to W's dtype."""
        delta = self._sized(W.shape)
        if delta.shape != W.shape:
            raise OptionError(f"A change of {tuple(self.shape)} does not fit a weight of {tuple(W.shape)}; give W as out×in.")
        wide = torch.float64 if W.dtype == torch.float64 else torch.float32
        base = (W if weight is None else weight).to(torch.promote_types(wide, self.dtype)) if self.needs_weight else None
        change = delta.map(lambda t: t.to(torch.promote_types(wide, t.dtype))).dense(base)
        return (W.to(wide) + change.to(wide)).to(W.dtype)

    def transposed(self) -> Delta:
        """The change of Wᵀ."""
        return KINDS["dense"](self.dense().mT)  # type: ignore[call-arg]

    def __add__(self, other: Delta) -> Delta:
        if not isinstance(other, Delta):
            return NotImplemented
        a, b = self._match(other, "added")
        joined = a._join(b)
        if joined is None:
            joined = b._join(a)
        return joined if joined is not None else KINDS["sum"]((a, b))  # type: ignore[call-arg]

    def _join(self, other: Delta) -> Delta | None:
        """The sum as one value of this kind, or None."""
        return None

    def _inner(self, other: Delta) -> Tensor | None:
        """⟨ΔW, ΔW'⟩ in fp64 without an out×in matrix, or None where this kind has no way."""
        return None

    def _sized(self, shape: torch.Size) -> Delta:
        """The same value for a weight of ``shape``, for a kind that may not know its own shape yet."""
        return self

    def _match(self, other: Delta, verb: str) -> tuple[Delta, Delta]:
        a, b = self._sized(other.shape), other._sized(self.shape)
        if a.shape != b.shape:
            raise OptionError(
                f"A change of {tuple(a.shape)} and one of {tuple(b.shape)} cannot be {verb}; they are for different weights."
            )
        return a, b

    def _wide(self) -> Self:
        return self.map(lambda t: t.double())

    def __neg__(self) -> Delta:
        return self.scaled(-1.0)

    def __sub__(self, other: Delta) -> Delta:
        return self + (-other)

    # --- low rank -----------------------------------------------------------------------------------------------
    def to_lowrank(self, rank: int | None = None, energy: float | None = None, weight: Tensor | None = None) -> tuple[Any, float]:
        """(a :class:`~rankwise.delta.lowrank.LowRank`, the relative Frobenius error it makes).

        Args:
            rank: cut to this rank.
            energy: cut to the smallest rank that keeps this share of ‖ΔW‖², in (0, 1].  With neither, the factorisation is
                exact (error 0.0) or refused.
            weight: the base weight, (out, in), for kinds that need it.

        Raises:
            OptionError: no exact factorisation and neither given; both given; out of range.
        """
        if rank is not None and energy is not None:
            raise OptionError("to_lowrank takes rank or energy, not both.")
        exact = self._exact()
        if rank is None and energy is None:
            if exact is None:
                raise OptionError(
                    f"A {self.kind} change has no exact low-rank form; give ",
                    Option("rank", ...),
                    " or ",
                    Option("energy", ...),
                    ", and the error made is reported.",
                )
            return exact, 0.0
        if exact is not None:
            return exact.truncate(rank=rank, energy=energy)
        W = self.dense(weight)
        low, error = KINDS["lowrank"].from_svd(*torch.linalg.svd(W.double(), full_matrices=False), rank=rank, energy=energy)  # type: ignore[attr-defined]
        return low.to(W.dtype), error

    # --- geometry of values -------------------------------------------------------------------------------------
    def inner(self, other: Delta, weight: Tensor | None = None) -> Tensor:
        """⟨Δ, Δ'⟩ summed over all axes, fp64; through factors or entries where both sides allow it.

        ``weight`` is the base weight, for kinds that need it.
        """
        a, b = self._match(other, "compared")
        for p, q in ((a, b), (b, a)):
            found = p._inner(q)
            if found is not None:
                return found
        low = a._exact(), b._exact()
        if low[0] is not None and low[1] is not None:
            return low[0]._pair(low[1])
        W = None if weight is None else weight.double()
        return (a._wide().dense(W) * b._wide().dense(W)).sum()

    def norm(self, weight: Tensor | None = None) -> Tensor:
        """‖Δ‖_F, fp64."""
        return self.inner(self, weight).clamp_min(0).sqrt()

    def cos(self, other: Delta, weight: Tensor | None = None) -> Tensor:
        """⟨Δ, Δ'⟩/(‖Δ‖·‖Δ'‖), fp64; 0 where one vanishes."""
        size = self.norm(weight) * other.norm(weight)
        return self.inner(other, weight) / size if size > 0 else torch.zeros((), dtype=torch.float64)


def rebuild(kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Delta:
    """The value of a stored kind, its tensors and its meta."""
    if kind not in KINDS:
        raise unknown("kind of change", kind, KINDS)
    return KINDS[kind].from_tensors(tensors, meta)
