"""Many small jobs on one base, trained at once: one forward and one backward for all of them, everything else each its own.

A step takes every running job's micro-batch, puts them below each other in one batch, and runs the base once with each row
under its job's adapter.  The loss is the sum of the jobs' own means, so every adapter's gradient is that of its job alone;
optimiser, schedule, clipping, order of data and length are the job's own.  Rows of two jobs never meet: a job that diverges
is stopped by name and the others do not notice, and one that ends makes room for the next.

Trajectories are those of separate runs to rounding.  The adapters' dropout is drawn for each job, step and place apart, and
alike however far rows are padded; what the base itself draws in training (a dropout of its own) is drawn for the batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.adapter import attach
from rankwise.errors import Option, OptionError, RankwiseError, RecipeError
from rankwise.forms.base import AdapterLayer
from rankwise.recipe import Recipe, build
from rankwise.runtime.build import choose_sites
from rankwise.runtime.registry import AdapterRegistry, registry_of
from rankwise.runtime.view import View, entered
from rankwise.seeds import generator
from rankwise.store.names import check_name
from rankwise.train.data.sampler import Sampler
from rankwise.train.data.tokens import IGNORED, Example
from rankwise.train.session import Session
from rankwise.train.settings import TrainSettings

if TYPE_CHECKING:
    from rankwise.train.data.collate import Collator
    from rankwise.train.data.packing import Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterJob(TrainSettings):
    """One adapter to train; its rate, schedule and length are those of :class:`~rankwise.train.settings.TrainSettings`.

    Attributes:
        name: of the adapter; one job a name.
        rows: its data, examples or packed rows; jobs may share one list.
        batch: rows in an optimiser step.
        seed: of the order of its rows (the adapter's own draws follow the recipe's).

    Raises:
        OptionError: what could not be trained.
    """

    name: str
    recipe: Recipe
    rows: Sequence[Example | Packed]
    batch: int = 1
    seed: int = 0
    schedule: str = "cosine"
    warmup: float = 0.03
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.batch < 1 or not self.rows:
            raise OptionError(f"The job {self.name!r} has steps of {self.batch} of {len(self.rows)} rows; each is at least 1.")
        try:
            self.check()
            self.lr_lambda(self.total_steps)
        except OptionError as error:
            raise OptionError(f"The job {self.name!r}: ", *error.args) from error

    @property
    def total_steps(self) -> int:
        return self.steps_over(len(self.rows), self.batch)


class Running:
    """A job whose adapter is in the model.

    Attributes:
        losses: the task's loss (nats a learnt token) of each step so far.
        seconds: its share of the steps' wall time, by rows.
        error: why it was stopped, or None.
    """

    def __init__(self, model: nn.Module, job: AdapterJob, collator: Collator):
        self.job, self.model = job, model
        self.adapter = attach(model, job.recipe, calibration=_calibration(job, collator), name=job.name, activate=False)
        try:
            self.session = Session(model, self.adapter, **{**job.for_session(job.total_steps), "seed": None})
        except BaseException:
            self.adapter.detach()
            raise
        for m in self.adapter.module.modules():
            if isinstance(m, AdapterLayer):
                m.keeps = self._keeps
        self.own = registry_of(model).view({job.name: 1.0})
        self.losses: list[float] = []
        self.seconds = 0.0
        self.error: str | None = None
        self._order = _endless(len(job.rows), job.seed)

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.losses) >= self.job.total_steps

    def _keeps(self, site: str, x: Tensor, p: float) -> Tensor:
        """Dropout's mask of x (rows, tokens, …): 0 or 1/(1−p).  Tokens come first in the draw, so padding is drawn last."""
        g = generator(self.job.recipe.seed, f"dropout {len(self.losses)}", site)
        first = x.transpose(0, 1).shape if x.dim() > 2 else x.shape
        drawn = torch.rand(first, generator=g)
        kept = (drawn.transpose(0, 1) if x.dim() > 2 else drawn) >= p
        return kept.to(x.device, x.dtype).div_(1 - p)

    def next_rows(self) -> list[Example | Packed]:
        return [self.job.rows[next(self._order)] for _ in range(self.job.batch)]

    def update(self, loss: float) -> None:
        """Take the optimiser step after a backward; what forbids it stops this job alone."""
        self.losses.append(loss)
        try:
            with entered(self.own):
                self.session.step()
        except RankwiseError as error:
            self.stop(str(error))

    def stop(self, why: str) -> None:
        self.error = why
        for p in self.adapter.trainable_parameters():
            p.grad = None

    def close(self) -> None:
        """Take the adapter out of the model."""
        self.session.close()
        self.adapter.detach()


