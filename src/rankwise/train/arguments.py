"""TrainingArguments from keywords: defaults of a run, and wrong ones refused before the model is touched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import OptionError, nearest

#: TrainingArguments that a run has unless it says otherwise
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 5,
    "logging_first_step": True,
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def make_arguments(cls: type, out: Path, given: Mapping[str, Any], **fixed: Any) -> Any:
    """The ``cls`` (TrainingArguments, or TRL's) of a run.

    Args:
        cls: a dataclass derived from TrainingArguments.
        out: the run's folder.
        given: fields by name, over :data:`DEFAULTS`.
        fixed: fields that the run itself decides.

    Raises:
        OptionError: an unknown field, or a value that it cannot have.
    """
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in fields:
            raise OptionError(f"There is no training argument {key!r}; {nearest(key, fields)}")
        _check_number(key, value, fields[key])
    settings = {k: v for k, v in DEFAULTS.items() if k in fields} | dict(given) | fixed
    if not torch.cuda.is_available() and "use_cpu" in fields:
        settings.setdefault("use_cpu", True)
    try:
        return cls(output_dir=str(out), **settings)
    except (ValueError, TypeError) as error:
        raise OptionError(f"The training arguments are refused by {cls.__name__}: {error}") from error


def _check_number(key: str, value: Any, default: Any) -> None:
    """Refuse a word where a number is meant, and a run that could not learn."""
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        if isinstance(value, (str, list, dict)) or value is None:
            raise OptionError(f"The training argument {key!r} is a number; it got {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"The training argument {key!r} must be a finite number; it got {value!r}.")
    if key in ("learning_rate", "num_train_epochs") and not value > 0:
        raise OptionError(f"With {key} = {value!r} nothing would be learnt; give a number above 0.")
