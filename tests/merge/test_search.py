"""The search over a grid of options: every combination once, in order, and the best by the first split."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.errors import OptionError
from rankwise.merge.search import GridPoint, combinations, search

GRID = {"density": [0.2, 0.5], "elect": ["a", "b", "c"]}


def scores(options: dict[str, Any]) -> dict[str, float]:
    value = {"a": 3.0, "b": 1.0, "c": 1.0}[options["elect"]]
    return {"validation": value, "test": -value}


def test_every_combination_once_the_last_option_fastest() -> None:
    found = list(combinations(GRID))
    assert len(found) == 6 and found[:2] == [{"density": 0.2, "elect": "a"}, {"density": 0.2, "elect": "b"}]
    assert list(combinations({})) == [{}], "no grid is one combination"


def test_an_option_without_values_is_refused() -> None:
    with pytest.raises(OptionError, match="no value for 'elect'"):
        list(combinations({"density": [1], "elect": []}))


def test_the_best_is_of_the_first_split_and_of_equal_ones_the_first() -> None:
    seen: list[GridPoint] = []
    low, high = search(scores, GRID, False, seen.append), search(scores, GRID, True)
    assert low.best.options == {"density": 0.2, "elect": "b"} and high.best.options == {"density": 0.2, "elect": "a"}
    assert seen == low.points and len(seen) == 6 and low.best.scores == {"validation": 1.0, "test": -1.0}
