"""Where the shipped models lie and how they are opened: no download, no cache, any install."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rankwise import errors

_HERE = Path(__file__).parent


def _shipped(folder: str, maker: str) -> Path:
    path = _HERE / folder
    if not (path / "model.safetensors").is_file():
        raise errors.ArtefactError(
            f"{path} holds no model.safetensors; this install came without its package data. Install the wheel, "
            f"or make the model again: python -m {maker} --out {path}."
        )
    return path


def base_path() -> Path:
    """The folder of the shipped base (config, bf16 weights, tokenizer, model card)."""
    return _shipped("base", "rankwise.assets.pretrain")


def digits_vit_path() -> Path:
    """The folder of the shipped image classifier (config, fp32 weights, model card)."""
    return _shipped("digits_vit", "rankwise.assets.pretrain_digits")


def load_base() -> tuple[Any, Any]:
    """(`LlamaForCausalLM` in fp32 and eval mode, its `PreTrainedTokenizerFast`), from `base_path`."""
    try:
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    except ImportError as e:
        raise errors.need("transformers", "hf", "The shipped base") from e
    path = base_path()
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(path)


def load_digits_vit() -> Any:
    """The shipped `ViTForImageClassification`: pixel_values (n, 1, 8, 8) in [0, 1] -> logits (n, 10); fp32, eval."""
    try:
        from transformers import ViTForImageClassification
    except ImportError as e:
        raise errors.need("transformers", "hf", "The shipped image classifier") from e
    return ViTForImageClassification.from_pretrained(digits_vit_path(), dtype=torch.float32).eval()
