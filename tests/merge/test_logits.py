"""Fusing logits: the identities of the paper, against naive formulas; decoding by itself and inside transformers' generate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise import catalogue
from rankwise.decoding.combine import Term
from rankwise.decoding.model import DecodingModel, Fusion
from rankwise.errors import DataError, MergeError, OptionError, UnknownName
from rankwise.merge.engine.files import attach_state
from tests.merge.models import value
from tests.models import FAMILIES, VOCAB, llama

Two = tuple[Any, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def two() -> Two:
    """A llama with adapters a and b that say different things, and prompts of 2 × 5 tokens."""
    model = llama()
    for i, name in enumerate("ab"):
        attach_state(model, value(i + 7), name=name)
    return model, torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))


def ours(model: Any, ids: Tensor, view: dict[str, float], n: int = 8, **more: Any) -> Tensor:
    with rw.view(model, view), torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=None, **more
        )


def fused(fusion: Fusion, ids: Tensor, n: int = 8, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Through transformers' generate."""
    model = fusion.models[fusion.target].model
    mask_ = torch.ones_like(ids) if mask is None else mask
    more = {"do_sample": False, "eos_token_id": None, "logits_processor": [fusion.processor(mask)], **more}
    with fusion.acting(), torch.no_grad():
        return model.generate(ids, attention_mask=mask_, max_new_tokens=n, **more)


# --- combiners -----------------------------------------------------------------------------------------------------
LOGITS = {n: draw(3, 11, seed=i) * 1.5 for i, n in enumerate(("L", "S", "t", "u"))}
LOGITS |= {n: LOGITS["S"] + LOGITS[n] / 1.5 for n in "tu"}  # within reach
T, U = Term("t", 1.0, "S"), Term("u", 1.0, "S")


def dynamic(*terms: Term, logits: dict[str, Tensor] = LOGITS, target: str = "L", **options: Any) -> Tensor:
    """α: (3, T)."""
    return catalogue.make("logits", "dynamic", **options).strengths(logits, target, terms)


def test_static_is_the_formula() -> None:
    got = catalogue.make("logits", "static")(LOGITS, "L", [Term("t", 0.7, "S"), Term("u", -0.3, "t")])
    want = LOGITS["L"] + 0.7 * (LOGITS["t"] - LOGITS["S"]) - 0.3 * (LOGITS["u"] - LOGITS["t"])
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "both"])
def test_dynamic_matches_the_shift_of_one_expert_against_a_grid(divergence: str) -> None:
    alpha = dynamic(T, divergence=divergence, cap=50.0)[:, 0]
    far = {"forward": kl, "reverse": lambda p, q: kl(q, p), "both": lambda p, q: kl(p, q) + kl(q, p)}[divergence]
    goal = far(LOGITS["t"], LOGITS["S"])
    got = far(LOGITS["L"] + alpha[:, None] * (LOGITS["t"] - LOGITS["S"]), LOGITS["L"])
    assert torch.allclose(got, goal, rtol=1e-8) and bool((alpha < 50).all()) and alpha.std() > 1e-3
    grid = torch.linspace(0, 5, 501, dtype=torch.float64)
    gaps = torch.stack([far(LOGITS["L"] + a * (LOGITS["t"] - LOGITS["S"]), LOGITS["L"]) - goal for a in grid])
    assert bool((gaps.diff(dim=0) > -1e-9).all())  # non-decreasing: the solution is unique
    nearest = grid[gaps.abs().argmin(0)]
    assert torch.allclose(alpha, nearest, atol=0.0101)


def test_of_several_experts_the_mean_shift_is_met_and_the_ray_is_as_said() -> None:
    goal = (2 * kl(LOGITS["t"], LOGITS["S"]) + kl(LOGITS["u"], LOGITS["S"])) / 3
    weighted = Term("t", 2.0, "S")
    for ray in ("shift", "weight"):
        alpha = dynamic(weighted, U, ray=ray, cap=50.0)
        mixed = LOGITS["L"] + sum(alpha[:, i, None] * (LOGITS[n] - LOGITS["S"]) for i, n in enumerate("tu"))
        assert torch.allclose(kl(mixed, LOGITS["L"]), goal, rtol=1e-8)
        says = 2 * kl(LOGITS["t"], LOGITS["S"]) / kl(LOGITS["u"], LOGITS["S"]) if ray == "shift" else torch.full((3,), 2.0).double()
        assert torch.allclose(alpha[:, 0] / alpha[:, 1], says)


