"""rsLoRA: LoRA at α/√r under its own name, in every file and beside PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.merge.engine.folders import open_folder
from rankwise.train.compare import run_peft
from tests.forms.helpers import one
from tests.models import batch_for, llama, logits, move


def test_it_is_lora_at_alpha_over_the_root_of_r_bit_for_bit() -> None:
    options = {"r": 4, "alpha": 8, "rank_pattern": {"v": 2}, "alpha_pattern": {"k": 6}}
    seen = []
    for fields in ({"form": "rslora"}, {"form": "lora", "scale": "alpha/sqrt_r"}):
        model = llama()
        adapter = rw.attach(model, {**fields, **options})
        move(adapter)
        seen.append((logits(model, batch_for(model)), {n: d.scale for n, d in adapter.sites.items()}))
    assert torch.equal(seen[0][0], seen[1][0]) and seen[0][1] == seen[1][1]
    scales = seen[0][1]
    assert scales["model.layers.0.self_attn.q_proj"] == 4.0
    assert scales["model.layers.0.self_attn.v_proj"] == 8 / 2**0.5 and scales["model.layers.0.self_attn.k_proj"] == 3.0
    assert one({"form": "rslora", "r": 9})[2].scale == 3.0, "alpha is r where none is given"


def test_inside_dora_it_scales_too() -> None:
    assert one({"form": {"name": "dora", "inner": "rslora"}, "r": 4, "alpha": 8})[2].scale == 4.0


@pytest.mark.parametrize("scale", ["alpha/r", "constant"])
def test_another_scale_is_refused(scale: str) -> None:
    with pytest.raises(RecipeError, match="stands for scale = 'alpha/sqrt_r', but the recipe says"):
        rw.Recipe(form="rslora", scale=scale)
    assert rw.Recipe(form="rslora", scale="alpha/sqrt_r").policy == "alpha/sqrt_r"


def test_files_say_it_and_merges_read_it(tmp_path: Path) -> None:
    model = llama()
    adapter = rw.attach(model, {"form": "rslora", "r": 4, "alpha": 8})
    move(adapter)
    adapter.save(tmp_path / "a")
    assert rw.load(llama(), tmp_path / "a").recipe.form == "rslora"
    site = "model.layers.0.mlp.up_proj"
    state = open_folder(tmp_path / "a")
    assert torch.equal(state.sites[site].dense(), adapter.delta(site).dense())
    adapter.export(tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 16, False), "s = 4 = 16/4, for readers of α/r"


def test_its_twin_in_peft_has_its_scale() -> None:
    pytest.importorskip("peft")
    model = llama()
    batch = batch_for(model, rows=4)

    def losses(**fields: Any) -> list[float]:
        recipe = rw.Recipe(r=4, alpha=8, targets=["q_proj", "v_proj"], **fields)
        row: Any = run_peft(model, recipe, [batch], lambda m: m(**batch).loss.item(), name="x", steps=3, lr=1e-2, before=0.0)
        return row.losses  # type: ignore[no-any-return]

    assert losses(form="rslora") == losses(scale="alpha/sqrt_r") != losses()
