"""What a person sees: one bar with figures beside it, titles on one line, recipes one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rankwise.cli import common
from rankwise.train.progress import figures
from tests.cli.tools import call

SHORT = [
    "--model",
    "base",
    "--set",
    "targets=q_proj",
    "--set",
    "r=2",
    "--steps",
    "6",
    "--batch",
    "2",
    "--max-length",
    "32",
    "--stage",
    "pt",
]


def test_a_run_shows_one_bar_and_no_dictionary(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "notes.txt"
    data.write_text("def add(a, b):\n    return a + b\n\n\n" * 40)
    code, text, err = call(capsys, "train", *SHORT, "--data", str(data), "--out", str(tmp_path / "run"))
    assert code == 0, err
    assert "{" not in text + err and "train_runtime" not in text + err, "the Trainer's own dictionaries"
    assert "training: 100%" in err and "loss=" in err and "lr=" in err
    assert "scored on" in text and "before" in text and "adapter: " in text
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == [1, 5], "the first step is logged, so that a short run has a curve too"
    code, text, err = call(capsys, "train", *SHORT, "--data", str(data), "--out", str(tmp_path / "quiet"), "--json")
    assert code == 0 and json.loads(text)["after"] and "training" not in err


def test_figures_are_few_and_named() -> None:
    assert figures({"loss": 2.34567, "grad_norm": 1.0, "epoch": 0.5}) == {"loss": "2.346", "gradient": "1"}
    assert figures({"train_runtime": 3.0, "train_loss": 2.0}) == {}


def test_a_title_is_not_folded_to_its_table(monkeypatch: Any) -> None:
    narrow = Console(width=60, record=True)
    monkeypatch.setattr(common, "out", narrow)
    common.table("scored on 1 of 19 rows, kept aside", ["", "n"], [("a", 1)], right=["n"])
    assert "scored on 1 of 19 rows, kept aside" in narrow.export_text()


def test_recipes_one_after_the_other(tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("form: paca\nr: 2\ntargets: [q_proj]\n")
    data = tmp_path / "text.txt"
    data.write_text("def add(a, b):\n    return a + b\n\n\n" * 60)
    args = [
        "--data",
        str(data),
        "--steps",
        "1",
        "--batch",
        "1",
        "--tokens",
        "16",
        "--no-peft",
        "--out",
        str(tmp_path / "report"),
        "--json",
    ]
    code, text, err = call(capsys, "compare", "--recipes", str(recipe), "lora", *args)
    assert code == 0, err
    names = [r["name"] for r in json.loads(text[text.index("{") :])["rows"]]
    assert {"small", "lora"} <= set(names)


def test_preferences_are_told_by_their_first_and_last_step(tmp_path: Path, capsys: Any) -> None:
    from rankwise.assets import tasks

    pytest.importorskip("trl")
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in tasks.preference_task()[0][:6]))
    args = ["--stage", "dpo", "--set", "targets=q_proj", "--set", "r=2", "--steps", "2", "--batch", "2", "--max-length", "96"]
    code, text, err = call(
        capsys, "train", "--model", "base", "--data", str(data), "--out", str(tmp_path / "run"), *args, "--arg", "logging_steps=1"
    )
    assert code == 0, err
    assert "preferences" in text and "step 2" in text and "pairs right" in text and "margin" in text
    assert "{" not in text and (tmp_path / "run" / "adapter" / "rankwise.safetensors").exists()
