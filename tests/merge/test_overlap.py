"""Overlap of adapters with planted subspaces, against dense formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankwise.delta import AdapterState, LowRank
from rankwise.errors import MergeError, OptionError
from rankwise.merge.judge.overlap import SiteOverlap, SourcePair, compare_states
from tests.merge.tools import source

OUT, IN = 24, 20


def basis(seed: int, n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


U, V = basis(0, OUT), basis(1, IN)


def planted(cols: list[int], rows: list[int], sizes: list[float], name: str = "x") -> AdapterState:
    """Σ size·u_col·v_rowᵀ with fp64 factors mixed by an arbitrary gauge."""
    G = torch.randn(len(cols), len(cols), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    B, A = U[:, cols] * torch.tensor(sizes, dtype=torch.float64), V[:, rows].mT
    return AdapterState({name: LowRank(G @ A, B @ torch.linalg.inv(G) * 2, 0.5)})


def one(*states: AdapterState, **options: float) -> tuple[SiteOverlap, SourcePair]:
    site = compare_states(states, **options).sites["x"]
    return site, site.pairs[0, 1]


def close(got: object, want: object) -> bool:
    return torch.allclose(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64), atol=1e-7)


def test_itself_its_negative_and_the_orthogonal() -> None:
    a = planted([0, 1, 2], [0, 1, 2], [3.0, 2.0, 1.0])
    for c, cosine, conflict in ((2.0, 1.0, 0.0), (-0.5, -1.0, 1.0)):
        site, p = one(a, a.scaled(c))
        assert (
            close(p.left, [1.0] * 3)
            and close(p.right, [1.0] * 3)
            and close([p.cosine, p.matched_a, p.matched_b], [cosine, 1.0, 1.0])
        )
        assert close([site.conflict[0, 1], site.conflicts], [conflict, conflict]) and close(site.energies, [14.0, 14.0 * c * c])
    site, p = one(a, planted([3, 4], [5, 6], [1.0, 4.0]))
    assert close(p.left, [0.0] * 2) and close(p.right, [0.0] * 2) and close([p.cosine, p.matched_a, p.shared_left], [0.0] * 3)
    assert site.ranks == (3, 2) and close(p.chance, [3 / OUT, 3 / IN])


def test_a_shared_part_is_found_on_its_side() -> None:
    """One column direction and two row directions shared, paired differently; one component the same with its sign flipped."""
    a, b = planted([0, 1, 2], [0, 1, 2], [3.0, 2.0, 1.0]), planted([0, 7, 8], [0, 9, 1], [-5.0, 3.0, 1.0])
    _, p = one(a, b)
    assert close(p.left, [1.0, 0.0, 0.0]) and close(p.right, [1.0, 1.0, 0.0])
    assert close([p.shared_left, p.shared_right], [1 / 3, 2 / 3])
    assert close([p.matched_a, p.matched_b], [9 / 14, 25 / 35]) and close(p.cosine, -15 / math.sqrt(14 * 35))


def test_angles_are_the_planted_ones_and_match_is_a_threshold() -> None:
    t = 0.7
    a = planted([0], [0], [1.0])
    turned = AdapterState({"x": LowRank(V[:, :1].mT, (math.cos(t) * U[:, :1] + math.sin(t) * U[:, 5:6]))})
    _, p = one(a, turned)
    assert close(p.left, [math.cos(t)]) and close(p.right, [1.0]) and close(p.cosine, math.cos(t)) and p.matched_a == 1.0
    assert one(a, turned, match=0.8)[1].matched_a == 0.0 and one(a, turned, match=0.76)[1].matched_b == 1.0


def test_components_are_paired_one_to_one() -> None:
    """b holds two components that both resemble a's one: only one of them has a partner."""
    c = math.sqrt(0.5)
    a = planted([0], [0], [1.0])
    B = torch.stack([c * U[:, 0] + c * U[:, 1], c * U[:, 0] - c * U[:, 1]], 1) * torch.tensor([2.0, 1.0]).double()
    b = AdapterState({"x": LowRank(torch.stack([c * (V[:, 0] + V[:, 1]), c * (V[:, 0] - V[:, 1])]), B)})
    _, p = one(a, b, match=0.45)
    assert close([p.matched_a], [1.0]) and min(abs(p.matched_b - 0.8), abs(p.matched_b - 0.2)) < 1e-7


