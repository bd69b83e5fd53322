from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import MergeError, OptionError
from rankwise.merge import attach_state, merge_states
from rankwise.merge.methods.signatures import quantise, signature, signatures
from tests.merge.models import SITES, copy_with, value
from tests.models import FAMILIES, batch_for, llama, logits

Weights = dict[str, Tensor]


def vit() -> Any:
    return FAMILIES["vit"][0]()


def tuned(seed: int, size: float = 0.05) -> Weights:
    """A 'fine-tune' of the ViT: every parameter moved at random."""
    g = torch.Generator().manual_seed(seed)
    return {n: p.detach() + size * torch.randn(p.shape, generator=g) for n, p in vit().named_parameters()}


BASE = {n: p.detach().clone() for n, p in vit().named_parameters()}
WEIGHT = "vit.layers.0.attention.q_proj"


def change(state: Any, site: str = WEIGHT) -> Tensor:
    return state.sites[site].dense().double().flatten()


def move(theta: Weights, name: str) -> Tensor:
    return (theta[name].double() - BASE[name].double()).flatten()


def test_a_signature_is_orthogonal_to_the_clean_move_and_taking_it_again_changes_nothing() -> None:
    state = signatures(vit(), tuned(1), [tuned(2)], keep=3)
    for site, d in state.sites.items():
        name = site if site in BASE else f"{site}.weight"
        u, s, v = move(tuned(1), name), d.dense().double().flatten(), move(tuned(2), name)
        assert abs(u @ s) < 1e-6 * u.norm() * s.norm(), site
        naive = v - torch.outer(u, u) @ v / (u @ u) if len(u) < 2000 else None  # the d×d projection of the reference
        assert naive is None or torch.allclose(s, naive, atol=1e-6)
    u, v = move(tuned(1), f"{WEIGHT}.weight"), move(tuned(2), f"{WEIGHT}.weight")
    once = signature(v, u)
    assert torch.allclose(signature(once, u), once, atol=1e-14) and 0.5 < once.norm() / v.norm() < 1


def test_parallel_moves_leave_nothing_and_an_untouched_tensor_leaves_the_move() -> None:
    clean = tuned(1)
    parallel = {n: BASE[n] + 3 * (t - BASE[n]) for n, t in clean.items()}
    assert change(signatures(vit(), clean, [parallel])).abs().max() < 1e-6
    untouched = {**clean, f"{WEIGHT}.weight": BASE[f"{WEIGHT}.weight"]}
    assert torch.allclose(change(signatures(vit(), untouched, [tuned(2)])), move(tuned(2), f"{WEIGHT}.weight"), atol=1e-7)


def test_linear_in_alpha_which_is_shared_once() -> None:
    clean, noisy, dark = tuned(1), tuned(2), tuned(3)
    both = signatures(vit(), clean, {"noise": noisy, "dark": dark}, alpha=1.0)
    a, b = (change(signatures(vit(), clean, [t])) for t in (noisy, dark))
    assert torch.allclose(change(both), (a + b) / 2, atol=1e-7)  # not (a + b)/4
    assert torch.allclose(change(signatures(vit(), clean, [noisy, dark], alpha=0.3)), 0.3 * change(both), atol=1e-7)
    name = "vit.layernorm.weight"
    assert torch.allclose(both.full[name], (noisy[name] + dark[name]) / 2, atol=1e-6)


def test_the_first_layers_alone_and_every_norm() -> None:
    state = signatures(vit(), tuned(1), [tuned(2)], keep=2)
    weights = {n for n in state.sites if not n.endswith((".bias", "_token", "embeddings"))}
    assert weights == {"vit.embeddings.patch_embeddings.projection", WEIGHT}
    assert {n for n in state.sites if n.endswith(".bias")} == {f"{n}.bias" for n in weights}
    assert "vit.embeddings.cls_token" in state.sites and len(state.full) == 2 * (2 * 2 + 1)
    assert not signatures(vit(), tuned(1), [tuned(2)], norms="leave").full
    for wrong in (0, 15):
        with pytest.raises(OptionError, match="weight layers"):
            signatures(vit(), tuned(1), [tuned(2)], keep=wrong)


@pytest.mark.parametrize("levels", [2, 5, 16, 256])
def test_quantised_error_is_at_most_half_a_step(levels: int) -> None:
    exact, coarse = (change(signatures(vit(), tuned(1), [tuned(2)], levels=n)) for n in (None, levels))
    bound = (exact.max() - exact.min()) / (2 * (levels - 1))
    assert (coarse - exact).abs().max() <= bound * (1 + 1e-5)
    assert len(coarse.unique()) <= levels and (coarse - exact).abs().max() > 0.5 * bound
    flat = torch.full((4,), 0.3)
    assert torch.equal(quantise(flat, 2), flat)
    with pytest.raises(OptionError, match="at least 2"):
        quantise(flat, 1)


def test_a_patch_goes_on_another_model_and_comes_off_to_the_bit() -> None:
    state = signatures(vit(), tuned(1), [tuned(2), tuned(3)])
    target = vit()
    target.load_state_dict(tuned(9), strict=False)
    bits = {k: v.clone() for k, v in target.state_dict().items()}
    batch = batch_for(target)
    before = logits(target, batch)
    adapter = attach_state(target, state, name="robust")
    want = vit()
    with torch.no_grad():
        for n, p in want.named_parameters():
            site = n if n in state.sites else n.removesuffix(".weight")
            p.copy_(bits[n])
            if n in state.full:
                p.copy_(state.full[n])
            elif site in state.sites:
                p.add_(state.sites[site].dense().reshape(p.shape))
    assert (logits(target, batch) - before).abs().max() > 1e-2
    assert torch.allclose(logits(target, batch), logits(want, batch), atol=1e-5)
    with rw.view(target, {"robust": 0.0}):
        assert torch.allclose(logits(target, batch), before, atol=1e-6)
    adapter.detach()
    assert torch.equal(logits(target, batch), before)
    assert all(torch.equal(v, bits[k]) for k, v in target.state_dict().items())