def test_identities_of_the_strengths() -> None:
    same = {**LOGITS, "L": LOGITS["S"]}
    assert torch.allclose(dynamic(T, logits=same), torch.ones(3, 1).double(), atol=1e-12)  # large = small
    clones = dynamic(T, T, logits=same)
    assert torch.allclose(clones.sum(-1), torch.ones(3).double()) and torch.allclose(clones[:, 0], clones[:, 1])
    moved = {**LOGITS, "u": LOGITS["S"] + 3.0}  # constant over the vocabulary
    got = catalogue.make("logits", "dynamic")(moved, "L", [U])
    assert torch.allclose(got.log_softmax(-1), LOGITS["L"].log_softmax(-1), atol=1e-10)
    peaked = {**LOGITS, "t": LOGITS["S"] + 40 * torch.eye(11).double()[:3], "L": LOGITS["S"] * 0 - 200 * torch.eye(11).double()[:3]}
    assert torch.equal(dynamic(T, logits=peaked, cap=1.5), torch.full((3, 1), 1.5).double())  # out of reach
    order = dynamic(U, T, cap=9.0).flip(-1)
    assert torch.allclose(order, dynamic(T, U, cap=9.0), atol=1e-9)
    delta, base = LOGITS["t"] - LOGITS["S"], LOGITS["L"].log_softmax(-1)
    shift = lambda alpha: ((q := (LOGITS["L"] + alpha * delta).log_softmax(-1)).exp() * (q - base)).sum(-1)
    steps = torch.stack([shift(i / 20) for i in range(61)])
    assert bool((steps.diff(dim=0) >= -1e-12).all()), "KL(p_α‖p_L) does not fall as α ≥ 0 grows"
    p = base.exp()
    spread = (p * delta.square()).sum(-1) - (p * delta).sum(-1).square()
    assert torch.allclose(shift(1e-3), 0.5e-6 * spread, rtol=2e-2)  # ½·α²·Var for small α
    alone = torch.cat([dynamic(T, U, logits={n: v[i : i + 1] for n, v in LOGITS.items()}) for i in range(3)])
    assert torch.allclose(alone, dynamic(T, U), atol=1e-9)  # a row does not depend on its batch


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_excluded_tokens_stay_excluded_and_half_precision_comes_back(method: str) -> None:
    logits = {n: v.to(torch.bfloat16) for n, v in LOGITS.items()}
    logits["t"] = logits["t"].index_fill(1, torch.tensor([4]), -torch.inf)
    logits["L"] = logits["L"].index_fill(1, torch.tensor([2]), -torch.inf)
    got = catalogue.make("logits", method)(logits, "L", [T, U])
    assert got.dtype == torch.bfloat16 and bool(got[:, [2, 4]].isneginf().all())
    keep = [0, 1, 3, *range(5, 11)]
    less = catalogue.make("logits", method)({n: v[:, keep] for n, v in logits.items()}, "L", [T, U])
    assert torch.allclose(got[:, keep].float(), less.float(), atol=1e-2)


