"""A tiny U-Net, a tiny Flux transformer and a tiny text encoder, for the formats of image models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rankwise as rw
from rankwise.seeds import generator
from tests.models import move

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def draw(model: Any) -> Tensor:
    g = generator(0, "test", "unet")
    with torch.no_grad():
        return model(torch.randn(1, 4, 8, 8, generator=g), 1, torch.randn(1, 5, 16, generator=g)).sample


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def draw_flux(model: Any) -> Tensor:
    g = generator(0, "test", "flux")
    image, text, pooled = (torch.randn(*s, generator=g) for s in ((1, 16, 4), (1, 5, 32), (1, 32)))
    with torch.no_grad():
        return model(
            hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.ones(1), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3)
        ).sample  # fmt: skip


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def read(model: Any) -> Tensor:
    ids = torch.randint(3, 64, (2, 7), generator=generator(0, "test", "text"))
    with torch.no_grad():
        return model(ids).last_hidden_state


def adapted(model: Any, targets: Any = TARGETS, form: str = "lora", **more: Any) -> Any:
    adapter = rw.attach(model, {"form": form, "targets": targets, "r": 3, "alpha": 5, **more})
    move(adapter)
    return adapter


def gap(got: Tensor, want: Tensor, base: Tensor) -> float:
    """Largest difference, relative to what the adapter changes (which must be something)."""
    change = float((want - base).abs().max())
    assert change > 1e-2
    return float((got - want).abs().max()) / change
