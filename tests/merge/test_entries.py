"""The entry-wise table: what each sparsifier keeps, how votes go, DARE's mean, rescaling, planted tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.catalogue import make
from rankwise.delta import AdapterState, LowRank
from rankwise.merge import merge_states
from rankwise.merge.engine.stack import TensorStack
from rankwise.merge.methods.sparsify import Bernoulli, Middle, Ranked, Sparsifier, Top


def stack(*rows: Tensor, weights: tuple[float, ...] | None = None) -> TensorStack:
    shape = (1, rows[0].numel()) if rows[0].dim() == 1 else tuple(rows[0].shape)
    w = weights or (1.0,) * len(rows)
    return TensorStack("t", w, torch.float64, tuple((lambda r=r: r) for r in rows), None, shape)  # type: ignore[misc,arg-type]


def kept(s: Sparsifier, x: Tensor, seed: int = 0) -> Tensor:
    st = stack(x)
    keep = s.keep(st, 0, seed)
    return torch.cat([keep(st.block(0, rows), rows.start) for rows in st.blocks()]).reshape(x.shape)


A, B, C = torch.tensor([3.0, -1, 0.1, 2]), torch.tensor([2.0, 2, -0.2, -3]), torch.tensor([-1.0, 0.5, 0.3, -1])


def test_top_keeps_exactly_so_many_also_among_equals() -> None:
    assert kept(Top(0.5), A).tolist() == [3, 0, 0, 2]
    x = torch.tensor([[1.0, -1, 1], [1, 2, 1]])
    assert kept(Top(0.5), x).tolist() == [[1, -1, 0], [0, 2, 0]]
    big = torch.randint(-3, 4, (70, 9), generator=torch.Generator().manual_seed(0)).double()
    assert int((kept(Top(0.3), big) != 0).sum()) == min(int(0.3 * 630), int((big != 0).sum()))


def test_middle_drops_the_outliers_and_the_dust() -> None:
    x = torch.arange(1.0, 11)
    assert kept(Middle(0.5, "none", 0.2), x).tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]
    assert kept(Middle(0.5, "none", 0.01), x).tolist() == [0] * 5 + [6, 7, 8, 9, 10], "less than one outlier: none is dropped"


def test_chance_keeps_the_mean_and_the_norm() -> None:
    x = torch.randn(60, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws = torch.stack([kept(Bernoulli(0.3, "1/p"), x, seed) for seed in range(200)])
    error = draws.std(0) / 200**0.5
    assert float(((draws.mean(0) - x).abs() < 4 * error).double().mean()) > 0.995
    assert float((draws != 0).double().mean()) == pytest.approx(0.3, abs=0.005)
    for norm, size in (("l1", lambda t: t.abs().sum()), ("l2", lambda t: t.norm()), ("linf", lambda t: t.abs().max())):
        for s in (Bernoulli(0.3, norm), Ranked(0.5, norm, 0.2), Top(0.3, norm)):
            assert float(size(kept(s, x))) == pytest.approx(float(size(x)), rel=1e-9)


def test_della_chances_rise_with_rank_and_meet_bernoulli() -> None:
    x = torch.linspace(0.1, 1, 40).repeat(3000, 1).double()
    share = (kept(Ranked(0.5, "none", 0.3), x) != 0).double().mean(0)
    assert share[0] == pytest.approx(0.2, abs=0.04) and share[-1] == pytest.approx(0.8, abs=0.04)
    assert torch.equal(kept(Ranked(0.5, "none", 0.0), x), kept(Bernoulli(0.5), x)), "ε = 0 is a plain coin"


def test_votes() -> None:
    def join(name: str, *rows: Tensor, weights: tuple[float, ...] | None = None, **options: object) -> list[float]:
        st = stack(*rows, weights=weights)
        rule = make("merge", name, density=1.0, **options)
        return [round(float(v), 6) for v in rule.entries(st, 0)[0]]

    assert join("ties", A, B, C) == [2.5, 1.25, 0.2, -2.0]  # signs +, +, +, −; means over those that agree
    assert join("ties", torch.tensor([5.0]), torch.tensor([-2.0])) == [5.0], "the larger survives, undivided"
    assert join("ties", A, B, C, elect="frequency") == [2.5, 1.25, 0.2, -2.0]
    lone, pair = torch.tensor([5.0]), torch.tensor([-2.0])
    assert join("ties", lone, pair, pair) == [5.0] and join("ties", lone, pair, pair, elect="frequency") == [-2.0]
    assert join("ties", lone, pair, weights=(0.1, 0.9), elect="weighted") == [-2.0]
    assert join("ties", lone, lone, weights=(0.3, 0.3), divide="count") == [1.5]
    assert join("ties", lone, lone, weights=(0.3, 0.3), divide="none") == [3.0]
    assert join("dare_linear", lone, pair, weights=(0.5, 0.25)) == [2.0]
    assert join("dare_linear", lone, pair, weights=(0.5, 0.5), normalize=True) == [1.5]


def test_trimming_frees_planted_tasks() -> None:
    """Two tasks on disjoint large entries, each with small noise everywhere: TIES and breadcrumbs keep more of both than the sum."""
    g = torch.Generator().manual_seed(0)
    plan = torch.zeros(2, 12, 12)
    plan[0, :6, :6] = 3 * torch.randn(6, 6, generator=g).sign()
    plan[1, 6:, 6:] = 3 * torch.randn(6, 6, generator=g).sign()
    noisy = plan + 0.6 * torch.randn(2, 12, 12, generator=g)
    states = [AdapterState({"x": LowRank(torch.eye(12), n)}) for n in noisy]
    want = plan.sum(0).double()

    def miss(name: str, **options: object) -> float:
        weights = [1.0, 1.0]
        return float((merge_states(states, weights, name, rank=12, **options).sites["x"].dense().double() - want).norm())

    plain = miss("task_arithmetic")
    assert miss("ties", density=0.25) < 0.7 * plain
    assert miss("magnitude_prune", density=0.25) < 0.7 * plain


@pytest.mark.parametrize("kind", ["normal", "tied", "skewed", "rowwise"])
def test_the_threshold_of_a_long_vector_is_the_sorted_one(kind: str) -> None:
    """Bracketed by a sample and counted exactly: the value, how many are larger and how many equal it."""
    from rankwise.merge.methods.sparsify import SAMPLED, nth_largest

    g = torch.Generator().manual_seed(3)
    n = 17 * SAMPLED
    x = torch.randn(n, generator=g).abs()
    if kind == "tied":
        x = (x * 3).round()
    elif kind == "skewed":
        x = torch.where(torch.arange(n) < n - 5, 0.0, x)
    elif kind == "rowwise":  # columns of unlike sizes, as in a low-rank product
        x = (x.view(-1, 1088) * torch.logspace(-3, 3, 1088)).flatten()
    ordered = x.sort(descending=True).values
    for at in (0, 1, 4, 5, n // 5, n // 2, n - 2, n - 1):
        value, larger, equal = nth_largest(x, at)
        assert value == float(ordered[at])
        assert (larger, equal) == (int((x > value).sum()), int((x == value).sum()))
        assert larger <= at < larger + equal


@pytest.mark.parametrize("elect", ["total", "frequency", "weighted"])
def test_where_ties_is_not_zero_it_has_the_elected_sign(elect: str) -> None:
    g = torch.Generator().manual_seed(4)
    rows = [torch.randn(40, 30, generator=g, dtype=torch.float64) for _ in range(5)]
    w = (0.5, 1.5, 1.0, 0.7, 0.3)
    made = make("merge", "ties", density=0.3, elect=elect).entries(stack(*rows, weights=w), 0)
    trimmed = torch.stack([kept(Top(0.3), x) for x in rows])
    column = torch.tensor(w, dtype=torch.float64).view(-1, 1, 1)
    vote = {"total": trimmed, "frequency": trimmed.sign(), "weighted": column * trimmed}[elect].sum(0)
    sign = torch.where(vote >= 0, 1.0, -1.0).double()
    assert bool((made != 0).any()) and torch.equal(made.sign()[made != 0], sign[made != 0])
