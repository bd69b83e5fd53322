"""Robustness as a patch: taken from digits under one shift, put on a model of another.

python -m examples.robustness_patch [--source inverted] [--target none] [--keep 7] [--levels 16]

The shipped image classifier is fine-tuned on digits turned by 90° (shift A): clean, noisy, and tilted by up to ±45°.  What
the two robust fine-tunes have beyond the clean one (``rankwise.merge.signatures``) is put on a model that was fine-tuned
on upright digits (shift B) and never saw noise or tilt.  Accuracy in per cent on test images of shift B, each under
four draws of the corruption; the last rows are what training on the corruption of shift B itself would give.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import rankwise as rw
from rankwise.assets.digits import SHIFTS, Images, accuracy, digits
from rankwise.assets.load import load_digits_vit
from rankwise.merge import attach_state
from rankwise.merge.signatures import signatures
from rankwise.seeds import generator

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
CORRUPTIONS = ("noisy", "rotated")
DRAWS = 4
Weights = dict[str, Tensor]


def corrupt(pixels: Tensor, how: str, sigma: float, degrees: float, seed: int) -> Tensor:
    """Clipped Gaussian noise of σ, or each image turned by up to ± ``degrees`` (bilinear; what enters repeats the border)."""
    g = generator(seed, "robustness_patch", how)
    if how == "noisy":
        return (pixels + sigma * torch.randn(pixels.shape, generator=g)).clamp(0, 1)
    if how == "rotated":
        angle = (2 * torch.rand(len(pixels), generator=g) - 1) * degrees * torch.pi / 180
        rows = torch.stack(
            [torch.stack([angle.cos(), -angle.sin(), 0 * angle], 1), torch.stack([angle.sin(), angle.cos(), 0 * angle], 1)], 1
        )
        grid = torch.nn.functional.affine_grid(rows, list(pixels.shape), align_corners=False)
        return torch.nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return pixels


def finetune(images: Images, how: str, a: argparse.Namespace) -> Weights:
    """Weights after ``a.steps`` steps of full fine-tuning on images of which half are corrupted anew each step."""
    model = load_digits_vit()
    adapter = rw.attach(model, {"form": "full", "targets": "all"})
    session = rw.Session(model, adapter, lr=a.lr, total_steps=a.steps, warmup=0.1, weight_decay=5e-4)
    pixels, labels = images
    draw = generator(a.seed, "robustness_patch", f"order {how}")
    model.train()
    for step in range(a.steps):
        pick = torch.randint(len(labels), (a.batch,), generator=draw)
        x, half = pixels[pick].clone(), a.batch // 2
        x[:half] = corrupt(x[:half], how, a.sigma, a.degrees, seed=1000 + step)
        session.step_begin()
        model(pixel_values=x, labels=labels[pick]).loss.backward()
        session.step()
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("rankwise.")}


def row(model: Any, tests: dict[str, Images]) -> str:
    return " | ".join(f"{100 * accuracy(model, t):.1f}" for t in tests.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each of the six fine-tunes")
    parser.add_argument("--source", choices=SHIFTS, default="rotated", help="shift A: where the signatures are taken")
    parser.add_argument("--target", choices=SHIFTS, default="none", help="shift B: the model that is patched")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--keep", type=int, default=7, help="weight layers that are patched")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the whole patch, shared by the corruptions")
    parser.add_argument("--norms", choices=("average", "leave"), default="average")
    parser.add_argument("--levels", type=int, help="quantise the patch to so many values a tensor")
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--degrees", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    away, _ = digits(a.source)
    here, test = digits(a.target)
    clean, *robust = [finetune(away, how, a) for how in ("clean", *CORRUPTIONS)]

    target = load_digits_vit()
    target.load_state_dict(finetune(here, "clean", a))
    many = (test[0].repeat(DRAWS, 1, 1, 1), test[1].repeat(DRAWS))
    tests = {"clean": test} | {c: (corrupt(many[0], c, a.sigma, a.degrees, seed=a.seed), many[1]) for c in CORRUPTIONS}
    bits = {k: v.clone() for k, v in target.state_dict().items()}
    base = load_digits_vit()
    patches = {" + ".join(CORRUPTIONS): robust} | {c: [r] for c, r in zip(CORRUPTIONS, robust, strict=True)}
    print(f"| model of shift B | {' | '.join(tests)} |\n|---|{'---|' * len(tests)}")
    print(f"| before | {row(target, tests)} |")
    for name, sources in patches.items():
        state = signatures(base, clean, sources, keep=a.keep, alpha=a.alpha, norms=a.norms, levels=a.levels)
        adapter = attach_state(target, state, name="patch")
        for s in STRENGTHS:
            with rw.view(target, {"patch": s}):
                print(f"| patch {name}, strength {s} | {row(target, tests)} |", flush=True)
        adapter.detach()
    equal = all(torch.equal(v, bits[k]) for k, v in target.state_dict().items())
    print(f"| taken off ({'bit-equal' if equal else 'NOT bit-equal'}) | {row(target, tests)} |")
    for c in CORRUPTIONS:
        target.load_state_dict(finetune(here, c, a))
        print(f"| fine-tuned on {c} images of shift B instead | {row(target, tests)} |")
    assert equal


if __name__ == "__main__":
    main()
