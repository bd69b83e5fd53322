"""Adapters of four domains merged by every method, scored on all of them beside the single ones and a multi-task adapter.

python -m examples.merge_domains [--steps 150] [--out docs/reports]

Trains one LoRA a domain on the shipped base (and one on all domains together, with as many steps as all of them), merges
them by every registered method that takes adapters, and writes a table, a picture of it and a sweep of interpolations
between two of them.  Lower is better throughout: bits a byte on text that no adapter has read.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise import assets, catalogue
from rankwise.assets import tasks
from rankwise.assets.measure import bits_per_byte
from rankwise.errors import RankwiseError
from rankwise.merge import attach_state, merge_states, read_state
from rankwise.train.compare import run_recipe, windows

DOMAINS = ("prose", "xml", "email", "tables")
#: what differs from a method's defaults: with weight 1 a source, the literature's scale for several tasks
OPTIONS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lam": 0.4},
    "magnitude_prune": {"lam": 0.4},
    "dare_linear": {"lam": 0.4},
    "dare_ties": {"lam": 0.8},
    "ties": {"lam": 0.8},
    "breadcrumbs": {"lam": 0.4},
    "knots": {"lam": 0.6},
}
Scores = dict[str, float]


class Bench:
    """The base, the domains' texts, and a score of whatever acts."""

    def __init__(self, chars: int, seed: int = 0) -> None:
        self.model, self.tokenizer = assets.load_base()
        self.texts = {n: tasks.domains()[n] for n in DOMAINS}
        self.held = {n: "\n".join(test)[:chars] for n, (_, test) in self.texts.items()}
        self.batches = {n: windows(self.tokenizer, train, 128, 8, seed) for n, (train, _) in self.texts.items()}

    def scores(self) -> Scores:
        self.model.eval()
        return {n: bits_per_byte(self.model, self.tokenizer, [text]) for n, text in self.held.items()}

    def train(self, name: str, batches: list[Any], steps: int, folder: Path) -> None:
        run_recipe(
            self.model, rw.Recipe(form="lora", r=8, alpha=16), batches, lambda m: 0.0, name=name, steps=steps, lr=3e-3, before=0.0,
            keep=folder / name,
        )  # fmt: skip

    def of(self, state: Any) -> Scores:
        adapter = attach_state(self.model, state, name="judged")
        try:
            return self.scores()
        finally:
            adapter.detach()


def merged(bench: Bench, states: list[Any]) -> dict[str, tuple[Scores, float] | str]:
    """Every method's scores and mean distance from the weighted sum, or why it does not apply."""
    out: dict[str, tuple[Scores, float] | str] = {}
    for m in catalogue.methods("merge"):
        if not getattr(m.cls, "adapters", False) or m.cls().needs_oracle:
            continue
        options = OPTIONS.get(m.name, {})
        weights = [1.0] * len(states) if "lam" in options else None
        try:
            state = merge_states(states, weights, m.name, **options)
        except RankwiseError as refusal:
            out[m.name] = str(refusal)
            continue
        out[m.name] = bench.of(state), statistics.mean(state.meta["errors"].values())
    return out


def sweep(bench: Bench, a: Any, b: Any, pair: tuple[str, str]) -> dict[float, Scores]:
    found = {}
    for i in range(-1, 12):
        t = i / 10
        s = bench.of(merge_states([a, b], [1 - t, t], "task_arithmetic"))
        found[t] = {n: s[n] for n in pair}
    return found


def table(base: Scores, rows: dict[str, Scores], best: Scores) -> list[str]:
    """A line a row: bits a byte by domain, and the mean share of the single adapters' gain that is kept."""
    lines = ["| adapter | " + " | ".join(DOMAINS) + " | gain kept |", "|---" * (len(DOMAINS) + 2) + "|"]
    for name, s in rows.items():
        kept = statistics.mean((base[d] - s[d]) / (base[d] - best[d]) for d in DOMAINS)
        lines.append(f"| {name} | " + " | ".join(f"{s[d]:.3f}" for d in DOMAINS) + f" | {kept:+.0%} |")
    return lines