def test_adapters_of_form_full_are_sources_and_linears_can_be_cut_to_low_rank() -> None:
    made = []
    for seed in (1, 2):
        net = vit()
        adapter = rw.attach(net, {"form": "full", "targets": "all"})
        with torch.no_grad():
            for n, p in net.named_parameters():
                p.copy_(tuned(seed)[n])
        made.append(adapter)
    state, same = signatures(vit(), made[0], made[1:]), signatures(vit(), tuned(1), [tuned(2)])
    assert all(torch.equal(change(state, n), change(same, n)) for n in same.sites)
    assert all(torch.equal(state.full[n], t) for n, t in same.full.items())
    assert all(torch.equal(change(signatures(made[0].model, made[0], made[1:]), n), change(same, n)) for n in same.sites)
    low, error = state.sites[WEIGHT].to_lowrank(rank=4)
    assert isinstance(low, LowRank) and 0 < error < 1


def test_refusals() -> None:
    lora = rw.attach(vit(), {"form": "lora", "r": 2, "targets": ["fc1"]})
    short = {n: t for n, t in tuned(2).items() if "q_proj" not in n}
    for clean, robust, why in (
        (tuned(1), [], "at least one"),
        (lora, [tuned(2)], "form 'lora'"),
        (tuned(1), [short], "nothing"),
        ({**tuned(1), f"{WEIGHT}.weight": torch.zeros(2, 2)}, [tuned(2)], r"\(2, 2\)"),
    ):
        with pytest.raises(MergeError, match=why):
            signatures(vit(), clean, robust)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="norms"):
        signatures(vit(), tuned(1), [tuned(2)], norms="replace")  # type: ignore[arg-type]


def test_of_adapters_the_signature_is_the_formula_and_a_patch() -> None:
    """As a merge: orthogonal to the clean change a site, α shared once, u = 0 leaves v, the first blocks alone."""
    clean, first, second = value(0), value(1, r=3), value(2)
    got = merge_states([clean, first, second], None, "robust_signature", alpha=0.8)
    for n in SITES:
        u, v, w = (s.sites[n].dense().double() for s in (clean, first, second))
        want = sum(0.4 * (x - (u * x).sum() / (u * u).sum() * u) for x in (v, w))
        assert torch.allclose(got.sites[n].dense().double(), want, atol=1e-6)
        assert abs(float((got.sites[n].dense().double() * u).sum())) < 1e-5 * float(want.norm() * u.norm())
    twice = merge_states([clean, got], None, "robust_signature")  # a projection is idempotent
    assert torch.allclose(twice.sites[SITES[0]].dense(), got.sites[SITES[0]].dense(), atol=1e-5)
    parallel = merge_states([clean, clean.scaled(-2.0)], None, "robust_signature")
    assert all(float(d.norm()) < 1e-5 for d in parallel.sites.values())
    uneven = merge_states([clean, first, second], [5.0, 3.0, 1.0], "robust_signature")
    one, two = (merge_states([clean, s], None, "robust_signature").sites[SITES[0]].dense() for s in (first, second))
    assert torch.allclose(uneven.sites[SITES[0]].dense(), 0.75 * one + 0.25 * two, atol=1e-5)
    part = AdapterState({n: d for n, d in clean.sites.items() if n != SITES[0]})
    left = merge_states([part, first], None, "robust_signature").sites[SITES[0]]
    assert torch.allclose(left.dense(), first.sites[SITES[0]].dense(), atol=1e-6)
    shallow = merge_states([clean, first], None, "robust_signature", keep=1)
    assert sorted(shallow.sites) == sorted(n for n in SITES if ".layers.0." in n)

    model = llama()
    bits, batch = {k: v.clone() for k, v in model.state_dict().items()}, batch_for(model)
    attach_state(model, second, name="other")
    patch = attach_state(model, got, name="patch")
    with rw.view(model, {"other": 1.0}):
        before = logits(model, batch)
    with rw.view(model, {"other": 1.0, "patch": 1.0}):
        full = logits(model, batch)
    with rw.view(model, {"other": 1.0, "patch": 0.5}):
        half = logits(model, batch)
    both = AdapterState({n: second.sites[n] + got.sites[n].scaled(0.5) for n in SITES})
    assert torch.allclose(half, logits(copy_with(both), batch), atol=1e-5) and not torch.allclose(half, full, atol=1e-3)
    patch.detach()
    with rw.view(model, {"other": 1.0}):
        assert torch.equal(logits(model, batch), before)
    rw.adapters(model)["other"].detach()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    for states, options, says in (
        ([clean], {}, "at least one robust one; it got 1"), ([clean, first], {"keep": 0}, "keep = 0"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=says):
            merge_states(states, None, "robust_signature", **options)
    with pytest.raises(OptionError, match="sum is 0"):
        merge_states([clean, first, second], [1.0, 1.0, -1.0], "robust_signature")
