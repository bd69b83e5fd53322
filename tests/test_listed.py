"""Every method named here is in ``rankwise methods`` under its reference number, and no method is without page and source."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rankwise import catalogue
from rankwise.catalogue import MethodInfo
from tests.cli.tools import call

#: (kind, name) → its reference number; None where it has none of its own
NAMED: dict[tuple[str, str], str | None] = {
    ("form", "lora"): None, ("form", "rslora"): None, ("form", "dora"): None, ("form", "mos"): "034", ("form", "paca"): "041",
    ("form", "lora_xs"): None, ("form", "bottleneck"): None, ("form", "svd"): "203",
    ("init", "pissa"): "086", ("init", "eva"): "046", ("init", "lora_ga"): "027", ("init", "loftq"): None,
    ("budget", "adalora"): "203", ("budget", "lisa"): "078",
    ("optimizer", "loraplus"): None, ("optimizer", "galore"): "087", ("optimizer", "lora_pro"): "035", ("optimizer", "allora"): "031",
    ("loss", "ba_lora"): "054", ("loss", "orthogonality"): "203",
    ("router", "smora"): "009", ("router", "mixlora"): "065", ("router", "arrow"): None,
    ("merge", "linear"): None, ("merge", "ties"): None, ("merge", "lego"): "003",
    ("codec", "compeft"): "192", ("codec", "nf4"): "180", ("codec", "intk"): None,
}  # fmt: skip
KINDS = ("form", "init", "budget", "optimizer", "router", "loss")
ALL = [m for kind in KINDS for m in catalogue.methods(kind)]


def test_all_are_listed_with_their_number(capsys: Any) -> None:
    code, text, _ = call(capsys, "methods", "--json")
    assert code == 0
    found = {(m["kind"], m["name"]): m["reference"] for m in json.loads(text)}
    assert {k: found.get(k, "missing") for k in NAMED} == NAMED


@pytest.mark.parametrize("info", ALL, ids=lambda m: f"{m.kind}-{m.name}")
def test_each_has_a_page_with_its_formula_options_and_source(capsys: Any, info: MethodInfo) -> None:
    code, text, _ = call(capsys, "methods", info.name)
    flat = " ".join(text.split())
    assert code == 0 and f"{info.name} · {info.kind}" in flat and info.title in flat
    assert info.reference is None or f"reference {info.reference}" in flat
    assert all(option in flat for option in info.options)
    assert " ".join(info.doc.split("\n\n")[0].split())[:60] in flat, "the page leaves out what the method says of itself"
    assert len(info.doc) > 60
    assert re.search(r"Source:|[Pp]ublished|as ``torch|as PEFT's|released code|programs? of the authors", info.doc), "no source"
