"""Adapters of four domains merged by every method, scored on all of them beside the single ones and a multi-task adapter.

python -m examples.merge_domains [--steps 150] [--out docs/reports]

Trains one LoRA a domain on the shipped base (and one on all domains together, with as many steps as all of them) and merges
them by every registered method: all four at once; of methods between two, two of them; of methods of one, that one part of
the way.  Soups are chosen, and their weights learnt, on documents that nothing trains on and no table reports.  Writes the
tables and a picture with two sweeps: from adapter to adapter, and from the base past an adapter.  Lower is better
throughout: bits a byte on text that no adapter has read.
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
from rankwise.merge import Evaluator, attach_state, merge_states, read_state
from rankwise.merge.methods.interpolation import path
from rankwise.merge.methods.interpolation import sweep as line
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
    "learned_soup": {"epochs": 2},
}
#: what is no merge of four finished adapters into one model
ELSEWHERE = {"robust_signature": "a patch of robustness, not a mixture of tasks: see robustness_patch.md"}
PAIR = ("prose", "xml")
Scores = dict[str, float]


class Bench:
    """The base, the domains' texts, and a score of whatever acts."""

    def __init__(self, chars: int, seed: int = 0) -> None:
        self.model, self.tokenizer = assets.load_base()
        texts = {n: (list(tasks.domains()[n][0]), tasks.domains()[n][1]) for n in DOMAINS}
        self.held = {n: "\n".join(test)[:chars] for n, (_, test) in texts.items()}
        self.choosing = {n: self._spare(train, max(chars // 4, 2_000)) for n, (train, _) in texts.items()}
        self.batches = {n: windows(self.tokenizer, train, 128, 8, seed) for n, (train, _) in texts.items()}
        rows = [windows(self.tokenizer, docs, 128, 2, seed)[:3] for docs in self.choosing.values()]
        self.evaluator = Evaluator(self.model, self._choose, batches=[b for group in zip(*rows, strict=False) for b in group])

    def _spare(self, train: list[str], chars: int) -> list[str]:
        """The last documents, taken out of what is trained on."""
        spare: list[str] = []
        while sum(map(len, spare)) < chars:
            spare.append(train.pop())
        return spare

    def _choose(self, model: Any) -> float:
        """Mean over the domains of the spare documents' bits a byte."""
        return statistics.mean(bits_per_byte(model, self.tokenizer, ["\n".join(d)]) for d in self.choosing.values())

    def judge(self, domains: tuple[str, ...]) -> Evaluator:
        """A split for each of some domains' reported text."""
        score = lambda n: lambda m: bits_per_byte(m, self.tokenizer, [self.held[n]])
        return Evaluator(self.model, {n: score(n) for n in domains})

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


def merged(bench: Bench, states: list[Any], names: list[str]) -> dict[str, Scores | str]:
    """Each method's scores, or why it does not apply."""
    out: dict[str, Scores | str] = {}
    for name in names:
        options, rule = OPTIONS.get(name, {}), catalogue.find("merge", name).cls()
        weights = [1.0] * len(states) if "lam" in options else None
        try:
            out[name] = bench.of(
                merge_states(states, weights, name, evaluator=bench.evaluator if rule.needs_evaluator else None, **options)
            )
        except RankwiseError as refusal:
            out[name] = str(refusal)
        print(name, out[name], flush=True)
    return out


def names_of(count: int | None) -> list[str]:
    """Methods of adapters that take so many sources, or any number."""
    rules = {m.name: m.cls for m in catalogue.methods("merge") if getattr(m.cls, "adapters", False)}
    return [n for n, cls in rules.items() if cls.count == count and n not in ELSEWHERE]  # type: ignore[attr-defined]


def swept(bench: Bench, states: dict[str, Any], far: str) -> tuple[dict[float, Scores], dict[float, Scores]]:
    """From one of the pair to the other and a little past both; from the base to ``far``'s adapter and past it, on all domains."""
    grid = [round(-0.2 + 0.1 * i, 1) for i in range(15)]
    first, second = (states[n] for n in PAIR)
    across = {p.lam: p.scores for p in line(bench.judge(PAIR), first, second, grid)}
    away = {p.lam: p.scores for p in path(bench.judge(DOMAINS), states[far], [round(0.125 * i, 3) for i in range(13)])}
    return across, away


def table(base: Scores, rows: dict[str, Scores], best: Scores, domains: tuple[str, ...] = DOMAINS) -> list[str]:
    """A line a row: bits a byte by domain, and the mean share of the single adapters' gain that is kept."""
    lines = ["| adapter | " + " | ".join(domains) + " | gain kept |", "|---" * (len(domains) + 2) + "|"]
    for name, s in rows.items():
        kept = statistics.mean((base[d] - s[d]) / (base[d] - best[d]) for d in domains)
        lines.append(f"| {name} | " + " | ".join(f"{s[d]:.3f}" for d in domains) + f" | {kept:+.0%} |")
    return lines


def draw(base: Scores, rows: dict[str, Scores], best: Scores, across: dict[float, Scores], away: dict[float, Scores], far: str, to: Path) -> None:  # fmt: skip
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(12, 1.2 + 0.25 * len(rows)), constrained_layout=True)
    grid = fig.add_gridspec(2, 2, width_ratios=[3, 2])
    left, right, low = fig.add_subplot(grid[:, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, 1])
    kept = {n: [(base[d] - s[d]) / (base[d] - best[d]) for d in DOMAINS] for n, s in rows.items()}
    names = sorted(rows, key=lambda n: statistics.mean(kept[n]))
    edge = -0.6
    for j, d in enumerate(DOMAINS):
        inside = [(kept[n][j], i) for i, n in enumerate(names) if kept[n][j] >= edge]
        left.scatter(*zip(*inside, strict=True), s=22, color=f"C{j}", label=d, zorder=3)
        off = [i for i, n in enumerate(names) if kept[n][j] < edge]
        left.scatter([edge] * len(off), off, s=26, marker="<", color=f"C{j}", zorder=3, clip_on=False)
    left.barh(range(len(names)), [statistics.mean(kept[n]) for n in names], color="#e3e8ef", height=0.7)
    left.set_yticks(range(len(names)), names, fontsize=8.5)
    left.axvline(0, color="#c44", lw=1, ls="--")
    left.axvline(1, color="#888", lw=1, ls="--")
    left.set(
        xlabel="share of the single adapter's gain (bar: mean; ◂: off the picture)",
        xlim=(edge, 1.25),
        ylim=(-0.7, len(names) - 0.3),
    )
    left.legend(frameon=False, fontsize=8.5, loc="lower right")
    for ax, found in ((right, across), (low, away)):
        for d in next(iter(found.values())):
            ax.plot(list(found), [s[d] for s in found.values()], marker="o", ms=3, color=f"C{DOMAINS.index(d)}", label=d)
            ax.axhline(base[d], color=f"C{DOMAINS.index(d)}", lw=1, ls=":")
        ax.set_ylabel("bits a byte (dotted: the base)")
        ax.legend(frameon=False, fontsize=8.5)
    right.set(xlabel=f"λ·{PAIR[0]} + (1 − λ)·{PAIR[1]}")
    low.set(xlabel=f"base + α·{far}")
    for ax in (left, right, low):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    fig.savefig(to)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--chars", type=int, default=16_000, help="characters of held-out text a domain")
    parser.add_argument("--far", choices=DOMAINS, default="email", help="whose adapter is followed from the base")
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
    notes = [f"- {n}: {why}." for n, why in ELSEWHERE.items()]
    found = merged(bench, list(states.values()), names_of(None))
    two = merged(bench, [states[n] for n in PAIR], [*names_of(2), "average", "ties"])
    one = merged(bench, [states[a.far]], names_of(1))
    for name, got in {**found, **two, **one}.items():
        if isinstance(got, str):
            notes.append(f"- {name}: {got}")
    rows |= {n: s for n, s in found.items() if not isinstance(s, str)}
    pair = (
        {"base": base} | {f"only {n}": rows[f"only {n}"] for n in PAIR} | {n: s for n, s in two.items() if not isinstance(s, str)}
    )
    alone = {"base": base, f"only {a.far}": rows[f"only {a.far}"]} | {n: s for n, s in one.items() if not isinstance(s, str)}
    across, away = swept(bench, states, a.far)
    a.out.mkdir(parents=True, exist_ok=True)
    draw(base, rows, best, across, away, a.far, a.out / "merging.svg")
    least = min(away, key=lambda t: statistics.mean(away[t].values()))
    text = [
        "# Merging adapters of four domains", "",
        f"`python -m examples.merge_domains --steps {a.steps} --chars {a.chars}`: LoRA of rank 8 on every linear of the shipped base, {a.steps} steps of 8 × 128 tokens "
        f"a domain (the multi-task one {len(DOMAINS) * a.steps}); bits a byte on {a.chars:,} held-out characters of each; torch {torch.__version__}, seed 0. "
        "*Gain kept*: the mean share of what each domain's own adapter gains over the base. Soups are chosen on other documents, "
        f"about {a.chars // 4:,} characters a domain.", "",
        *table(base, rows, best), "", "![share of the gain kept by each merge; sweeps between two adapters and along one](merging.svg)", "",
        f"Options other than the defaults (weight 1 a source where λ is among them): {', '.join(f'{n} {o}' for n, o in OPTIONS.items())}.", "",
        f"## Two of them: {PAIR[0]} and {PAIR[1]}", "", "Methods that are between two sources, beside two that are not.", "",
        *table(base, pair, best, PAIR), "",
        f"## One of them, part of the way: {a.far}", "",
        f"`robust_interpolation` at its α = 0.75. Along the path drawn above, the mean over the four domains is lowest at α = {least:g}.", "",
        *table(base, alone, best, DOMAINS),
        *(["", "Not applied:", *notes] if notes else []),
    ]  # fmt: skip
    (a.out / "merging.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
