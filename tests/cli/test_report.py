"""The page of a comparison: every row and number on it, the best one marked, nothing of the input taken for HTML."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from rankwise.cli.report import write
from rankwise.train.compare import Row

pytest.importorskip("matplotlib")
MEMORY = {"weights": 1_000_000, "activations": 500_000}
ROWS = [
    Row("lora", "rankwise", 2.0, 1.5, 12_345, 4_096, 0.25, MEMORY, [3.0, 2.0, 1.5]),
    Row("<dora>", "rankwise", 2.0, 1.25, 23_456, 8_192, 0.5, MEMORY, [3.0, 1.0]),
    Row("lora", "peft", 2.0, 1.0, 12_345, 4_096, 0.125, MEMORY, [3.0, 2.0]),
]


def test_the_page_and_the_numbers(tmp_path: Path) -> None:
    page = write(tmp_path / "new/folder", ROWS, {"score": "bits & bytes", "what": "<b>"}, [("p<", "a&", "b>")], ["a <note>"])
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "new/folder/report.html" and len(re.findall("<img ", text)) == 3
    cells = [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr class='.*?</tr>", text)]
    assert [c[:4] for c in cells] == [
        ["lora", "rankwise", "2.0000", "1.5000"], ["&lt;dora&gt;", "rankwise", "2.0000", "1.2500"], ["lora", "peft", "2.0000", "1.0000"],
    ]  # fmt: skip
    assert [c[4] for c in cells] == ["-25.0%", "-37.5%", "-50.0%"] and cells[1][5] == "23,456" and cells[1][8] == "500 ms"
    assert re.findall("<tr class='(.*?)'", text) == ["", "best", "peer"], "the best is of our own rows"
    outside = re.sub(r"<style>.*?</style>|<img [^>]*>", "", text)
    assert "a &lt;note&gt;" in outside and "p&lt;" in outside and "<b>" not in outside and "<dora>" not in outside
    data = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert data["rows"] == [dataclasses.asdict(r) | {"peak_bytes": 1_500_000} for r in ROWS]
    assert (data["info"]["what"], data["samples"], data["notes"]) == ("<b>", [["p<", "a&", "b>"]], ["a <note>"])


def test_without_samples_there_is_no_heading_for_them(tmp_path: Path) -> None:
    assert "Text before and after" not in write(tmp_path, ROWS[:1], {}).read_text(encoding="utf-8")