def _endless(n: int, seed: int) -> Iterator[int]:
    sampler = Sampler(n, seed)
    while True:
        yield from sampler


def _calibration(job: AdapterJob, collator: Collator) -> list[dict[str, Any]]:
    rows = job.rows[:32]
    return [collator(rows[i : i + 4]) for i in range(0, len(rows), 4)]


# --- what can share a batch ------------------------------------------------------------------------------------
def why_alone(model: nn.Module, recipe: Recipe) -> str | None:
    """Why an adapter of this recipe cannot share a batch with others, in words that name the part; None where it can.

    Raises:
        RankwiseError: the recipe does not fit the model at all.
    """
    found = model._modules.get("rankwise")
    registry = found if isinstance(found, AdapterRegistry) else AdapterRegistry(model)
    if any("BatchNorm" in type(m).__name__ for m in model.modules()):
        return "the model has batch normalisation, in which rows of a batch see each other"
    for part in recipe.all_parts():
        form = build("form", part.form)
        if part.router:
            return f"the router {_name(part.router)!r} balances over every row of its batch"
        if "weight" in form.provides:
            return f"the form {form.info.name!r} moves the base weights, which all rows share"
        if part.init and build("init", part.init).replaces:
            return f"the init {_name(part.init)!r} puts another weight in the base's place, for all rows"
        for site in choose_sites(registry, part, form)[0]:
            if site.spec.mode not in ("called", "block") or site.spec.routed:
                return f"another forward reads the weight {site.name!r} for all rows at once"
    return None


def _name(named: Any) -> str:
    return named["name"] if isinstance(named, dict) else named


# --- the loop -----------------------------------------------------------------------------------------------
def train_together(
    model: nn.Module,
    jobs: Sequence[AdapterJob],
    collator: Collator,
    *,
    together: int = 8,
    finished: Callable[[Running], None] = lambda r: None,
    refused: Callable[[AdapterJob, RankwiseError], None] | None = None,
    progress: Callable[[str, int], None] = lambda name, step: None,
) -> None:
    """Train all jobs, ``together`` at a time; as one ends the next joins.  The base is left as it was, to the bit.

    Args:
        model: the base.
        jobs: one or more, each of a name of its own.
        together: jobs in one batch.
        collator: makes a batch of rows for this model; see ``Collator.for_model``.
        finished: called with each job at its end (also where it was stopped: ``error``), its adapter still in the model.
        refused: called with a job whose adapter cannot be attached; the others go on.  None: the error is raised.
        progress: called with a job's name and its steps so far.

    Raises:
        OptionError, RecipeError: before the first step, for two jobs of one name, and recipes that
            cannot share a batch while ``together`` is above 1 (train those with ``together=1``).
    """
    _check(model, jobs, together)
    waiting, running = deque(jobs), list[Running]()
    mode = model.training
    model.train()
    try:
        while waiting or running:
            while waiting and len(running) < together:
                running += _begun(model, waiting.popleft(), collator, refused)
            if not running:
                break
            step(model, running, collator)
            for r in running:
                progress(r.job.name, len(r.losses))
            for r in [r for r in running if r.done]:
                finished(r)
                running.remove(r)
                r.close()
    finally:
        for r in running:
            r.close()
        model.train(mode)


