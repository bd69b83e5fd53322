"""The picture of a sweep: held-out loss of every job beside the base, and the training losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: curves that get a colour and a name; the others are grey
NAMED = 6
_SHOWN = 30


def draw(outcomes: Sequence[Any], path: Path) -> Path | None:
    """Write the picture; None where nothing finished, or matplotlib is not installed (sweep.json holds the numbers)."""
    done = sorted((o for o in outcomes if o.after), key=lambda o: o.score())
    if not done:
        return None
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = max(3.6, 1.3 + 0.27 * min(len(done), _SHOWN))
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, height), constrained_layout=True)
    _scores(left, done)
    _curves(right, done)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


def _scores(ax: Any, done: Sequence[Any]) -> None:
    """A dot a job, the best on top, the base as a line."""
    measure = "bits_per_byte" if "bits_per_byte" in done[0].after else "loss"
    shown = done[:_SHOWN]
    values = [o.after[measure] for o in shown]
    base = shown[0].before[measure]
    for i, (o, v) in enumerate(zip(shown, values, strict=True)):
        ax.plot([base, v], [i, i], color=_colour(i), lw=1.2, alpha=0.5)
        ax.plot(v, i, "o", color=_colour(i), ms=6)
    ax.axvline(base, color="0.35", ls=":", lw=1.2)
    ax.annotate("base", (base, 1.0), xycoords=("data", "axes fraction"), fontsize=9, color="0.35", ha="center", va="bottom")
    ax.set_yticks(range(len(shown)), [o.name for o in shown], fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.08)
    more = f" (the best {len(shown)} of {len(done)})" if len(done) > len(shown) else ""
    ax.set_xlabel(f"held-out {'bits per byte' if measure == 'bits_per_byte' else 'loss, nats a token'}{more}")


def _curves(ax: Any, done: Sequence[Any]) -> None:
    """Training losses, a running mean; jobs that saw the same rows at each step, less their mean at that step."""
    paired = len(done) > 1 and len({tuple(o.settings[k] for k in ("steps", "batch", "seed")) for o in done}) == 1
    curves = [o.losses for o in done]
    if paired:
        common = [sum(step) / len(done) for step in zip(*curves, strict=True)]
        curves = [[v - c for v, c in zip(losses, common, strict=True)] for losses in curves]
        ax.axhline(0, color="0.35", ls=":", lw=1.2)
    for i, losses in reversed(list(enumerate(curves))):
        named = i < NAMED
        smooth = _smooth(losses)
        ax.plot(range(1, len(smooth) + 1), smooth, lw=1.5 if named else 0.9, color=_colour(i), alpha=0.95 if named else 0.6)
    for i, o in enumerate(done[:NAMED]):
        ax.plot([], [], color=_colour(i), lw=1.5, label=o.name)
    if len(done) > NAMED:
        ax.plot([], [], color="0.7", lw=1, label=f"{len(done) - NAMED} more")
    ax.set_xlabel("step (running mean over a tenth)")
    ax.set_ylabel("training loss against the jobs' mean" if paired else "training loss, nats a token")
    ax.legend(fontsize=8, frameon=False)


def _colour(i: int) -> str:
    return f"C{i}" if i < NAMED else "0.7"


def _smooth(losses: Sequence[float]) -> list[float]:
    width = max(1, len(losses) // 10)
    return [sum(losses[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(losses))]
