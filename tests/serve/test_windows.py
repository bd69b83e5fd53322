"""Windowed passes against the whole sequence's: gradients, losses, bytes, and which models are refused."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import AttachError, DataError, TrainingError
from rankwise.runtime.registry import registry_of
from rankwise.runtime.shared_copy import shared_copy
from rankwise.runtime.view import View
from rankwise.serve.finetune.chunked_backward import ChunkedBackward, Sample, run
from rankwise.serve.finetune.layerwise import LayerwiseModel
from rankwise.serve.model import paged_attention as paged
from tests.models import FAMILIES, VOCAB, llama

CUTS = [(5, 5), (7, 3), (1, 1), (4, 9), (23, 23)]


def sample(n: int = 23, seed: int = 0, masked: int = 3) -> Sample:
    ids = torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample.of(ids, [-100] * masked + ids[masked:])


def moved(adapter: Any, seed: int = 1, size: float = 0.2) -> None:
    """No factor at zero, so that every gradient is one."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=size)


def adapted(model: Any, recipe: dict[str, Any]) -> Any:
    adapter = rw.attach(model, recipe, name="a", activate=False)
    adapter.module.double()
    moved(adapter)
    return adapter


def whole_gradients(model: Any, adapter: Any, s: Sample) -> tuple[float, dict[str, Tensor]]:
    """By one forward and one backward of transformers' own model, with the loss in fp64."""
    ids, labels = torch.tensor([s.tokens]), torch.tensor([s.labels])
    with rw.view(model, "a"):
        logits = model(input_ids=ids).logits[0, :-1]
    loss = nn.functional.cross_entropy(logits, labels[0, 1:])
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in adapter.named_parameters().items()}


def the_view(net: LayerwiseModel) -> View:
    return View(registry_of(net.model), {"a": 1.0})


RECIPES = {
    "lora": {"r": 3, "targets": "all-linear"},
    "dora": {"form": "dora", "r": 2, "targets": "all-linear"},
    "pissa": {"r": 2, "init": "pissa", "targets": "all-linear"},
    "with the head, the norms and the embedding": {
        "parts": [
            {"targets": ["lm_head", "embed_tokens", "q_proj"], "r": 2},
            {"targets": ["model.norm.weight", "input_layernorm.weight"], "form": "dense"},
        ]
    },
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_windowed_gradients_are_the_full_ones(recipe: str, cuts: tuple[int, int]) -> None:
    base = llama(layers=3).double()
    net, s = LayerwiseModel(base), sample()
    mine, theirs = adapted(net.model, RECIPES[recipe]), adapted(base, RECIPES[recipe])
    loss, expected = whole_gradients(base, theirs, s)
    if recipe in ("lora", "dora"):
        assert len(mine.sites) == 3 * 7, "seven modules a layer"
    assert abs(run(ChunkedBackward(net, s, the_view(net)), *cuts) - loss) < 1e-12 * abs(loss)
    got = mine.named_parameters()
    assert got.keys() == expected.keys()
    for name, p in got.items():
        assert expected[name].abs().max() > 0, name
        assert (p.grad - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "mistral"])
def test_other_decoders(family: str) -> None:
    """Two widths of attention in one model, norms of queries and keys, fused projections, one sliding window for all."""
    if family == "mistral":
        import transformers as T

        torch.manual_seed(0)
        config = T.MistralConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, sliding_window=6, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        base, targets = T.MistralForCausalLM(config).eval().double(), "all-linear"
    else:
        make, targets = FAMILIES[family]
        base = make().double()
    net, s = LayerwiseModel(base, check=True), sample()
    recipe = {"r": 2, "targets": targets}
    mine, theirs = adapted(net.model, recipe), adapted(base, recipe)
    loss, expected = whole_gradients(base, theirs, s)
    assert abs(run(ChunkedBackward(net, s, the_view(net)), 5, 4) - loss) < 1e-6 * abs(loss)
    for name, p in mine.named_parameters().items():
        # Gemma norms in fp32 whatever the dtype
        assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("family", ["mamba", "bert", "t5", "vit"])
def test_what_cannot_be_windowed_is_refused_by_name(family: str) -> None:
    model = FAMILIES[family][0]()
    with pytest.raises(AttachError, match=type(model).__name__):
        LayerwiseModel(model, check=True)


