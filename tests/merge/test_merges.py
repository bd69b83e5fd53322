"""Merges: the laws over all of them, the identities of each card, agreement with PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise import catalogue
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import MergeError, OptionError
from rankwise.merge import attach_merged, attach_state, merge_states
from rankwise.merge.ties import TIES, trim
from tests.models import batch_for, llama, logits, move

NAMES = [m.name for m in catalogue.methods("merge")]
#: options under which a method keeps everything, so that the laws of one and of identical sources apply
KEEP: dict[str, dict[str, Any]] = {"ties": {"density": 1.0}, "lego": {"reweigh_output": False, "rank": 99}}


def source(seed: int, r: int = 3, out: int = 10, inp: int = 8) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g)
    return AdapterState({"x": LowRank(draw(r, inp), draw(out, r), 0.5), "y": LowRank(draw(r, inp), draw(out, r), 0.5)})


def dense(state: AdapterState, site: str = "x") -> torch.Tensor:
    return state.sites[site].dense().double()


@pytest.mark.parametrize("name", NAMES)
def test_one_source_is_itself(name: str) -> None:
    a = source(0)
    got = merge_states([a], [1.0], name, **KEEP.get(name, {}))
    assert torch.allclose(dense(got), dense(a), atol=1e-5) and max(got.meta["errors"].values()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_identical_sources_with_convex_weights(name: str) -> None:
    a = source(0)
    got = merge_states([a, a], [0.5, 0.5], name, **KEEP.get(name, {}))
    factor = 2.0 if name == "linear" else 0.5 if name == "ties" else 1.0  # linear: cross terms; ties: a disjoint *mean* of w·v
    assert torch.allclose(dense(got), factor * dense(a), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_sources_changes_nothing(name: str) -> None:
    a, b = source(0), source(1)
    options = KEEP.get(name, {})
    assert torch.allclose(
        dense(merge_states([a, b], [0.7, 0.3], name, **options)),
        dense(merge_states([b, a], [0.3, 0.7], name, **options)),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", NAMES)
def test_scaling_the_sources_scales_the_result(name: str) -> None:
    a, b = source(0), source(1)
    got = merge_states([a.scaled(3.0), b.scaled(3.0)], [0.6, 0.4], name)
    assert torch.allclose(dense(got), 3 * dense(merge_states([a, b], [0.6, 0.4], name)), atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if catalogue.find("merge", n).cls.gauge_invariant and n != "lego"])
def test_gauge_of_the_sources_changes_nothing(name: str) -> None:
    a, b = source(0), source(1)
    G = torch.randn(3, 3)
    other = AdapterState({n: LowRank(G @ d.A, d.B @ torch.linalg.inv(G), d.scale) for n, d in a.sites.items()})
    assert torch.allclose(dense(merge_states([a, b], None, name)), dense(merge_states([other, b], None, name)), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_whatever_the_order_of_sites(name: str) -> None:
    a, b = source(0), source(1)
    flipped = [AdapterState(dict(reversed(list(s.sites.items())))) for s in (a, b)]
    assert torch.equal(dense(merge_states([a, b], None, name), "y"), dense(merge_states(flipped, None, name), "y"))


@pytest.mark.parametrize("name", NAMES)
def test_the_reported_error_is_true(name: str) -> None:
    a, b = source(0), source(1)
    got = merge_states([a, b], [0.7, 0.3], name)
    total = 0.7 * dense(a) + 0.3 * dense(b)
    assert got.meta["errors"]["x"] == pytest.approx(((dense(got) - total).norm() / total.norm()).item(), abs=1e-5)


def test_svd_is_eckart_young_and_cat_exact() -> None:
    a, b = source(0), source(1)
    total = 0.7 * dense(a) + 0.3 * dense(b)
    S = torch.linalg.svdvals(total)
    cut = merge_states([a, b], [0.7, 0.3], "svd", rank=2)
    assert (dense(cut) - total).norm() == pytest.approx(S[2:].norm().item(), abs=1e-5)
    assert torch.allclose(dense(merge_states([a, b], [0.7, -0.3], "cat")), 0.7 * dense(a) - 0.3 * dense(b), atol=1e-6)


def test_ties_trims_elects_and_averages() -> None:
    a, b, c = torch.tensor([3.0, -1, 0.1, 2]), torch.tensor([2.0, 2, -0.2, -3]), torch.tensor([-1.0, 0.5, 0.3, -1])
    assert trim(a, 0.5).tolist() == [3, 0, 0, 2]
    got = TIES(density=1.0).merge([a, b, c], [1, 1, 1])
    assert got.tolist() == pytest.approx([2.5, 1.25, 0.2, -2.0])  # signs +, +, +, −; means over those that agree
    assert TIES(density=1.0).merge([torch.tensor([5.0]), torch.tensor([-2.0])], [1, 1]).tolist() == [5.0], (
        "the larger survives, undivided"
    )


def test_lego_merges_shared_units_and_chooses_k() -> None:
    a = source(0)
    doubled = merge_states([a, a], [1.0, 1.0], "lego", rank=3, reweigh_output=False)
    assert doubled.sites["x"].exact_rank == 3
    assert torch.allclose(dense(doubled), dense(a), atol=1e-4), "twin units in one cluster return themselves"
    flipped = AdapterState({n: LowRank(-2 * d.A, -d.B / 2, d.scale) for n, d in a.sites.items()})
    assert torch.allclose(
        dense(merge_states([a, flipped], [1.0, 1.0], "lego", rank=3, reweigh_output=False)), dense(a), atol=1e-4
    ), "(−2a, −b/2) is the same unit"
    many = merge_states([a, source(1)], None, "lego", energy=0.9)
    assert 1 <= many.sites["x"].exact_rank <= 6
    full = merge_states([a, source(1)], [0.5, 0.5], "lego", rank=6, reweigh_output=False)
    assert torch.allclose(dense(full), 0.5 * dense(a) + 0.5 * dense(source(1)), atol=1e-5), "singleton clusters are the sum"


def test_lego_output_reweighting() -> None:
    a = source(0, r=4)
    plain = merge_states([a], [1.0], "lego", rank=2, reweigh_output=False)
    scaled = merge_states([a], [1.0], "lego", rank=2)
    assert torch.allclose(dense(scaled), 2**0.5 * dense(plain), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [("cat", "cat", {}), ("svd", "svd", {"svd_rank": 4}), ("linear", "linear", {}), ("ties", "ties", {"density": 0.5})],
)
def test_agreement_with_peft(name: str, kind: str, options: dict, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    folders = []
    for i in range(2):
        adapter = rw.attach(llama(), {"r": 4, "alpha": 8})
        move(adapter, seed=i)
        folders.append(str(adapter.export(tmp_path / f"p{i}")))
        adapter.detach()
    net = peft.PeftModel.from_pretrained(llama(), folders[0], adapter_name="0")
    net.load_adapter(folders[1], adapter_name="1")
    net.add_weighted_adapter(["0", "1"], [0.7, 0.3], "m", combination_type=kind, **options)
    net.set_adapter("m")
    model = llama()
    ours = {"svd": {"rank": 4}, "ties": {"density": 0.5, "space": "factors"}}.get(name, {})
    attach_merged(model, folders, name, [0.7, 0.3], **ours)
    batch = batch_for(model)
    assert torch.allclose(logits(net, batch), logits(model, batch), atol=1e-4)


def test_a_site_that_only_some_sources_have_counts_as_zero() -> None:
    a, b = source(0), AdapterState({"x": source(1).sites["x"]})
    got = merge_states([a, b], [0.5, 0.5], "cat")
    assert torch.allclose(dense(got, "y"), 0.5 * dense(a, "y"), atol=1e-6)
    with pytest.raises(MergeError, match="every source needs 'y'"):
        merge_states([a, b], None, "linear")


def test_refusals() -> None:
    with pytest.raises(MergeError, match="nothing to merge"):
        merge_states([])
    with pytest.raises(OptionError, match="3 weights for 2"):
        merge_states([source(0), source(1)], [1, 1, 1])
    with pytest.raises(MergeError, match="different bases"):
        merge_states([source(0), source(1, out=7)])
    with pytest.raises(OptionError, match="density"):
        merge_states([source(0)], [1.0], "ties", density=0)


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
