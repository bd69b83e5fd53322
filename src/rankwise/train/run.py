"""``rw.train``: data in, adapter, metrics and plots out; thin over transformers' Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.adapter import attach
from rankwise.errors import DataError, OptionError, need
from rankwise.recipe import Recipe
from rankwise.runtime.switch import view
from rankwise.store.atomic import replace_file
from rankwise.train import stages
from rankwise.train.checkpoint import whole_checkpoint
from rankwise.train.data.collate import Collator
from rankwise.train.data.isolation import check_isolation
from rankwise.train.data.packing import pack
from rankwise.train.data.readers import read
from rankwise.train.data.tokens import Example, tokenize
from rankwise.train.evaluate import classify, evaluate
from rankwise.train.progress import one_bar
from rankwise.train.stages import STAGES
from rankwise.train.trainer import ReferenceModel, bridge, trainer_class

#: TrainingArguments that a run has unless it says otherwise
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4, "per_device_train_batch_size": 8, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 5, "logging_first_step": True,
    "report_to": "none", "save_strategy": "epoch", "save_total_limit": 2, "gradient_checkpointing_kwargs": {"use_reentrant": False},
}  # fmt: skip


@dataclasses.dataclass
class Result:
    """What a run gave: its handle, figures before and after, and where its files are."""

    adapter: Any
    metrics: dict[str, Any]
    output_dir: Path
    plot: Path | None = None
    log: Path | None = None


def train(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    recipe: Recipe | Mapping[str, Any] | str = "lora",
    *,
    output_dir: str | Path,
    stage: str = "sft",
    eval_data: Any = None,
    packing: bool = True,
    max_length: int = 512,
    overlong: str = "auto",
    fmt: str = "auto",
    split: str | None = None,
    eval_split: str | None = None,
    name: str = "default",
    resume: bool | str = False,
    overwrite: bool = False,
    **arguments: Any,
) -> Result:
    """Attach an adapter, train it, and write adapter, metrics, log and plot to ``output_dir``.

    Args:
        tokenizer: for an image model its image processor, or None (pixels as they are given).
        data: a file, a folder or records; see :mod:`rankwise.train.data.readers`.  For an image model: a folder of class
            folders, an .npz, or pixel_values (N, C, H, W) and labels (N), as a mapping or as records.
        stage: pt (all of a text), sft (completions and the assistant's part) or dpo (preference pairs, through TRL).
        eval_data: held-out data; else a tenth is kept aside (of pairs: none).
        packing: several documents a row, isolated; checked with one forward before the run (pt and sft).
        max_length, overlong: tokens a row, and what becomes of longer records (text; see ``tokenize``).
        fmt, split: layout of the records, and the split of a saved dataset that holds several; see ``read``.
        eval_split: the split of ``eval_data`` (or of ``data``, where that is not given) that is held out.
        resume: True for the newest whole checkpoint in ``output_dir``, or a checkpoint's path.
        overwrite: train anew over an earlier run in ``output_dir``; its checkpoints and adapter are lost.
        arguments: transformers' TrainingArguments (TRL's DPOConfig for dpo).

    Returns:
        Result with ``metrics`` (loss before and after on ``eval_data``, or on a tenth kept aside).

    Raises:
        DataError, OptionError, RecipeError and the rest of the family, before the first step where they can be known.
    """
    try:
        from transformers import TrainingArguments, set_seed
    except ImportError as error:
        raise need("transformers", "hf", "rw.train") from error
    if stage not in STAGES:
        raise OptionError(f"stage is {', '.join(STAGES)}; it is {stage!r}.")
    recipe = Recipe.of(recipe)
    out = Path(output_dir)
    earlier = _earlier_run(out, resume, overwrite)
    if stages.sees(model):
        if stage != "sft":
            raise OptionError(f"An image model is trained with stage='sft'; stage={stage!r} is for text.")
        stages.refuse_text_options(fmt, split, eval_split, max_length, overlong)
        return _images(model, tokenizer, data, eval_data, recipe, out, earlier, name, resume, arguments)
    records = read(data, fmt, split)
    held = None
    if eval_data is not None or eval_split is not None:
        held = read(data if eval_data is None else eval_data, fmt, eval_split)
    if stage == "dpo":
        return _dpo(model, tokenizer, records, held, recipe, out, earlier, name, max_length, overlong, resume, arguments)
    if stage == "pt" and records[0].kind != "text":
        raise DataError(
            f"stage='pt' learns whole texts, but the data holds {records[0].kind} records ({records[0].where}); use stage='sft'."
        )
    examples = tokenize(records, tokenizer, max_length, overlong=overlong)  # type: ignore[arg-type]
    scored = "held-out data"
    if held is not None:
        eval_examples = tokenize(held, tokenizer, max_length, overlong=overlong)  # type: ignore[arg-type]
    else:
        cut = max(1, len(examples) // 10)
        scored = f"{cut} of {len(examples)} rows, kept aside"
        if len(examples) == 1:  # nothing can be kept aside; the metrics and the terminal say so
            scored, eval_examples = "the one training row (nothing was held out; give eval_data, --eval-data)", examples
        else:
            examples, eval_examples = examples[:-cut], examples[-cut:]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    rows: Sequence[Any] = examples
    if packing:
        check_isolation(model, getattr(model.config, "vocab_size", 100))  # type: ignore[union-attr]
        rows = pack(examples, max_length)
    collator = Collator.for_model(model, pad)
    args = _arguments(TrainingArguments, out, arguments, remove_unused_columns=False)
    set_seed(args.seed)
    adapter = _attach(model, recipe, _calibration(rows, collator), name, args, earlier)
    with view(model, {}):
        before = evaluate(model, eval_examples, pad_id=pad)
    trainer = trainer_class()(
        model=model, adapter=adapter, args=args, train_dataset=_Rows(rows), data_collator=collator, processing_class=tokenizer,
        eval_dataset=_Rows(eval_examples),
    )  # fmt: skip
    one_bar(trainer)
    result = trainer.train(resume_from_checkpoint=resume)
    after = evaluate(model, eval_examples, pad_id=pad)
    metrics = {"scored_on": scored, "before": before, "after": after, "train": result.metrics, "trainable": adapter.by_role()}
    return _finish(adapter, trainer, out, metrics)


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: Sequence[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def _arguments(cls: type, out: Path, given: Mapping[str, Any], **fixed: Any) -> Any:
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            from rankwise.errors import nearest

            raise OptionError(f"There is no training argument {key!r}; {nearest(key, fields)}")
    _refuse_no_number(cls, given)
    settings = {k: v for k, v in DEFAULTS.items() if k in fields} | dict(given) | fixed
    if not torch.cuda.is_available() and "use_cpu" in fields:
        settings.setdefault("use_cpu", True)
    try:
        return cls(output_dir=str(out), **settings)
    except (ValueError, TypeError) as error:
        raise OptionError(f"The training arguments are refused by {cls.__name__}: {error}") from error


def _refuse_no_number(cls: type, given: Mapping[str, Any]) -> None:
    """A word where a number is meant, and a run that could not learn, are refused before the model is touched."""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for key, value in given.items():
        numeric = isinstance(defaults[key], (int, float)) and not isinstance(defaults[key], bool)
        if numeric and (isinstance(value, (str, list, dict)) or value is None):
            raise OptionError(f"The training argument {key!r} is a number; it got {value!r}.")
        if numeric and isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"The training argument {key!r} must be a finite number; it got {value!r}.")
    for key in ("learning_rate", "num_train_epochs"):
        if key in given and not given[key] > 0:
            raise OptionError(f"With {key} = {given[key]!r} nothing would be learnt; give a number above 0.")


def _earlier_run(out: Path, resume: bool | str, overwrite: bool) -> list[Path]:
    """What of an earlier run stands in the folder and is to go, once all that can be refused has been; never lost in silence."""
    check_writable(out)
    if resume:
        whole_checkpoint(out, resume)
    earlier = sorted([*out.glob("checkpoint-*"), *out.glob("adapter")])
    if not earlier or resume:
        return []
    if not overwrite:
        names = ", ".join(p.name for p in earlier[:3])
        raise OptionError(
            f"{str(out)!r} already holds a run ({names}); resume it, choose another folder, or say overwrite (--overwrite)."
        )
    return earlier


def check_writable(out: Path) -> None:
    """Raise OptionError where no folder can stand at ``out``."""
    if out.exists() and not out.is_dir():
        raise OptionError(f"The output {str(out)!r} is a file; give a folder.")
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OptionError(
            f"The output {str(out)!r} cannot be written: {str(above)!r} is {'read-only' if above.is_dir() else 'a file'}."
        )


def _attach(model: nn.Module, recipe: Recipe, calibration: Any, name: str, args: Any, earlier: Sequence[Path]) -> Any:
    """Attach, give up the earlier run, and say before step 0 what will be trained (standard output is the caller's)."""
    adapter = attach(model, recipe, calibration=calibration, name=name)
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not args.disable_tqdm:
        roles = ", ".join(f"{role} {n:,}" for role, n in adapter.by_role().items())
        print(f"{name}: {adapter.numel():,} numbers to train at {len(adapter.sites)} places: {roles}", file=sys.stderr)
    return adapter


def _calibration(rows: Sequence[Any], collator: Collator, batches: int = 8, size: int = 4) -> list[dict[str, Any]]:
    chunks = [rows[i : i + size] for i in range(0, min(len(rows), batches * size), size)]
    return [collator(c) for c in chunks]


def _finish(adapter: Any, trainer: Any, out: Path, metrics: dict[str, Any]) -> Result:
    adapter.save(out / "adapter")
    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    replace_file(out / "log.jsonl", "".join(json.dumps(e) + "\n" for e in log).encode())
    replace_file(out / "metrics.json", json.dumps(metrics, indent=2, default=float).encode())
    return Result(adapter, metrics, out, _plot(log, out / "loss.svg"), out / "log.jsonl")


def _plot(log: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    points = [(e["step"], e["loss"]) for e in log if "loss" in e]
    if len(points) < 2:
        return None
    try:
        import matplotlib
    except ImportError:
        return None  # plots are an extra; the log holds the numbers
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.5, 3.4), constrained_layout=True)
    ax.plot(*zip(*points, strict=True), lw=1.6)
    ax.set(xlabel="step", ylabel="loss")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    fig.savefig(path)
    plt.close(fig)
    return path


