"""A fine-tuning job: what it is told, what is known of it, and the order of its steps."""

from __future__ import annotations

import dataclasses
import enum
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankwise.errors import ArtefactError, OptionError
from rankwise.recipe import Recipe
from rankwise.seeds import generator
from rankwise.serve.finetune.chunked_backward import Sample
from rankwise.serve.finetune.recipes import refuse_recipe
from rankwise.store.atomic import replace_file
from rankwise.store.names import check_name
from rankwise.train.settings import TrainSettings

if TYPE_CHECKING:
    from rankwise.serve.finetune.training import Task, Training

FILE = "job.json"


class Status(enum.StrEnum):
    """Where a job is; the words are those of OpenAI's fine-tuning jobs."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


@dataclasses.dataclass(frozen=True)
class TrainSpec(TrainSettings):
    """What a job is told.

    Attributes:
        name: under which the finished adapter is served.
        samples: to learn, at least one; ``batch_size`` of them an optimiser step, each label of a step weighing the same.
        recipe: the fields of a :class:`~rankwise.Recipe` (form, r, targets, init, optimizer, …).
        epochs: passes over the samples, each in an order of its own; ``steps`` overrules it.
        lr, schedule, warmup, weight_decay, max_grad_norm, seed: see :class:`~rankwise.train.settings.TrainSettings`.
        checkpoint_every: optimiser steps between two checkpoints, 0 for none.

    Raises:
        OptionError, RecipeError: a value out of its range; a recipe that cannot be trained beside serving.
    """

    name: str
    samples: tuple[Sample, ...]
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    batch_size: int = 1
    lr: float = 1e-3
    max_grad_norm: float | None = 1.0
    seed: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.samples:
            raise OptionError(f"The job {self.name!r} has no samples to learn; give one at least.")
        checks = (
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 0, "0 (none) or more"),
        )
        for name, value, right, expected in checks:
            if not right:
                raise OptionError(f"{name} = {value}; it is {expected}.")
        self.check()
        self.lr_lambda(self.total_steps)
        refuse_recipe(self.parsed())

    def parsed(self) -> Recipe:
        return Recipe.of({"seed": self.seed, **self.recipe})

    @property
    def total_steps(self) -> int:
        return self.steps_over(len(self.samples), self.batch_size)

    def batch(self, step: int) -> list[Sample]:
        """The samples of optimiser step ``step`` (from 0): epoch after epoch, each in its own order."""
        n = len(self.samples)
        at = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {e: self._order(e) for e in {i // n for i in at}}
        return [self.samples[orders[i // n][i % n]] for i in at]

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.samples), generator=generator(self.seed, "co-served order", str(epoch))).tolist()

    def session_options(self) -> dict[str, Any]:
        return self.for_session(self.total_steps)


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """One event of a job.

    Attributes:
        at: seconds since 1970; ``level``: info or error.
        message, data: a sentence, and numbers where there are some.
    """

    at: float
    level: str
    message: str
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class FineTuningJob:
    """A job as others see it.  Written by the engine's thread (and by the stream's helper), read by any.

    Args:
        id, spec: its name here, and what it is told.
        home: folder of its own.
        created: seconds since 1970 (default: now).

    Attributes:
        notes: its events, in order; a record of each step (loss, lr, grad_norm, tokens) is one.
        step: optimiser steps taken; ``tokens``: tokens of the samples they learnt from.
        version: the number under which the finished adapter was saved, in ``folder``.
    """

    def __init__(self, id: str, spec: TrainSpec, home: Path, created: float | None = None):
        self.id, self.spec, self.home = id, spec, home
        self.created = time.time() if created is None else created
        self.status = Status.QUEUED
        self.finished: float | None = None
        self.step = 0
        self.tokens = 0
        self.error = ""
        self.version: int | None = None
        self.folder: Path | None = None
        self.notes: list[Note] = []
        self.cancelling = False

    def note(self, message: str, level: str = "info", **data: Any) -> None:
        self.notes.append(Note(time.time(), level, message, data))

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """One mapping a step: step, loss, lr, tokens, and what the Session logged."""
        return [n.data for n in self.notes if "loss" in n.data]

    def schedule(self, training: Training) -> Iterator[Task]:
        """The tasks that are left, in order; each is done before the next is asked for."""
        while self.step < self.spec.total_steps:
            batch = self.spec.batch(self.step)
            loss = training.forward_backward(batch)
            yield loss
            step = training.optim_step()
            yield step
            self.step += 1
            self.tokens += sum(len(s.tokens) for s in batch)
            data = {"step": self.step, "loss": loss.result.result(), "tokens": self.tokens, **step.result.result()}
            self.note(f"Step {self.step} of {self.spec.total_steps}: loss {data['loss']:.4f}", **data)

    # --- on disk ------------------------------------------------------------------------------------------------
    def write(self) -> None:
        """All of it as ``job.json`` in its home, whole or as before."""
        known = {n: getattr(self, n) for n in ("id", "created", "finished", "step", "tokens", "error", "version")}
        text = {**known, "status": self.status.value, "folder": str(self.folder or ""), "spec": dataclasses.asdict(self.spec),
                "notes": [dataclasses.asdict(n) for n in self.notes]}  # fmt: skip
        replace_file(self.home / FILE, json.dumps(text).encode())

    @classmethod
    def read(cls, home: Path) -> FineTuningJob:
        """Inverse of :meth:`write`.

        Raises:
            ArtefactError: the file is damaged.
        """
        try:
            text = json.loads((home / FILE).read_bytes())
            spec = dict(text["spec"])
            spec["samples"] = tuple(Sample(tuple(s["tokens"]), tuple(s["labels"])) for s in spec["samples"])
            job = cls(str(text["id"]), TrainSpec(**spec), home, float(text["created"]))
            job.status = Status(text["status"])
            for name in ("finished", "step", "tokens", "error", "version"):
                setattr(job, name, text[name])
            job.folder = Path(text["folder"]) if text["folder"] else None
            job.notes = [Note(**n) for n in text["notes"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"The job in {home} cannot be read ({error}); move it away to start without it.") from error
        return job
