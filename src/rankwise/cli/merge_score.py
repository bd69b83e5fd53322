"""What ``rankwise merge`` chooses by held-out data: soups, stragglers, and options searched on a grid; told and drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.cli.common import _value, table
from rankwise.errors import OptionError, need
from rankwise.merge.search import SearchResult


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """``data``: paths or shipped domains, of which the first chooses; ``score``: of which kind; ``search``: option → values.

    Args:
        data: paths or shipped domains.
        score: loss, perplexity, bits_per_byte or accuracy.
        search: option → values to try; default none.
        picture: file to draw the search into; None: no picture.
    """

    data: tuple[str, ...] = ()
    score: str = "loss"
    search: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    picture: str | None = None

    def evaluator(self, net: Any, reader: Any) -> Any:
        """Of ``net``, with a split for each data set."""
        from rankwise.cli.compare import texts_of
        from rankwise.merge.judge.evaluator import Evaluator
        from rankwise.merge.judge.held_out import held_out

        read = {}
        for d in self.data:
            source: Any = d if Path(d).exists() else [{"text": t} for t in texts_of(d)[1]]
            read[d] = held_out(net, reader, source, self.score)
        first = read[self.data[0]]
        scores = {d: h.score for d, h in read.items()}
        return Evaluator(net, scores, batches=first.batches, higher_is_better=first.higher_is_better)

    def models(self, folders: Sequence[str]) -> Any:
        """Whole models, judged in the first one."""
        from rankwise.cli.common import load_model
        from rankwise.merge.judge.model_soups import Models

        net, reader = load_model(folders[0])
        return Models(self.evaluator(net, reader), folders, lambda f: load_model(f)[0])


def held_from(data: Sequence[str], score: str, search: Sequence[str], picture: str | None) -> HeldOut:
    """The flags, checked for what needs no reading.

    Args:
        data: what --score-data names.
        score: what --score names.
        search: each --search, option=values.
        picture: what --picture names, or None.
    """
    from rankwise.cli.common import picture_path

    grid: dict[str, Sequence[Any]] = {}
    for s in search:
        key, sep, raw = s.partition("=")
        if not sep or not key or not raw:
            raise OptionError(f"--search takes option=value,value,… or option=first:last:step; it got {s!r}.")
        if key in grid:
            raise OptionError(f"--search {key} is given twice; give all its values at once.")
        grid[key] = values_of(key, raw)
    if grid and not data:
        raise OptionError("--search chooses by a score on held-out data; give that data with --score-data.")
    if picture is not None and (len(grid) != 1 or not all(map(_number, next(iter(grid.values()))))):
        raise OptionError("--picture draws the search of one option that is a number; give one --search option=first:last:step.")
    if len(set(data)) < len(data):
        raise OptionError(f"--score-data names {next(d for d in data if list(data).count(d) > 1)!r} twice; give each once.")
    return HeldOut(tuple(data), score, grid, picture_path(picture))


def values_of(key: str, raw: str) -> list[Any]:
    """``0:1:0.25`` with both ends, or values with commas between."""
    parts = raw.split(":")
    if len(parts) == 3 and all(_number(_value(p)) for p in parts):
        first, last, step = (float(p) for p in parts)
        count = (last - first) / step if step else -1.0
        if not 0 <= count <= 1000:
            raise OptionError(f"--search {key}={raw}: no step of {step:g} leads from {first:g} to {last:g} in at most 1000 places.")
        return [round(first + i * step, 12) for i in range(int(count + 1e-9) + 1)]
    return [_value(v) for v in raw.split(",")]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fits(held: HeldOut, method: str, options: Mapping[str, Any], given: Mapping[str, Any], kind: str) -> None:
    """Whether the method is chosen by a score and what that needs was given; before any work.

    Args:
        options: the method's own.
        given: ``weights`` and ``model``, None where not given.
        kind: "adapters" or "models".
    """
    from rankwise.catalogue import make
    from rankwise.merge.search import combinations

    rules = [make("merge", method, **{**options, **some}) for some in combinations(held.search)]
    requires = next((r for r in rules if r.needs_evaluator), None)
    if requires is None and not held.search and (held.data or held.score != "loss"):
        flag = "--score-data" if held.data else "--score"
        raise OptionError(
            f"{flag} says nothing to the merge {method!r}, which asks no score; leave it out, choose greedy_soup or learned_soup, or "
            "search an option with --search."
        )
    if requires is not None and not held.data:
        raise OptionError(
            f"The merge {method!r} is chosen by a score on held-out data; give that data with --score-data (text or images that nothing was trained on)."
        )
    if requires is not None and requires.finds_weights and given["weights"] is not None:
        raise OptionError(f"The merge {method!r} finds its weights itself; leave --weights out.")
    if held.data and kind == "adapters" and given["model"] is None:
        raise OptionError(f"The merge {method!r} scores the adapters on their base; give it with --model.")


def told(found: SearchResult, held: HeldOut) -> dict[str, Any]:
    """For JSON and the report."""
    rows = [{**p.options, "scores": p.scores} for p in found.points]
    return {"of": held.score, "chosen_on": held.data[0], "best": found.best.options, "points": rows}


def show(searched: Mapping[str, Any]) -> None:
    """The table of a search, its best row marked."""
    points, best = searched["points"], searched["best"]
    names, splits = list(best), list(points[0]["scores"])
    rows = []
    for p in points:
        chosen = all(p[n] == best[n] for n in names)
        rows.append([*(_short(p[n]) for n in names), *p["scores"].values(), "chosen" if chosen else ""])
    table(f"{searched['of']}, chosen on {searched['chosen_on']}", [*names, *splits, ""], rows, right=[*names, *splits])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def draw(found: SearchResult, held: HeldOut, title: str) -> None:
    """One line a data set over the option's values, the chosen place ringed."""
    assert held.picture is not None
    try:
        import matplotlib
    except ImportError as error:
        raise need("matplotlib", "plots", "A picture") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from rankwise.merge.judge.held_out import SCORES

    (option,) = held.search
    points = sorted(found.points, key=lambda p: p.options[option])
    x = [p.options[option] for p in points]
    fig, ax = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for i, split in enumerate(held.data):
        ax.plot(x, [p.scores[split] for p in points], marker="o", ms=3.5, lw=1.6, color=f"C{i}", label=Path(split).name)
    best = found.best
    ax.scatter([best.options[option]], [best.scores[held.data[0]]], s=110, facecolor="none", edgecolor="C0", lw=1.6, zorder=3)
    better = "higher is better" if SCORES[held.score] else "lower is better"
    ax.set(xlabel=option, ylabel=f"{held.score} ({better})", title=title)
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=9, title="ring: chosen on the first" if len(held.data) > 1 else None)
    fig.savefig(held.picture)
    plt.close(fig)


def progress_of(tick: Callable[[str], None]) -> Callable[[Any], None]:
    return lambda point: tick(str(point.options))