def draw(base: Scores, rows: dict[str, Scores], best: Scores, swept: dict[float, Scores], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 0.6 + 0.27 * len(rows)), constrained_layout=True, width_ratios=[3, 2])
    kept = {n: [(base[d] - s[d]) / (base[d] - best[d]) for d in DOMAINS] for n, s in rows.items()}
    names = sorted(rows, key=lambda n: statistics.mean(kept[n]))
    for j, d in enumerate(DOMAINS):
        left.scatter([kept[n][j] for n in names], range(len(names)), s=22, color=f"C{j}", label=d, zorder=3)
    left.barh(range(len(names)), [statistics.mean(kept[n]) for n in names], color="#e3e8ef", height=0.7)
    left.set_yticks(range(len(names)), names, fontsize=8.5)
    left.axvline(0, color="#c44", lw=1, ls="--")
    left.axvline(1, color="#888", lw=1, ls="--")
    left.set(xlabel="share of the single adapter's gain (bar: mean)", xlim=(-0.6, 1.25))
    left.legend(frameon=False, fontsize=8.5, loc="lower right")
    for j, d in enumerate(next(iter(swept.values()))):
        right.plot(list(swept), [s[d] for s in swept.values()], marker="o", ms=3, color=f"C{DOMAINS.index(d)}", label=d)
        right.axhline(base[d], color=f"C{DOMAINS.index(d)}", lw=1, ls=":")
    a, b = next(iter(swept.values()))
    right.set(xlabel=f"λ: (1 − λ)·{a} + λ·{b}", ylabel="bits a byte (dotted: the base)")
    right.legend(frameon=False, fontsize=8.5)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    fig.savefig(path)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--chars", type=int, default=16_000, help="characters of held-out text a domain")
    parser.add_argument("--out", type=Path, default=Path("docs/reports"))
    a = parser.parse_args()
    bench = Bench(a.chars)
    base = bench.scores()
    print("base", base, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows: dict[str, Scores] = {"base": base}
        states = {}
        for n in DOMAINS:
            bench.train(n, bench.batches[n], a.steps, folder)
            states[n] = read_state(bench.model, folder / n)
            rows[f"only {n}"] = bench.of(states[n])
            print(n, rows[f"only {n}"], flush=True)
        together = [b for group in zip(*bench.batches.values(), strict=False) for b in group]
        bench.train("together", together, len(DOMAINS) * a.steps, folder)
        rows["multi-task"] = bench.of(read_state(bench.model, folder / "together"))
        best = {d: rows[f"only {d}"][d] for d in DOMAINS}
        notes = []
        for name, got in merged(bench, list(states.values())).items():
            if isinstance(got, str):
                notes.append(f"- {name}: {got}")
            else:
                rows[name] = got[0]
            print(name, got, flush=True)
        swept = sweep(bench, states["prose"], states["xml"], ("prose", "xml"))
    a.out.mkdir(parents=True, exist_ok=True)
    draw(base, rows, best, swept, a.out / "merging.svg")
    text = [
        "# Merging adapters of four domains", "",
        f"`python -m examples.merge_domains --steps {a.steps} --chars {a.chars}`: LoRA of rank 8 on every linear of the shipped base, {a.steps} steps of 8 × 128 tokens "
        f"a domain (the multi-task one {len(DOMAINS) * a.steps}); bits a byte on {a.chars:,} held-out characters of each; torch {torch.__version__}, seed 0. "
        "*Gain kept*: the mean share of what each domain's own adapter gains over the base.", "",
        *table(base, rows, best), "", "![share of the gain kept by each merge; interpolation between two adapters](merging.svg)", "",
        f"Options other than the defaults (weight 1 a source there, 1/4 elsewhere): {', '.join(f'{n} {o}' for n, o in OPTIONS.items())}.",
        *(["", "Not applied:", *notes] if notes else []),
    ]  # fmt: skip
    (a.out / "merging.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
