"""A refusal on the command line advises options; the library's own keeps its arguments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli.spelling import as_options
from tests.cli.tools import call

ARGUMENT = re.compile(r"\b[a-z_]+=('|True|False|\[|\{|…)")


@pytest.mark.parametrize(
    ("told", "here"),
    [
        ("give packing=False (--no-packing).", "give --no-packing."),
        (
            "raise max_length, or give overlong='truncate' (--overlong truncate).",
            "raise --max-length, or give --overlong truncate.",
        ),
        ("more than max_length = 64 tokens", "more than max_length = 64 tokens"),
        ("train it with stage='dpo'.", "train it with --stage dpo."),
        ("or give fmt='alpaca'.", "or give --format alpaca."),
        ("lower r, or set rank_pattern={'k': 8}.", "lower r, or give --set rank_pattern='{k: 8}'."),
        ("leave them out with exclude=[…], or", "leave them out with --set exclude=…, or"),
        ("give adapters=[folder, folder, …].", "give --set router.adapters=folder,folder,…."),
        ("choose another folder, or say overwrite (--overwrite).", "choose another folder, or say --overwrite."),
        ("it got k = 9, experts = 4", "it got k = 9, experts = 4"),
    ],
)
def test_arguments_become_options(told: str, here: str) -> None:
    assert as_options(told) == here


@pytest.mark.parametrize(
    ("records", "args", "says"),
    [
        ([{"prompt": "a", "completion": "word " * 200}], ["--max-length", "32"], "--overlong truncate"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3, [], "--stage dpo"),
        ([{"prompt": "a", "completion": "b"}] * 3, ["--stage", "pt"], "--stage sft"),
        ([{"text": "a", "prompt": "a", "completion": "b"}] * 3, [], "--format"),
    ],
)
def test_a_refusal_of_the_library_names_options(
    records: list[Any], args: list[str], says: str, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in records))
    code, _, err = call(capsys, "train", "--model", "base", "--data", str(data), "--out", str(tmp_path / "run"), *args)
    assert code == 2 and says in err and not ARGUMENT.search(err), err


def test_a_rank_too_high_says_what_to_type_and_it_can_be_typed(capsys: Any) -> None:
    code, _, err = call(capsys, "plan", "--model", "base", "--set", "r=130")
    assert code == 2 and "--set rank_pattern='{k: " in err, err
    pattern = re.search(r"rank_pattern='(\{[^}]*\})'", err)
    assert pattern is not None
    code, _, err = call(capsys, "plan", "--model", "base", "--set", "r=130", "--set", f"rank_pattern={pattern[1][:-1]}, v: 64}}")
    assert code == 0, err