def _images(
    model: nn.Module, processor: Any, data: Any, eval_data: Any, recipe: Recipe, out: Path, earlier: Sequence[Path], name: str,
    resume: bool | str, given: Mapping[str, Any],
) -> Result:  # fmt: skip
    """Image classification: loss and accuracy before and after."""
    from transformers import TrainingArguments, set_seed

    args = _arguments(TrainingArguments, out, given, remove_unused_columns=False)
    set_seed(args.seed)
    train_set = stages.images(data, model, processor)
    train_set, held = (
        stages.kept_aside(*train_set, args.seed) if eval_data is None else (train_set, stages.images(eval_data, model, processor))
    )
    rows, eval_rows = ([{"pixel_values": x, "labels": y} for x, y in zip(*part, strict=True)] for part in (train_set, held))
    calibration = [{"pixel_values": x, "labels": y} for x, y in zip(*(t[:32].split(4) for t in train_set), strict=True)]
    adapter = _attach(model, recipe, calibration, name, args, earlier)
    with view(model, {}):
        before = classify(model, *held)
    trainer = trainer_class()(
        model=model,
        adapter=adapter,
        args=args,
        train_dataset=_Rows(rows),
        eval_dataset=_Rows(eval_rows),
        processing_class=processor,
    )
    one_bar(trainer)
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = {"before": before, "after": classify(model, *held), "train": result.metrics, "trainable": adapter.by_role()}
    return _finish(adapter, trainer, out, metrics)


