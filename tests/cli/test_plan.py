"""What a plan foresees is what a run then has."""

from __future__ import annotations

import json
from typing import Any

import pytest

import rankwise as rw
from rankwise import assets
from rankwise.cli.plan import folded
from rankwise.forms import packed
from tests.cli.tools import call


def plan(capsys: Any, *args: str) -> Any:
    code, text, err = call(capsys, "plan", "--model", "base", *args, "--json")
    assert code == 0, err
    return json.loads(text)


def test_targets_are_resolved_to_tensors(capsys: Any) -> None:
    report = plan(capsys, "--form", "dora", "--set", "form.r=4", "--set", "targets=q_proj,down_proj")
    adapter = rw.attach(assets.load_base()[0], {"form": "dora", "r": 4, "targets": ["q_proj", "down_proj"]})
    held = {n: list(p.shape) for n, p in adapter.named_parameters().items()}
    assert {f"{place}::{name}": shape for place, own in report["tensors"].items() for name, shape in own.items()} == held
    assert report["trainable"] == adapter.numel() == sum(r["trainable"] for r in report["roles"])
    assert [(r["role"], r["where"], r["rank"]) for r in report["roles"]] == [
        ("q", "model.layers.{0…5}.self_attn.q_proj", 4),
        ("down", "model.layers.{0…5}.mlp.down_proj", 4),
    ]


def test_a_shared_bank_is_counted_once_and_has_its_rank(capsys: Any) -> None:
    report = plan(capsys, "--form", "mos", "--set", "form.r=4")
    assert {r["rank"] for r in report["roles"]} == {4, None} and report["roles"][-1]["where"] == "rankwise"
    assert sum(r["trainable"] for r in report["roles"]) == report["trainable"]


def test_how_frozen_products_run_is_said_and_their_copies_counted(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed.packable(assets.load_base()[0].lm_head.weight.detach().float()):
        pytest.skip("this torch has no packed oneDNN products")
    for ratio, kind in ((0.5, "packed"), (2.0, "plain")):
        monkeypatch.setattr(packed, "_choices", {})
        monkeypatch.setattr(packed, "_ratio", lambda *_, r=ratio: r)
        report = plan(capsys, "--set", "targets=q_proj")
        assert report["product"].startswith(f"{kind} (packed takes {ratio:.2f} of the plain time")
        assert report["memory"].get("packed copies of frozen weights", 0) == (6 * 8 * 256 * 256 if kind == "packed" else 0)


def test_names_that_differ_in_one_number_are_one() -> None:
    assert folded(["a.0.q", "a.1.q", "a.2.q", "b.7.k", "c"]) == ["a.{0…2}.q", "b.7.k", "c"]
    assert folded(["a.0.q", "a.2.q"]) == ["a.{0,2}.q"]
