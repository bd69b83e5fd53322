"""The folder a run writes to: whether it can be, what of an earlier run stands there, and what a finished run leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import Option, OptionError
from rankwise.store.atomic import replace_file
from rankwise.train.checkpoint import whole_checkpoint


@dataclasses.dataclass
class Result:
    """What a run gave.

    Args:
        adapter: its handle, trained and still attached.
        metrics: figures before and after.
        output_dir: where its files are.
        plot: the picture of the loss; None without matplotlib.
        log: one line of JSON a logged step.
    """

    adapter: Any
    metrics: dict[str, Any]
    output_dir: Path
    plot: Path | None = None
    log: Path | None = None


def check_writable(out: Path) -> None:
    """Raise OptionError where no folder can stand at ``out``."""
    if out.exists() and not out.is_dir():
        raise OptionError(f"The output {str(out)!r} is a file; give a folder.")
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OptionError(
            f"The output {str(out)!r} cannot be written: {str(above)!r} is {'read-only' if above.is_dir() else 'a file'}."
        )


def earlier_run(out: Path, resume: bool | str, overwrite: bool) -> list[Path]:
    """What of an earlier run stands in the folder and is to go, once all that can be refused has been; never lost in silence."""
    check_writable(out)
    if resume:
        whole_checkpoint(out, resume)
    earlier = sorted([*out.glob("checkpoint-*"), *out.glob("adapter")])
    if not earlier or resume:
        return []
    if not overwrite:
        names = ", ".join(p.name for p in earlier[:3])
        go_on, give_up = Option("resume", True), Option("overwrite", True)
        what = f"{str(out)!r} already holds a run ({names}); go on from it with "
        raise OptionError(what, go_on, ", choose another folder, or give it up with ", give_up, ".")
    return earlier


def remove(paths: Sequence[Path]) -> None:
    """Remove files, links and whole folders."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_result(adapter: Any, history: Sequence[Mapping[str, Any]], out: Path, metrics: dict[str, Any]) -> Result:
    """Adapter, log, metrics and picture of a finished run.

    Args:
        adapter: to be saved in ``out/adapter``.
        history: what the Trainer logged.
        out: the run's folder.
        metrics: plain data.
    """
    adapter.save(out / "adapter")
    log = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    replace_file(out / "log.jsonl", "".join(json.dumps(e) + "\n" for e in log).encode())
    replace_file(out / "metrics.json", json.dumps(metrics, indent=2, default=float).encode())
    return Result(adapter, metrics, out, _plot(log, out / "loss.svg"), out / "log.jsonl")


def _plot(log: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    points = [(e["step"], e["loss"]) for e in log if "loss" in e]
    if len(points) < 2:
        return None
    try:
        import matplotlib
    except ImportError:
        return None  # plots are an extra; the log holds the numbers
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.5, 3.4), constrained_layout=True)
    ax.plot(*zip(*points, strict=True), lw=1.6)
    ax.set(xlabel="step", ylabel="loss")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    fig.savefig(path)
    plt.close(fig)
    return path
