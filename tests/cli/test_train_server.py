"""``rankwise train --server`` against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tools import call
from tests.serve.http.test_fine_tuning import TEXTS, running


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("server")) as (address, _):
        yield address


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "say it twice: ", "completion": t}) for t in TEXTS))
    return str(path)


def test_it_trains_there_and_says_the_name(url: str, data: str, capsys: Any) -> None:
    args = ["train", "--server", url, "--data", data, "--name", "twice", "--form", "dora", "--set", "form.r=2", "--lr", "0.01"]
    code, text, err = call(capsys, *args, "--steps", "4")
    assert code == 0, err
    assert text.strip() == f"served as twice (version 1) at {url}"
    code, text, err = call(capsys, *args, "--epochs", "2", "--batch", "2", "--json")
    job = json.loads(text)
    assert code == 0 and not err and (job["step"], job["version"], job["status"]) == (3, 2, "succeeded")
    assert job["recipe"] == {"form": "dora", "r": 2} and job["hyperparameters"]["learning_rate_multiplier"] == 10


WRONG = [
    (["--name", "x", "--out", "here"], "--out means nothing with --server"),
    (["--name", "x", "--arg", "fp16=true"], "--arg means nothing with --server"),
    ([], "--server needs --name"),
    (["--name", "x", "--stage", "dpo"], "--stage is pt or sft"),
    (["--name", "x", "--stage", "pt"], "learns whole texts"),
    (["--name", "X Y"], "The server refuses it (400): suffix"),
    (["--name", "x", "--form", "full"], "'full'"),
    (["--name", "x", "--model", "other"], "The server refuses it (400): model is"),
    (["--name", "x", "--set", "dropout=0.1"], "dropout"),
    (["--name", "x", "--max-length", "3"], "The server refuses it (400)"),
    (["--name", "x", "--set", "targets=nothing_there"], "did not succeed: "),
]


@pytest.mark.parametrize(("args", "says"), WRONG)
def test_mistakes_are_one_line(args: list[str], says: str, url: str, data: str, capsys: Any) -> None:
    code, text, err = call(capsys, "train", "--server", url, "--data", data, *args)
    last = [line for line in err.splitlines() if line.startswith("rankwise:")]
    assert code == 2 and len(last) == 1 and says in last[0] and not text, err


def test_where_no_server_is(data: str, capsys: Any) -> None:
    for url, says in (("http://127.0.0.1:9", "No rankwise server answers at"), ("nowhere", "is no address")):
        code, _, err = call(capsys, "train", "--server", url, "--data", data, "--name", "x")
        assert code == 2 and says in err
    for args, says in ((["--out", "x"], "--model is missing"), (["--model", "base"], "--out is missing")):
        code, _, err = call(capsys, "train", "--data", data, *args)
        assert code == 2 and says in err
    code, _, err = call(capsys, "train", "--data", data, "--model", "base", "--out", "x", "--name", "y")
    assert code == 2 and "--name" in err
