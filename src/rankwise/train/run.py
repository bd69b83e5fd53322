"""``rw.train``: data in, adapter, metrics and plots out; thin over transformers' Trainer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise._renamed import renamed_argument
from rankwise.adapter import attach
from rankwise.errors import DataError, Option, OptionError, need
from rankwise.recipe import Recipe
from rankwise.runtime.switch import view
from rankwise.train import stages
from rankwise.train.arguments import DEFAULTS, make_arguments
from rankwise.train.data.collate import Collator
from rankwise.train.data.isolation import check_isolation
from rankwise.train.data.packing import pack
from rankwise.train.data.readers import read
from rankwise.train.data.tokens import OVERLONG, Example, Truncation, tokenize
from rankwise.train.evaluate import classify, evaluate
from rankwise.train.output import Result, earlier_run, remove, write_result
from rankwise.train.progress import one_bar
from rankwise.train.stages import STAGES
from rankwise.train.trainer import ReferenceModel, bridge, trainer_class


@renamed_argument("overlong", "truncation", OVERLONG)
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
    truncation: Truncation = "auto",
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
        model: the base; its weights stay as they are (unless the form trains them).
        tokenizer: for an image model its image processor, or None (pixels as they are given).
        data: a file, a folder or records, see ``read``.  For an image model: a folder of class folders, an .npz, or
            pixel_values (N, C, H, W) and labels (N), as a mapping or as records.
        recipe: a Recipe, its fields, its file, or the name of a form or preset.
        output_dir: the run's folder; made where it is not there.
        stage: pt (all of a text), sft (completions and the assistant's part) or dpo (preference pairs, through TRL).
        eval_data: held-out data; else a tenth is kept aside (of pairs: none).
        packing: several documents a row, isolated; checked with one forward before the run (pt and sft).
        max_length: tokens a row.
        truncation: what becomes of longer records: True cuts them, as in transformers; False refuses; see ``tokenize``.
        fmt, split: layout of the records, and the split of a saved dataset that holds several; see ``read``.
        eval_split: the split of ``eval_data`` (or of ``data``, where that is not given) that is held out.
        name: of the adapter.
        resume: True for the newest whole checkpoint in ``output_dir``, or a checkpoint's path.
        overwrite: train anew over an earlier run in ``output_dir``; its checkpoints and adapter are lost.
        arguments: transformers' TrainingArguments (TRL's DPOConfig for dpo).

    Returns:
        Result with ``metrics``: loss before and after, on the held-out data.

    Raises:
        DataError, OptionError, RecipeError and the rest of the family, before the first step where they can be known.
    """
    options = TextOptions(stage, packing, max_length, truncation, fmt, split, eval_split)
    out = Path(output_dir)
    run = TrainerRun(model, tokenizer, Recipe.of(recipe), out, name, resume, arguments, earlier_run(out, resume, overwrite))
    return (_images if stages.sees(model) else _records)(run, data, eval_data, options)


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How records of text are read and cut into rows.

    Args:
        stage, packing, max_length, truncation, fmt, split, eval_split: as of :func:`train`.
    """

    stage: str
    packing: bool
    max_length: int
    truncation: Truncation
    fmt: str
    split: str | None
    eval_split: str | None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise OptionError(f"stage is {', '.join(STAGES)}; it is {self.stage!r}.")

    def refuse_for_images(self) -> None:
        """Raise OptionError where something was asked for that an image model has no use for."""
        if self.stage != "sft":
            here, given = Option("stage", "sft"), Option("stage", self.stage)
            raise OptionError("An image model is trained with ", here, "; ", given, " is for text.")
        stages.refuse_text_options(self.fmt, self.split, self.eval_split, self.max_length, self.truncation)


@dataclasses.dataclass(frozen=True)
class TrainerRun:
    """What every run by a Trainer has, whatever it learns from.

    Args:
        model: the base.
        reader: its tokenizer or image processor.
        recipe: of the adapter.
        out: the run's folder.
        name: of the adapter.
        resume: as in :func:`train`.
        given: TrainingArguments by name.
        earlier: files of an earlier run, which go once the adapter is attached.
    """

    model: nn.Module
    reader: Any
    recipe: Recipe
    out: Path
    name: str
    resume: bool | str
    given: Mapping[str, Any]
    earlier: Sequence[Path]

    def attach(self, calibration: Any, args: Any) -> Any:
        """Attach, give up the earlier run, and say before step 0 what will be trained (standard output is the caller's)."""
        adapter = attach(self.model, self.recipe, calibration=calibration, name=self.name)
        remove(self.earlier)
        if not args.disable_tqdm:
            roles = ", ".join(f"{role} {n:,}" for role, n in adapter.by_role().items())
            print(f"{self.name}: {trainable(adapter.numel(), len(adapter.sites))}: {roles}", file=sys.stderr)
        return adapter

    def fit(self, trainer: Any) -> dict[str, Any]:
        """Train to the end; the Trainer's own metrics."""
        one_bar(trainer)
        return dict(trainer.train(resume_from_checkpoint=self.resume).metrics)

    def scored(self, adapter: Any, trainer: Callable[[], Any], score: Callable[[], dict[str, float]], on: str | None) -> Result:
        """Score under the empty view, train, score again, and write the result.

        Args:
            adapter: attached.
            trainer: makes the Trainer.
            score: scores the model under the view in force.
            on: what it is scored on, in words; None: not said.
        """
        with view(self.model, {}):
            before = score()
        made = trainer()
        fitted = self.fit(made)
        metrics = {"before": before, "after": score(), "train": fitted, "trainable": adapter.by_role()}
        metrics = metrics if on is None else {"scored_on": on, **metrics}
        return write_result(adapter, made.state.log_history, self.out, metrics)


def trainable(parameters: int, layers: int) -> str:
    """``1,024 trainable parameters in 2 layers``."""
    return f"{parameters:,} trainable parameters in {layers} layer{'s' if layers != 1 else ''}"


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: Sequence[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def _training_arguments(run: TrainerRun) -> Any:
    """The run's TrainingArguments, its seed set."""
    try:
        from transformers import TrainingArguments, set_seed
    except ImportError as error:
        raise need("transformers", "hf", "rw.train") from error
    args = make_arguments(TrainingArguments, run.out, run.given, remove_unused_columns=False)
    set_seed(args.seed)
    return args


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0))


