"""Numbers, paths and pairs that cannot be: one sentence, status 2, and what was there stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tools import call

LINE = [
    "train",
    "--model",
    "base",
    "--set",
    "form.r=2",
    "--set",
    "targets=q_proj",
    "--batch",
    "2",
    "--max-length",
    "64",
    "--stage",
    "pt",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("def add(a, b):\n    return a + b\n\n\n" * 40)
    return path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--arg", "learning_rate=abc"], "'learning_rate' is a number; it got 'abc'"),
        (["--arg", "learning_rate=.nan"], "must be a finite number"),
        (["--lr", "0"], "nothing would be learnt"),
        (["--epochs", "0"], "nothing would be learnt"),
        (["--arg", "num_train_epochs=-1"], "nothing would be learnt"),
        (["--resume"], "no whole checkpoint"),
        (["--overlong", "shorten"], "overlong"),
    ],
)
def test_a_number_that_cannot_be_leaves_nothing_behind(args: list[str], says: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = call(capsys, *LINE, "--data", str(text), "--out", str(tmp_path / "run"), *args)
    assert code == 2 and says in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_output_below_a_file(text: Path, capsys: Any) -> None:
    code, _, err = call(capsys, *LINE, "--data", str(text), "--out", str(text / "deep" / "run"))
    assert code == 2 and "cannot be written" in err and str(text) in err


@pytest.mark.parametrize("broken", ["data", "recipe", "argument"])
def test_overwrite_gives_up_the_earlier_run_only_when_the_new_one_can_begin(
    broken: str, text: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "rankwise.safetensors").write_bytes(b"dear")
    (run / "checkpoint-3").write_text("a plain file")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    extra = {"data": [], "recipe": ["--set", "targets=no_such_place"], "argument": ["--arg", "learning_rate=abc"]}[broken]
    line = [*LINE, "--data", str(bad if broken == "data" else text), "--out", str(run), "--steps", "1"]
    code, _, err = call(capsys, *line, *extra)
    assert code == 2 and "already holds a run (adapter, checkpoint-3)" in err
    code, _, err = call(capsys, *line, *extra, "--overwrite")
    assert code == 2 and "Traceback" not in err
    assert (run / "adapter" / "rankwise.safetensors").read_bytes() == b"dear" and (run / "checkpoint-3").is_file()
    if broken == "data":
        line[line.index(str(bad))] = str(text)
        assert call(capsys, *line, "--overwrite")[0] == 0
        assert (run / "adapter" / "rankwise.safetensors").stat().st_size > 1000 and not (run / "checkpoint-3").exists()


def test_one_row_is_said_to_be_what_was_learnt(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": "x = 1\ny = 2\nprint(x + y)"}))
    code, text, err = call(capsys, *LINE, "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", "--json")
    assert code == 0, err
    assert "nothing was held out" in json.loads(text)["scored_on"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import rankwise as rw
    from rankwise import assets

    model, _ = assets.load_base()
    path = tmp_path_factory.mktemp("a") / "adapter"
    rw.attach(model, rw.Recipe(form="lora", r=2, targets="q_proj")).save(path)
    return path


def test_pictures_that_cannot_be_written(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    for path, says in (("x.xyz", ".png, .svg, .pdf"), ("none/x.png", "does not exist"), ("x", "no suffix")):
        for which in ([str(adapter)], [str(adapter), str(adapter)]):
            code, _, err = call(capsys, "inspect", *which, "--model", "base", "--picture", str(tmp_path / path))
            assert code == 2 and says in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("given", "says"),
    [("{}=nan", "finite"), ("{}=inf", "finite"), ("{}=", "folder=number"), ("=2", "names no folder"), ("{}=x", "folder=number")],
)
def test_strengths_that_cannot_be(given: str, says: str, adapter: Path, capsys: Any) -> None:
    code, _, err = call(capsys, "generate", "--model", "base", "-p", "def f(", "-a", given.format(adapter), "--tokens", "1")
    assert code == 2 and says in err


def test_the_same_adapter_twice(adapter: Path, capsys: Any) -> None:
    code, _, err = call(
        capsys, "generate", "--model", "base", "-p", "def f(", "-a", str(adapter), "-a", f"{adapter}=0.5", "--tokens", "1"
    )
    assert code == 2 and "twice" in err


@pytest.mark.parametrize("rank", ["0", "-1", "9999"])
def test_a_rank_that_is_no_cut(rank: str, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = call(capsys, "convert", str(adapter), "--model", "base", "--out", str(tmp_path / "o"), "--rank", rank)
    assert code == 2 and "no cut" in err and not (tmp_path / "o").exists()


def test_exponents_without_a_point_are_numbers(text: Path, tmp_path: Path, capsys: Any) -> None:
    line = [*LINE, "--data", str(text), "--out", str(tmp_path / "run"), "--steps", "1", "--json"]
    assert call(capsys, *line, "--arg", "learning_rate=1e-3")[0] == 0
