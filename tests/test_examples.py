"""Every file of examples/ runs as printed in its head, with fewer steps, in a folder of its own."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
#: example → (arguments, what it must print, a pattern whose numbers are finite)
RUNS: dict[str, tuple[list[str], str]] = {
    "plain_loop": (["--steps", "2", "--out", "made"], r"step 2: loss \d\.\d+\nbits per byte \d\.\d+ → \d\.\d+; saved to made"),
    "trl_sft": (["--steps", "3", "--out", "made"], r"saved to made/adapter"),
    "trl_dpo": (["--steps", "2", "--out", "made"], r"'loss': \d\.\d+, 'rewards/accuracies': [\d.]+, 'rewards/margins': -?\d"),
    "fuse_logits": (
        ["--steps", "2", "--chars", "100"],
        r"logits, dynamic \(weight\) +\d\.\d+ +\d\.\d+ +\d\.\d+\n\ndynamic: 'From: ",
    ),
}
LONG = {
    "soup": (["--steps", "2", "--chars", "3000"], r"learned soup +\d\.\d+ +\d\.\d+ +(\d\.\d\d ?){4}"),
    "robustness_patch": (["--steps", "2", "--seeds", "1"], r"taken off \(bit-equal\) \| \d\d\.\d \| \d\d\.\d \| \d\d\.\d"),
    "merge_domains": (["--steps", "2", "--chars", "400", "--out", "made"], r"multi-task|ties"),
}


def run(name: str, args: list[str], shows: str, monkeypatch: Any, folder: Path, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *args])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert re.search(shows, text), text[-1500:]


def test_none_is_forgotten() -> None:
    assert {p.stem for p in FOLDER.glob("*.py")} == {*RUNS, *LONG}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name: str, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    run(name, *RUNS[name], monkeypatch, tmp_path, capsys)
    if "made" in RUNS[name][0]:
        saved = next(tmp_path.rglob("rankwise.safetensors"), None)
        assert saved is not None and saved.stat().st_size > 10_000


@pytest.mark.soak
@pytest.mark.parametrize("name", LONG)
def test_it_runs_long(name: str, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    run(name, *LONG[name], monkeypatch, tmp_path, capsys)
    if name == "merge_domains":
        report = (tmp_path / "made" / "merging.md").read_text()
        assert report.count("\n| ") > 20 and (tmp_path / "made" / "merging.svg").exists()
