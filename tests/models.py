"""Small random configurations of real architectures, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 64


def llama(layers: int = 2, hidden: int = 32, tie: bool = False, seed: int = 0, **more: Any) -> Any:
    import transformers as T

    torch.manual_seed(seed)
    config = T.LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=hidden * 3 // 2, max_position_embeddings=128, tie_word_embeddings=tie, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval()


def _text(cls: str, config: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers as T

        torch.manual_seed(0)
        return getattr(T, cls)(getattr(T, config)(**fields)).eval()

    return make


_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
)
_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=2)

#: family → (maker, targets that reach every kind of layer it has)
FAMILIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "llama": (_text("LlamaForCausalLM", "LlamaConfig", **_LLAMA, **_IDS), "all-linear"),
    "qwen3": (_text("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, **_IDS, head_dim=8), "all-linear"),
    "gemma3": (_text("Gemma3ForCausalLM", "Gemma3TextConfig", **_LLAMA, **_IDS, head_dim=8, sliding_window=8), "all-linear"),
    "gpt2": (_text("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_IDS), "all-linear"),
    "gpt_neox": (
        _text("GPTNeoXForCausalLM", "GPTNeoXConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **_IDS),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "phi3": (_text("Phi3ForCausalLM", "Phi3Config", **_LLAMA, **_IDS), ["q", "v", "o_proj", "gate", "up", "down_proj"]),
    "mixtral": (_text("MixtralForCausalLM", "MixtralConfig", **_LLAMA, **_IDS, num_local_experts=4), "all-linear"),
    "qwen3_moe": (
        _text("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_LLAMA, **_IDS, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
        "all-linear",
    ),
    "bert": (
        _text("BertForSequenceClassification", "BertConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0),
        ["query", "key", "value", "dense"],
    ),
    "t5": (
        _text("T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2),
        "all-linear",
    ),
    "vit": (_text("ViTForImageClassification", "ViTConfig", **_VISION, num_channels=1, num_labels=4), ["q_proj", "v_proj", "fc1", "fc2", "projection"]),
    "clip": (
        _text("CLIPModel", "CLIPConfig", projection_dim=16,
              text_config=dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **_IDS), vision_config=_VISION),
        ["q_proj", "v_proj", "fc1", "visual_projection", "text_projection"],
    ),
    "whisper": (
        _text("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
              encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16, max_target_positions=32, decoder_start_token_id=1, **_IDS),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "mamba": (
        _text("MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, **_IDS),
        ["in_proj", "x_proj", "out_proj"],
    ),
}  # fmt: skip


def batch_for(model: Any, rows: int = 3, tokens: int = 10, seed: int = 1) -> dict[str, Tensor]:
    """A batch with labels for any of the families."""
    g = torch.Generator().manual_seed(seed)
    name = type(model).__name__
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=g)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=g), "labels": torch.randint(0, 4, (rows,), generator=g)}
    if name.startswith("CLIP"):
        return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 8, 8, generator=g), "return_loss": True}  # type: ignore[dict-item]
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(rows, 8, 32, generator=g), "labels": ids}
    if name.startswith("Bert"):
        return {"input_ids": ids, "labels": torch.randint(0, 2, (rows,), generator=g)}
    return {"input_ids": ids, "labels": ids.clone()}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's answer for a batch, no gradient, in eval mode."""
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    return out.logits_per_image if hasattr(out, "logits_per_image") else out.logits


def move(adapter: Any, std: float = 0.1, seed: int = 3) -> None:
    """Take an adapter away from its start, so that a test of it can fail."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in sorted(adapter.named_parameters().items()):
            noise = torch.randn(p.shape, generator=g).to(p.dtype) * std
            if key.endswith("::weight"):  # the form `full`: a base weight, moved a little
                p.add_(0.1 * noise)
            elif key.endswith("::m"):
                p.mul_(1 + noise)
            else:
                p.add_(noise)
