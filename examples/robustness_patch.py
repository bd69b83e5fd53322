"""Robustness as a patch: taken from models of one set of digits, put on a model of another.

python -m examples.robustness_patch [--source none] [--target none] [--seeds 3] [--out docs/reports]

The shipped image classifier is fine-tuned on set A: clean, noisy, and tilted by up to ±45°.  What the two robust fine-tunes
have beyond the clean one (``rankwise.merge.methods.signatures``) is put on a model that was fine-tuned on set B and never saw noise
or tilt.  Where both are of one shift (upright digits, the default) A and B are disjoint halves of the images; else they are
all images under two shifts.  A fifth of B is trained on by nobody: it chooses each patch's strength.  Accuracy in per cent
on test images of shift B, each under four draws of the corruption, the mean over seeds; the last rows are what training on
the corruption of set B itself gives.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import rankwise as rw
from rankwise.assets.digits import SHIFTS, Images, accuracy, digits
from rankwise.assets.load import load_digits_vit
from rankwise.merge import attach_state
from rankwise.merge.methods.signatures import signatures
from rankwise.seeds import generator

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CORRUPTIONS = ("noisy", "rotated")
DRAWS = 4
Weights = dict[str, Tensor]
Scores = dict[str, float]
#: row → "choose" and "test" → image set → per cent
Rows = dict[str, dict[str, Scores]]


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


def finetune(images: Images, how: str, a: argparse.Namespace, seed: int) -> Weights:
    """Weights after ``a.steps`` steps of full fine-tuning on images of which half are corrupted anew each step."""
    model = load_digits_vit()
    adapter = rw.attach(model, {"form": "full", "targets": "all"})
    session = rw.Session(model, adapter, lr=a.lr, total_steps=a.steps, warmup=0.1, weight_decay=5e-4)
    pixels, labels = images
    draw = generator(seed, "robustness_patch", f"order {how}")
    model.train()
    for step in range(a.steps):
        pick = torch.randint(len(labels), (a.batch,), generator=draw)
        x, half = pixels[pick].clone(), a.batch // 2
        x[:half] = corrupt(x[:half], how, a.sigma, a.degrees, seed=1000 * (seed + 1) + step)
        session.step_begin()
        model(pixel_values=x, labels=labels[pick]).loss.backward()
        session.step()
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("rankwise.")}


def sets(a: argparse.Namespace, seed: int) -> tuple[Images, Images, Images, Images]:
    """(training images of A, of B, those that choose, test images of B)."""
    away, _ = digits(a.source)
    here, test = digits(a.target)
    order = torch.randperm(len(here[1]), generator=generator(seed, "robustness_patch", "halves"))
    pick = lambda images, at: (images[0][at], images[1][at])
    half = len(order) // 2 if a.source == a.target else 0
    spare = (len(order) - half) // 5
    away = pick(away, order[:half]) if half else away
    return away, pick(here, order[half + spare :]), pick(here, order[half : half + spare]), test


def trial(a: argparse.Namespace, seed: int) -> Rows:
    """All rows of one seed."""
    away, here, choose, test = sets(a, seed)
    clean, *robust = [finetune(away, how, a, seed) for how in ("clean", *CORRUPTIONS)]
    target = load_digits_vit()
    target.load_state_dict(finetune(here, "clean", a, seed))
    looked = {"choose": _corrupted(choose, a, 100 + seed), "test": _corrupted(test, a, seed)}
    score = lambda model: {w: {n: 100 * accuracy(model, t) for n, t in tests.items()} for w, tests in looked.items()}
    bits = {k: v.clone() for k, v in target.state_dict().items()}
    base, rows = load_digits_vit(), {"before": score(target)}
    patches = {" + ".join(CORRUPTIONS): robust} | {c: [r] for c, r in zip(CORRUPTIONS, robust, strict=True)}
    for name, sources in patches.items():
        state = signatures(base, clean, sources, keep=a.keep, alpha=a.alpha, norms=a.norms, levels=a.levels)
        adapter = attach_state(target, state, name="patch")
        for s in STRENGTHS:
            with rw.view(target, {"patch": s}):
                rows[f"patch {name}, strength {s}"] = score(target)
        adapter.detach()
    assert all(torch.equal(v, bits[k]) for k, v in target.state_dict().items()), "taking the patches off left a trace"
    rows["taken off (bit-equal)"] = score(target)
    for c in CORRUPTIONS:
        target.load_state_dict(finetune(here, c, a, seed))
        rows[f"fine-tuned on {c} images of B instead"] = score(target)
    return rows


def _corrupted(images: Images, a: argparse.Namespace, seed: int) -> dict[str, Images]:
    many = (images[0].repeat(DRAWS, 1, 1, 1), images[1].repeat(DRAWS))
    return {"clean": images} | {c: (corrupt(many[0], c, a.sigma, a.degrees, seed), many[1]) for c in CORRUPTIONS}


def report(rows: Rows) -> list[str]:
    """The table, then for each patch the strength that the choosing images take and the share of training's gain it gives."""
    names = list(rows["before"]["test"])
    lines = [f"| model of B | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {n} | " + " | ".join(f"{r['test'][t]:.1f}" for t in names) + " |" for n, r in rows.items()]
    said = []
    for c in CORRUPTIONS:
        best = max(STRENGTHS, key=lambda s: sum(rows[f"patch {c}, strength {s}"]["choose"][t] for t in ("clean", c)))
        got, before = rows[f"patch {c}, strength {best}"]["test"], rows["before"]["test"]
        trained = rows[f"fine-tuned on {c} images of B instead"]["test"][c] - before[c]
        said.append(
            f"- {c}: strength {best}, chosen on images that nothing trained on and this table does not hold (mean of clean and {c}), lifts {c} "
            f"accuracy by {got[c] - before[c]:+.1f} points, {(got[c] - before[c]) / trained:.0%} of the {trained:+.1f} that training on it gives; clean "
            f"{got['clean'] - before['clean']:+.1f}."
        )
    return [*lines, "", *said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each of the six fine-tunes")
    parser.add_argument("--source", choices=SHIFTS, default="none", help="shift of A, where the signatures are taken")
    parser.add_argument("--target", choices=SHIFTS, default="none", help="shift of B, whose model is patched")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--keep", type=int, default=7, help="weight layers that are patched")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the whole patch, shared by the corruptions")
    parser.add_argument("--norms", choices=("average", "leave"), default="average")
    parser.add_argument("--levels", type=int, help="quantise the patch to so many values a tensor")
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--degrees", type=float, default=45.0)
    parser.add_argument("--out", type=Path, help="folder for robustness_patch_SOURCE_TARGET.md")
    a = parser.parse_args()
    start = time.process_time()
    every = [trial(a, seed) for seed in range(a.seeds)]
    mean = lambda n, w, t: statistics.mean(r[n][w][t] for r in every)
    rows: Rows = {n: {w: {t: mean(n, w, t) for t in found} for w, found in r.items()} for n, r in every[0].items()}
    lines = report(rows)
    print("\n".join(lines))
    if a.out is not None:
        which = f"--source {a.source} --target {a.target} --seeds {a.seeds}"
        said = (
            "disjoint halves of the images"
            if a.source == a.target
            else f"digits under the shifts {a.source} (A) and {a.target} (B)"
        )
        a.out.mkdir(parents=True, exist_ok=True)
        head = [
            f"## A and B: {said}", "", f"`python -m examples.robustness_patch {which}`: {a.steps} steps a fine-tune at {a.lr:g}, the first {a.keep} weight layers and all "
            f"norms, σ = {a.sigma}, ±{a.degrees:g}°, α = {a.alpha:g} shared by the corruptions; mean of {a.seeds} seeds, {time.process_time() - start:.0f} s of processor time.",
            "", *lines, "",
        ]  # fmt: skip
        (a.out / f"robustness_patch_{a.source}_{a.target}.md").write_text("\n".join(head), encoding="utf-8")


if __name__ == "__main__":
    main()
