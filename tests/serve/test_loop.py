"""The loop for Llama-like models gives what their own modules give, and stands for no others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import rankwise.serve.model.llama_loop as loop_module
from rankwise.errors import AttachError
from rankwise.serve.batch import Role, Span, make_plan
from rankwise.serve.model.llama_loop import loop_of
from rankwise.serve.server import Sizes, build_server
from tests.models import FAMILIES, VOCAB, llama

_SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def _made(cls: str, **more: Any) -> Any:
    import transformers as T

    torch.manual_seed(0)
    model = getattr(T, f"{cls}ForCausalLM")(getattr(T, f"{cls}Config")(**{**_SMALL, **more})).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + ("norm" in n))  # biases and norms are zero and one when they are made
    return model


CASES: dict[str, dict[str, Any]] = {
    "llama": {"cls": "Llama"},
    "llama, biases": {"cls": "Llama", "attention_bias": True, "mlp_bias": True},
    "llama, tied, wide heads": {"cls": "Llama", "tie_word_embeddings": True, "head_dim": 16},
    "llama, every head its own": {"cls": "Llama", "num_key_value_heads": 4},
    "llama, llama3 rope": {
        "cls": "Llama",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    },
    "llama, yarn": {"cls": "Llama", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral, window": {"cls": "Mistral", "sliding_window": 7},
    "qwen2, window": {"cls": "Qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"cls": "Qwen3", "head_dim": 8},
}  # fmt: skip


def _served(model: Any, **options: Any) -> Any:
    return build_server(
        copy.deepcopy(model), lambda _: None, sizes=Sizes(kv_tokens=1024, page=8, max_lora_blocks=2), op="reference", **options
    ).runner  # type: ignore[arg-type,return-value]


def _logits(runner: Any) -> torch.Tensor:
    """Two prompts in chunks beside rows that decode, contexts beyond the first table of angles among them."""
    g = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(3, VOCAB, (n,), generator=g).tolist()) for n in (100, 21, 5)]
    blocks = [tuple(range(20)), tuple(range(20, 30)), tuple(range(30, 34))]
    steps = [
        [(0, 0, 60), (1, 0, 20)],
        [(0, 60, 99), (1, 20, 21), (2, 0, 4)],
        [(0, 99, 100), (2, 4, 5)],
    ]
    out = []
    for step in steps:
        spans = [
            Span(f"r{i}", ids[i][a:b], a, blocks[i], role=Role.DECODE if b - a == 1 else Role.PREFILL, samples=1, serial=i)
            for i, a, b in step
        ]
        out.append(runner.run(make_plan(spans, 8), {}))
    return torch.cat(out)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_loop_gives_the_modules_logits(case: str, pack: bool) -> None:
    model = _made(**CASES[case])
    mine, own = _served(model, loop=True, pack=pack), _served(model, loop=False, pack=pack)
    assert mine.loop is not None and own.loop is None
    torch.testing.assert_close(_logits(mine), _logits(own), rtol=2e-4, atol=2e-4)


def test_in_bfloat16_it_is_no_further_from_fp32_than_the_modules() -> None:
    model = _made("Llama").bfloat16()
    true = _logits(_served(copy.deepcopy(model).float(), loop=False))
    mine, own = (float((_logits(_served(model, loop=loop)) - true).norm() / true.norm()) for loop in (True, False))
    assert mine < 1.2 * own < 0.1, (mine, own)


def _changed() -> dict[str, Any]:
    import transformers as T

    watched, patched = _made("Llama"), _made("Llama")
    watched.model.layers[1].register_forward_hook(lambda *a: None)
    patched.model.layers[0].mlp.forward = lambda x: x * 0
    torch.manual_seed(0)
    own = type("MyLlamaForCausalLM", (T.LlamaForCausalLM,), {})(_made("Llama").config).eval()
    dynamic = _made("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    return {"watched": watched, "patched": patched, "a subclass": own, "dynamic angles": dynamic, "gpt2": FAMILIES["gpt2"][0]()}


@pytest.mark.parametrize("which", ["watched", "patched", "a subclass", "dynamic angles", "gpt2"])
def test_it_stands_for_no_others(which: str) -> None:
    model = _changed()[which]
    assert loop_of(model) is None
    with pytest.raises(AttachError, match="No loop stands for"):
        _served(model, loop=True)


def test_a_loop_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rotate = loop_module._rotate
    monkeypatch.setattr(loop_module, "_rotate", lambda x, turn: rotate(x, (turn[0], -turn[1])))
    runner = _served(llama(seed=1))
    assert runner.loop is None and "is not used" in caplog.text
    monkeypatch.undo()
    assert _served(llama(seed=1)).loop is not None
