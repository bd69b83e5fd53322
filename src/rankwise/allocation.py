"""Ranks, masks and trainable sets as plain data, and the pure functions that distribute a budget of ranks over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from rankwise.errors import OptionError

K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What a budget decided: plain data, saved with the run, so a checkpoint can be read without the scorer.

    Attributes:
        masks: site → which components are kept (tuple of bool).
        ranks: site → rank.
        trainable: names that train in this phase, or None for all.
    """

    masks: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    trainable: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "masks": {n: [int(b) for b in m] for n, m in self.masks.items()},
            "ranks": dict(self.ranks),
            "trainable": None if self.trainable is None else list(self.trainable),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Allocation:
        trainable = data.get("trainable")
        return cls(
            {n: tuple(bool(b) for b in m) for n, m in data.get("masks", {}).items()},
            dict(data.get("ranks", {})),
            None if trainable is None else tuple(trainable),
        )


def top_k(scores: Mapping[K, float], k: int) -> list[K]:
    """The ``k`` keys of highest score; ties go to the smaller key, so the order of the mapping does not matter.

    >>> top_k({"a": 1.0, "b": 3.0, "c": 3.0}, 2)
    ['b', 'c']
    """
    if k < 0:
        raise OptionError(f"A budget of {k} components cannot be given out; it is at least 0.")
    return sorted(scores, key=lambda key: (-scores[key], str(key)))[:k]


def cubic(step: int, start: float, end: float, warm: int, final: int, total: int) -> float:
    """AdaLoRA's budget: ``start`` to ``end`` along 1 − (…)³ between ``warm`` and ``total − final``.

    Args:
        step: optimiser steps taken.
        start, end: the budget (total rank) before and after.
        warm: steps at ``start``.
        final: last steps, at ``end``.
        total: steps of the run.

    >>> cubic(0, 12, 8, 2, 2, 10), cubic(10, 12, 8, 2, 2, 10)
    (12, 8)
    """
    if step <= warm:
        return start
    if step >= total - final:
        return end
    share = (step - warm) / (total - final - warm)
    return end + (start - end) * (1 - share) ** 3


def by_energy(values: Sequence[float], share: float) -> int:
    """The smallest number of leading ``values`` whose squares hold ``share`` of the sum of squares.

    >>> by_energy([3.0, 4.0, 0.0], 1.0)
    2
    """
    if not 0 < share <= 1:
        raise OptionError(f"energy = {share}; it is a share in (0, 1].")
    squares = torch.tensor(list(values), dtype=torch.float64).square()
    held = squares.cumsum(0)
    return int((held < held[-1] * share * (1 - 1e-12)).sum()) + 1 if len(squares) and held[-1] > 0 else 0


def sample(names: Sequence[str], k: int, g: torch.Generator, weights: Sequence[float] | None = None) -> list[str]:
    """``k`` of ``names`` without replacement, in their own order.

    Args:
        names: to draw from.
        k: from 1 to their number.
        g: generator, on the CPU.
        weights: unnormalised probabilities; None: uniform.
    """
    if not 0 < k <= len(names):
        raise OptionError(f"{k} of {len(names)} cannot be drawn; give a number from 1 to {len(names)}.")
    w = torch.ones(len(names)) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
    picked = set(torch.multinomial(w, k, generator=g).tolist())
    return [n for i, n in enumerate(names) if i in picked]


def knapsack(values: Sequence[float], costs: Sequence[int], budget: int) -> list[int]:
    """Indices that maximise the sum of ``values`` with integer ``costs`` within ``budget`` (exact, O(n·budget)).

    >>> knapsack([6, 5, 4], [3, 2, 2], 4)
    [1, 2]
    """
    best = [0.0] * (budget + 1)
    taken: list[list[bool]] = []
    for value, cost in zip(values, costs, strict=True):
        row = [False] * (budget + 1)
        for room in range(budget, cost - 1, -1):
            if value > 0 and best[room - cost] + value > best[room]:
                best[room] = best[room - cost] + value
                row[room] = True
        taken.append(row)
    out, room = [], budget
    for i in range(len(values) - 1, -1, -1):
        if taken[i][room]:
            out.append(i)
            room -= costs[i]
    return out[::-1]
