"""Real handwritten digits (scikit-learn's, 8×8) and three shifts of them: a vision task that adapts in seconds."""

from __future__ import annotations

import torch

from rankwise import errors
from rankwise.seeds import generator

Images = tuple[torch.Tensor, torch.Tensor]
"""(pixels (n, 1, 8, 8) fp32 in [0, 1], labels (n,) int64)."""

SHIFTS: tuple[str, ...] = ("none", "rotated", "inverted", "noisy")
_NOISE = 0.3
_TEST_SHARE = 0.25


def _shifted(pixels: torch.Tensor, shift: str, seed: int) -> torch.Tensor:
    """The same digits turned by 90°, with black and white swapped, or under clipped Gaussian noise (σ = 0.3)."""
    if shift == "rotated":
        return pixels.rot90(1, (2, 3)).contiguous()
    if shift == "inverted":
        return 1 - pixels
    if shift == "noisy":
        noise = torch.randn(pixels.shape, generator=generator(seed, "digits", "noise"))
        return (pixels + _NOISE * noise).clamp(0, 1)
    return pixels


def digits(shift: str = "none", seed: int = 0) -> tuple[Images, Images]:
    """((train pixels, train labels), (test pixels, test labels)) of the 1,797 digits under one shift.

    The split is fixed (it is the shipped model's), so no test image of any shift was ever trained on; ``seed`` draws
    the noise alone.
    """
    if shift not in SHIFTS:
        raise errors.OptionError(f"Got shift={shift!r}; expected one of {', '.join(SHIFTS)}.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise errors.need("sklearn", "vision", "The digits") from e
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    pixels = _shifted(pixels, shift, seed)
    order = torch.randperm(len(labels), generator=generator(0, "digits", "split"))
    cut = round(_TEST_SHARE * len(labels))
    test, train = order[:cut], order[cut:]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Images) -> float:
    """The share of images whose largest logit is the label's; ``model(pixel_values=…)`` must return ``.logits``."""
    pixels, labels = images
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        guess = model(pixel_values=pixels.to(device)).logits.argmax(-1).cpu()
    finally:
        model.train(was_training)
    return (guess == labels).float().mean().item()
