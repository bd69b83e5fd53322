"""The table of weighings against naive arithmetic on dense vectors, and the identities of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankwise.catalogue import make
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import OptionError
from rankwise.merge import merge_states
from rankwise.merge.engine.stack import TensorStack
from tests.merge.tools import dense, source


def vectors(*xs: Tensor) -> list[AdapterState]:
    """Each vector as a rank-one change 1×n."""
    return [AdapterState({"x": LowRank(x[None].double(), torch.ones(1, 1, dtype=torch.float64))}) for x in xs]


def merged(name: str, *xs: Tensor, weights: list[float] | None = None, **options: object) -> Tensor:
    return dense(merge_states(vectors(*xs), weights, name, **options))[0]


E0, E1 = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])


def test_slerp_keeps_the_ends_and_the_norm() -> None:
    a, b = torch.randn(7), torch.randn(7)
    assert torch.allclose(merged("slerp", a, b, t=0.0), a.double(), atol=1e-6)
    assert torch.allclose(merged("slerp", a, b, t=1.0), b.double(), atol=1e-6)
    assert merged("slerp", E0, E1, t=0.3).tolist() == pytest.approx(
        [math.cos(0.15 * math.pi), math.sin(0.15 * math.pi), 0], abs=1e-6
    )
    assert torch.allclose(merged("nuslerp", a, b, weights=[1, 3]), merged("slerp", a, b, t=0.75), atol=1e-6)
    assert torch.allclose(merged("slerp", a, a * 2, t=0.25), 1.25 * a.double(), atol=1e-5), "parallel: straight"


def test_spherical_means_bisect_and_agree_with_the_naive_iteration() -> None:
    for name in ("multislerp", "karcher"):
        assert merged(name, 2 * E0, 2 * E1).tolist() == pytest.approx([2**0.5, 2**0.5, 0], abs=1e-6)
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(6, generator=g).double() + 1 for _ in range(4)]
    w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    u = torch.stack([x / x.norm() for x in xs])
    m = (w @ u) / (w @ u).norm()
    for _ in range(50):
        angle = (u @ m).clamp(-1, 1).acos()
        v = (w * angle / angle.sin()) @ (u - (u @ m)[:, None] * m)
        m = math.cos(v.norm()) * m + math.sin(v.norm()) / v.norm().clamp_min(1e-30) * v
    size = float(w @ torch.stack([x.norm() for x in xs]))
    assert torch.allclose(merged("karcher", *xs, weights=w.tolist(), iterations=50, tol=1e-12), m * size, atol=1e-6)
    with pytest.raises(OptionError, match="cancel"):
        merged("karcher", E0, -E0)


def test_karcher_of_two_is_half_the_great_circle_at_their_mean_norm() -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(9, generator=g).double(), 3 * torch.randn(9, generator=g).double()
    half = merged("slerp", a / a.norm(), b / b.norm(), t=0.5)
    want = half / half.norm() * (a.norm() + b.norm()) / 2
    assert torch.allclose(merged("karcher", a, b, iterations=50, tol=1e-12), want, atol=1e-6)
    equal = b / b.norm() * a.norm()
    for t in (0.2, 0.5, 0.9):
        assert float(merged("slerp", a, equal, t=t).norm()) == pytest.approx(float(a.norm()), rel=1e-6), "equal norms are kept"


def test_model_stock_trusts_what_agrees() -> None:
    assert torch.allclose(merged("model_stock", E0, E1), torch.zeros(3, dtype=torch.float64), atol=1e-9), "orthogonal: the base"
    assert torch.allclose(merged("model_stock", E0, E0, E0), E0.double(), atol=1e-9), "equal: their mean"
    a, b = torch.tensor([1.0, 1, 0]), torch.tensor([1.0, 0, 0])
    cos = 1 / 2**0.5
    assert torch.allclose(merged("model_stock", a, b), 2 * cos / (1 + cos) * (a + b).double() / 2, atol=1e-6)
    with pytest.raises(OptionError, match="at least two"):
        merged("model_stock", E0)


def test_arithmetic_and_average() -> None:
    a, b = source(0), source(1)
    got = merge_states([a, b], [1.0, -1.0], "task_arithmetic", lam=0.4)
    assert torch.allclose(dense(got), 0.4 * (dense(a) - dense(b)), atol=1e-6)
    assert torch.allclose(dense(merge_states([a, b], [2.0, 6.0], "average")), 0.25 * dense(a) + 0.75 * dense(b), atol=1e-6)
    with pytest.raises(OptionError, match="normalize=False"):
        merge_states([a, b], [1.0, -1.0], "average")
    assert merge_states([a, b], None, "karcher", rank=2).sites["x"].exact_rank == 2


@pytest.mark.parametrize(
    "name",
    [
        "average",
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "model_stock",
        "task_arithmetic",
        "uniform_soup",
        "quality_diversity",
        "robust_signature",
    ],
)
def test_factors_and_whole_tensors_give_the_same(name: str) -> None:
    a, b = source(0), source(1)
    whole = TensorStack("x", (0.4, 0.6), torch.float64, (lambda: dense(a), lambda: dense(b)), None, (10, 8))
    rule = make("merge", name)
    weights = [0.4, 0.6] if rule.uses_weights else None
    assert torch.allclose(rule.combine(whole, 0).value, dense(merge_states([a, b], weights, name)), atol=1e-5)
