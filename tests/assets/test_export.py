"""What a pretraining run ships: weights as they will be loaded, a card with what was measured on them, marked while it is not done."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rankwise import assets
from rankwise.assets import export
from rankwise.assets.pretrain_run import PretrainConfig


def run(progress: float) -> Any:
    """A run of a small model over the shipped tokenizer; of a PretrainRun what the export reads."""
    tokenizer = assets.load_base()[1]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )  # fmt: skip
    return SimpleNamespace(
        model=LlamaForCausalLM(config), tokenizer=tokenizer, config=PretrainConfig(), device=torch.device("cpu"), progress=progress, step=1234,
        seconds=600.0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.corpus, "control_texts", lambda: ["import os\n" * 20])
    monkeypatch.setattr(export, "domains", lambda: {"xml": (["unused"], ["<a>é</a>\n" * 20])})


def test_what_is_written_is_what_is_loaded_and_measured(tmp_path: Path) -> None:
    made = run(0.25)
    export.export(made, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(torch.bfloat16)), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<a>")["input_ids"] == made.tokenizer("<a>")["input_ids"]
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == 0o644
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    bits = assets.bits_per_byte(again.float(), made.tokenizer, ["<a>é</a>\n" * 20])
    assert f"| xml | 200 | {bits:.3f} |" in card, "the bytes of the text and the bits of the rounded weights"
    assert "| all | 400 |" in card and "**Interim**: exported at 25%" in card and "10 minutes on cpu" in card
    tokens = 1234 * made.config.batch * made.config.context
    assert "1,234 steps" in card and f"{tokens:,} tokens in all" in card and f"{made.model.num_parameters():,} parameters" in card


def test_a_finished_run_is_not_interim() -> None:
    assert "Interim" not in export.render_card(run(1.0), {"all": (1.0, 2.0, 3)})
