"""One set of numbers for every way of training: the same names, the same checks, the same rate at each step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import OptionError
from rankwise.serve.finetune.job import TrainSpec
from rankwise.train.data.readers import read
from rankwise.train.data.tokens import tokenize
from rankwise.train.settings import TrainSettings
from rankwise.train.together import AdapterJob
from tests.train.data.conftest import make

WRONG: list[dict[str, Any]] = [
    {"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"steps": 0}, {"epochs": 0.0}, {"schedule": "stairs"}, {"warmup": -1.0},
    {"weight_decay": -0.1}, {"max_grad_norm": 0.0}, {"max_grad_norm": math.nan},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_number_that_cannot_be_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(OptionError, match=f"^{name} = "):
        TrainSettings(**{"lr": 1e-3, **wrong})


def test_the_ways_of_training_share_the_settings() -> None:
    assert issubclass(AdapterJob, TrainSettings) and issubclass(TrainSpec, TrainSettings)
    said = {f.name for f in dataclasses.fields(TrainSettings)}
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = rw.attach(model, rw.Recipe(form="lora", r=2))
    session = rw.Session(
        model, adapter, lr=1e-2, total_steps=7, schedule="cosine", warmup=2, weight_decay=0.1, max_grad_norm=1.0, seed=3
    )
    given = {n: getattr(session.settings, n) for n in said - {"epochs"}}
    assert given == {
        "lr": 1e-2,
        "steps": 7,
        "schedule": "cosine",
        "warmup": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "seed": 3,
    }
    again = rw.Session(model, adapter, **session.settings.for_session(7))
    assert again.settings == session.settings


def test_epochs_become_steps() -> None:
    assert TrainSettings(lr=1.0, epochs=2.5).steps_over(10, 4) == 7
    assert TrainSettings(lr=1.0, epochs=0.01).steps_over(10, 4) == 1
    assert TrainSettings(lr=1.0, epochs=2.5, steps=3).steps_over(10, 4) == 3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_is_that_of_transformers(schedule: str) -> None:
    transformers = pytest.importorskip("transformers")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)
    ours = TrainSettings(lr=1.0, schedule=schedule).lr_lambda(10)
    for n in range(10):
        assert ours(n) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_old_spelling_of_truncation_is_taken_with_a_warning() -> None:
    tokenizer = make()
    records = read([{"prompt": "a", "completion": "the cat " * 20}])
    with pytest.warns(DeprecationWarning, match="'overlong' is now 'truncation'") as said:
        old = tokenize(records, tokenizer, 8, overlong="truncate")  # type: ignore[call-arg]
    assert len(said) == 1 and said[0].filename == __file__
    assert old == tokenize(records, tokenizer, 8, truncation=True) and len(old[0]) == 8
    with pytest.raises(TypeError, match="old name"):
        tokenize(records, tokenizer, 8, overlong="error", truncation=False)  # type: ignore[call-arg]


def test_rw_train_takes_the_old_spelling(tmp_path: Any) -> None:
    with pytest.warns(DeprecationWarning, match="'overlong' is now 'truncation'"), pytest.raises(OptionError, match="'nothing'"):
        rw.train(nn.Linear(2, 2), None, [], output_dir=tmp_path / "run", stage="nothing", overlong="error")
