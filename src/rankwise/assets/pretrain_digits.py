"""Makes the shipped image classifier: ``python -m rankwise.assets.pretrain_digits``, seeded, under a minute on a CPU.

A ViT of about 100,000 parameters on 2×2 patches of the unshifted digits, half of the images moved by up to one pixel.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from rankwise import errors
from rankwise.assets.digits import SHIFTS, accuracy, digits
from rankwise.seeds import generator, seed_of


def build_vit(seed: int = 0) -> Any:
    """A fresh `ViTForImageClassification`: 8×8×1 images, patches of 2, 64 wide, 3 layers, 4 heads, 10 classes."""
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError as e:
        raise errors.need("transformers", "hf", "Pretraining the image classifier") from e
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    width = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(**shape, **width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "pretrain_digits", "weights"))
        return ViTForImageClassification(config)


def _moved(pixels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Every other image, by chance, moved by −1, 0 or 1 pixel along each axis; what enters is blank."""
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    offsets = torch.randint(3, (len(pixels), 2), generator=draw)
    offsets[torch.rand(len(pixels), generator=draw) < 0.5] = 1
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, offsets.tolist())])


def train_vit(epochs: int = 60, seed: int = 0, batch: int = 64, peak: float = 1.5e-3) -> Any:
    """The classifier trained on the unshifted digits: AdamW, warm-up, cosine to 0.

    Args:
        epochs: passes over the train images.
        seed: of weights and order.
        batch: images a step.
        peak: learning rate after the warm-up of 50 steps.
    """
    (pixels, labels), _ = digits()
    model = build_vit(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    draw = generator(seed, "pretrain_digits", "order")
    total = epochs * math.ceil(len(labels) / batch)
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(len(labels), generator=draw).split(batch):
            rate = peak * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / total)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = model(pixel_values=_moved(pixels[index], draw)).logits
            torch.nn.functional.cross_entropy(logits, labels[index], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return model.eval()


def _card(model: Any) -> str:
    scores = {shift: accuracy(model, digits(shift)[1]) for shift in SHIFTS}
    rows = "\n".join(f"| {shift} | {score:.4f} |" for shift, score in scores.items())
    return f"""---
license: apache-2.0
pipeline_tag: image-classification
library_name: transformers
---

# rankwise-digits-vit

A ViT of {model.num_parameters():,} parameters (8×8 images of one channel, patches of 2, 64 wide, 3 layers, 4 heads)
trained by `python -m rankwise.assets.pretrain_digits` on the train part of scikit-learn's digits (UCI optical
recognition of handwritten digits, 1,797 images). Input: `pixel_values` (n, 1, 8, 8) in [0, 1]; output: 10 logits.

Test accuracy (449 images that were never trained on), and under the shifts that adapters are to learn:

| shift | accuracy |
|---|---|
{rows}

It is a test object and an example; it is no good for reading digits in the world.
"""


def main(argv: list[str] | None = None) -> None:
    line = argparse.ArgumentParser(prog="python -m rankwise.assets.pretrain_digits", description=__doc__)
    line.add_argument("--out", type=Path, default=Path("digits_vit"), help="folder for the model and its card")
    line.add_argument("--epochs", type=int, default=60)
    options = line.parse_args(argv)
    model = train_vit(options.epochs)
    model.save_pretrained(options.out)
    card = _card(model)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
