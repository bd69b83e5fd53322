"""cat, svd and linear: Eckart–Young, exactness, cross terms; PEFT's combinations by the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import MergeError
from rankwise.merge import attach_merged, attach_state, merge_states
from tests.merge.tools import dense, source
from tests.models import batch_for, llama, logits, move


def test_svd_is_eckart_young_and_cat_exact() -> None:
    a, b = source(0), source(1)
    total = 0.7 * dense(a) + 0.3 * dense(b)
    S = torch.linalg.svdvals(total)
    cut = merge_states([a, b], [0.7, 0.3], "svd", rank=2)
    assert (dense(cut) - total).norm() == pytest.approx(S[2:].norm().item(), abs=1e-5)
    assert cut.meta["truncation"]["x"] == pytest.approx((S[2:].norm() / S.norm()).item(), abs=1e-6)
    assert torch.allclose(dense(merge_states([a, b], [0.7, -0.3], "cat")), 0.7 * dense(a) - 0.3 * dense(b), atol=1e-6)


def test_svd_at_the_sum_s_rank_is_cat_and_linear_s_cross_terms_are_told() -> None:
    a, b = source(0), source(1)
    whole = merge_states([a, b], [0.7, 0.3], "svd", rank=6)
    assert torch.allclose(dense(whole), dense(merge_states([a, b], [0.7, 0.3], "cat")), atol=1e-6)
    assert whole.meta["truncation"]["x"] < 1e-6
    twins = merge_states([a] * 3, None, "linear")  # T times the adapter, and the report says so
    assert torch.allclose(dense(twins), 3 * dense(a), atol=1e-5) and twins.meta["errors"]["x"] == pytest.approx(2.0, abs=1e-5)


def test_linear_has_the_cross_terms() -> None:
    a, b = source(0), source(1)
    (A1, B1), (A2, B2) = a.sites["x"].factors(), b.sites["x"].factors()
    want = 0.6 * B1 @ A1 + 0.4 * B2 @ A2 + (0.6 * 0.4) ** 0.5 * (B1 @ A2 + B2 @ A1)
    assert torch.allclose(dense(merge_states([a, b], [0.6, 0.4], "linear")), want.double(), atol=1e-5)
    with pytest.raises(MergeError, match="every source needs 'y'"):
        merge_states([a, AdapterState({"x": b.sites["x"]})], None, "linear")


@pytest.mark.parametrize(
    ("name", "ours", "kind", "theirs"),
    [
        ("cat", {}, "cat", {}),
        ("svd", {"rank": 4}, "svd", {"svd_rank": 4}),
        ("linear", {}, "linear", {}),
        ("ties", {"rank": 4, "density": 0.5, "divide": "count"}, "ties_svd", {"svd_rank": 4, "density": 0.5}),
        ("magnitude_prune", {"rank": 4, "density": 0.5}, "magnitude_prune_svd", {"svd_rank": 4, "density": 0.5}),
    ],
)
def test_agreement_with_peft(name: str, ours: dict[str, Any], kind: str, theirs: dict[str, Any], tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    folders = []
    for i in range(2):
        adapter = rw.attach(llama(), {"r": 4, "alpha": 8})
        move(adapter, seed=i)
        folders.append(str(adapter.export(tmp_path / f"p{i}")))
        adapter.detach()
    net = peft.PeftModel.from_pretrained(llama(), folders[0], adapter_name="0")
    net.load_adapter(folders[1], adapter_name="1")
    net.add_weighted_adapter(["0", "1"], [0.7, 0.3], "m", combination_type=kind, **theirs)
    net.set_adapter("m")
    model = llama()
    attach_merged(model, folders, name, [0.7, 0.3], **ours)
    batch = batch_for(model)
    assert torch.allclose(logits(net, batch), logits(model, batch), atol=1e-4)


def test_merged_values_attach_and_act() -> None:
    model = llama()
    adapter = rw.attach(model, {"r": 2})
    move(adapter)
    batch = batch_for(model)
    want = logits(model, batch)
    state = adapter.lower()
    adapter.detach()
    attach_state(model, state)
    assert torch.allclose(logits(model, batch), want, atol=1e-5)


@pytest.mark.parametrize("near", [False, True])
def test_crossed_sums_are_told_from_products_of_factors(near: bool) -> None:
    """The distance of ``linear`` and its like from the weighted sum, against matrices written out; near ones in fp64."""
    from rankwise.merge.engine.stack import FactorStack

    g = torch.Generator().manual_seed(0)
    pairs = tuple(
        (torch.randn(3, 9, generator=g, dtype=torch.float64), torch.randn(7, 3, generator=g, dtype=torch.float64)) for _ in range(4)
    )
    w = (0.5, -0.2, 1.0, 0.0)
    C = torch.tensor(w, dtype=torch.float64).diag() + (1e-6 if near else 1.0) * torch.randn(4, 4, generator=g, dtype=torch.float64)
    want = sum(C[s, t] * pairs[s][1] @ pairs[t][0] for s in range(4) for t in range(4))
    whole = sum(x * B @ A for x, (A, B) in zip(w, pairs, strict=True))
    ratio = float((want - whole).norm() / whole.norm())
    assert FactorStack("x", w, pairs=pairs).crossed(C) == pytest.approx(ratio, rel=1e-4 if near else 1e-6)
    assert FactorStack("x", (0.0,) * 4, pairs=pairs).crossed(C) == 1.0


def test_the_distance_from_a_sum_that_nearly_cancels_is_true() -> None:
    """Two near adapters, one taken off the other: products in fp32 would tell the small sum wrongly."""
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 12, generator=g), torch.randn(10, 4, generator=g)
    C, D = A + 1e-4 * torch.randn(4, 12, generator=g), B + 1e-4 * torch.randn(10, 4, generator=g)
    got = merge_states([AdapterState({"x": LowRank(A, B)}), AdapterState({"x": LowRank(C, D)})], [1.0, -1.0], "linear")
    whole = B.double() @ A.double() - D.double() @ C.double()
    made = got.sites["x"].B.double() @ got.sites["x"].A.double()
    assert got.meta["errors"]["x"] == pytest.approx(float((made - whole).norm() / whole.norm()), rel=1e-4)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "lego", "knots", "slerp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_is_refused(method: str, value: float) -> None:
    B = torch.ones(10, 2)
    B[3, 1] = value
    broken, sound = (AdapterState({"x": LowRank(torch.ones(2, 8), b)}) for b in (B, torch.ones(10, 2)))
    with pytest.raises(MergeError, match=r"Source 1 \(from 0\) holds values at 'x' that are not finite"):
        merge_states([sound, broken], None, method)


def test_a_sum_beyond_fp32_is_refused() -> None:
    wide = AdapterState({"x": LowRank(torch.full((1, 8), 1e200, dtype=torch.float64), torch.ones(10, 1, dtype=torch.float64))})
    with pytest.raises(MergeError, match="beyond what fp32 holds"):
        merge_states([wide], [1.0], "cat")
