"""KnOTS: coordinates that give the sources back, an orthonormal basis, rotated twins that meet only there."""

from __future__ import annotations

import pytest
import torch

from rankwise.catalogue import make
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import OptionError
from rankwise.merge import merge_states
from rankwise.merge.engine.base import factors_of
from rankwise.merge.engine.stack import FactorStack
from tests.merge.tools import dense, source


def test_the_basis_spans_the_sources() -> None:
    a, b = source(0), source(1, r=2)
    stack = FactorStack("x", (0.5, 0.5), pairs=(factors_of(a.sites["x"], "x"), factors_of(b.sites["x"], "x")))
    U = make("merge", "knots")._basis(stack)
    assert U.shape == (10, 5) and torch.allclose(U.mT @ U, torch.eye(5, dtype=torch.float64), atol=1e-10)
    D = [s.sites["x"].to(dtype=torch.float64).dense() for s in (a, b)]  # an fp32 product leaves the span in its last bits
    for d in D:
        assert torch.allclose(U @ (U.mT @ d), d, atol=1e-9)
    M = torch.cat(D, 1)
    left = torch.linalg.svd(M, full_matrices=False).U[:, :5]
    assert torch.allclose((left.mT @ U).abs(), torch.eye(5, dtype=torch.float64), atol=1e-7), (
        "the joint's singular vectors, in order"
    )


def test_sum_without_pruning_is_the_weighted_sum() -> None:
    a, b = source(0), source(1)
    got = merge_states([a, b], [0.7, 0.3], "knots", rule="sum", density=1.0, lam=0.5)
    assert torch.allclose(dense(got), 0.5 * (0.7 * dense(a) + 0.3 * dense(b)), atol=1e-5)
    assert merge_states([a, b], None, "knots", rank=2).sites["x"].exact_rank == 2
    with pytest.raises(OptionError, match="rule as one of"):
        merge_states([a, b], None, "knots", rule="vote")


def test_at_density_one_the_mean_is_over_those_that_agree_in_the_joint_basis() -> None:
    """Sources whose coordinates nowhere disagree: Σ/T, the divisor being the count of non-zero entries."""
    a = source(0)
    got = merge_states([a, a.scaled(3.0)], [1.0, 1.0], "knots", density=1.0, lam=1.0)
    assert torch.allclose(dense(got), 2 * dense(a), atol=1e-5)


def test_beats_ties_where_the_tasks_live_in_one_turned_basis() -> None:
    """Both sources are few coordinates of one hidden basis plus noise: pruning there keeps the tasks, pruning entries does not."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(24, 24, generator=g)).Q[:, :4]
    plan = [torch.zeros(4, 24), torch.zeros(4, 24)]
    plan[0][0, :6], plan[0][1, 3:8] = 6.0, 3.0
    plan[1][0, :6], plan[1][2, 10:14] = 6.0, -4.0
    states, want = [], torch.zeros(24, 24)
    for p in plan:
        states.append(AdapterState({"x": LowRank(p + 0.3 * torch.randn(4, 24, generator=g), Q)}))
    agree = torch.where((plan[0] != 0) & (plan[1] != 0), 0.5, 1.0)
    want = Q @ (agree * (plan[0] + plan[1]))
    miss = lambda name, **o: float((dense(merge_states(states, None, name, **o)) - want).norm())
    assert miss("knots", density=0.2, lam=1.0) < 0.7 * miss("ties", density=0.2, rank=24)
