"""How good a model is, under whatever view is in force: loss, perplexity, bits a byte, accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from rankwise.errors import DataError
from rankwise.train.data.collate import Collator
from rankwise.train.data.tokens import IGNORED, Example


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Example], *, pad_id: int = 0, batch: int = 8, bytes_: int | None = None
) -> dict[str, float]:
    """Mean loss a learnt token (nats), perplexity, and bits a byte where the number of bytes is given.

    Args:
        model: under the view in force.
        examples: one or more.
        pad_id: the token of padding.
        batch: examples in a forward.
        bytes_: of the texts, for bits a byte; None: not told.
    """
    if not examples:
        raise DataError("There is nothing to evaluate on.")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    try:
        for i in range(0, len(examples), batch):
            rows = {k: v.to(device) for k, v in Collator(pad_id)(examples[i : i + batch]).items()}
            logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1].float()
            target = rows["labels"][:, 1:]
            nats += float(
                nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
            )
            tokens += int((target != IGNORED).sum())
    finally:
        model.train(training)
    loss = nats / max(tokens, 1)
    out = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(tokens)}
    return out | ({"bits_per_byte": nats / math.log(2) / bytes_} if bytes_ else {})


@torch.no_grad()
def classify(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, *, batch: int = 128) -> dict[str, float]:
    """Mean loss (nats) of the labels, the share whose logit is the largest, and the number of images.

    Args:
        model: under the view in force.
        pixels, labels: (N, C, H, W) floats and (N,) int64, on any device.
        batch: images in a forward.
    """
    if not len(labels):
        raise DataError("There is nothing to evaluate on.")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats, right = 0.0, 0
    try:
        for p, y in zip(pixels.split(batch), labels.split(batch), strict=True):
            logits, target = model(pixel_values=p.to(device)).logits.float(), y.to(device)
            nats += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
            right += int((logits.argmax(-1) == target).sum())
    finally:
        model.train(training)
    return {"loss": nats / len(labels), "accuracy": right / len(labels), "images": float(len(labels))}


def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, *, batch: int = 128) -> float:
    """Share of images whose largest logit is their label's.

    Args:
        model: under the view in force.
        pixels, labels: (N, C, H, W) floats and (N,) int64, on any device.
        batch: images in a forward.
    """
    return classify(model, pixels, labels, batch=batch)["accuracy"]
