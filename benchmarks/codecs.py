"""Stored size and quality of coded adapters beside safetensors: bits a byte of held-out text before and after coding.

python -m benchmarks.codecs [--steps 150] [--chars 6000] [--out docs/reports/codecs.md]

Trains a LoRA of rank 8 on a shipped domain (and a second one from the same start on the same text in another order, the
reference of the differences), writes it by every codec, loads each file back, and scores the base under it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.cli.convert import write
from rankwise.codecs.compeft import ComPEFT
from rankwise.codecs.search import search
from rankwise.train.compare import run_recipe, windows

CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("compeft, k = 0.05", {"name": "compeft", "density": 0.05}, True),
    ("compeft, k = 0.1", {"name": "compeft", "density": 0.1}, True),
    ("compeft, k = 0.2 (default)", {"name": "compeft"}, True),
    ("compeft, k = 0.2, per tensor", {"name": "compeft", "per_tensor": True}, True),
    ("compeft, k = 0.5, per tensor", {"name": "compeft", "density": 0.5, "per_tensor": True}, True),
    ("ternary, k = 0.2, per tensor", {"name": "ternary", "per_tensor": True}, False),
    ("intk, k = 4", {"name": "intk", "k": 4}, False),
    ("intk, k = 8", {"name": "intk", "k": 8}, False),
    ("nf4", {"name": "nf4"}, False),
    ("lossless", {"name": "lossless"}, False),
    ("delta, lossless", {"name": "delta"}, False),
    ("delta, intk k = 4", {"name": "delta", "inner": {"name": "intk", "k": 4}}, False),
    ("delta, compeft k = 0.2 per tensor", {"name": "delta", "inner": {"name": "compeft", "per_tensor": True}}, False),
]


def train(model: Any, tokenizer: Any, text: list[str], folder: Path, steps: int, seed: int) -> None:
    run_recipe(
        model, rw.Recipe(form="lora", r=8, alpha=16), windows(tokenizer, text, 128, 8, seed), lambda m: 0.0, name="trained",
        steps=steps, lr=3e-3, before=0.0, keep=folder,
    )  # fmt: skip


def tuned(model: Any, folder: Path, options: dict[str, Any], loss: Callable[[], float]) -> dict[str, Any]:
    """The options with the alpha of least ``loss`` (of text that is neither trained on nor reported)."""
    adapter = rw.load(model, folder, name="tuned")
    mine = adapter.named_parameters()

    @torch.no_grad()
    def score(tensors: dict[str, torch.Tensor]) -> float:
        for n, t in tensors.items():
            mine[n].copy_(t)
        return loss()

    codec = ComPEFT(**{k: v for k, v in options.items() if k != "name"})
    found = search(codec, {n: t.detach().clone() for n, t in mine.items()}, score)
    adapter.detach()
    return {**options, "alpha": found.codec.alpha}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--steps", type=int, default=150)
    parse.add_argument("--chars", type=int, default=6000)
    parse.add_argument("--domain", default="tables")
    parse.add_argument("--out", default="docs/reports/codecs.md")
    args = parse.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = assets.load_base()
    learn, test = tasks.domains()[args.domain]
    text = "\n".join(test)
    held, chosen = text[: args.chars], text[args.chars : args.chars + 2000]

    def bits(of: str) -> float:
        return assets.bits_per_byte(model, tokenizer, [of])

    rows: list[tuple[str, int | None, float, float, float]] = []
    with tempfile.TemporaryDirectory() as where:
        a, b = Path(where) / "a", Path(where) / "b"
        train(model, tokenizer, learn, a, args.steps, 0)
        train(model, tokenizer, learn, b, args.steps, 1)
        base = bits(held)
        adapter = rw.load(model, a, name="plain")
        plain = bits(held)
        numel = sum(t.numel() for t in adapter.tensors().values())
        adapter.detach()
        other = rw.load(model, b, name="other")
        alone = bits(held)  # what a difference of nothing would score
        other.detach()
        native = (a / "rankwise.safetensors").stat().st_size
        cases = [(n, o) for n, o, _ in CASES]
        cases += [(f"{n}, α searched", tuned(model, a, o, lambda: bits(chosen))) for n, o, s in CASES if s]
        for name, options in cases:
            reference = str(b) if options["name"] == "delta" else None
            report = write(model, rw.load(model, a, name="source"), f"{where}/coded", options, reference)
            coded = rw.load(model, f"{where}/coded", name="coded", reference=reference)
            label = name.replace("α searched", f"α = {options.get('alpha', 1):g} searched")
            errors = report["errors"].values()
            rows.append((label, report["bytes"], bits(held), sum(errors) / len(errors), max(errors)))
            coded.detach()
    Path(args.out).write_text(page(args, base, plain, alone, native, numel, rows))
    print(Path(args.out).read_text())


def page(args: Any, base: float, plain: float, alone: float, native: int, numel: int, rows: list[Any]) -> str:
    lines = [
        "# Coded adapters: size and quality",
        "",
        f"`python -m benchmarks.codecs --steps {args.steps} --chars {args.chars}`: LoRA of rank 8 on every linear of the shipped base, "
        f"{args.steps} steps of 8 × 128 tokens of the domain `{args.domain}`, one thread; bits a byte on {args.chars:,} held-out characters; "
        f"torch {torch.__version__}, seed 0. α is searched on 2,000 other held-out characters. *Smaller*: the plain native file "
        "(fp32 safetensors with its header) over the coded file, everything in it counted. *Gain kept*: the share of what the plain "
        "adapter gains over the base. Errors are ‖ΔŴ − ΔW‖/‖ΔW‖ over the places. The reference of `delta` began at the same start and "
        "read the same text in another order; its bytes are not counted, and its own score is the control: a lossy difference has only "
        "to keep what lies between the two.",
        "",
        "| adapter | bytes | smaller | bits a byte | gain kept | mean error | largest |",
        "|---|---|---|---|---|---|---|",
        f"| none (the base) | 0 |  | {base:.4f} | 0% |  |  |",
        f"| safetensors fp32 | {native:,} | 1 | {plain:.4f} | 100% | 0 | 0 |",
        f"| the reference of delta, alone | {native:,} | 1 | {alone:.4f} | {(base - alone) / (base - plain):.0%} |  |  |",
        f"| safetensors bf16 (tensors alone) | {2 * numel:,} | {native / (2 * numel):.2f} |  |  |  |  |",
    ]
    for name, size, score, mean, worst in rows:
        kept = (base - score) / (base - plain)
        lines.append(f"| {name} | {size:,} | {native / size:.1f} | {score:.4f} | {kept:.0%} | {mean:.3g} | {worst:.3g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
