"""MixLoRA's variants: each is its naive sum with its gradients, keeps MixLoRA's invariants, and its noise is repeatable."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise import catalogue
from rankwise.errors import OptionError
from rankwise.routers.base import routers_in
from rankwise.seeds import seed_of
from tests.contract import test_laws as laws
from tests.models import batch_for, llama, logits, move

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"jitter": 0.3},
    "dynamic": {"std": 1.0, "top_p": 0.9},
    "switch": {"capacity": 3, "jitter": 0.0},
}
PATH = "model.layers.1.mlp"


def mixlora(variant: str, **options: Any) -> tuple[Any, Any]:
    model = llama()
    adapter = rw.attach(model, {"r": 2, "router": {"name": "mixlora", "experts": 4, "variant": variant, **options}})
    move(adapter, std=0.3)
    return model, adapter


def chosen(variant: str, probs: Tensor, capacity: int, top_p: float) -> list[dict[int, Tensor]]:
    """Row after row, {expert: weight}; for ``switch`` over sequences of ten rows."""
    out: list[dict[int, Tensor]] = []
    for n, p in enumerate(probs):
        order = p.argsort(descending=True).tolist()
        if variant == "topk":
            out.append({e: p[e] / (p[order[0]] + p[order[1]]) for e in order[:2]})
        elif variant == "dynamic":
            kept, total = {}, 0.0
            for e in order:
                if total > top_p:
                    break
                kept[e], total = p[e], total + p[e].item()
            out.append(kept)
        else:
            earlier = sum(int(q.argmax()) == order[0] for q in probs[n // 10 * 10 : n])
            out.append({order[0]: p[order[0]]} if earlier < capacity else {})
    return out


def naive_block(model: Any, adapter: Any, h: Tensor, variant: str, options: dict[str, Any]) -> Tensor:
    """Σ_e w_e·F_e(h) row by row, from the plain weights; a row without an expert is itself."""
    mlp, router = model.model.layers[1].mlp, adapter.sites[PATH].router
    probs = (h @ router.weight.T).softmax(-1)

    def weight(name: str, e: int) -> Tensor:
        d = adapter.sites[f"{PATH}.{name}_proj"]
        return getattr(mlp, f"{name}_proj").weight + d.scale * d.inner.B[:, 2 * e : 2 * e + 2] @ d.inner.A[2 * e : 2 * e + 2]

    def expert(x: Tensor, e: int) -> Tensor:
        return weight("down", e) @ (nn.functional.silu(weight("gate", e) @ x) * (weight("up", e) @ x))

    experts = chosen(variant, probs, options.get("capacity", 0), options.get("top_p", 0.0))
    rows = [sum((w * expert(x, e) for e, w in by.items()), torch.zeros_like(x)) if by else x for x, by in zip(h, experts)]
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_is_its_naive_sum_with_its_gradients(variant: str) -> None:
    model, adapter = mixlora(variant, **VARIANTS[variant])
    tensors = [p for n, p in adapter.named_parameters().items() if n.startswith(PATH)]
    h = torch.randn(2, 10, 32, requires_grad=True)
    outs = []
    for y in (
        model.model.layers[1].mlp(h).reshape(-1, 32),
        naive_block(model, adapter, h.reshape(-1, 32), variant, VARIANTS[variant]),
    ):
        outs.append([y, *torch.autograd.grad((y * torch.arange(640.0).view(20, 32).cos()).sum(), [h, *tensors])])
    assert all(torch.allclose(a, b, atol=2e-4, rtol=1e-4) for a, b in zip(*outs, strict=True))
    decision = adapter.sites[PATH].router.route(h)
    acting = (decision.dense() != 0).sum(-1)
    assert {"topk": {2}, "dynamic": {1, 2, 3}, "switch": {0, 1}}[variant] == set(acting.tolist()), "all cases are met"
    assert len(tensors) == 7 and all(g.any() for g in outs[0][2:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("moved", [True, False], ids=["equal experts", "B = 0"])
def test_equal_experts_leave_the_router_only_the_sum_of_its_weights(variant: str, moved: bool) -> None:
    """F for a top-k whatever its router says, Σw·F for the others, h where no expert takes the row."""
    model, adapter = mixlora(variant, **{**VARIANTS[variant], "jitter": 0.0})
    with torch.no_grad():
        for d in adapter.sites.values():
            if hasattr(d, "experts"):
                d.inner.A.copy_(d.inner.A[:2].repeat(4, 1))
                d.inner.B.copy_(d.inner.B[:, :2].repeat(1, 4) * moved)
    h, router = torch.randn(2, 10, 32), adapter.sites[PATH].router
    seen = []
    for seed in range(2):
        with torch.no_grad():
            router.weight.normal_(generator=torch.Generator().manual_seed(seed))
        total = router.route(h).dense().sum(-1).view(2, 10, 1)
        y = model.model.layers[1].mlp(h)
        seen.append(torch.where(total > 0, y / total, torch.nan))
        assert torch.equal(y[total[..., 0] == 0], h[total[..., 0] == 0])
    both = ~(seen[0].isnan() | seen[1].isnan())
    assert both.any() and torch.allclose(seen[0][both], seen[1][both], atol=1e-5)
    with rw.view(model, {} if not moved else {"default": 1.0}):
        if not moved:
            assert torch.allclose(model.model.layers[1].mlp(h).expand_as(seen[0])[both], seen[0][both], atol=1e-5)


def test_capacity_is_each_sequences_own_and_padding_takes_none() -> None:
    model, adapter = mixlora("switch", capacity=4, jitter=0.0)
    router = adapter.sites[PATH].router
    h = torch.randn(1, 32).expand(2, 6, 32)  # all rows want one expert
    assert (router.route(h).dense() != 0).any(-1).view(2, 6).tolist() == [[True] * 4 + [False] * 2] * 2
    kept: dict[str, Tensor] = {}
    inner = router.select

    def select(logits: Tensor, probs: Tensor, length: int) -> Any:
        flat = torch.zeros_like(probs)
        flat[:, 2] = 1.0
        kept["decision"] = inner(logits, flat, length)
        return kept["decision"]

    router.select = select
    batch = batch_for(model, rows=2, tokens=6)
    batch["attention_mask"] = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    logits(model, batch)
    acts = (kept["decision"].weight != 0).any(-1).view(2, 6).tolist()
    assert acts == [[True] * 6, [True] * 4 + [False] * 2], "three of padding leave room for three"


def test_losses_are_the_formulas() -> None:
    model, adapter = mixlora("switch", capacity=2, jitter=0.0, balance=0.5, z=0.25)
    router = adapter.sites[PATH].router
    batch = batch_for(model)
    batch["attention_mask"] = torch.ones(3, 10, dtype=torch.long)
    batch["attention_mask"][0, 7:] = 0
    model.train()
    session = rw.Session(model, adapter, lr=1e-3, total_steps=1)
    session.step_begin()
    out = model(**batch)
    (record,) = router.records
    real = batch["attention_mask"].bool().reshape(-1)
    assert record.mask is not None and torch.equal(record.mask, real), "padding has no say"
    L = record.decision.logits[real]
    share = nn.functional.one_hot(L.argmax(-1), 4).float().mean(0)  # what rows want, full or not
    got = router.losses([record])
    assert got["switch"].item() == pytest.approx(0.5 * 4 * (share * L.softmax(-1).mean(0)).sum().item(), rel=1e-5)
    assert got["z"].item() == pytest.approx(0.25 * L.logsumexp(-1).square().mean().item(), rel=1e-5)
    session.penalty(out, batch)
    assert session.logs["z"] > 0 and session.logs["switch"] > 0


def test_at_uniform_the_loss_of_dynamic_is_the_number_it_keeps() -> None:
    _, adapter = mixlora("dynamic", top_p=0.7, balance=1.0)
    router = adapter.sites[PATH].router
    with torch.no_grad():
        router.weight.zero_()
    h = torch.randn(1, 10, 32)
    router.train(), setattr(router, "recording", True)
    router.note(router.route(h))
    assert (router.records[0].decision.weight != 0).sum(-1).eq(3).all(), "a quarter each: 0.25, 0.5, 0.75 crosses"
    assert router.losses(router.records)["switch"].item() == pytest.approx(3.0, rel=1e-5)


# --- jitter -------------------------------------------------------------------------------------------------
def test_jitter_is_of_the_gates_input_in_training_only() -> None:
    model, adapter = mixlora("topk", jitter=0.3)
    router, h = adapter.sites[PATH].router, torch.randn(2, 10, 32)
    before = h.clone()
    quiet = (h.reshape(-1, 32) @ router.weight.T).softmax(-1)
    assert torch.equal(router.route(h).probs, quiet)
    model.train()
    g = torch.Generator().manual_seed(seed_of(0, "jitter", f"{PATH}:0"))
    noise = torch.empty(20, 32).uniform_(0.7, 1.3, generator=g)
    assert torch.allclose(router.route(h).probs, ((h.reshape(-1, 32) * noise) @ router.weight.T).softmax(-1), atol=1e-6)
    assert not torch.allclose(router.route(h).probs, quiet, atol=1e-3)
    model.model.layers[1].mlp(h)
    assert torch.equal(h, before), "the residual stream was written to"


def test_jitter_depends_on_seed_place_and_step_not_on_the_callers_generator() -> None:
    model, adapter = mixlora("topk", jitter=0.3)
    model.train()
    first, second = (adapter.sites[f"model.layers.{i}.mlp"].router for i in (0, 1))
    h = torch.randn(1, 8, 32)
    noise = {name: r._jittered(h[0]) for name, r in (("0", first), ("1", second))}
    torch.manual_seed(9)
    assert torch.equal(second._jittered(h[0]), noise["1"]) and not torch.equal(noise["0"], noise["1"])
    session = rw.Session(model, adapter, lr=1e-3, total_steps=2, accumulate=2)
    for _ in range(2):
        session.step_begin()
        out = model(**batch_for(model))
        (out.loss + session.penalty(out, {})).backward()
        assert int(second.steps) == 0, "micro-batches of a step share it"
        session.step()
    assert int(second.steps) == 1 and not torch.equal(second._jittered(h[0]), noise["1"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recomputed_forward_chooses_alike_without_anybodys_rng_state(variant: str) -> None:
    """Padding, capacity and noise included; the recompute runs after the forward has ended and is told of no generator."""
    batch = batch_for(llama(), rows=2)
    batch["attention_mask"] = torch.ones(2, 10, dtype=torch.long)
    batch["attention_mask"][0, :4] = 0
    grads = []
    for checkpointed in (False, True):
        model, adapter = mixlora(variant, **{**VARIANTS[variant], "jitter": 0.3})
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        loss = model(**batch).loss
        torch.manual_seed(123)
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in adapter.named_parameters().items()})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


# --- views --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_rows_and_strength_zero_are_the_base(variant: str) -> None:
    model, _ = mixlora(variant, **VARIANTS[variant])
    batch = batch_for(model)
    whole = logits(model, batch)
    with rw.view(model, {}):
        base = logits(model, batch)
    with rw.view(model, {"default": 1}, rows=["default", None, "default"]):
        mixed = logits(model, batch)
    assert torch.allclose(mixed[1], base[1], atol=1e-5) and torch.allclose(mixed[0], whole[0], atol=1e-5)
    assert (whole - base).abs().max() > 1e-2
    with rw.view(model, {"default": 0.0}):
        assert torch.allclose(logits(model, batch), base, atol=1e-5)
    with rw.view(model, {"default": 1e-3}):
        assert (logits(model, batch) - base).abs().max() < 0.02, "strength goes from the base to the mixture without a jump"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bottleneck_on_the_same_block_adds_to_the_mixture(variant: str) -> None:
    model, _ = mixlora(variant, **VARIANTS[variant])
    move(rw.attach(model, {"form": "bottleneck", "r": 2}, name="b"), std=0.3)
    mlp, h = model.model.layers[1].mlp, torch.randn(1, 10, 32)
    y = {}
    for names in (("default",), ("b",), ("default", "b"), ()):
        with rw.view(model, names):
            y[names] = mlp(h)
    assert torch.allclose(y["default", "b"] - y[("default",)], y[("b",)] - y[()], atol=1e-5)


# --- the contract's laws ------------------------------------------------------------------------------------
def info_of(variant: str) -> Any:
    fields = {"r": 2, "router": {"name": "mixlora", "experts": 4, "variant": variant, **VARIANTS[variant]}}
    info = catalogue.find("router", "mixlora")
    return dataclasses.replace(info, cls=type(info.cls.__name__, (info.cls,), {"example": fields}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_laws_hold_for_each(variant: str, tmp_path: Any) -> None:
    info = info_of(variant)
    laws.test_every_trainable_tensor_moves_within_ten_steps(info)
    laws.test_forward_equals_weight_merge_and_detach(info)
    laws.test_order_of_adapters_changes_nothing(info)
    laws.test_save_and_load_give_the_same_bits(info, tmp_path)
    laws.test_same_seed_same_bits_and_resume_equals_not_stopping(info)
    laws.test_frozen_tensors_keep_their_bits_under_weight_decay(info)
    laws.test_deepcopy_and_pickle_keep_the_adapter(info)
    laws.test_gradient_checkpointing_changes_no_gradient(info)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "top"}, "the variants topk, dynamic, switch; it got 'top'"),
        ({"variant": "dynamic", "k": 2}, "k = 2 is an option of the variant 'topk'"),
        ({"top_p": 0.5}, "top_p = 0.5 is an option of the variant 'dynamic'"),
        ({"variant": "dynamic", "capacity": 8}, "of the variant 'switch'"),
        ({"z": 0.1}, "z = 0.1 is an option of the variant 'switch' of 'mixlora', not of 'topk'"),
        ({"variant": "dynamic", "top_p": 1.5}, r"needs top_p in \(0, 1\]; it got 1.5"),
        ({"variant": "switch", "capacity": 0}, "needs capacity ≥ 1"),
        ({"jitter": 1.0}, r"needs jitter in \[0, 1\)"),
        ({"std": float("nan")}, "needs std"),
        ({"k": 9}, "needs k from 1 to experts; it got 9 with experts = 8"),
    ],
)
def test_options_that_a_variant_does_not_use_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        rw.Recipe(router={"name": "mixlora", **options})


def test_defaults_are_the_released_ones() -> None:
    made = {v: catalogue.make("router", "mixlora", variant=v) for v in VARIANTS}
    assert (made["topk"].experts, made["topk"].k, made["topk"].std, made["topk"].jitter) == (8, 2, 0.02, 0.0)
    assert (made["dynamic"].top_p, made["dynamic"].k, made["dynamic"].std) == (0.8, None, 0.02)
    s = made["switch"]
    assert (s.capacity, s.z, s.jitter, s.std, s.balance, s.top_p) == (32, 0.001, 0.01, 1.0, 0.001, None)
    _, adapter = mixlora("switch")
    assert all(r.jitter == 0.01 for r in routers_in(adapter.module) if hasattr(r, "jitter"))


# --- two mappings at once -------------------------------------------------------------------------------------
class Tokens(nn.Module):
    """One MLP as large models have it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        torch.manual_seed(0)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=48, num_attention_heads=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def rest(recipe: dict[str, Any], seed: int) -> float:
    """What is left of the error of two mappings of the same tokens, told apart by one mark; 1 is the start's."""
    g = torch.Generator().manual_seed(seed)
    tokens, mark = torch.randn(96, 24, generator=g), 3 * torch.eye(24)[0]
    x = torch.cat([tokens + mark, tokens - mark])[None]
    change = tokens @ torch.randn(24, 4, generator=g) @ torch.randn(4, 24, generator=g) / 96**0.5
    model = Tokens()
    target = model(x).detach() + torch.cat([change, -change])[None]
    adapter = rw.attach(model, {**recipe, "targets": ["gate_proj", "up_proj", "down_proj"]})
    start = (model(x) - target).square().mean().item()
    session = rw.Session(model, adapter, lr=1e-2, total_steps=300, schedule="constant")
    model.train()
    for _ in range(300):
        session.step_begin()
        out = model(x)
        ((out - target).square().mean() + session.penalty(out, {})).backward()
        session.step()
    return (model.eval()(x) - target).square().mean().item() / start


@pytest.mark.parametrize("seed", [0, 1])
def test_two_experts_fit_two_mappings_that_conflict_better_than_one_pair_of_their_rank(seed: int) -> None:
    one = rest({"r": 4, "alpha": 4}, seed)
    two = rest({"r": 2, "alpha": 2, "router": {"name": "mixlora", "experts": 2}}, seed)
    assert two < 0.8 * one
