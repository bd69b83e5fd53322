"""The seven laws of merging over every registered method that takes adapters; exceptions are named by the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankwise import catalogue
from rankwise.catalogue import MethodInfo
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import MergeError, OptionError
from rankwise.merge import merge_states
from rankwise.merge.engine.base import Merge
from tests.merge.tools import dense, keep_all, source

ALL = [m for m in catalogue.methods("merge") if issubclass(m.cls, Merge) and m.cls.adapters and not m.cls().needs_evaluator]


def holding(law: str, count: int = 2) -> list[object]:
    fits = [m for m in ALL if law not in m.cls.breaks and m.cls.count in (None, count)]
    return [pytest.param(m, id=m.name) for m in fits]


def merged(m: MethodInfo, states: list[AdapterState], weights: list[float] | None = None, **options: Any) -> AdapterState:
    """By ``m``: of the first alone where it takes one source; without weights where it refuses them."""
    count = m.cls.count or len(states)
    return merge_states(states[:count], weights[:count] if weights and m.cls().uses_weights else None, m.name, **options)


def test_the_named_exceptions_are_few_and_known() -> None:
    assert {m.name: sorted(m.cls.breaks) for m in ALL if m.cls.breaks} == {
        "interpolation": ["missing sites"],
        "linear": ["twins"],
        "model_stock": ["one source"],
        "nearswap": ["one source", "order", "scale"],
        "quality_diversity": ["order"],
        "robust_signature": ["one source", "order", "twins"],
        "slerp": ["order"],
    }


@pytest.mark.parametrize("m", holding("one source", 1))
def test_one_source_at_weight_one_is_itself(m: MethodInfo) -> None:
    a = source(0)
    got = merged(m, [a], [1.0], **keep_all(m))
    assert torch.allclose(dense(got), dense(a), atol=1e-5) and max(got.meta["errors"].values()) < 1e-5


@pytest.mark.parametrize("m", holding("twins"))
def test_twins_with_convex_weights_are_the_source(m: MethodInfo) -> None:
    a = source(0)
    got = merged(m, [a, a], [0.3, 0.7], **keep_all(m))
    if m.name == "task_arithmetic":
        assert got.meta["errors"]["x"] < 1e-5
    assert torch.allclose(dense(got), dense(a), atol=1e-5)


def test_factorwise_twins_are_counted_twice() -> None:
    a = source(0)
    assert torch.allclose(dense(merge_states([a, a], [0.5, 0.5], "linear")), 2 * dense(a), atol=1e-5)


@pytest.mark.parametrize("m", holding("order"))
def test_order_of_sources_changes_nothing(m: MethodInfo) -> None:
    a, b = source(0), source(1)
    one, two = merged(m, [a, b], [0.7, 0.3]), merged(m, [b, a], [0.3, 0.7])
    assert torch.allclose(dense(one), dense(two), atol=1e-5)


@pytest.mark.parametrize("m", holding("scale"))
def test_scaling_the_sources_scales_the_result(m: MethodInfo) -> None:
    a, b = source(0), source(1)
    got = merged(m, [a.scaled(3.0), b.scaled(3.0)], [0.6, 0.4])
    assert torch.allclose(dense(got), 3 * dense(merged(m, [a, b], [0.6, 0.4])), atol=1e-4)


@pytest.mark.parametrize("m", [pytest.param(m, id=m.name) for m in ALL if m.cls.gauge_invariant])
def test_gauge_of_the_sources_changes_nothing(m: MethodInfo) -> None:
    a, b = source(0), source(1)
    G = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    other = AdapterState({n: LowRank(G @ d.A, d.B @ torch.linalg.inv(G), d.scale) for n, d in a.sites.items()})
    assert torch.allclose(dense(merged(m, [a, b])), dense(merged(m, [other, b])), atol=1e-3)


@pytest.mark.parametrize("m", [pytest.param(m, id=m.name) for m in ALL])
def test_low_precision_is_widened_once_and_site_order_and_blocks_do_not_matter(
    m: MethodInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = source(0).to(torch.bfloat16), source(1).to(torch.bfloat16)
    wide = merged(m, [a.to(torch.float32), b.to(torch.float32)])
    narrow = merged(m, [a, b])
    assert torch.equal(dense(narrow), dense(wide)) and narrow.sites["x"].dtype == torch.float32
    flipped = [AdapterState(dict(reversed(list(s.sites.items())))) for s in (a, b)]
    assert torch.equal(dense(merged(m, flipped), "y"), dense(narrow, "y"))
    big_a, big_b = source(2, 3, 40, 12), source(3, 2 if m.name != "linear" else 3, 40, 12)
    whole = merged(m, [big_a, big_b])
    monkeypatch.setattr("rankwise.merge.engine.stack.BLOCK_BYTES", 1)  # 16 rows at a time
    assert torch.allclose(dense(merged(m, [big_a, big_b])), dense(whole), atol=1e-5)


@pytest.mark.parametrize("m", [pytest.param(m, id=m.name) for m in ALL])
def test_the_reported_error_is_true(m: MethodInfo) -> None:
    a, b = source(0), source(1)
    got = merged(m, [a, b], [0.7, 0.3])
    total = sum(w * dense(s) for w, s in zip(got.meta["weights"], (a, b), strict=False))
    assert got.meta["errors"]["x"] == pytest.approx(((dense(got) - total).norm() / total.norm()).item(), abs=1e-5)


@pytest.mark.parametrize(
    "m", [pytest.param(m, id=m.name) for m in ALL if m.name != "linear" and "missing sites" not in m.cls.breaks]
)
def test_a_site_that_one_source_lacks_counts_as_zero(m: MethodInfo) -> None:
    a, b = source(0), source(1)
    part = AdapterState({"x": b.sites["x"]})
    zero = AdapterState({"x": b.sites["x"], "y": LowRank(torch.zeros(3, 8), torch.zeros(10, 3))})
    got, full = merged(m, [a, part], None, **keep_all(m)), merged(m, [a, zero], None, **keep_all(m))
    assert torch.allclose(dense(got, "y"), dense(full, "y"), atol=1e-5)


def test_wrong_input_is_told() -> None:
    a = source(0)
    with pytest.raises(MergeError, match="nothing to merge"):
        merge_states([])
    with pytest.raises(OptionError, match="1 weights for 2"):
        merge_states([a, a], [1.0])
    with pytest.raises(OptionError, match="finite"):
        merge_states([a, a], [1.0, float("nan")])
    with pytest.raises(MergeError, match="different bases"):
        merge_states([a, source(1, 3, 12)])
    with pytest.raises(OptionError, match="between 2 sources; it got 3"):
        merge_states([a, a, a], None, "slerp")
    with pytest.raises(OptionError, match="density as a share"):
        merge_states([a, a], None, "ties", density=1.5)
    with pytest.raises(OptionError, match="elect in"):
        merge_states([a, a], None, "ties", elect="majority")
    with pytest.raises(OptionError, match=r"density ± epsilon"):
        merge_states([a, a], None, "della", density=0.9)
    head = AdapterState(a.sites, {"head.weight": torch.ones(2)})
    with pytest.raises(MergeError, match=r"head\.weight"):
        merge_states([head, AdapterState(a.sites, {"head.weight": torch.zeros(2)})])
    assert torch.equal(merge_states([head, a]).full["head.weight"], torch.ones(2))
