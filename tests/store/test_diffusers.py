"""diffusers' files against the real library, both ways; its older schemes; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from rankwise.errors import ArtefactError, OptionError
from tests.store.unet import TARGETS, adapted, draw, draw_flux, flux, gap, read, text_encoder, unet

pytest.importorskip("diffusers")
FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("where", ["unet", "transformer"])
def test_the_real_library_loads_our_file_to_equal_outputs(form: str, where: str, tmp_path: Path) -> None:
    make, run = (unet, draw) if where == "unet" else (flux, draw_flux)
    targets = (
        TARGETS
        if where == "unet" and form == "lora"
        else ["to_q", "to_out.0", "time_emb_proj"]
        if where == "unet"
        else ["to_q", "to_add_out", "proj_mlp", "x_embedder"]
    )
    model, theirs, ours = make(), make(), make()
    base = run(ours)
    file = adapted(model, targets, form).export(tmp_path, format="diffusers")
    assert file == tmp_path / FILE
    assert all(k.startswith(f"{where}.") for k in load_file(file))
    theirs.load_lora_adapter(str(tmp_path), prefix=where, use_safetensors=True)
    assert gap(run(theirs), run(model), base) < 1e-4
    loaded = rw.load(ours, tmp_path)
    assert loaded.recipe.parts[0].form == form
    assert gap(run(ours), run(model), base) < 1e-4


def test_it_loads_the_same_without_the_header(tmp_path: Path) -> None:
    """Older readers take α = r whatever was trained: the scale is in B."""
    model, theirs, ours = unet(), unet(), unet()
    base = draw(ours)
    tensors = load_file(adapted(model).export(tmp_path / "a", format="diffusers"))
    theirs.load_lora_adapter(dict(tensors), prefix="unet")
    assert gap(draw(theirs), draw(model), base) < 1e-4
    save_file(tensors, tmp_path / "b.safetensors")
    rw.load(ours, tmp_path / "b.safetensors")
    assert gap(draw(ours), draw(model), base) < 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"to_q": 7.0}}, {"use_dora": True}]
)
def test_what_the_real_library_saves_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    theirs, ours = unet(), unet()
    base = draw(ours)
    theirs.add_adapter(
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["to_q", "to_out.0"] if "use_dora" in options else TARGETS,
            init_lora_weights=False,
            **options,
        )
    )
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_B" in n:
                p.mul_(4)
    theirs.save_lora_adapter(str(tmp_path))
    loaded = rw.load(ours, tmp_path)
    assert gap(draw(ours), draw(theirs), base) < 1e-4
    scale = loaded.sites["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].scale
    want = 5 / 3**0.5 if options.get("use_rslora") else 7 / 3 if "alpha_pattern" in options else 5 / 3
    assert float(scale) == pytest.approx(want)


def test_the_header_says_what_the_factors_are(tmp_path: Path) -> None:
    recipe = {
        "parts": [
            {"form": "lora", "targets": ["to_q"], "r": 3, "alpha": 6},
            {"form": "lora", "targets": ["conv1"], "r": 2, "alpha": 1},
        ]
    }
    file = rw.attach(unet(), recipe).export(tmp_path, format="diffusers")
    with safe_open(file, "pt") as f:
        head = json.loads(f.metadata()["lora_adapter_metadata"])
        assert f.metadata()["format"] == "pt"
    assert (head["unet.r"], head["unet.lora_alpha"], head["unet.use_rslora"]) == (3, 3, False)
    assert set(head["unet.rank_pattern"].values()) == {2} and head["unet.rank_pattern"] == head["unet.alpha_pattern"]
    assert all(n.endswith(("to_q", "conv1")) for n in head["unet.target_modules"])


def test_two_components_in_one_file(tmp_path: Path) -> None:
    model, fresh = (nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()}) for _ in range(2))
    before = draw(fresh["unet"]), read(fresh["text_encoder"])
    adapter = adapted(model, ["to_q", "q_proj"])
    file = adapter.export(tmp_path, format="diffusers")
    assert {k.partition(".")[0] for k in load_file(file)} == {"unet", "text_encoder"}
    rw.load(fresh, tmp_path)
    assert gap(draw(fresh["unet"]), draw(model["unet"]), before[0]) < 1e-4
    assert gap(read(fresh["text_encoder"]), read(model["text_encoder"]), before[1]) < 1e-4
    with pytest.raises(ArtefactError, match="text_encoder, unet.*ModuleDict"):
        rw.load(unet(), tmp_path)
    assert not hasattr(unet(), "rankwise")


@pytest.mark.parametrize("scheme", ["lora.down", "processor", "lora_linear_layer", "alpha"])
def test_older_schemes(scheme: str, tmp_path: Path) -> None:
    model, ours = unet(), unet()
    base = draw(ours)
    tensors = load_file(adapted(model, ["to_q", "to_out.0"]).export(tmp_path / "a", format="diffusers"))
    old = {}
    for key, t in tensors.items():
        module, side = key.rsplit(".lora_", 1)
        way = "down" if side[0] == "A" else "up"
        if scheme == "processor":
            at, leaf = (module.removesuffix(".to_out.0"), "to_out") if module.endswith("to_out.0") else module.rsplit(".", 1)
            old[f"{at}.processor.{leaf}_lora.{way}.weight"] = t
        elif scheme == "alpha":
            old[key] = t * (2 if way == "up" else 1)
            old[f"{module}.alpha"] = torch.tensor(1.5)  # of rank 3: half
        else:
            old[f"{module}.{scheme.removesuffix('.down')}.{way}.weight"] = t
    save_file(old, tmp_path / "old.safetensors")
    rw.load(ours, tmp_path / "old.safetensors")
    assert gap(draw(ours), draw(model), base) < 1e-4


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    adapter = adapted(unet(), ["to_q"])
    with pytest.raises(OptionError, match="'vae'"):
        adapter.export(tmp_path, format="diffusers", component="vae")
    tensors = load_file(adapter.export(tmp_path / "a", format="diffusers"))
    first = min(tensors)

    def refused(change: dict[str, Any], words: str, metadata: dict[str, str] | None = None) -> None:
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, tmp_path / "x.safetensors", metadata)
        model = unet()
        with pytest.raises(ArtefactError, match=words):
            rw.load(model, tmp_path / "x.safetensors")
        assert "rankwise" not in model._modules

    refused({first: None}, "lacks its first factor")
    refused({"unet.nowhere.lora_A.weight": torch.ones(3, 4), "unet.nowhere.lora_B.weight": torch.ones(4, 3)}, "nowhere.*lacks")
    refused({first: torch.ones(3, 5)}, "takes 3×")
    refused({"unet.conv_in.lora_B.bias": torch.ones(8)}, "no key of a diffusers")
    refused({}, "rank 3.*header says 4", {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})})
    refused({}, "unknown key 'twist'", {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.twist": 4})})


def test_a_change_that_is_not_low_rank_is_refused(tmp_path: Path) -> None:
    dense = rw.attach(unet(), {"form": "dense", "targets": ["to_q"]})
    with pytest.raises(ArtefactError, match="saved whole"):
        dense.export(tmp_path, format="diffusers")


def test_a_folder_of_two_files_is_ambiguous(tmp_path: Path) -> None:
    adapter = adapted(unet(), ["to_q"])
    adapter.export(tmp_path, format="diffusers")
    adapter.export(tmp_path, format="kohya")
    with pytest.raises(ArtefactError, match="several .safetensors"):
        rw.load(unet(), tmp_path)