def _dpo(
    model: nn.Module, tokenizer: Any, records: Sequence[Any], eval_records: Sequence[Any] | None, recipe: Recipe, out: Path,
    earlier: Sequence[Path], name: str, max_length: int, overlong: Any, resume: bool | str, given: Mapping[str, Any],
) -> Result:  # fmt: skip
    """Preference training by TRL's DPOTrainer; the reference is the same weights under the empty view."""
    try:
        from transformers import set_seed
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise need("trl", "rl", "stage='dpo'") from error
    examples = stages.preferences(records, tokenizer, max_length, overlong)
    if eval_records is not None:
        stages.preferences(eval_records, tokenizer, max_length, overlong)
    args = _arguments(
        DPOConfig, out, {"max_length": max_length, "learning_rate": 5e-5, **given}, bf16=bool(given.get("bf16", False))
    )
    set_seed(args.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    adapter = _attach(model, recipe, _calibration(examples, Collator.for_model(model, pad)), name, args, earlier)
    trainer = bridge(DPOTrainer)(
        model=model, ref_model=ReferenceModel(adapter), adapter=adapter, args=args, processing_class=tokenizer,
        train_dataset=stages.pairs(records), eval_dataset=None if eval_records is None else stages.pairs(eval_records),
    )  # fmt: skip
    one_bar(trainer)
    result = trainer.train(resume_from_checkpoint=resume)
    log = [e for e in trainer.state.log_history if "rewards/accuracies" in e and "loss" in e]
    metrics = {
        "train": result.metrics,
        "first": log[0] if log else {},
        "last": log[-1] if log else {},
        "trainable": adapter.by_role(),
    }
    if eval_records is not None:
        metrics["held out"] = trainer.evaluate()
    return _finish(adapter, trainer, out, metrics)


__all__ = ["DEFAULTS", "Example", "Result", "train"]
