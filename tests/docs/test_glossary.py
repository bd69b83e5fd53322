"""docs/glossary.md: few terms, each in one sentence, each of something that is in the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs/glossary.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([\w.]+)` \|$", PAGE, re.MULTILINE)
MOST = 20


def found(path: str) -> Any:
    """What a dotted path names: as many parts as there are modules, then attributes."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[n:]:
            thing = getattr(thing, attribute)
        return thing
    raise AssertionError(path)


def test_the_table_is_short_and_read_whole() -> None:
    terms = [term for term, _, _ in ROWS]
    assert 10 <= len(ROWS) <= MOST and len(ROWS) == PAGE.count("\n| ") - 1, "a row that is not written as the others"
    assert len(set(terms)) == len(terms)


@pytest.mark.parametrize(("term", "meaning", "code"), ROWS, ids=[r[0] for r in ROWS])
def test_a_term_is_one_sentence_of_something_that_exists(term: str, meaning: str, code: str) -> None:
    assert meaning.endswith(".") and not re.search(r"[.!?] [A-Z]", meaning), "one sentence"
    assert found(code) is not None


def test_a_name_that_is_not_there_is_seen() -> None:
    with pytest.raises(AttributeError):
        found("rankwise.sites.Place")
