"""Makes the shipped base: ``python -m rankwise.assets.pretrain`` trains a 5 M-parameter Llama on Python's own source.

The run is a function of (config, seed, progress): the batch of step t is drawn from t alone, the learning rate
follows the share of the budget that is spent (a warm-up, a plateau, a linear fall to nothing over the last 60 %), and
the state on disk holds weights, AdamW's moments, step and seconds spent, so a run that is stopped goes on where it
was.  Under ``--steps`` the budget is counted in steps and the result repeats bit for bit; under ``--minutes`` it is
counted in seconds of training, and how many steps fit depends on the machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rankwise.assets.export import export
from rankwise.assets.pretrain_run import (
    TINY,
    PretrainConfig,
    PretrainRun,
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: one budget, a work folder for the state, and where the finished base goes."""
    line = argparse.ArgumentParser(prog="python -m rankwise.assets.pretrain", description=__doc__)
    budget = line.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="training time, spread over any number of runs (default 40)")
    budget.add_argument("--steps", type=int, help="training steps; the result repeats bit for bit")
    line.add_argument("--work", type=Path, default=Path("pretrain-work"), help="folder of the resumable state")
    line.add_argument("--out", type=Path, help="folder for the finished base (default: WORK/base)")
    line.add_argument("--threads", type=int, default=2)
    line.add_argument("--tiny", action="store_true", help="a toy of the same kind, to try the script")
    line.add_argument("--export-only", action="store_true", help="write the base from the saved state; no training")
    return line.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    run = PretrainRun(TINY if options.tiny else PretrainConfig(), options.work)
    if not options.export_only:
        minutes = None if options.steps else (options.minutes or 40.0)
        run.train(steps=options.steps, minutes=minutes, say=lambda text: print(text, flush=True))
    export(run, options.out or options.work / "base")


if __name__ == "__main__":
    main()