# --- decoding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_weight_0_is_the_base_and_one_expert_is_that_expert(two: Two, method: str) -> None:
    model, ids = two
    base, a = ours(model, ids, {}), ours(model, ids, {"a": 1.0})
    assert not torch.equal(base, a)
    none, one = Fusion.of_adapters(model, {"a": 0.0}, method), Fusion.of_adapters(model, {"a": 1.0}, method)
    assert len(none.models) == 1  # an expert of weight 0 is not run
    for want, fusion in ((base, none), (a, one)):
        assert torch.equal(fused(fusion, ids), want) and torch.equal(fusion.generate(ids, max_new_tokens=8), want)


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_caches_give_what_whole_texts_give(two: Two, method: str) -> None:
    """Greedy with caches, both ways, against argmax over the whole text without any."""
    model, ids = two
    fusion = Fusion.of_adapters(model, {"a": 1.0, "b": 0.6}, method)
    slow = ids
    for _ in range(8):
        slow = torch.cat([slow, fusion.logits(slow)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(fusion.generate(ids, max_new_tokens=8), slow) and torch.equal(fused(fusion, ids), slow)
    assert not any(torch.equal(slow, ours(model, ids, v)) for v in ({}, {"a": 1.0}, {"b": 1.0}))


def test_padding_on_the_left_changes_nothing(two: Two) -> None:
    model, ids = two
    fusion = Fusion.of_adapters(model, {"a": 1.0, "b": 1.0})
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    want = fusion.generate(ids, max_new_tokens=6)
    assert torch.equal(fusion.generate(padded, mask, max_new_tokens=6)[:, 3:], want)
    assert torch.equal(fused(fusion, padded, 6, mask)[:, 3:], want)
    absolute = Fusion({"base": DecodingModel(FAMILIES["gpt2"][0]())}, [])  # learnt positions, where a shift is seen
    assert torch.equal(absolute.generate(padded, mask, max_new_tokens=6)[:, 3:], absolute.generate(ids, max_new_tokens=6))
    with pytest.raises(DataError, match="attention_mask"), fusion.acting():
        model.generate(padded, attention_mask=mask, max_new_tokens=2, logits_processor=[fusion.processor()])


def test_beams_and_another_prompt_never_meet_a_stale_cache(two: Two) -> None:
    """A beam search over one expert at w = 1 is the expert's own; one processor reads a second prompt anew."""
    model, ids = two
    one = Fusion.of_adapters(model, {"a": 1.0}, "static")
    assert torch.equal(fused(one, ids, 5, num_beams=3), ours(model, ids, {"a": 1.0}, 5, num_beams=3))
    kept = one.processor()
    first, other = fused(one, ids, 4, logits_processor=[kept]), fused(one, ids.flip(1), 4, logits_processor=[kept])
    assert torch.equal(first, ours(model, ids, {"a": 1.0}, 4)) and torch.equal(other, ours(model, ids.flip(1), {"a": 1.0}, 4))


def test_scores_that_are_not_the_targets_are_refused(two: Two) -> None:
    model, ids = two
    fusion = Fusion.of_adapters(model, {"a": 1.0}, "static")
    with rw.view(model, {"b": 1.0}), pytest.raises(DataError, match="acting"):
        model.generate(ids, max_new_tokens=2, logits_processor=[fusion.processor()])
    with pytest.raises(DataError, match="penalty"):
        fused(fusion, ids, repetition_penalty=5.0)


def test_an_end_ends_a_row(two: Two) -> None:
    model, ids = two
    fusion = Fusion.of_adapters(model, {"a": 1.0})
    free = fusion.generate(ids, max_new_tokens=8)
    end = int(free[0, 6])
    row = fusion.generate(ids[:1], max_new_tokens=8, eos_token_id=end)
    at = (free[0, 5:] == end).nonzero()[0].item() + 5
    assert torch.equal(row[0], free[0, : at + 1])


def test_a_small_pair_steers_another_model_and_vocabularies_must_agree(two: Two) -> None:
    """Proxy tuning of another architecture: the formula on three whole forwards."""
    model, ids = two
    large = llama(layers=3, hidden=48, seed=4)
    voices = {"base": DecodingModel(large), "small": DecodingModel(model, {}), "tuned": DecodingModel(model, {"a": 1.0})}
    got = Fusion(voices, [Term("tuned", 0.8, "small")], "static").logits(ids)
    with torch.no_grad():
        want = large(ids).logits.double()
        for view, sign in (({"a": 1.0}, 0.8), ({}, -0.8)):
            with rw.view(model, view):
                want += sign * model(ids).logits.double()
    assert torch.allclose(got.double(), want, atol=1e-5)
    odd = llama()
    odd.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    with pytest.raises(MergeError, match="'tuned' has 72 logits and 'base' 64"):
        Fusion({"base": DecodingModel(large), "tuned": DecodingModel(odd)}, [Term("tuned", 1.0, "base")])

    class Tokens:
        def __init__(self, **more: int) -> None:
            self.get_vocab = lambda: {"x": 1, "y": 2, **more}

    padded = {"base": DecodingModel(large, tokenizer=Tokens()), "wide": DecodingModel(odd, tokenizer=Tokens())}
    assert Fusion(padded, [Term("wide", 1.0, "base")], "static").logits(ids).shape[-1] == VOCAB
    wide = Fusion(padded, [Term("base", 1.0, "wide")], "static", target="wide").logits(ids)
    assert wide.shape[-1] == VOCAB + 8 and bool(wide[..., VOCAB:].isneginf().all())
    with pytest.raises(MergeError, match="'tuned' does not share .* 'z'"):
        Fusion({"base": padded["base"], "tuned": DecodingModel(odd, tokenizer=Tokens(z=3))}, [Term("tuned", 1.0, "base")])


def test_what_is_refused(two: Two) -> None:
    model, _ = two
    for experts, method, options, word in (
        ({"a": 0.5}, "dynamic", {}, "single expert"), ({"a": -1.0, "b": 1.0}, "dynamic", {}, "static"), ({"a": math.nan}, "static", {}, "finite"),
        ({"a": 1.0}, "dynamic", {"cap": 0.0}, "cap"), ({"a": 1.0}, "dynamic", {"ray": "x"}, "ray"), ({"a": 1.0}, "dynamic", {"divergence": "x"}, "divergence"),
        ({"a": 1.0}, "static", {"cap": 1.0}, "no option"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=word):
            Fusion.of_adapters(model, experts, method, **options)
    with pytest.raises(UnknownName, match="decoding model"):
        Fusion({"base": DecodingModel(model, {})}, [Term("b", 1.0, "base")])
    with pytest.raises(UnknownName):
        Fusion.of_adapters(model, {"a": 1.0}, "dynamc")
