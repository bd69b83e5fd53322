"""Allocators against brute force."""

from __future__ import annotations

import pytest
import torch

from rankwise.allocation import Allocation, by_energy, cubic, knapsack, top_k


def test_allocators() -> None:
    assert top_k({"a": 1.0, "b": 1.0, "c": 2.0}, 2) == ["c", "a"]
    assert cubic(5, 10, 2, 0, 0, 10) == pytest.approx(2 + 8 * 0.5**3)
    assert by_energy([2.0, 1.0, 1.0], 0.5) == 1 and by_energy([2.0, 1.0, 1.0], 0.7) == 2
    g = torch.Generator().manual_seed(0)
    for _ in range(20):  # exact against brute force
        v, c = torch.rand(7, generator=g).tolist(), torch.randint(1, 6, (7,), generator=g).tolist()
        picked = knapsack(v, c, 10)
        sets = [[i for i in range(7) if m >> i & 1] for m in range(128)]
        best = max(sum(v[i] for i in s) for s in sets if sum(c[i] for i in s) <= 10)
        assert sum(c[i] for i in picked) <= 10 and sum(v[i] for i in picked) == pytest.approx(best)
    a = Allocation(masks={"x": (True, False)}, ranks={"x": 1}, trainable=("x",))
    assert Allocation.from_json(a.to_json()) == a
