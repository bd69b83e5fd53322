"""GGUF adapters: read with gguf's own reader, against a naive permutation, and back to equal logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.errors import ArtefactError, MissingExtra
from tests.models import FAMILIES, llama, move
from tests.store.store_models import ids

gguf = pytest.importorskip("gguf")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: Any, targets: Any = LINEAR, **more: Any) -> Any:
    adapter = rw.attach(model, {"form": "lora", "targets": targets, "r": 4, "alpha": 8, **more})
    move(adapter)
    return adapter


def tensors_of(file: Path) -> dict[str, Tensor]:
    reader = gguf.GGUFReader(file)
    return {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def value(file: Path, name: str) -> Any:
    return gguf.GGUFReader(file).get_field(name).contents()


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def test_keys_and_metadata_are_those_of_the_converter(tmp_path: Path) -> None:
    file = adapted(llama()).export(tmp_path / "a", format="gguf")
    assert file == tmp_path / "a" / "adapter.gguf"
    said = {k: value(file, k) for k in ("general.type", "adapter.type", "general.architecture", "adapter.lora.alpha")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama", "adapter.lora.alpha": 8.0}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(tensors_of(file)) == {f"blk.{n}.{p}.weight.lora_{s}" for n in (0, 1) for p in parts for s in "ab"}
    reader = gguf.GGUFReader(file)
    q = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight.lora_a")
    assert list(q.shape) == [32, 4]  # ggml's order: the row length first, as llama.cpp checks it against the weight


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Row by row: the i-th of a head's first half, then the i-th of its second."""
    d = weight.shape[0] // heads
    rows = [h * d + part * (d // 2) + i for h in range(heads) for i in range(d // 2) for part in (0, 1)]
    return weight[rows]


def test_factors_are_the_bits_of_ours_with_q_and_k_permuted(tmp_path: Path) -> None:
    model = llama()
    adapter = adapted(model)
    got = tensors_of(adapter.export(tmp_path, format="gguf"))
    mine = adapter.tensors()
    at = "model.layers.1.self_attn."
    for leaf, name, heads in (
        ("q_proj", "attn_q", 4),
        ("k_proj", "attn_k", 2),
        ("v_proj", "attn_v", 0),
        ("o_proj", "attn_output", 0),
    ):
        B = mine[f"{at}{leaf}::B"]
        assert torch.equal(got[f"blk.1.{name}.weight.lora_a"], mine[f"{at}{leaf}::A"])
        assert torch.equal(got[f"blk.1.{name}.weight.lora_b"], permuted(B, heads) if heads else B)
    assert not torch.equal(permuted(mine[f"{at}q_proj::B"], 4), mine[f"{at}q_proj::B"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_back_on_a_fresh_base_it_computes_the_same(family: str, dtype: str, tmp_path: Path) -> None:
    make, targets = FAMILIES[family]
    model, plain = make(), make()
    targets = ["qkv_proj", "o_proj", "down_proj"] if family == "phi3" else LINEAR
    adapter = adapted(model, targets)
    want, base = out(model), out(plain)
    loaded = rw.load(plain, adapter.export(tmp_path / "x.gguf", format="gguf", dtype=dtype))
    gap = (out(plain) - want).abs().max() / (want - base).abs().max()
    assert gap < (1e-5 if dtype == "f32" else 5e-3)
    if dtype == "f32":
        assert all(torch.equal(loaded.tensors()[k], t) for k, t in adapter.tensors().items())
    else:
        assert all(torch.equal(loaded.tensors()[k], t.half().float()) for k, t in adapter.tensors().items())


def test_qwen_and_gemma_rows_are_not_permuted(tmp_path: Path) -> None:
    for family, arch in (("qwen3", "qwen3"), ("gemma3", "gemma3")):
        adapter = adapted(FAMILIES[family][0](), ["q_proj"])
        file = adapter.export(tmp_path / family, format="gguf")
        assert value(file, "general.architecture") == arch
        mine = adapter.tensors()["model.layers.0.self_attn.q_proj::B"]
        assert torch.equal(tensors_of(file)["blk.0.attn_q.weight.lora_b"], mine)


def test_unequal_scales_are_in_b_under_one_alpha(tmp_path: Path) -> None:
    model, plain = llama(), llama()
    recipe = {
        "parts": [
            {"form": "lora", "targets": ["q_proj", "k_proj"], "r": 4, "alpha": 8},
            {"form": "lora", "targets": ["down_proj"], "r": 8, "alpha": 2.4},
        ]
    }
    adapter = rw.attach(model, recipe)
    move(adapter)
    file = adapter.export(tmp_path, format="gguf")
    alpha, got, mine = value(file, "adapter.lora.alpha"), tensors_of(file), adapter.tensors()
    assert alpha == 8.0
    B = got["blk.0.ffn_down.weight.lora_b"]
    torch.testing.assert_close(B * (alpha / B.shape[1]), mine["model.layers.0.mlp.down_proj::B"] * 0.3, rtol=1e-6, atol=0)
    rw.load(plain, file)
    torch.testing.assert_close(out(plain), out(model), rtol=1e-5, atol=1e-5)


def test_an_embedding_is_stored_vocab_first(tmp_path: Path) -> None:
    model, plain = llama(), llama()
    adapter = adapted(model, ["embed_tokens", "lm_head"])
    file = adapter.export(tmp_path, format="gguf")
    got, mine = tensors_of(file), adapter.tensors()
    assert torch.equal(got["token_embd.weight.lora_a"], mine["model.embed_tokens::A"].mT)
    assert torch.equal(got["token_embd.weight.lora_b"], mine["model.embed_tokens::B"])
    assert torch.equal(got["output.weight.lora_b"], mine["lm_head::B"])
    rw.load(plain, file)
    assert torch.equal(out(plain), out(model))


def test_what_gguf_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    dora = rw.attach(llama(), {"form": "dora", "targets": ["q_proj"], "r": 2})
    with pytest.raises(ArtefactError, match="DoRA"):
        dora.export(tmp_path, format="gguf")
    gpt2 = rw.attach(FAMILIES["gpt2"][0](), {"form": "lora", "targets": ["c_attn"], "r": 2})
    with pytest.raises(ArtefactError, match="'gpt2'"):
        gpt2.export(tmp_path, format="gguf")
    tied = adapted(llama(tie=True), ["embed_tokens"])
    with pytest.raises(ArtefactError, match="tied"):
        tied.export(tmp_path, format="gguf")
    assert not list(tmp_path.iterdir())


def test_another_architecture_and_damaged_files_are_refused(tmp_path: Path) -> None:
    file = adapted(llama()).export(tmp_path / "a.gguf", format="gguf")
    with pytest.raises(ArtefactError, match="'llama'.*'qwen3'"):
        rw.load(FAMILIES["qwen3"][0](), file)
    data = file.read_bytes()
    for cut in (0, 3, 40, len(data) // 2):
        (tmp_path / "b.gguf").write_bytes(data[:cut])
        with pytest.raises(ArtefactError):
            rw.load(llama(), tmp_path / "b.gguf")

    with pytest.raises(ArtefactError):
        rw.load(llama(layers=1), file)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"rankwise\[gguf\]"):
        adapted(llama()).export(tmp_path, format="gguf")


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    a = adapted(llama()).export(tmp_path / "a.gguf", format="gguf").read_bytes()
    assert a == adapted(llama()).export(tmp_path / "b.gguf", format="gguf").read_bytes()
