"""Every kind of adapter, saved and read again, computes served what it computes attached, or is refused with its reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.catalogue import find
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.kinds import Options
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.types import AdapterRefused
from tests.contract.cases import example, methods
from tests.models import FAMILIES, logits
from tests.serve.adapters.helpers import attached, batch, family, served_logits

MODELS = ["llama", "qwen3", "gpt2", "phi3"]
METHODS = methods("form", "router")
#: forms that cannot be served to some rows of a batch, and a word of the reason
REFUSED = {"full": "base's own weights", "bottleneck": "wraps a whole block", "mixlora": "wraps a whole block"}
#: what an architecture has no place for (blocks of linears that are called one by one)
NOT_THERE = {("bottleneck", "gpt2"), ("mixlora", "gpt2"), ("mixlora", "phi3")}
#: what PEFT's format cannot hold there (a norm for every row of a fused projection)
NOT_IN_PEFT = {("dora", "phi3")}


def recipe_of(info: Any, model: str) -> dict[str, Any]:
    recipe = {**example(info)}
    if info.name in ("bottleneck", "mixlora"):
        return recipe
    if info.name == "full":
        return {**recipe, "targets": ["mlp.down_proj" if model != "gpt2" else "mlp.c_proj"]}
    if info.name == "dense":
        return {**recipe, "targets": ["lm_head"]}
    return {**recipe, "targets": FAMILIES[model][1]}


def fetch(root: Path, model: Any, name: str = "a", **options: Any) -> tuple[FolderSource, Any]:
    source = FolderSource(root, AdapterLoader(model, **options))
    return source, source.fetch(source.resolve(name))


CASES = [(i, m) for i in METHODS for m in MODELS if (i.name, m) not in NOT_THERE]


@pytest.mark.parametrize(("info", "model_name"), CASES, ids=[f"{i.name}-{m}" for i, m in CASES])
def test_served_equals_attached(info: Any, model_name: str, tmp_path: Path) -> None:
    model = family(model_name)
    base = logits(model, batch(model))
    adapter = attached(model, recipe_of(info, model_name))
    want = logits(model, batch(model))
    adapter.save(tmp_path / "native" / "a")
    if info.kind == "form" and find("form", info.name).exports_to_peft and (info.name, model_name) not in NOT_IN_PEFT:
        adapter.export(tmp_path / "peft" / "a")
    fresh = family(model_name)
    for root in sorted(tmp_path.iterdir()):
        if info.name in REFUSED:
            with pytest.raises(AdapterRefused, match=REFUSED[info.name]):
                fetch(root, fresh)
            continue
        source, served = fetch(root, fresh)
        got = served_logits(fresh, source.adapter_loader.layout, served, batch(fresh))
        assert (want - base).abs().max() > 1e-3, "the adapter does nothing, so this test could not fail"
        assert torch.allclose(got, want, atol=1e-5), (root.name, (got - want).abs().max())
        assert served.manifest.exact and served.manifest.nbytes > 0
    assert torch.equal(logits(fresh, batch(fresh)), base), "reading an adapter changed the base"


def test_the_straight_way_of_a_plain_lora_gives_the_general_way_s_pairs(tmp_path: Path) -> None:
    """Straight from the file's tensors, and by attaching: the same pairs to the bit, from native and PEFT files."""
    from rankwise.serve.adapters import adapter_loader as module

    for model_name in MODELS:
        model = family(model_name)
        adapter = attached(
            model,
            {"r": 3, "alpha": 7, "targets": FAMILIES[model_name][1], "rank_pattern": {"o_proj": 2} if model_name != "gpt2" else {}},
        )
        adapter.save(tmp_path / model_name / "native")
        adapter.export(tmp_path / model_name / "peft")
        for name in ("native", "peft"):
            _, fast = fetch(tmp_path / model_name, family(model_name), name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "is_plain", lambda *a: False)
                _, slow = fetch(tmp_path / model_name, family(model_name), name)
            assert (
                fast.manifest == dataclasses.replace(slow.manifest, nbytes=fast.manifest.nbytes)
                and fast.pairs.keys() == slow.pairs.keys()
            )
            for group, pairs in fast.pairs.items():
                for mine, other in zip(pairs, slow.pairs[group], strict=True):
                    assert (mine is None) == (other is None)
                    assert mine is None or all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_residual_starts_and_rank_stabilised_scales(tmp_path: Path) -> None:
    """PiSSA's subtracted start and α/√r reach the served pair."""
    model = family("llama")
    attached(model, {"r": 4, "init": "pissa", "alpha": 3, "scale": "alpha/sqrt_r"}).save(tmp_path / "a")
    want = logits(model, batch(model))
    fresh = family("llama")
    source, served = fetch(tmp_path, fresh)
    assert served.manifest.rank == 8 and served.manifest.pages == 1
    assert torch.allclose(served_logits(fresh, source.adapter_loader.layout, served, batch(fresh)), want, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_heads_and_embeddings(tie: bool, tmp_path: Path) -> None:
    """A low-rank change of the head and of the embedding stay loose; saved whole they replace the parameter; ties hold."""
    from tests.models import llama

    for name, targets in {"pair": ["q_proj", "lm_head"], "table": ["embed_tokens", "v_proj"]}.items():
        for form in ({}, {"modules_to_save": ["lm_head"]}) if name == "table" and not tie else ({},):
            model = llama(tie=tie)
            adapter = attached(model, {"r": 3, "targets": targets, **form})
            want = logits(model, batch(model))
            adapter.save(tmp_path / "n" / name)
            adapter.export(tmp_path / "p" / name)
            for root in ("n", "p"):
                fresh = llama(tie=tie)
                source, served = fetch(tmp_path / root, fresh, name)
                assert set(served.full_params) == ({"lm_head.weight"} if form else set())
                assert set(served.non_lora_changes) == (
                    {"model.embed_tokens", "lm_head"} if tie else {"lm_head"} if name == "pair" else {"model.embed_tokens"}
                )
                assert torch.allclose(served_logits(fresh, source.adapter_loader.layout, served, batch(fresh)), want, atol=1e-5)


def test_biases_are_served_and_norms_refused(tmp_path: Path) -> None:
    model = family("gpt2")
    attached(model, {"form": "dense", "targets": ["transformer.h.0.mlp.c_fc.bias", "transformer.h.1.attn.c_attn"]}).save(
        tmp_path / "bias"
    )
    want = logits(model, batch(model))
    model = family("gpt2")
    attached(model, {"form": "dense", "targets": ["ln_f"]}).save(tmp_path / "norm")
    model = family("gpt2")
    attached(model, {"r": 2, "targets": ["wpe"]}).save(tmp_path / "positions")
    fresh = family("gpt2")
    source, served = fetch(tmp_path, fresh, "bias")
    assert torch.allclose(served_logits(fresh, source.adapter_loader.layout, served, batch(fresh)), want, atol=1e-5)
    with pytest.raises(AdapterRefused, match=r"ln_f.*used for all rows"):
        source.resolve("norm")
    with pytest.raises(AdapterRefused, match=r"wpe.*only the one of the input ids"):
        source.resolve("positions")


def test_experts_are_refused(tmp_path: Path) -> None:
    model = family("mixtral")
    attached(model, {"r": 2, "targets": "all-linear"}).save(tmp_path / "a")
    with pytest.raises(AdapterRefused, match=r"experts.*another forward reads that weight"):
        fetch(tmp_path, family("mixtral"))


@pytest.mark.parametrize("kind", ["entries", "rows", "kron", "hadamard", "tile", "scale_in", "replace", "block_affine", "dense"])
def test_any_constant_value(kind: str, tmp_path: Path) -> None:
    """Patches of every kind: exact, and lowered to a rank with the error that the value really has."""
    from rankwise.delta import AdapterState
    from rankwise.merge import attach_state

    site = "model.layers.0.self_attn.q_proj"
    value = _value(kind)
    model = family("llama")
    attach_state(model, AdapterState({site: value}), name="p").save(tmp_path / "a")
    want = logits(model, batch(model))
    fresh = family("llama")
    source, served = fetch(tmp_path, fresh)
    assert torch.allclose(served_logits(fresh, source.adapter_loader.layout, served, batch(fresh)), want, atol=1e-5)
    assert served.manifest.exact and served.manifest.error == 0

    lowered = fetch(tmp_path, fresh, options=Options(lower=2, pair_rank=0))[1]
    W = source.adapter_loader.layout.sites[site].read()
    error = value.to_lowrank(rank=2, weight=W)[1]
    assert not lowered.non_lora_changes and lowered.manifest.rank == 2 and lowered.manifest.pages == 1
    assert not lowered.manifest.exact and lowered.manifest.error == pytest.approx(error, rel=1e-6) and error > 0.01
    assert lowered.manifest.digest != served.manifest.digest, "what is lowered computes something else"


def _value(kind: str) -> Any:
    from rankwise import delta as D

    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.2
    index = torch.tensor([1, 5, 9, 30])
    return {
        "entries": lambda: D.Entries(torch.randperm(1024, generator=g)[:50], draw(50), (32, 32)),
        "rows": lambda: D.Rows(index, draw(4, 32), 32),
        "kron": lambda: D.Kron(draw(4, 4), draw(8, 8), 0.5),
        "hadamard": lambda: D.Hadamard(D.LowRank(draw(2, 32), draw(32, 2)), D.LowRank(draw(3, 32), draw(32, 3))),
        "tile": lambda: D.Tile(draw(3, 32), 32),
        "scale_in": lambda: D.Scale(1 + draw(32), "in", 32),
        "replace": lambda: D.Replace(draw(32, 32)),
        "block_affine": lambda: D.BlockAffine(draw(8, 4, 4), 32),
        "dense": lambda: D.Dense(draw(32, 32)),
    }[kind]()


def test_a_gate_that_does_not_look_at_x_becomes_a_pair() -> None:
    from rankwise.delta import LowRank
    from rankwise.delta.gated import ConstantGate, Gated
    from rankwise.serve.adapters.base import AdapterMetadata
    from rankwise.serve.adapters.kinds import prepare
    from rankwise.serve.adapters.layout import Layout

    layout = Layout(family("llama"))
    value = Gated(LowRank(torch.randn(3, 32), torch.randn(32, 3)), ConstantGate(torch.tensor([0.5, 0.0, 2.0])))
    served = prepare(layout, {"model.layers.1.self_attn.q_proj": value}, AdapterMetadata("d", "n", "", "", 0, 0, 0))
    (A, B), *rest = served.pairs["model.layers.1.self_attn#0:32"]
    assert rest == [None, None] and not served.non_lora_changes
    assert torch.allclose(B @ A, value.dense(), atol=1e-6)


def test_arrow_is_served_by_its_own_forward(tmp_path: Path) -> None:
    """A library of adapters routed by x: two PEFT adapters, top-1 of 2."""
    for i in range(2):
        attached(family("llama"), {"r": 2, "targets": ["q_proj", "o_proj"]}, seed=i).export(tmp_path / "library" / f"e{i}")
    library = [str(tmp_path / "library" / f"e{i}") for i in range(2)]
    model = family("llama")
    rw.attach(model, {"targets": ["q_proj", "o_proj"], "router": {"name": "arrow", "adapters": library, "top_k": 1}}).save(
        tmp_path / "root" / "a"
    )
    want = logits(model, batch(model))
    fresh = family("llama")
    source, served = fetch(tmp_path / "root", fresh)
    assert served.manifest.kind == "lora/arrow" and not served.pairs and len(served.non_lora_changes) == 4
    got = served_logits(fresh, source.adapter_loader.layout, served, batch(fresh))
    assert torch.allclose(got, want, atol=1e-5) and (want - logits(fresh, batch(fresh))).abs().max() > 1e-3


def test_half_precision_files_and_pairs(tmp_path: Path) -> None:
    """A bf16 PEFT file gives fp32 pairs with the scale multiplied in fp32; bf16 pairs on request."""
    model = family("llama")
    adapter = attached(model, {"r": 2, "alpha": 3, "targets": ["q_proj"]})
    adapter.export(tmp_path / "a", dtype=torch.bfloat16)
    source, served = fetch(tmp_path, family("llama"))
    A, B = served.pairs["model.layers.0.self_attn#0:32"][0]
    mine = adapter.sites["model.layers.0.self_attn.q_proj"]
    assert A.dtype == B.dtype == torch.float32
    assert torch.equal(A, mine.A.detach().bfloat16().float() * 1.5)
    half = fetch(tmp_path, family("llama"), options=Options(dtype=torch.bfloat16))[1]
    assert half.pairs["model.layers.0.self_attn#0:32"][0][0].dtype == torch.bfloat16
    assert half.manifest.nbytes * 2 == served.manifest.nbytes


@pytest.mark.parametrize(
    ("recipe", "why"),
    [({"r": 2, "init": "loftq"}, "puts another weight in the base's place"), ({"form": "full"}, "base's own weights")],
)
def test_what_moves_the_base_is_refused_before_it_does(
    recipe: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoftQ writes over W, `full` trains it, and the shadow shares W: neither may come as far as attaching."""
    attached(family("llama"), {"targets": ["q_proj"], **recipe}).save(tmp_path / "a")
    fresh = family("llama")
    before = logits(fresh, batch(fresh))
    monkeypatch.setattr("rankwise.serve.adapters.values.rebuild", lambda *a, **k: pytest.fail("it was attached"))
    with pytest.raises(AdapterRefused, match=why):
        fetch(tmp_path, fresh, check_base=False)
    assert torch.equal(logits(fresh, batch(fresh)), before)


PEFT_CONFIGS = {
    "rslora": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 5}},
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "head": ("qwen3", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_what_peft_saved_gives_peft_s_logits(name: str, tmp_path: Path) -> None:
    import peft

    model_name, config = PEFT_CONFIGS[name]
    net = peft.get_peft_model(family(model_name), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    net.save_pretrained(tmp_path / "a")
    fresh = family(model_name)
    want = logits(net, batch(fresh))
    source, served = fetch(tmp_path, fresh)
    got = served_logits(fresh, source.adapter_loader.layout, served, batch(fresh))
    assert torch.allclose(got, want, atol=1e-5), (got - want).abs().max()
    assert (want - logits(fresh, batch(fresh))).abs().max() > 1e-3