@pytest.mark.parametrize("block", [1, 10**9])
def test_conflict_and_cosine_are_the_dense_formulas_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.merge.engine import stack

    monkeypatch.setattr(stack, "BLOCK_BYTES", block)
    states = [source(i, out=40, inp=8) for i in range(3)]
    states[1] = states[1].scaled(100.0)  # size does not hide a conflict
    got = compare_states(states)
    for name in "xy":
        x = [s.sites[name].dense().double() for s in states]
        x = [v / v.norm() for v in x]
        for (a, b), share in got.sites[name].conflict.items():
            opposite = (x[a] * x[b] < 0) * 2 * torch.minimum(x[a].abs(), x[b].abs())
            assert abs(share - float(opposite.sum() / (x[a].abs() + x[b].abs()).sum())) < 1e-6
            assert abs(got.sites[name].pairs[a, b].cosine - float((x[a] * x[b]).sum())) < 1e-6
        assert abs(got.sites[name].conflicts - float(1 - sum(x).abs().sum() / sum(v.abs().sum() for v in x))) < 1e-6


def test_over_sites_the_cosine_is_of_all_changes_as_one_vector() -> None:
    states = [source(0), source(1), AdapterState({"x": source(2).sites["x"]})]
    got = compare_states(states)
    found, whole = got.over(), got.cosines()
    for (a, b), row in found.items():
        want = float(states[a].cos(states[b]))
        assert abs(row["cosine"] - want) < 1e-6 and abs(float(whole[a, b]) - want) < 1e-6
    assert close(got.energy(), [float(s.inner(s)) for s in states])
    assert (
        set(got.over(["y"])) == {(0, 1)}
        and abs(got.over(["y"])[0, 1]["shared_left"] - got.sites["y"].pairs[0, 1].shared_left) < 1e-12
    )
    weights = [math.sqrt(s.energies[0] * s.energies[1]) for s in got.sites.values()]
    want = sum(w * s.conflict[0, 1] for w, s in zip(weights, got.sites.values(), strict=True)) / sum(weights)
    assert abs(found[0, 1]["conflict"] - want) < 1e-12


def test_a_source_that_changes_nothing_somewhere_has_no_pair_there() -> None:
    zero = AdapterState({"x": LowRank(torch.randn(2, IN), torch.zeros(OUT, 2)), "y": LowRank(torch.ones(1, 3), torch.ones(2, 1))})
    a = planted([0, 1], [0, 1], [1.0, 1.0])
    both = AdapterState({**a.sites, "y": zero.sites["y"]})
    got = compare_states([both, zero])
    assert got.sites["x"].pairs == {} and got.sites["x"].ranks == (2, 0) and got.sites["y"].pairs[0, 1].cosine == pytest.approx(1.0)
    doubled = AdapterState({"x": LowRank(torch.cat([a.sites["x"].A] * 2), torch.cat([a.sites["x"].B] * 2, 1), 0.5)})
    assert compare_states([a, doubled]).sites["x"].ranks == (2, 2)  # a rank that is there, not the factors' width


def test_what_is_refused() -> None:
    a = source(0)
    for states, options, error, word in (
        ([a], {}, OptionError, "two adapters"), ([a, a], {"match": 0.0}, OptionError, "match"), ([a, source(1, inp=9)], {}, MergeError, "shapes"),
        ([AdapterState({"x": a.sites["x"]}), AdapterState({"y": a.sites["y"]})], {}, MergeError, "same place"),
    ):  # fmt: skip
        with pytest.raises(error, match=word):
            compare_states(states, **options)
