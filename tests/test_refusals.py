"""What was set takes effect or is refused: no option is ignored, no adapter attached that could not train or load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import ArtefactError, AttachError, OptionError, TargetError, ViewError
from tests.models import batch_for, llama, logits, move


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern.*q_prj.*did you mean 'q_proj'"),
        ({"alpha_pattern": {"nothing": 99}}, "alpha_pattern.*nothing.*none of the 14"),
        ({"form": "dense", "dropout": 0.5, "targets": ["embed_tokens"]}, "dropout = 0.5.*embed_tokens.*'dense'"),
        ({"form": "full", "dropout": 0.5, "targets": ["q_proj"]}, "dropout = 0.5.*q_proj.*'full'"),
        ({"form": "full", "alpha": 4, "targets": ["q_proj"]}, "alpha = 4.*'full'"),
        ({"form": "dense", "r": 4, "targets": ["lm_head"]}, "r = 4.*'dense'"),
        ({"separate_tied": True}, "separate_tied = True"),
    ],
)
def test_an_option_without_effect_is_refused(recipe: dict[str, Any], words: str) -> None:
    model = llama()
    with pytest.raises(OptionError, match=words):
        rw.attach(model, recipe)
    assert "rankwise" not in model._modules


def test_options_with_effect_pass() -> None:
    model = llama(tie=True)
    adapter = rw.attach(
        model, {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"v_proj": 4}, "dropout": 0.5}
    )
    assert adapter.sites["model.layers.0.self_attn.q_proj"].component_count() == 2
    assert adapter.sites["model.layers.1.mlp.up_proj"].component_count() == 3
    rw.attach(llama(tie=True), {"targets": ["embed_tokens"], "separate_tied": True})
    rw.attach(llama(), {"form": "bottleneck", "r": 2, "alpha": 4, "dropout": 0.1})


@pytest.mark.parametrize("form", ["lora", "svd", "paca", "lora_xs"])
def test_dropout_at_stacks_of_experts_is_refused(form: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    with pytest.raises(OptionError, match="dropout = 0.5 cannot act at .*experts"):
        rw.attach(model, {"form": form, "r": 2, "dropout": 0.5})


def test_a_bottleneck_round_a_block_without_width_is_refused() -> None:
    with pytest.raises(TargetError, match="embed_tokens.*no linear layer"):
        rw.attach(llama(), {"form": "bottleneck", "targets": ["embed_tokens"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_save_refuses_what_load_would(tmp_path: Path, value: float) -> None:
    adapter = rw.attach(llama(), {"r": 2})
    move(adapter)
    adapter.save(tmp_path / "a")
    before = (tmp_path / "a" / "rankwise.safetensors").read_bytes()
    adapter.sites["model.layers.0.self_attn.q_proj"].B.data[0, 0] = value
    with pytest.raises(ArtefactError, match="'B' at 'model.layers.0.self_attn.q_proj'"):
        adapter.save(tmp_path / "a")
    assert (tmp_path / "a" / "rankwise.safetensors").read_bytes() == before


def test_attaching_in_inference_mode_is_refused() -> None:
    model = llama()
    with torch.inference_mode(), pytest.raises(AttachError, match="inference_mode"):
        rw.attach(model, {"r": 2})
    assert "rankwise" not in model._modules


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_strengths_are_finite(strength: Any) -> None:
    model = llama()
    rw.attach(model, {"r": 2})
    with pytest.raises(ViewError, match="'default'.*finite"), rw.view(model, {"default": strength}):
        pass


def test_row_views_whatever_keyword_comes_first() -> None:
    model = llama()
    move(rw.attach(model, {"r": 2}))
    ids = batch_for(model, rows=4, tokens=9)["input_ids"]
    with rw.view(model, {"default": 1.0}, rows=["default", None, "default", None]), torch.no_grad():
        got = model(position_ids=torch.arange(9)[None], input_ids=ids).logits
    full, base = logits(model, {"input_ids": ids}), None
    with rw.view(model, {}):
        base = logits(model, {"input_ids": ids})
    assert torch.allclose(got[::2], full[::2], atol=1e-5) and torch.allclose(got[1::2], base[1::2], atol=1e-5)
