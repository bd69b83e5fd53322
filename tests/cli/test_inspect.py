"""``rankwise inspect`` of several adapters: tables, JSON and a picture; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli import adapters as _verb  # noqa: F401 - so that their consoles are replaced
from rankwise.cli import overlap
from rankwise.merge.engine.folders import open_folders
from tests.cli.test_merge import made  # noqa: F401 - a fixture
from tests.cli.tools import call


def test_several_without_their_model(capsys: Any, made: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    png = tmp_path / "o.png"
    code, text, err = call(capsys, "inspect", made["a"], made["b"], "--json", "--picture", str(png))
    assert code == 0, err
    got = json.loads(text)
    states = open_folders([made["a"], made["b"]])
    a, b = ({n: d.dense().double() for n, d in s.sites.items()} for s in states)
    want = (
        sum((a[n] * b[n]).sum() for n in a)
        / (sum(x.square().sum() for x in a.values()) * sum(x.square().sum() for x in b.values())) ** 0.5
    )
    assert abs(got["overall"][0]["cosine"] - float(want)) < 1e-6
    assert {s["role"] for s in got["sites"]} == set(got["roles"]) == {"q", "up"} and png.stat().st_size > 20_000
    code, text, err = call(capsys, "inspect", made["a"], made["b"])
    assert code == 0 and "a · b" in text and "sign conflict" in text and "up" in text, err


def test_itself_with_its_model_and_a_dora_cut(capsys: Any, made: dict[str, str]) -> None:  # noqa: F811
    args = ["inspect", made["a"], made["a"], made["dora"], "--model", made["base"], "--json"]
    code, _, err = call(capsys, *args)
    assert code == 2 and "rank" in err
    code, text, err = call(capsys, *args, "--source-rank", "4")
    assert code == 0, err
    rows = {tuple(r["pair"]): r for r in json.loads(text)["overall"]}
    assert rows[0, 1]["cosine"] == pytest.approx(1) and rows[0, 1]["conflict"] == pytest.approx(0, abs=1e-6)
    assert abs(rows[0, 2]["cosine"]) < 0.9


def test_labels_are_what_differs() -> None:
    assert overlap.labels(["run1/adapter", "run2/adapter"]) == ["run1", "run2"]
    assert overlap.labels(["x/a", "y/b"]) == ["a", "b"]
    assert len(set(overlap.labels(["r/a", "r/a"]))) == 2
    assert overlap.labels(["p/a", "q/a", "q/b"]) == ["a (1)", "a (2)", "b"]


def test_what_is_refused(capsys: Any, made: dict[str, str]) -> None:  # noqa: F811
    for args, word in (
        ([made["a"], "--model", made["base"], "--match", "0.3"], "two or more"), ([made["a"], made["b"], "--source-rank", "2"], "--model"),
        ([made["a"]], "--model"), ([made["a"], made["b"], "--match", "2"], "similarity"),
    ):  # fmt: skip
        code, _, err = call(capsys, "inspect", *args)
        assert code == 2 and word in err, (args, err)
