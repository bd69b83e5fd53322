"""Two adapters of one base, fused at each step instead of merged: bits a byte on both domains, and a text.

python -m examples.fuse_logits [--steps 20] [--keep DIR]

Trains one LoRA a domain on the shipped base for a few steps, then scores held-out text of both domains under each adapter
alone, the sum of their weights, and their fused logits (static with w = 1 and 1/2, dynamic).  Lower is better.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.assets.measure import bits_per_byte
from rankwise.decoding.model import Fusion
from rankwise.train.compare import run_recipe, windows

DOMAINS = ("xml", "email")


class Scored(nn.Module):
    """A fusion as what a scorer calls: a model of whole texts."""

    def __init__(self, model: nn.Module, fusion: Fusion) -> None:
        super().__init__()
        self.model, self.config, self.fusion = model, model.config, fusion

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.fusion.logits(input_ids))


def train(model: Any, tokenizer: Any, domain: str, steps: int, folder: Path) -> str:
    batches = windows(tokenizer, tasks.domains()[domain][0], 128, 8)
    recipe = rw.Recipe(form="lora", r=8, alpha=16)
    run_recipe(model, recipe, batches, lambda m: 0.0, name=domain, steps=steps, lr=3e-3, before=0.0, keep=folder / domain)
    return str(folder / domain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chars", type=int, default=2_000, help="characters of held-out text a domain")
    parser.add_argument("--keep", type=Path, help="folder for the adapters; those that are there are used")
    a = parser.parse_args()
    model, tokenizer = assets.load_base()
    held = {n: "\n".join(tasks.domains()[n][1])[: a.chars] for n in DOMAINS}
    with contextlib.ExitStack() as stack:
        folder = a.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept = [str(folder / n) if (folder / n).exists() else train(model, tokenizer, n, a.steps, folder) for n in DOMAINS]
        for name, path in zip(DOMAINS, kept, strict=True):
            rw.load(model, path, name=name)
    model.eval()

    def show(title: str, scored: Any) -> None:
        row = [bits_per_byte(scored, tokenizer, [text], batch_tokens=512, window=128) for text in held.values()]
        print(f"{title:28}" + "".join(f"{x:9.3f}" for x in row) + f"{sum(row) / len(row):9.3f}", flush=True)

    print(f"{'bits a byte':28}" + "".join(f"{n:>9}" for n in DOMAINS) + "     mean")
    views: dict[str, dict[str, float]] = {"base": {}} | {f"{n} alone": {n: 1.0} for n in DOMAINS}
    views |= {"weights summed": dict.fromkeys(DOMAINS, 1.0), "weights averaged": dict.fromkeys(DOMAINS, 0.5)}
    for title, view in views.items():
        with rw.view(model, view):
            show(title, model)
    fusions = {f"logits, static {w:g}": Fusion.of_adapters(model, dict.fromkeys(DOMAINS, w), "static") for w in (1.0, 0.5)}
    for ray in ("shift", "weight"):
        fusions[f"logits, dynamic ({ray})"] = Fusion.of_adapters(model, dict.fromkeys(DOMAINS, 1.0), "dynamic", ray=ray)
    for title, fusion in fusions.items():
        show(title, Scored(model, fusion))
    fusion = fusions["logits, dynamic (shift)"]
    ids = tokenizer("From: ", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with fusion.acting(), torch.no_grad():
        made = model.generate(
            ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id, logits_processor=[fusion.processor()]
        )
    print("\ndynamic:", repr(tokenizer.decode(made[0])))


if __name__ == "__main__":
    main()