def _calibration(rows: Sequence[Any], collator: Collator, batches: int = 8, size: int = 4) -> list[dict[str, Any]]:
    chunks = [rows[i : i + size] for i in range(0, min(len(rows), batches * size), size)]
    return [collator(c) for c in chunks]


# --- texts --------------------------------------------------------------------------------------------------
def _records(run: TrainerRun, data: Any, eval_data: Any, options: TextOptions) -> Result:
    """Read the records, and train on texts, completions or pairs."""
    records, held = read(data, options.fmt, options.split), None
    if eval_data is not None or options.eval_split is not None:
        held = read(data if eval_data is None else eval_data, options.fmt, options.eval_split)
    if options.stage == "dpo":
        return _preferences(run, records, held, options.max_length, options.truncation)
    if options.stage == "pt" and records[0].kind != "text":
        found = f" learns whole texts, but the data holds {records[0].kind} records ({records[0].where}); use "
        raise DataError(Option("stage", "pt"), found, Option("stage", "sft"), ".")
    tokens = lambda part: tokenize(part, run.reader, options.max_length, truncation=options.truncation)
    parts = _held_out(tokens(records), None if held is None else tokens(held))
    return _texts(run, *parts, options.max_length if options.packing else None)


def _held_out(examples: list[Example], held: list[Example] | None) -> tuple[list[Example], list[Example], str]:
    """(to train on, held out, in words what the second are): the last tenth where nothing was given."""
    if held is not None:
        return examples, held, "held-out data"
    if len(examples) == 1:  # nothing can be kept aside; the metrics and the terminal say so
        return examples, examples, "the one training row (nothing was held out; give data to evaluate on)"
    cut = max(1, len(examples) // 10)
    return examples[:-cut], examples[-cut:], f"{cut} of {len(examples)} rows, kept aside"


def _texts(run: TrainerRun, examples: list[Example], held: list[Example], scored_on: str, packed: int | None) -> Result:
    """Language modelling; ``packed``: tokens of a row that holds several documents, or None."""
    pad, model = _pad_id(run.reader), run.model
    rows: Sequence[Any] = examples
    if packed is not None:
        check_isolation(model, getattr(model.config, "vocab_size", 100))  # type: ignore[union-attr]
        rows = pack(examples, packed)
    collator = Collator.for_model(model, pad)
    args = _training_arguments(run)
    adapter = run.attach(_calibration(rows, collator), args)
    data = {"train_dataset": _Rows(rows), "eval_dataset": _Rows(held), "data_collator": collator}
    make = lambda: trainer_class()(model=model, adapter=adapter, args=args, processing_class=run.reader, **data)
    return run.scored(adapter, make, lambda: evaluate(model, held, pad_id=pad), scored_on)


# --- images -------------------------------------------------------------------------------------------------
def _images(run: TrainerRun, data: Any, eval_data: Any, options: TextOptions) -> Result:
    """Image classification: loss and accuracy before and after."""
    options.refuse_for_images()
    args = _training_arguments(run)
    learnt = stages.images(data, run.model, run.reader)
    if eval_data is None:
        learnt, held = stages.kept_aside(*learnt, args.seed)
    else:
        held = stages.images(eval_data, run.model, run.reader)
    rows, eval_rows = ([{"pixel_values": x, "labels": y} for x, y in zip(*part, strict=True)] for part in (learnt, held))
    calibration = [{"pixel_values": x, "labels": y} for x, y in zip(*(t[:32].split(4) for t in learnt), strict=True)]
    adapter = run.attach(calibration, args)
    sets = {"train_dataset": _Rows(rows), "eval_dataset": _Rows(eval_rows)}
    make = lambda: trainer_class()(model=run.model, adapter=adapter, args=args, processing_class=run.reader, **sets)
    return run.scored(adapter, make, lambda: classify(run.model, *held), None)


# --- preference pairs ---------------------------------------------------------------------------------------
def _preferences(run: TrainerRun, records: Sequence[Any], held: Sequence[Any] | None, max_length: int, truncation: Any) -> Result:
    """Preference training by TRL's DPOTrainer; the reference is the same weights under the empty view."""
    try:
        from transformers import set_seed
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise need("trl", "rl", Option("stage", "dpo")) from error
    examples = stages.preferences(records, run.reader, max_length, truncation)
    if held is not None:
        stages.preferences(held, run.reader, max_length, truncation)
    given = {"max_length": max_length, "learning_rate": 5e-5, **run.given}
    args = make_arguments(DPOConfig, run.out, given, bf16=bool(run.given.get("bf16", False)))
    set_seed(args.seed)
    adapter = run.attach(_calibration(examples, Collator.for_model(run.model, _pad_id(run.reader))), args)
    sets = {"train_dataset": stages.pairs(records), "eval_dataset": None if held is None else stages.pairs(held)}
    reference = ReferenceModel(adapter)
    trainer = bridge(DPOTrainer)(
        model=run.model, ref_model=reference, adapter=adapter, args=args, processing_class=run.reader, **sets
    )
    fitted = run.fit(trainer)
    log = [e for e in trainer.state.log_history if "rewards/accuracies" in e and "loss" in e]
    metrics = {"train": fitted, "first": log[0] if log else {}, "last": log[-1] if log else {}, "trainable": adapter.by_role()}
    if held is not None:
        metrics["held out"] = trainer.evaluate()
    return write_result(adapter, trainer.state.log_history, run.out, metrics)


__all__ = ["DEFAULTS", "Example", "Result", "train"]