def _begun(
    model: nn.Module, job: AdapterJob, collator: Collator, refused: Callable[[AdapterJob, RankwiseError], None] | None
) -> list[Running]:
    try:
        return [Running(model, job, collator)]
    except RankwiseError as error:
        if refused is None:
            raise type(error)(f"The job {job.name!r}: ", *error.args) from error
        refused(job, error)
        return []


def _check(model: nn.Module, jobs: Sequence[AdapterJob], together: int) -> None:
    if together < 1 or not jobs:
        raise OptionError(f"{len(jobs)} jobs, {together} at a time; each is at least 1.")
    names = [j.name for j in jobs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise OptionError(f"Two jobs are called {twice!r}; give each a name of its own.")
    for job in jobs:
        reason = why_alone(model, job.recipe) if together > 1 else None
        if reason is not None:
            raise RecipeError(f"The job {job.name!r} cannot share a batch: {reason}. Train it with ", Option("together", 1), ".")


def step(model: nn.Module, running: Sequence[Running], collator: Collator) -> None:
    """One optimiser step of every running job: one forward, one backward."""
    start = time.perf_counter()
    rows = [r.next_rows() for r in running]
    ends = torch.tensor([len(part) for part in rows]).cumsum(0).tolist()
    cuts = [slice(b - len(part), b) for part, b in zip(rows, ends)]
    device = next(model.parameters()).device
    whole = collator([x for part in rows for x in part])
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in whole.items()}
    with entered(_view(running, rows)):
        for r in running:
            r.session.step_begin()
        logits = model(**_inputs(batch)).logits
        losses = _losses(logits, batch["labels"], cuts)
        numbers = torch.stack([loss.detach() for loss in losses]).tolist()
        learning = [i for i, n in enumerate(numbers) if math.isfinite(n)]
        terms = [losses[i] + _penalty(running[i], logits, losses[i], batch, cuts[i]) for i in learning]
        if terms:
            torch.stack(terms).sum().backward()
    for i, r in enumerate(running):
        if i in learning:
            r.update(numbers[i])
        else:
            r.stop(
                f"Step {len(r.losses) + 1}: the loss is {numbers[i]}; the step was not taken. Lower the learning rate, or look at the batch."
            )
    spent = time.perf_counter() - start
    for r, part in zip(running, rows):
        r.seconds += spent * len(part) / ends[-1]


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model is given: no mask and no positions where they say what causal attention does anyway (a given mask costs
    some percent of a small step)."""
    given = {"use_cache": False, **{k: v for k, v in batch.items() if k != "labels"}}
    mask, position = given.get("attention_mask"), given.get("position_ids")
    if position is not None:
        plain = bool((position == torch.arange(position.shape[1], device=position.device)).all())
    else:
        plain = mask is not None and mask.dim() == 2 and bool(mask.all())
    return {k: v for k, v in given.items() if not (plain and k in ("attention_mask", "position_ids"))}


def _view(running: Sequence[Running], rows: Sequence[Sequence[Any]]) -> View:
    """Each row under its job's adapter; a job alone has the plain view, in which every form works."""
    if len(running) == 1:
        return running[0].own
    names = [r.job.name for r in running]
    return registry_of(running[0].adapter.model).view(dict.fromkeys(names, 1.0), [n for n, part in zip(names, rows) for _ in part])


def _losses(logits: Tensor, labels: Tensor, cuts: Sequence[slice]) -> list[Tensor]:
    """Each job's mean over its own learnt tokens, as the model's own loss is of a batch of that job alone."""
    target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nats = nn.functional.cross_entropy(wide.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
    nats = nats.view(target.shape)
    return [nats[c].sum() / (target[c] != IGNORED).sum().clamp_min(1) for c in cuts]


def _penalty(r: Running, logits: Tensor, loss: Tensor, batch: dict[str, Any], cut: slice) -> Tensor:
    """What the job's own losses add, of its own rows."""
    mine = {k: v[cut] if isinstance(v, Tensor) else v for k, v in batch.items()}
    with entered(r.own):
        return r.session.penalty(SimpleNamespace(logits=logits[cut], loss=loss), mine)
