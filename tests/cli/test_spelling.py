"""A refusal on the command line advises options as they are typed; the library's own keeps its arguments."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import rankwise
from rankwise.cli import main
from rankwise.cli.spelling import FIELDS, FLAGS, PYTHON_ONLY, flags_of, spelled
from rankwise.errors import DataError, Option, OptionError
from tests.cli.tools import call

ARGUMENT = re.compile(r"\b[a-z_]+=('|True|False|\[|\{|…)")


def verbs() -> dict[str, dict[str, bool]]:
    """Every verb's flags."""
    main._verbs()
    return {name: flags_of(command) for name, command in typer.main.get_command(main.app).commands.items()}  # type: ignore[attr-defined]


def advised() -> Iterator[tuple[str, str]]:
    """(file, option) of every option that a message of the package advises."""
    home = Path(rankwise.__file__).parent
    for path in sorted(home.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Option":
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno} names its option by an expression"
                yield f"{path.relative_to(home)}:{node.lineno}", node.args[0].value


@pytest.mark.parametrize(
    ("verb", "option", "typed"),
    [
        ("train", Option("packing", False), "--no-packing"),
        ("train", Option("packing", True), "--packing"),
        ("train", Option("max_length"), "--max-length"),
        ("eval", Option("max_length"), "--max-length"),
        ("train", Option("truncation", True), "--truncation true"),
        ("train", Option("stage", "dpo"), "--stage dpo"),
        ("sweep", Option("fmt", "alpaca"), "--format alpaca"),
        ("sweep", Option("together", 1), "--together 1"),
        ("train", Option("overwrite", True), "--overwrite"),
        ("train", Option("split", ...), "--split …"),
        ("plan", Option("rank_pattern", {"k": 8}), "--set rank_pattern='{k: 8}'"),
        ("train", Option("exclude", [...]), "--set exclude=…"),
        ("train", Option("adapters", ["folder", "folder", ...]), "--set router.adapters=folder,folder,…"),
        ("merge", Option("normalize", False), "--set normalize=false"),
        ("merge", Option("force", True), "--force"),
        ("merge", Option("base", ...), "--base …"),
        ("convert", Option("codec", "delta"), "--codec delta"),
        ("convert", Option("rank", ...), "--rank …"),
        ("doctor", Option("packing", False), "packing=False"),
        ("eval", Option("stage", "dpo"), "stage='dpo'"),
        ("inspect", Option("exclude", [...]), "exclude=[…]"),
    ],
)
def test_an_option_is_spelled_for_the_verb(verb: str, option: Option, typed: str) -> None:
    assert spelled(option, verbs()[verb]) == typed


def test_every_option_that_a_message_advises_can_be_typed() -> None:
    """No message of the package advises what the table lacks, and every row of the table is a flag of some verb."""
    known = {flag for flags in verbs().values() for flag in flags}
    found = list(advised())
    assert len(found) > 30
    lost = [(where, name) for where, name in found if name not in {*FLAGS, *FIELDS, *PYTHON_ONLY}]
    assert not lost
    assert set(FLAGS.values()) <= known and "--set" in known
    assert {*FLAGS, *FIELDS, *PYTHON_ONLY} == {name for _, name in found}


@pytest.mark.parametrize("verb", ["plan", "train", "eval", "sweep", "generate", "serve", "compare", "merge", "convert", "inspect", "methods", "doctor", "demo"])  # fmt: skip
def test_no_verb_is_told_a_flag_that_it_lacks(verb: str) -> None:
    flags = verbs()[verb]
    for name in {name for _, name in advised()}:
        for value in (True, False, "x", 3, [...], {"k": 8}):
            told = spelled(Option(name, value), flags)
            if told.startswith("--"):
                assert told.split()[0] in flags, told
            else:
                assert told == str(Option(name, value))


def test_an_error_carries_its_options() -> None:
    error = DataError("a row is too long; raise ", Option("max_length"), ", or give ", Option("truncation", True), ".")
    assert str(error) == "a row is too long; raise max_length, or give truncation=True."
    assert error.option == "max_length" and OptionError("no option").option is None
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.told(lambda o: o.name.upper()) == error.told(lambda o: o.name.upper())


@pytest.mark.parametrize(
    ("records", "args", "says"),
    [
        ([{"prompt": "a", "completion": "word " * 200}], ["--max-length", "32"], "raise --max-length, or give --truncation true."),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3, [], "train it with --stage dpo."),
        ([{"prompt": "a", "completion": "b"}] * 3, ["--stage", "pt"], "use --stage sft."),
        ([{"text": "a", "prompt": "a", "completion": "b"}] * 3, [], "give --format "),
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


def test_the_old_spelling_of_truncation_is_taken_with_one_line(tmp_path: Path, capsys: Any) -> None:
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text(json.dumps({"prompt": "a", "completion": "word " * 200}) + "\n")
    line = [
        "train",
        "--model",
        "base",
        "--data",
        str(data),
        "--out",
        str(run),
        "--steps",
        "1",
        "--max-length",
        "32",
        "--set",
        "r=1",
    ]
    code, _, err = call(capsys, *line, "--overlong", "error")
    assert code == 2 and "--overlong error is now --truncation false; the old spelling goes in rankwise 0.3." in err
    assert "more than max_length = 32" in err
    code, _, err = call(capsys, *line, "--overlong", "truncate", "--truncation", "true")
    assert code == 2 and "give one of them" in err
    code, _, err = call(capsys, *line, "--truncation", "shorten")
    assert code == 2 and "--truncation is auto, true, false or split; it is 'shorten'" in err
    assert not run.exists()
