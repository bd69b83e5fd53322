"""Training runs found to say or do something else than they seemed to when the product was tried from outside."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import rankwise as rw
from rankwise import assets
from rankwise.errors import RankwiseError

ROWS = [{"prompt": f"a {i}", "completion": f"b {i * 7}"} for i in range(40)]
RECIPE: dict[str, Any] = {"form": "lora", "r": 2, "targets": ["q_proj"]}
wrong = pytest.mark.xfail(strict=True, reason="known fault, see the issue of the trials")


def go(out: Path, resume: bool = False, shift: float = 0.0, data: Any = ROWS, **more: Any) -> Any:
    m, tok = assets.load_base()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(shift)
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, **more,
    }  # fmt: skip
    return rw.train(m, tok, data, RECIPE, output_dir=out, packing=False, max_length=64, resume=resume, **arguments)


def digest(out: Path) -> str:
    return hashlib.sha256((out / "adapter/rankwise.safetensors").read_bytes()).hexdigest()


@wrong
def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    go(tmp_path, lr_scheduler_type="constant")
    first = digest(tmp_path)
    go(tmp_path, True, lr_scheduler_type="constant")
    assert digest(tmp_path) == first


@wrong
@pytest.mark.parametrize(
    "change",
    [{"shift": 0.01}, {"learning_rate": 5e-3}, {"data": ROWS[::-1]}, {"without": "optimizer.pt"}],
    ids=["base", "rate", "rows", "optimizer"],
)
def test_resume_of_another_run_is_refused_or_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    go(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("adapter", "checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "part" / name)
    if "without" in change:
        os.unlink(tmp_path / "part/checkpoint-2" / change["without"])
        change = {}
    try:
        go(tmp_path / "part", True, **change)
    except RankwiseError:
        return
    assert "learning_rate" in change and digest(tmp_path / "part") != digest(tmp_path / "whole")  # a new rate may be taken


@wrong
def test_held_out_rows_are_no_sorted_tail(tmp_path: Path) -> None:
    rows = [{"prompt": "section?", "completion": " perl"}] * 45 + [{"prompt": "section?", "completion": " games"}] * 5
    done = go(tmp_path, data=rows)
    assert done.metrics["after"]["loss"] < done.metrics["before"]["loss"] + 0.5 and "duplicate" in done.metrics["scored_on"]


@wrong
def test_arguments_of_adam_act(tmp_path: Path) -> None:
    go(tmp_path / "a")
    try:
        go(tmp_path / "b", adam_beta1=0.5)
    except RankwiseError:
        return
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


@wrong
def test_tool_call_that_the_template_does_not_print(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "vim?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "editor"},
        {"role": "assistant", "content": "An editor."},
    ]
    with pytest.raises(RankwiseError):
        go(tmp_path, data=[{"messages": messages}] * 4, max_steps=1)


@wrong
def test_weight_of_a_message_acts(tmp_path: Path) -> None:
    def rows(weight: dict[str, int]) -> list[dict[str, Any]]:
        wrong_answer = {"role": "assistant", "content": "wrong answer", **weight}
        return [{"messages": [{"role": "user", "content": "a"}, wrong_answer, {"role": "user", "content": "b"}, {"role": "assistant", "content": "right"}]}] * 4  # fmt: skip

    go(tmp_path / "a", data=rows({}), max_steps=2, lr_scheduler_type="constant")
    go(tmp_path / "b", data=rows({"weight": 0}), max_steps=2, lr_scheduler_type="constant")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


@wrong
def test_rows_of_a_view_that_only_divide_the_batch() -> None:
    m, _ = assets.load_base()
    for n in "ab":
        rw.attach(m, RECIPE, name=n)
    with pytest.raises(RankwiseError), rw.view(m, {"a": 1, "b": 1}, rows=["a", "b"]), torch.no_grad():
        m(input_ids=torch.ones(4, 5, dtype=torch.long))


@wrong
def test_overwrite_loses_nothing_where_the_new_run_is_refused(tmp_path: Path) -> None:
    go(tmp_path)
    m, tok = assets.load_base()
    a = rw.attach(m, RECIPE, name="sft")
    with torch.no_grad():
        for p in a.trainable_parameters():
            p.add_(0.1)
    a.merge()
    try:
        rw.train(m, tok, ROWS, "lora", output_dir=tmp_path, overwrite=True, packing=False, max_steps=2, max_length=64)
    except RankwiseError:
        assert (tmp_path / "adapter").exists()


@wrong
def test_adapter_of_a_classifier_on_its_own_encoder(tmp_path: Path) -> None:
    def make() -> Any:
        config = T.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, num_labels=4
        )
        return T.BertForSequenceClassification(config)

    torch.manual_seed(0)
    m, n = make(), make()
    n.bert.load_state_dict(m.bert.state_dict())  # the head, which the adapter replaces, is another
    rw.attach(m, rw.Recipe(r=2, modules_to_save=["classifier"])).save(tmp_path / "a")
    rw.load(n, tmp_path / "a")
