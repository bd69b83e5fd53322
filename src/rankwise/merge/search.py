"""Options of a merge chosen by held-out scores: every combination of a grid, the best by the first split."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise._renamed import renamed_argument
from rankwise.delta.state import AdapterState
from rankwise.errors import OptionError
from rankwise.merge.checkpoints import merge_checkpoints
from rankwise.merge.engine.base import Source, merge_states, rule_of

if TYPE_CHECKING:
    from rankwise.merge.engine.jobs import CheckpointReport
    from rankwise.merge.judge.evaluator import Evaluator
    from rankwise.merge.judge.model_soups import Models

Grid = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class GridPoint:
    """One combination of options and its score on each split."""

    options: dict[str, Any]
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """All points in the grid's order, and the best on the first split (of equal ones the first)."""

    points: list[GridPoint]
    best: GridPoint


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
    scores: Callable[[dict[str, Any]], dict[str, float]],
    grid: Grid,
    higher_is_better: bool,
    progress: Callable[[GridPoint], None] = lambda point: None,
) -> SearchResult:
    """The scores of each combination.

    Args:
        scores: options → a score on each split.
        grid: option → values.
        higher_is_better: of the first split.
        progress: called with each point of the grid when it is scored.
    """
    points = []
    for options in combinations(grid):
        points.append(GridPoint(options, scores(options)))
        progress(points[-1])
    sign = -1 if higher_is_better else 1
    return SearchResult(points, min(points, key=lambda p: sign * next(iter(p.scores.values()))))


@renamed_argument("oracle", "evaluator")
def search_states(
    states: Sequence[Source],
    method: str,
    grid: Grid,
    evaluator: Evaluator,
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[GridPoint], None] = lambda point: None,
    **options: Any,
) -> tuple[SearchResult, AdapterState]:
    """Adapters merged by each combination, scored on the evaluator's model; the best one's value.

    Args:
        states: the adapters' values.
        method: a registered merge, with its ``options``.
        grid: option → values.
        evaluator: scores on its model.
        weights: one a source; default 1/T each.
        seed: of random drops.
        progress: called with each point of the grid when it is scored.
    """
    for some in combinations(grid):  # what cannot be is told before anything is scored
        rule_of(method, {**options, **some}, len(states))

    def merged(some: dict[str, Any]) -> AdapterState:
        asks = rule_of(method, {**options, **some}, len(states)).needs_evaluator
        return merge_states(states, weights, method, seed=seed, evaluator=evaluator if asks else None, **{**options, **some})

    def scores(some: dict[str, Any]) -> dict[str, float]:
        value = AdapterState(merged(some).sites)
        return {split: evaluator.score(value, split) for split in evaluator.scores}

    found = search(scores, grid, evaluator.higher_is_better, progress)
    return found, merged(found.best.options)


def search_models(
    folders: Sequence[str],
    out: str | Path,
    method: str,
    grid: Grid,
    models: Models,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    *,
    progress: Callable[[GridPoint], None] = lambda point: None,
    force: bool = False,
    **options: Any,
) -> tuple[SearchResult, CheckpointReport]:
    """Whole models merged by each combination into a folder that does not stay, loaded and scored; the best one into ``out``.

    A candidate may equal its base (one end of a path does); the result may only with ``force``.

    Args:
        folders: of the models.
        out: the new folder of the best.
        method: a registered merge of whole models, with its ``options``.
        grid: option → values.
        models: what candidates are judged by.
        weights: one a source; default 1/T each.
        base: what changes are measured from; None: nothing.
        progress: called with each point of the grid when it is scored.
        force: keep a result that equals its base.
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

    found = search(scores, grid, models.evaluator.higher_is_better, progress)
    return found, merged(found.best.options, out, force)


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is the method's, of the options of a merge of whole models."""
    return {k: v for k, v in options.items() if k not in ("on", "missing", "vocabulary", "untie", "dtype", "seed", "shard_bytes")}
