"""A bridged Trainer on a few rows, saved at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise.train.trainer import bridge
from tests.models import batch_for, llama

RECIPE = {"r": 2, "dropout": 0.1}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, n: int = 12):
        batch = batch_for(llama(), rows=n)
        self.rows = [{k: v[i] for k, v in batch.items()} for i in range(n)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def trainer(folder: Path, recipe: Any = None, model: Any = None, **options: Any) -> Any:
    """A bridged transformers.Trainer of an adapter on a small llama; ``options`` are TrainingArguments."""
    from transformers import Trainer, TrainingArguments

    model = llama() if model is None else model
    adapter = rw.attach(model, recipe or RECIPE)
    given: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    args = TrainingArguments(output_dir=str(folder), **given)
    return bridge(Trainer)(model=model, adapter=adapter, args=args, train_dataset=Rows(), eval_dataset=Rows(4))
