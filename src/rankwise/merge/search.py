"""Options of a merge chosen by held-out scores: every combination of a grid, the best by the first split."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.delta import AdapterState
from rankwise.errors import OptionError
from rankwise.merge.base import Source, merge_states, rule_of
from rankwise.merge.checkpoints import merge_checkpoints
from rankwise.merge.jobs import CheckpointReport
from rankwise.merge.model_soups import Models
from rankwise.merge.oracle import Oracle

Grid = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of options and its score on each split."""

    options: dict[str, Any]
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Found:
    """All points in the grid's order, and the best on the first split (of equal ones the first)."""

    points: list[Point]
    best: Point


def combinations(grid: Grid) -> Iterator[dict[str, Any]]:
    """The product of all options' values.

    Raises:
        OptionError: an option without values.
    """
    if empty := next((n for n, values in grid.items() if not values), None):
        raise OptionError(f"The search has no value for {empty!r}; give at least one.")
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def search(
    scores: Callable[[dict[str, Any]], dict[str, float]], grid: Grid, higher_is_better: bool,
    progress: Callable[[Point], None] = lambda point: None,
) -> Found:  # fmt: skip
    """The scores of each combination."""
    points = []
    for options in combinations(grid):
        points.append(Point(options, scores(options)))
        progress(points[-1])
    sign = -1 if higher_is_better else 1
    return Found(points, min(points, key=lambda p: sign * next(iter(p.scores.values()))))


def search_states(
    states: Sequence[Source], method: str, grid: Grid, oracle: Oracle, weights: Sequence[float] | None = None, *, seed: int = 0,
    progress: Callable[[Point], None] = lambda point: None, **options: Any,
) -> tuple[Found, AdapterState]:  # fmt: skip
    """Adapters merged by each combination, scored on the oracle's model; the best one's value."""
    for some in combinations(grid):  # what cannot be is told before anything is scored
        rule_of(method, {**options, **some}, len(states))

    def merged(some: dict[str, Any]) -> AdapterState:
        asks = rule_of(method, {**options, **some}, len(states)).needs_oracle
        return merge_states(states, weights, method, seed=seed, oracle=oracle if asks else None, **{**options, **some})

    def scores(some: dict[str, Any]) -> dict[str, float]:
        value = AdapterState(merged(some).sites)
        return {split: oracle.score(value, split) for split in oracle.scores}

    found = search(scores, grid, oracle.higher_is_better, progress)
    return found, merged(found.best.options)


def search_models(
    folders: Sequence[str], out: str | Path, method: str, grid: Grid, models: Models, weights: Sequence[float] | None = None,
    base: str | None = None, *, progress: Callable[[Point], None] = lambda point: None, force: bool = False, **options: Any,
) -> tuple[Found, CheckpointReport]:  # fmt: skip
    """Whole models merged by each combination into a folder that does not stay, loaded and scored; the best one into ``out``.

    A candidate may equal its base (one end of a path does); the result may only with ``force``.
    """

    def merged(some: dict[str, Any], to: str | Path, keep: bool) -> CheckpointReport:
        return merge_checkpoints(
            folders, to, method, weights, base, models=models if finds else None, force=keep, **{**options, **some}
        )

    finds = any(rule_of(method, {**_own(options), **some}, len(folders)).finds_weights for some in combinations(grid))

    def scores(some: dict[str, Any]) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            merged(some, Path(folder) / "candidate", True)
            return models.scores_of(Path(folder) / "candidate")

    found = search(scores, grid, models.oracle.higher_is_better, progress)
    return found, merged(found.best.options, out, force)


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is the method's, of the options of a merge of whole models."""
    return {k: v for k, v in options.items() if k not in ("on", "missing", "vocabulary", "untie", "dtype", "seed", "shard_bytes")}
