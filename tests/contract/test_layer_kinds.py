"""The laws at every kind of layer a model has, in fp32 and bf16: what a form says it can do there holds, the rest is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import RankwiseError
from tests.contract.cases import example, methods, with_rank
from tests.models import FAMILIES, batch_for, llama, logits, move

#: kind of layer → (a model that has it, targets)
LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: llama(), ["q_proj", "down_proj"]),
    "Conv1D-style": (FAMILIES["gpt2"][0], ["c_attn", "c_fc"]),
    "convolution": (FAMILIES["vit"][0], ["projection"]),
    "embedding": (lambda: llama(), ["embed_tokens"]),
    "tied": (lambda: llama(tie=True), ["embed_tokens"]),
    "fused qkv": (FAMILIES["phi3"][0], ["q", "v", "gate"]),
    "interleaved qkv": (FAMILIES["gpt_neox"][0], ["query_key_value"]),
    "expert stack": (FAMILIES["mixtral"][0], ["gate_up_proj", "down_proj"]),
    "read": (FAMILIES["mamba"][0], ["out_proj"]),
}
FORMS = [m for m in methods("form") if "block" not in getattr(m.cls, "reads", ())]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: rounding of an output of size one: bf16 has 8 bits, and a form may go through W + ΔW − W
GAP = {torch.float32: 2e-5, torch.bfloat16: 0.15}
_MADE: dict[tuple[str, str], Any] = {}


def model_at(layer: str, dtype: str) -> Any:
    """A fresh frozen model; the first one made is kept and copied."""
    key = (layer, dtype)
    if key not in _MADE:
        _MADE[key] = LAYERS[layer][0]().to(DTYPES[dtype]).requires_grad_(False)
    return copy.deepcopy(_MADE[key])


def inputs(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch_for(model).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("info", FORMS, ids=[m.name for m in FORMS])
def test_a_whole_life_or_a_refusal(info: Any, layer: str, dtype: str, tmp_path: Any) -> None:
    model = model_at(layer, dtype)
    kind = DTYPES[dtype]
    batch = inputs(model, kind)
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    base = logits(model, batch)
    recipe = with_rank({**{k: v for k, v in example(info).items() if k != "r"}, "targets": LAYERS[layer][1]}, 2)
    try:
        adapter = rw.attach(model, recipe)
    except RankwiseError as refusal:
        assert len(str(refusal)) > 30 and not hasattr(model, "rankwise"), "a refusal says why and leaves nothing behind"
        assert info.name != "lora", f"plain LoRA must work at every kind of layer: {refusal}"
        return
    start = (logits(model, batch).float() - base.float()).abs().max().item()
    assert start <= max(GAP[kind], getattr(info.cls, "start_gap", 0.0)), f"starts {start:.1e} away"

    own = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.detach().clone() for n, t in adapter.named_parameters().items()}
    session = rw.Session(model, adapter, lr=1e-2, total_steps=2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
    session.close()
    assert any(not torch.equal(t, before[n]) for n, t in adapter.named_parameters().items())
    for name, p in model.named_parameters():
        if name not in own and name in bits:
            assert torch.equal(p, bits[name]), f"frozen {name} moved"

    move(adapter)
    moved = logits(model, batch)
    assert torch.isfinite(moved).all() and not torch.equal(moved, base), "it does not act"
    with rw.view(model, {}):
        assert torch.equal(logits(model, batch), base), "the empty view is not the base"
    adapter.save(tmp_path / "a")
    again = rw.load(model_at(layer, dtype), tmp_path / "a")
    assert torch.equal(logits(again.model, batch), moved), "saved and loaded differ"
    if info.mergeable:
        try:
            report = adapter.merge()
        except RankwiseError as refusal:  # bf16 may round a change away; then it must say so and leave the weights
            assert kind is torch.bfloat16 or layer == "read", refusal
        else:
            assert (logits(model, batch).float() - moved.float()).abs().max() <= max(50 * GAP[kind], 1e-3), report
    adapter.detach()
    assert list(model.state_dict()) == list(bits)
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items()), "detach did not give the bits back"