def test_the_bytes_kept_are_the_formulas() -> None:
    base = llama(layers=3)
    net, s = LayerwiseModel(base), sample(29)

    def graphs() -> dict[int, Tensor]:
        return {id(t): t for t in gc.get_objects() if isinstance(t, Tensor) and t.requires_grad and t.grad_fn}

    others = graphs()  # of whatever ran in this process before
    work = ChunkedBackward(net, s, None, most=8)
    while work.stage == "forward":
        work.take(8)
    c = base.config
    kv = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    wanted = 4 * 29 * (c.hidden_size * (c.num_hidden_layers + 1) + 2 * kv * c.num_hidden_layers)
    assert work.saved_bytes() == wanted
    live = set(graphs()) - set(others)
    assert not live, "no graph is kept between two pieces"


def test_a_piece_fits_its_budget() -> None:
    base = llama(layers=3)
    net, s = LayerwiseModel(base), sample(29)
    adapter = adapted(net.model, {"r": 2})
    adapter.module.float()
    spent, kinds = 0.0, []
    work = ChunkedBackward(net, s, the_view(net))
    while not work.finished:
        unit = work.take(6)
        assert unit.cost <= 6 and unit.end > unit.start
        spent += unit.cost
        kinds.append((unit.kind, unit.layer))
    assert list(dict.fromkeys(kinds)) == [
        ("forward", -1), ("loss", -1), ("backward", 2), ("backward", 1), ("backward", 0), ("embed", -1)
    ]  # fmt: skip
    last = unit.cost  # the embedding is not trained, which one look tells
    assert spent - last == pytest.approx(29 * (1 + 2 * net.head_cost + 2))
    assert work.saved_bytes() == 0


def test_a_copy_shares_every_number_and_leaves_the_served_model_alone() -> None:
    base = llama()
    plain = copy.deepcopy(base)
    before = {n: p.clone() for n, p in base.named_parameters()}
    ids = torch.tensor([sample().tokens])
    with torch.no_grad():
        logits = base(ids).logits
    hook = base.model.layers[0].mlp.forward
    base.model.layers[0].mlp.forward = lambda x: hook(x)  # as serving does
    paged.install(base)
    made = shared_copy(base, keep_forward=False)
    ours, theirs = dict(made.named_parameters()), dict(base.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[n].data_ptr() == p.data_ptr() for n, p in theirs.items())
    assert not any(p.requires_grad for p in ours.values()) and all(p.requires_grad for p in theirs.values())
    assert all(a is b for a, b in zip(made.buffers(), base.buffers(), strict=True))
    assert "forward" not in vars(made.model.layers[0].mlp) and "forward" in vars(base.model.layers[0].mlp)
    net = LayerwiseModel(base, check=True)
    adapter = adapted(net.model, {"form": "dora", "r": 2})
    adapter.module.float()
    run(ChunkedBackward(net, sample(), the_view(net)), 7, 5)
    assert base.config._attn_implementation == paged.NAME and "rankwise" not in base._modules
    assert all(type(a) is type(b) for a, b in zip(base.modules(), plain.modules(), strict=True))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in base.named_parameters())
    del base.model.layers[0].mlp.forward
    base.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(base(ids).logits, logits)


def test_a_dropped_copy_is_gone() -> None:
    base = llama()
    net = LayerwiseModel(base)
    adapter = rw.attach(net.model, {"r": 2}, name="a")
    held = [weakref.ref(adapter.trainable_parameters()[0]), weakref.ref(net.model)]
    adapter.detach()
    del adapter, net
    gc.collect()
    assert [h() for h in held] == [None, None]


def test_losses_that_are_not_finite_stop_the_pass() -> None:
    base = llama()
    net = LayerwiseModel(base)
    adapter = rw.attach(net.model, {"r": 2, "targets": ["lm_head"]}, name="a")
    with torch.no_grad():
        adapter.trainable_parameters()[1].fill_(torch.nan)
    with pytest.raises(TrainingError, match="loss is nan"):
        run(ChunkedBackward(net, sample(), the_view(net)), 8, 8)


def test_samples_that_teach_nothing_are_refused() -> None:
    for tokens, labels in (((1,), None), ((1, 2), (1,)), ((1, 2, 3), (1, -100, -100))):
        with pytest.raises(DataError, match="sample has"):
            Sample.of(tokens, labels)
