"""The bridge to transformers' Trainer and TRL's, on real text: exact resume, what a checkpoint holds, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.errors import ArtefactError, DataError, OptionError, TrainingError
from rankwise.train.trainer import RUN_STATE, whole_checkpoint

ARGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    train, _ = tasks.docstring_task()
    return train[:40]


def run(records: Any, folder: Path, recipe: Any = "lora", **options: Any) -> Any:
    torch.manual_seed(0)
    model, tokenizer = assets.load_base()
    return rw.train(model, tokenizer, records, recipe, output_dir=folder, **{"max_length": 64, **ARGS, **options})


@pytest.mark.slow
def test_a_run_learns_and_leaves_its_files(records: list, tmp_path: Path) -> None:
    result = run(records, tmp_path, {"form": "lora", "r": 4}, num_train_epochs=3)
    assert result.metrics["after"]["loss"] < result.metrics["before"]["loss"] - 0.05
    names = {p.name for p in tmp_path.iterdir()}
    assert {"adapter", "metrics.json", "log.jsonl"} <= names
    held = {p.name for p in next(tmp_path.glob("checkpoint-*")).iterdir()}
    assert {"rankwise.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", RUN_STATE} <= held
    assert not held & {"model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"}, "the base is not in it"
    model, _ = assets.load_base()
    again = rw.load(model, tmp_path / "adapter")
    for k, t in result.adapter.tensors().items():
        assert torch.equal(again.tensors()[k], t)
    assert json.loads((tmp_path / "metrics.json").read_text())["trainable"]["q"] == again.by_role()["q"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        {"r": 4, "dropout": 0.1},
        {"preset": "adalora", "r": 4, "budget": {"name": "adalora", "target_r": 2, "every": 1, "warmup": 1, "final": 2}},
        {
            "r": 2,
            "targets": ["up_proj", "down_proj"],
            "router": {"name": "mixlora", "experts": 2, "variant": "switch", "jitter": 0.2},
        },
    ],
)
def test_resume_equals_not_stopping(records: list, tmp_path: Path, recipe: Any) -> None:
    whole = run(records, tmp_path / "a", recipe, max_steps=6)
    run(records, tmp_path / "b", recipe, max_steps=6, save_total_limit=None)
    for folder in (tmp_path / "b").glob("checkpoint-*"):
        if folder.name != "checkpoint-4":
            (folder / RUN_STATE).unlink()  # as after a crash while it was written: not whole
    assert whole_checkpoint(str(tmp_path / "b"), True).endswith("checkpoint-4")
    resumed = run(records, tmp_path / "b", recipe, max_steps=6, resume=True)
    for k, t in whole.adapter.tensors().items():
        assert torch.equal(resumed.adapter.tensors()[k], t), k
    steps = {int(t) for k, t in whole.adapter.tensors().items() if k.endswith("steps")}
    assert steps == ({6} if "router" in recipe else set()), "moved once an optimiser step"


def test_resume_refuses_what_is_not_there(records: list, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        run(records, tmp_path, max_steps=2, resume=True)
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        run(records, tmp_path, max_steps=2, resume=str(tmp_path / "checkpoint-99"))
    run(records, tmp_path, max_steps=2)
    with pytest.raises(ArtefactError, match="another recipe"):
        run(records, tmp_path, {"r": 2}, max_steps=4, resume=True)


def test_a_nan_loss_stops_with_the_place_and_keeps_the_last_checkpoint(records: list, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = assets.load_base()
    calls = {"n": 0}

    def overflow(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor | None:
        calls["n"] += module.training
        return y * float("inf") if calls["n"] > 3 else None

    model.model.layers[2].mlp.down_proj.register_forward_hook(overflow)
    with pytest.raises(TrainingError, match=r"overflowed first at 'model\.layers\.2\.mlp\.down_proj'"):
        rw.train(model, tokenizer, records, "lora", output_dir=tmp_path, max_steps=6, max_length=64, **ARGS)
    kept = whole_checkpoint(str(tmp_path), True)
    fresh, _ = assets.load_base()
    assert all(torch.isfinite(t).all() for t in rw.load(fresh, kept).tensors().values())


def test_wrong_arguments(records: list, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'learning_rate'"):
        run(records, tmp_path, learning_rat=1)
    with pytest.raises(OptionError, match="stage is pt, sft, dpo"):
        run(records, tmp_path, stage="rl")
    with pytest.raises(DataError, match="stage='pt' learns whole texts"):
        run(records, tmp_path, stage="pt")


@pytest.mark.slow
def test_gradient_checkpointing_and_accumulation_keep_the_trajectory(records: list, tmp_path: Path) -> None:
    plain = run(records, tmp_path / "a", max_steps=3, seed=1)
    checked = run(records, tmp_path / "b", max_steps=3, seed=1, gradient_checkpointing=True)
    for k, t in plain.adapter.tensors().items():
        assert torch.allclose(checked.adapter.tensors()[k], t, atol=1e-5), k


@pytest.mark.slow
def test_dpo_through_trl_prefers_the_chosen(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    train, _ = tasks.preference_task()
    model, tokenizer = assets.load_base()
    result = rw.train(
        model, tokenizer, train[:16], {"r": 4}, output_dir=tmp_path, stage="dpo", max_length=96, max_steps=8, per_device_train_batch_size=8,
        learning_rate=3e-3, logging_steps=1, disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    assert result.metrics["first"]["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are the same at first: log 2"
    assert result.metrics["last"]["loss"] < 0.6


@pytest.mark.slow
def test_trl_sft_trainer_through_the_bridge(records: list, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from rankwise.train.trainer import bridge

    model, tokenizer = assets.load_base()
    adapter = rw.attach(model, {"r": 4})
    before = {k: t.clone() for k, t in adapter.tensors().items()}
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        max_length=64,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        learning_rate=1e-3,
    )
    trainer = bridge(trl.SFTTrainer)(
        model=model, adapter=adapter, args=args, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(records)
    )
    trainer.train()
    assert any(not torch.equal(t, before[k]) for k, t in adapter.tensors().items())
    assert trainer.session.t == 3
