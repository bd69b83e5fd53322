"""``rw.train`` on a dataset saved by `datasets`: the same run as from its records, splits and layouts chosen or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.errors import DataError, OptionError
from rankwise.train.data import read, tokenize
from rankwise.train.evaluate import evaluate

datasets = pytest.importorskip("datasets")
ROWS = tasks.docstring_task()[0][:12]
ARGS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-3,
    "max_length": 64,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


def run(data: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model, tokenizer = assets.load_base()
    return rw.train(model, tokenizer, data, {"r": 2, "targets": ["q_proj"]}, output_dir=folder, **{**ARGS, **options})


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "split"
    parts = {"train": ROWS[:8], "test": ROWS[8:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(folder)
    return folder


def test_a_saved_dataset_is_its_records(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    a = run(tmp_path / "saved", tmp_path / "a")
    b = run(ROWS, tmp_path / "b")
    assert a.metrics["before"] == b.metrics["before"] and a.metrics["after"] == b.metrics["after"]
    assert a.metrics["after"]["loss"] != a.metrics["before"]["loss"]
    for k, t in a.adapter.tensors().items():
        assert torch.equal(t, b.adapter.tensors()[k]), k


def test_splits_are_chosen_for_training_and_for_holding_out(split: Path, tmp_path: Path) -> None:
    a = run(split, tmp_path / "a", split="train", eval_split="test")
    b = run(ROWS[:8], tmp_path / "b", eval_data=ROWS[8:])
    assert a.metrics["before"] == b.metrics["before"] and a.metrics["after"] == b.metrics["after"]
    model, tokenizer = assets.load_base()
    assert a.metrics["before"] == evaluate(model, tokenize(read(ROWS[8:]), tokenizer, 64), pad_id=tokenizer.pad_token_id)
    c = run(ROWS[:8], tmp_path / "c", eval_data=split, eval_split="test")
    assert c.metrics["after"] == a.metrics["after"]
    d = run(split, tmp_path / "d", split="test", eval_split="train")
    assert d.metrics["before"]["tokens"] != a.metrics["before"]["tokens"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "holds the splits train, test; give split=…, one of them"),
        ({"split": "dev"}, "there is no 'dev'"),
        ({"split": "train", "eval_split": "dev"}, "there is no 'dev'"),
        ({"split": "train", "eval_data": ROWS[8:], "eval_split": "test"}, "the data has no splits"),
        ({"split": "train", "fmt": "alpaca"}, "alpaca"),
    ],
)
def test_a_split_that_is_not_there_is_refused_before_the_first_step(options: Any, says: str, split: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        run(split, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_layout_is_chosen_where_keys_are_those_of_two(tmp_path: Path) -> None:
    both = [{"text": "x = 1\n" * 8, **r} for r in ROWS]
    datasets.Dataset.from_list(both).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="text"):
        run(tmp_path / "both", tmp_path / "run")
    with pytest.raises(OptionError, match="fmt is one of"):
        run(tmp_path / "both", tmp_path / "run", fmt="texts")
    with pytest.warns(UserWarning, match="not used: completion"):
        texts = run(tmp_path / "both", tmp_path / "a", fmt="text", stage="pt")
    with pytest.warns(UserWarning, match="not used: text"):
        answers = run(tmp_path / "both", tmp_path / "b", fmt="completion")
    assert answers.metrics["before"] == run(ROWS, tmp_path / "c").metrics["before"] != texts.metrics["before"]
