"""Which entries of a source go on: by size, by chance, by chance that grows with size, without the outliers.

A sparsifier reads a source once to find what it needs to know of the whole tensor (thresholds, sums), then filters
block after block in the same order, so that a source is never held dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.merge.engine.stack import TILE, Stack
from rankwise.seeds import generator

#: (block of a source, first row) → the block with what is dropped at zero
Keep = Callable[[Tensor, int], Tensor]
#: entries of the sample that brackets a threshold
SAMPLED = 2**16
RESCALES = ("none", "1/p", "l1", "l2", "linf")


@dataclasses.dataclass(frozen=True)
class Sparsifier:
    """``density``: the share of entries kept.  ``rescale``: of what is kept, by 1/density, or so that its norm is the source's."""

    density: float = 1.0
    rescale: str = "none"

    def keep(self, stack: Stack, t: int, seed: int) -> Keep:
        mask = self._mask(stack, t, seed) if self.density < 1 else None
        if mask is None:
            return lambda block, row: block
        scale = self._scale(stack, t, seed)
        return lambda block, row: mask(block, row).mul_(scale)

    def _mask(self, stack: Stack, t: int, seed: int) -> Keep:
        raise NotImplementedError

    def _scale(self, stack: Stack, t: int, seed: int) -> float:
        if self.rescale == "none":
            return 1.0
        if self.rescale == "1/p":
            return 1 / self.density
        mask, before, after = self._mask(stack, t, seed), 0.0, 0.0
        for rows in stack.blocks(1):
            block = stack.block(t, rows)
            a, b = _size(block, self.rescale), _size(mask(block, rows.start), self.rescale)
            before, after = (max(before, a), max(after, b)) if self.rescale == "linf" else (before + a, after + b)
        ratio = before / after if after else 1.0
        return ratio**0.5 if self.rescale == "l2" else ratio


def _size(block: Tensor, norm: str) -> float:
    if norm == "linf":
        return float(block.abs().max())
    return float(block.abs().sum() if norm == "l1" else block.square().sum())


def magnitudes(stack: Stack, t: int) -> Tensor:
    """|x_t| as one vector, in the order of blocks."""
    size = torch.empty(stack.shape, dtype=stack.dtype)
    for rows in stack.blocks(1):
        torch.abs(stack.block(t, rows), out=size[rows])
    return size.flatten()


class Top(Sparsifier):
    """The int(density·numel) largest by magnitude (at least one); of equal ones the first."""

    def _mask(self, stack: Stack, t: int, seed: int) -> Keep:
        size = magnitudes(stack, t)
        return _band(size, 0, max(int(self.density * size.numel()), 1))


@dataclasses.dataclass(frozen=True)
class Middle(Sparsifier):
    """Without the int(γ·numel) largest, the next int(density·numel) by magnitude; no outlier is dropped where γ·numel < 1."""

    gamma: float = 0.01

    def keep(self, stack: Stack, t: int, seed: int) -> Keep:
        if self.density >= 1 and self.gamma == 0:
            return lambda block, row: block
        mask, scale = self._mask(stack, t, seed), self._scale(stack, t, seed)
        return lambda block, row: mask(block, row).mul_(scale)

    def _mask(self, stack: Stack, t: int, seed: int) -> Keep:
        size = magnitudes(stack, t)
        first = int(self.gamma * size.numel())
        return _band(size, first, min(first + max(int(self.density * size.numel()), 1), size.numel()))


def _band(size: Tensor, first: int, last: int) -> Keep:
    """Keeps ranks first … last−1 by magnitude (0 is the largest); equals are counted in order, so that exactly so many stay."""
    if last <= first:
        return lambda block, row: torch.zeros_like(block)
    low, above, equal = nth_largest(size, last - 1)
    low_stays, low_all = last - above, equal  # how many of those equal to ``low`` stay
    high, above, equal = nth_largest(size, first - 1) if first else (float("inf"), 0, 0)
    high_goes, high_all = first - above, equal  # how many equal to ``high`` go
    left = [0, 0]

    def keep(block: Tensor, row: int) -> Tensor:
        if row == 0:
            left[:] = [low_stays, high_goes]
        mag = block.abs()
        mask = mag >= low if low_stays == low_all else mag > low
        if low_stays != low_all:
            _count(mask, mag == low, left, 0, True)
        if first:
            mask &= mag < high if high_goes == high_all else mag <= high
            if high_goes != high_all:
                _count(mask, mag == high, left, 1, False)
        return block * mask

    return keep


def nth_largest(size: Tensor, n: int) -> tuple[float, int, int]:
    """(the value of rank n from the top, how many are larger, how many equal it), exactly.

    Of a long vector a sample says between which two values it must lie; only what lies there is sorted.
    """
    between, larger = size, 0
    if size.numel() > 16 * SAMPLED:
        at = torch.randint(size.numel(), (SAMPLED,), generator=generator(0, "merge:threshold", "sample"))
        sample = size[at].sort(descending=True).values  # drawn, not strided: a stride may be a row's
        middle, slack = n * SAMPLED // size.numel(), 4 * int(SAMPLED**0.5)
        high = float(sample[middle - slack]) if middle >= slack else float("inf")
        low = float(sample[middle + slack]) if middle + slack < SAMPLED else 0.0
        over = int(torch.count_nonzero(size > high))
        chosen = size[(size >= low).logical_and_(size <= high)]
        if over <= n < over + chosen.numel():  # else the sample misled, and the whole vector is sorted
            between, larger = chosen, over
    value = float(between.kthvalue(between.numel() - (n - larger)).values)
    more, equal = (int(torch.count_nonzero(m)) for m in (between > value, between == value))
    return value, larger + more, equal


def _count(mask: Tensor, equal: Tensor, left: list[int], i: int, value: bool) -> None:
    """Sets the first ``left[i]`` of the ``equal`` entries to ``value``."""
    if left[i] > 0 and bool(equal.any()):
        at = equal.flatten().nonzero()[: left[i], 0]
        mask.view(-1)[at] = value
        left[i] -= len(at)


class Bernoulli(Sparsifier):
    """Each entry by a coin of its own, with chance ``density``."""

    def _mask(self, stack: Stack, t: int, seed: int) -> Keep:
        key = stack.key(t)
        return lambda block, row: block * (_coins(block, seed, stack.name, key, row) < self.density)


@dataclasses.dataclass(frozen=True)
class Ranked(Sparsifier):
    """A coin whose chance rises with the magnitude's rank in its row, from density − ε to density + ε."""

    epsilon: float = 0.15

    def _mask(self, stack: Stack, t: int, seed: int) -> Keep:
        key = stack.key(t)

        def keep(block: Tensor, row: int) -> Tensor:
            rank = block.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(block.dtype)
            chance = self.density - self.epsilon + 2 * self.epsilon * rank / max(block.shape[-1] - 1, 1)
            return block * (_coins(block, seed, stack.name, key, row) < chance)

        return keep


def _coins(block: Tensor, seed: int, name: str, key: str, row: int) -> Tensor:
    """Uniform draws for a block's rows: a function of (seed, tensor, source, row), not of how rows are cut into blocks."""
    made = [
        torch.rand(min(TILE, len(block) - at), block.shape[-1], generator=generator(seed, f"merge:{name}:{key}", str(row + at)))
        for at in range(0, len(block), TILE)
    ]
    return torch.cat(made).to(block.dtype)
