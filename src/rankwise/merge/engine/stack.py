"""One tensor of T sources, ready to be combined: its blocks, its inner products, its weighted sums.

A stack is never held whole.  A method that weighs sources asks for :meth:`Stack.gram` and answers with T numbers;
one that works entry by entry reads blocks of rows, (T, rows, in), however many sources there are.  A source that has
no such tensor counts as zero (:attr:`Stack.present` tells).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rankwise.delta.lowrank import LowRank
from rankwise.errors import MergeError
from rankwise.merge.engine.result import FAR, Merged, lowered, share_of, truncated

#: A_t (r, in) and B_t (out, r) of one source
FactorPair = tuple[Tensor, Tensor]
#: bytes of one block of all sources, and the rows whose random draws are made together (blocks begin at multiples of it)
BLOCK_BYTES, TILE = 16 * 2**20, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """T sources of one tensor, each out×in (a vector is 1×n, a kernel out×(in·k·k)).

    Attributes:
        name: the site's or tensor's name, which seeds its random draws.
        weights: one a source.
        dtype: of blocks, and of what is made of them, whatever the sources' own.
    """

    name: str
    weights: tuple[float, ...]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def present(self) -> tuple[bool, ...]:
        raise NotImplementedError

    def block(self, t: int, rows: slice) -> Tensor:
        """Rows of source ``t`` as (rows, in), zeros where it is absent."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """⟨x_s, x_t⟩: T×T, fp64."""
        raise NotImplementedError

    def key(self, t: int) -> str:
        """A name for source ``t``'s values at this tensor: its random draws follow it wherever it stands in the list."""
        raise NotImplementedError

    def combination(self, c: Sequence[float]) -> LowRank | Tensor:
        """Σ c_t·x_t, exactly."""
        raise NotImplementedError

    def total(self) -> LowRank | Tensor:
        """The weighted sum Σ w_t·x_t."""
        return self.combination(self.weights)

    def combined(self, c: Sequence[float], rank: int | None = None) -> Merged:
        """Σ c_t·x_t as a result; of factors cut to ``rank`` where one is given, of whole tensors never cut."""
        return Merged(self.combination(c), error=0.0 if tuple(c) == self.weights else None)

    def lowered(self, made: Tensor, rank: int | None, g: torch.Generator) -> Merged:
        """An out×in value as a result; of factors cut to ``rank`` (None: the largest source rank), of whole tensors never cut."""
        return Merged(made)

    def factors(self) -> FactorStack:
        """This stack, for a method that works on the factors A and B.

        Raises:
            MergeError: the sources are whole tensors, which have none.
        """
        raise MergeError(f"The sources at {self.name!r} are whole tensors without factors A and B; use a merge of whole models.")

    def filled(self) -> Stack:
        """With the first source's values for those that lack the tensor; of whole models that was done when they were matched."""
        return self

    def rank(self) -> int:
        """The largest rank of a source."""
        return min(self.shape)

    def blocks(self, copies: int | None = None) -> Iterator[slice]:
        """Slices of rows, so that ``copies`` (default T) blocks of them fit in ``BLOCK_BYTES``."""
        out, inp = self.shape
        size = max(1, BLOCK_BYTES // max(1, (copies or len(self.weights)) * inp * torch.finfo(self.dtype).bits // 8))
        size = max(size // TILE, 1) * TILE
        for start in range(0, out, size):
            yield slice(start, min(start + size, out))

    def at(self, rows: slice) -> Tensor:
        """All sources' rows: (T, rows, in)."""
        return torch.stack([self.block(t, rows) for t in range(len(self.weights))])

    def column(self) -> Tensor:
        """The weights as (T, 1, 1)."""
        return torch.tensor(self.weights, dtype=self.dtype).view(-1, 1, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class FactorStack(Stack):
    """Sources as factors A_t (r_t, in), B_t (out, r_t) with √|s_t| on each side; None where absent.

    Args:
        name: of the site.
        weights: one a source.
        dtype: of blocks.
        pairs: (A, B) of each source.
    """

    pairs: tuple[FactorPair | None, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        A, B, _ = self.sources()[0]
        return B.shape[0], A.shape[1]

    @property
    def present(self) -> tuple[bool, ...]:
        return tuple(p is not None for p in self.pairs)

    def sources(self) -> list[tuple[Tensor, Tensor, float]]:
        """(A, B, weight) of those that have it."""
        return [(p[0], p[1], w) for p, w in zip(self.pairs, self.weights, strict=True) if p is not None]

    def rank(self) -> int:
        return min(max(A.shape[0] for A, _, _ in self.sources()), *self.shape)

    def block(self, t: int, rows: slice) -> Tensor:
        pair = self.pairs[t]
        if pair is None:
            return torch.zeros(rows.stop - rows.start, self.shape[1], dtype=self.dtype)
        return pair[1][rows].to(self.dtype) @ pair[0].to(self.dtype)

    def gram(self) -> Tensor:
        """Through r×r' products: with all factors stacked, block (s, t) of (BᵀB)∘(AAᵀ) summed."""
        A = torch.cat([A for A, _, _ in self.sources()]).double()
        B = torch.cat([B for _, B, _ in self.sources()], dim=1).double()
        owner = torch.tensor([t for t, p in enumerate(self.pairs) if p is not None for _ in range(p[0].shape[0])])
        select = torch.zeros(len(self.pairs), len(owner), dtype=torch.float64)
        select[owner, torch.arange(len(owner))] = 1
        return select @ ((B.mT @ B) * (A @ A.mT)) @ select.mT

    def key(self, t: int) -> str:
        """A digest of ΔW's product with a fixed vector: it does not change with the gauge of the factors."""
        pair = self.pairs[t]
        if pair is None:
            return "absent"
        probe = torch.linspace(-1, 1, self.shape[1], dtype=torch.float64).cos()
        return _digest(pair[1].double() @ (pair[0].double() @ probe))

    def combination(self, c: Sequence[float]) -> LowRank:
        """Σ c_t·ΔW_t, exactly, of rank Σ r_t; √|c_t| on each side."""
        A = [p[0] * abs(x) ** 0.5 for p, x in zip(self.pairs, c, strict=True) if p is not None]
        B = [p[1] * math.copysign(abs(x) ** 0.5, x) for p, x in zip(self.pairs, c, strict=True) if p is not None]
        return LowRank(torch.cat(A), torch.cat(B, dim=1))

    def total(self) -> LowRank:
        return self.combination(self.weights)

    def combined(self, c: Sequence[float], rank: int | None = None) -> Merged:
        return super().combined(c) if rank is None else truncated(self.combination(c), rank)

    def lowered(self, made: Tensor, rank: int | None, g: torch.Generator) -> Merged:
        return lowered(made, min(rank or self.rank(), *self.shape), g)

    def factors(self) -> FactorStack:
        return self

    def in_basis(self, U: Tensor) -> FactorStack:
        """The sources' coordinates UᵀΔW_t in an orthonormal basis U: out×R."""
        pairs = tuple(None if p is None else (p[0], U.mT @ p[1]) for p in self.pairs)
        return dataclasses.replace(self, pairs=pairs)

    def filled(self) -> FactorStack:
        """With the first source's factors for those that have none here."""
        return dataclasses.replace(self, pairs=tuple(self.pairs[0] if p is None else p for p in self.pairs))

    def crossed(self, C: Tensor) -> float:
        """‖Σ C[s,t]·B_s·A_t − Σ w_t·ΔW_t‖/‖Σ w_t·ΔW_t‖ for C: T×T fp64, where all T have one rank; nothing out×in is made.

        With G = AAᵀ and H = BᵀB of all factors stacked, ‖Σ C[s,t]·B_s·A_t‖² = ⟨H, (C⊗I)·G·(C⊗I)ᵀ⟩.
        """
        ratio = self._crossed(C, torch.float32)
        return ratio if ratio > FAR and math.isfinite(ratio) else self._crossed(C, torch.float64)

    def _crossed(self, C: Tensor, dtype: torch.dtype) -> float:
        T, r = len(self.pairs), self.sources()[0][0].shape[0]
        A = torch.cat([A.to(dtype) for A, _, _ in self.sources()])
        B = torch.cat([B.to(dtype) for _, B, _ in self.sources()], dim=1)
        G, H = (A @ A.mT).double(), (B.mT @ B).double()
        w = torch.tensor(self.weights, dtype=torch.float64)

        def products(M: Tensor) -> Tensor:
            half = (M @ G.view(T, -1)).view(T * r, T, r)
            return H.view(T * r, T, r) * (M @ half)

        return share_of(products(C - w.diag()), products(w.diag()), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class TensorStack(Stack):
    """Sources as whole tensors, read when asked for; ``base`` is taken off each where the method works on changes.

    Args:
        name: of the tensor.
        weights: one a source.
        dtype: of blocks.
        read: each source's reader; None where it is absent.
        base: what is taken off each; None: nothing is.
        size: out×in.
    """

    read: tuple[Callable[[], Tensor] | None, ...] = ()
    base: Tensor | None = None
    size: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def present(self) -> tuple[bool, ...]:
        return tuple(r is not None for r in self.read)

    def block(self, t: int, rows: slice) -> Tensor:
        """A copy of the rows: readers may hand out what they keep."""
        source = self.read[t]
        if source is None:
            return torch.zeros(rows.stop - rows.start, self.shape[1], dtype=self.dtype)
        block = source().reshape(self.size)[rows].to(self.dtype, copy=True)
        return block if self.base is None else block.sub_(self.base.reshape(self.size)[rows])

    def gram(self) -> Tensor:
        total = torch.zeros(len(self.read), len(self.read), dtype=torch.float64)
        for rows in self.blocks():
            x = self.at(rows).flatten(1).double()
            total += x @ x.mT
        return total

    def key(self, t: int) -> str:
        out = self.shape[0]
        return _digest(torch.cat([self.block(t, slice(r, r + 1)) for r in sorted({0, out // 2, out - 1})]))

    def combination(self, c: Sequence[float]) -> Tensor:
        """Σ c_t·x_t, out×in."""
        made = torch.zeros(self.size, dtype=self.dtype)
        for rows in self.blocks(copies=2):
            mine = made[rows]
            for t, x in enumerate(c):
                if (source := self.read[t]) is not None:
                    mine.add_(source().reshape(self.size)[rows] if self.base is None else self.block(t, rows), alpha=x)
        return made


def _digest(t: Tensor) -> str:
    """Of a tensor rounded to six digits of its largest entry, so that the last bits of a product do not matter."""
    top = float(t.abs().max())
    rounded = (t / top * 1e6).round().to(torch.int64) if top > 0 else torch.zeros_like(t, dtype=torch.int64)
    return hashlib.sha256(rounded.contiguous().numpy().tobytes()).hexdigest()[:16]


def one_shape(stack: FactorStack) -> None:
    """Refuse sources of different bases."""
    shapes = {(B.shape[0], A.shape[1]) for A, B, _ in stack.sources()}
    if len(shapes) > 1:
        raise MergeError(f"The sources at {stack.name!r} have shapes {sorted(shapes)}; they were made for different bases.")
