"""Images and preference pairs through ``rw.train``: what is learnt, resumed, evaluated and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.errors import DataError, OptionError
from rankwise.train.evaluate import accuracy, classify
from rankwise.train.stages import images, kept_aside

QUIET: dict[str, Any] = {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
            num_channels=1, num_labels=2,
        )
    ).eval()  # fmt: skip


def squares(n: int = 64) -> dict[str, torch.Tensor]:
    """Class 1 is bright on the left, class 0 on the right; class by class, as folders come."""
    labels = torch.arange(n) * 2 // n
    pixels = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    pixels[labels == 1, :, :, :4] += 1
    pixels[labels == 0, :, :, 4:] += 1
    return {"pixel_values": pixels, "labels": labels}


def test_an_image_model_learns_its_classes(tmp_path: Path, capsys: Any) -> None:
    recipe = {"r": 4, "targets": "all-linear", "modules_to_save": ["classifier"]}
    result = rw.train(
        vit(),
        None,
        squares(),
        recipe,
        output_dir=tmp_path,
        learning_rate=2e-2,
        num_train_epochs=12,
        disable_tqdm=False,
        save_strategy="no",
        logging_steps=1,
    )
    before, after = result.metrics["before"], result.metrics["after"]
    assert after["accuracy"] > before["accuracy"] and after["loss"] < 0.5 * before["loss"] and after["images"] == 6
    assert (tmp_path / "adapter" / "rankwise.safetensors").exists() and result.log == tmp_path / "log.jsonl"
    said = capsys.readouterr().err
    assert f"{result.adapter.numel():,} trainable parameters in" in said and "q " in said, "counted by role before step 0"


def test_records_and_mapping_are_one_thing_and_the_held_out_have_both_classes() -> None:
    data = squares()
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(data["pixel_values"], data["labels"], strict=True)]
    for a, b in zip(images(rows, vit()), images(data, vit()), strict=True):
        assert torch.equal(a, b)
    (_, train), (_, held) = kept_aside(*images(data, vit()), seed=0)
    assert len(train) == 58 and sorted(set(held.tolist())) == [0, 1]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"pixel_values": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([0, 2])}, "tells 2 classes apart"),
        ({"pixel_values": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([0])}, "N labels"),
        ([{"text": "a"}], "pixel_values and labels"),
    ],
)
def test_images_that_do_not_fit_are_refused(data: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        rw.train(vit(), None, data, "lora", output_dir=tmp_path, **QUIET)
    with pytest.raises(OptionError, match="stage='sft'"):
        rw.train(vit(), None, data, "lora", output_dir=tmp_path, stage="dpo", **QUIET)


def test_classify_against_the_definition() -> None:
    model, data = vit(), squares(10)
    logits = model(data["pixel_values"]).logits
    want = torch.nn.functional.cross_entropy(logits, data["labels"]).item()
    got = classify(model, data["pixel_values"], data["labels"], batch=3)
    assert got["loss"] == pytest.approx(want, abs=1e-5)
    assert got["accuracy"] == accuracy(model, pixels=data["pixel_values"], labels=data["labels"])
    assert got["accuracy"] == (logits.argmax(-1) == data["labels"]).float().mean().item()


def dpo(folder: Path, recipe: Any, data: Any, **options: Any) -> Any:
    pytest.importorskip("trl")
    model, tokenizer = assets.load_base()
    given = {"stage": "dpo", "max_length": 96, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **QUIET}
    return rw.train(model, tokenizer, data, recipe, output_dir=folder, **{**given, **options})


@pytest.mark.slow
def test_dpo_resumes_exactly_is_evaluated_and_calibrates(tmp_path: Path) -> None:
    pairs = tasks.preference_task()[0][:8]
    recipe = {"r": 2, "init": "eva", "targets": ["q_proj"]}
    whole = dpo(tmp_path / "a", recipe, pairs)
    dpo(tmp_path / "b", recipe, pairs, save_strategy="steps", save_steps=2, save_total_limit=None)
    import shutil

    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    again = dpo(tmp_path / "b", recipe, pairs, resume=True, eval_data=pairs[:2])
    assert again.metrics["held out"]["eval_loss"] > 0
    for k, t in whole.adapter.tensors().items():
        assert torch.equal(again.adapter.tensors()[k], t), k


def test_dpo_refuses_what_it_would_cut_or_cannot_read(tmp_path: Path) -> None:
    pairs = tasks.preference_task()[0][:4]
    with pytest.raises(DataError, match="tokens"):
        dpo(tmp_path, "lora", pairs, max_length=8)
    with pytest.raises(DataError, match="preference pairs"):
        dpo(tmp_path, "lora", [{"text": "no pair at all"}])
    with pytest.raises(OptionError, match="truncation='split'"):
        dpo(tmp_path, "lora", pairs, truncation="split")


def test_a_head_with_a_bias_is_saved_and_trained_whole() -> None:
    """Weight and bias are two places of one called module: y = x (W + ΔW)ᵀ + b + Δb, with a gradient for both."""
    model = vit()
    adapter = rw.attach(model, {"r": 2, "modules_to_save": ["classifier"]})
    head = model.classifier
    x = torch.randn(3, 16)
    weight, bias = _moved(adapter)
    want = torch.nn.functional.linear(x, head._parameters["weight"] + weight, head._parameters["bias"] + bias.reshape(-1))
    got = head(x)
    assert torch.allclose(got, want, atol=1e-6)
    got.square().sum().backward()
    assert torch.allclose(bias.grad.reshape(-1), 2 * want.sum(0), atol=1e-5) and weight.grad.abs().sum() > 0


def _moved(adapter: Any) -> list[Any]:
    """The difference at the head's weight and bias, set to something."""
    out = []
    for site in ("classifier", "classifier.bias"):
        (tensor,) = (p for k, p in adapter.named_parameters().items() if k.split("::")[0] == site)
        torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(len(site)))
        out.append(tensor)
    return out


def test_class_folders_go_to_the_models_own_outputs(tmp_path: Path) -> None:
    """By name where label2id knows it, by number where they are numbers, in order only if every class is there; else refused."""
    from PIL import Image

    def folder(names: list[str]) -> Path:
        home = tmp_path / "-".join(names)
        for i, name in enumerate(names):
            (home / name).mkdir(parents=True)
            Image.new("L", (8, 8), 10 * i).save(home / name / "x.png")
        return home

    def outputs(names: list[str], labels: int, label2id: dict[str, int] | None = None) -> dict[str, int]:
        model = vit()
        model.config.num_labels = labels
        if label2id is not None:
            model.config.label2id, model.config.id2label = label2id, {i: n for n, i in label2id.items()}
        pixels, ids = images(folder(names), model)
        return {names[round(float((x.mean() + 1) * 127.5) / 10)]: int(y) for x, y in zip(pixels, ids, strict=True)}

    assert outputs(["cat", "dog"], 3, {"dog": 0, "bird": 1, "cat": 2}) == {"cat": 2, "dog": 0}
    assert outputs(["1", "10", "2"], 11) == {"1": 1, "10": 10, "2": 2}
    assert outputs(["ape", "bee"], 2) == {"ape": 0, "bee": 1}
    with pytest.raises(DataError, match=r"has 2 classes \(eel, fox\), but the model tells 3 apart"):
        outputs(["eel", "fox"], 3)
    with pytest.raises(DataError, match="tells 3 classes apart"):
        outputs(["4", "5"], 3)
