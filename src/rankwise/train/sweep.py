"""A sweep: a grid of jobs on one base and one data set, read and tokenised once; each job's folder is whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankwise._renamed import renamed_argument
from rankwise.errors import ArtefactError, DataError, Option, OptionError, RankwiseError
from rankwise.runtime.switch import view
from rankwise.store.atomic import replace_file
from rankwise.train.data.collate import Collator
from rankwise.train.data.isolation import check_isolation
from rankwise.train.data.layouts import Record
from rankwise.train.data.packing import Packed, pack
from rankwise.train.data.readers import read
from rankwise.train.data.tokens import OVERLONG, Example, Truncation, tokenize
from rankwise.train.evaluate import evaluate
from rankwise.train.job_result import JobResult
from rankwise.train.output import check_writable
from rankwise.train.together import AdapterJob, Running, train_together, why_alone

#: what a job's folder holds once it is finished; written last
DONE = "job.json"


@dataclasses.dataclass(frozen=True)
class Shared:
    """What every job sees.

    Args:
        rows: to learn.
        held: examples held out.
        bytes_: of the held-out texts; None where they are no texts.
        scored: what the held-out examples are, in words.
        collator: makes batches.
        mark: a digest of all token ids, so that a resumed sweep cannot mix data.
    """

    rows: Sequence[Example | Packed]
    held: Sequence[Example]
    bytes_: int | None
    scored: str
    collator: Collator
    mark: str


@renamed_argument("overlong", "truncation", OVERLONG)
def prepare(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    *,
    eval_data: Any = None,
    fmt: str = "auto",
    split: str | None = None,
    eval_split: str | None = None,
    max_length: int = 512,
    truncation: Truncation = "auto",
    packing: bool = True,
) -> Shared:
    """Read and tokenise the data once for all jobs.

    Without held-out data the last tenth of the records is kept aside, or of the text where there is one.

    Args:
        model, tokenizer, data, eval_data, fmt, split, eval_split, max_length, truncation, packing: as of ``rw.train``.

    Raises:
        DataError, OptionError: the data cannot be read, or the model cannot keep packed documents apart.
    """
    records = read(data, fmt, split)
    if eval_data is not None or eval_split is not None:
        held, scored = read(data if eval_data is None else eval_data, fmt, eval_split), "held-out data"
    else:
        records, held, scored = kept_aside(records)
    rows: Sequence[Example | Packed] = tokenize(records, tokenizer, max_length, truncation=truncation)
    examples = tokenize(held, tokenizer, max_length, truncation=truncation)
    if packing:
        check_isolation(model, getattr(model.config, "vocab_size", 100))  # type: ignore[union-attr]
        rows = pack(rows, max_length)  # type: ignore[arg-type]
    size = sum(len(r.fields["text"].encode()) for r in held) if all(r.kind == "text" for r in held) else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    everything = json.dumps([[r.input_ids, r.labels] for r in [*rows, *examples]])
    mark = hashlib.sha256(everything.encode()).hexdigest()[:16]
    return Shared(rows, examples, size, scored, Collator.for_model(model, pad), mark)


def kept_aside(records: Sequence[Record]) -> tuple[list[Record], list[Record], str]:
    """(train, held out, in words): the last tenth of the records, or of the one text there is."""
    if len(records) > 1:
        cut = max(1, len(records) // 10)
        return list(records[:-cut]), list(records[-cut:]), f"{cut} of {len(records)} records, kept aside"
    only = records[0]
    text = str(only.fields.get("text", ""))
    at = int(len(text) * 0.9)
    if only.kind != "text" or not text[:at].strip() or not text[at:].strip():
        raise DataError(
            f"{only.where} is the only record, so none can be held out; give ", Option("eval_data", ...), ", or more records."
        )
    parts = [Record("text", {"text": t}, only.where) for t in (text[:at], text[at:])]
    return parts[:1], parts[1:], "the last tenth of the text, kept aside"


# --- folders ------------------------------------------------------------------------------------------------
def settings_of(job: AdapterJob, shared: Shared) -> dict[str, Any]:
    """All that decides what a job becomes, as plain data."""
    numbers = ("lr", "batch", "seed", "schedule", "warmup", "weight_decay", "max_grad_norm")
    return {"recipe": job.recipe.to_json(), "steps": job.total_steps, **{n: getattr(job, n) for n in numbers}, "data": shared.mark}


def earlier(out: Path, jobs: Sequence[AdapterJob], shared: Shared, resume: bool, overwrite: bool) -> dict[str, JobResult]:
    """The jobs that are finished in ``out`` and are to be kept; nothing is removed yet.

    Args:
        out: the sweep's folder.
        jobs: of this sweep.
        shared: its data.
        resume: keep the finished jobs.
        overwrite: train them anew.

    Raises:
        OptionError: jobs stand there and neither ``resume`` nor ``overwrite`` was said, or both; one stands there that was
            made with other settings or data.
        ArtefactError: a job's file is damaged.
    """
    check_writable(out)
    if resume and overwrite:
        raise OptionError(
            Option("resume", True), " keeps the finished jobs and ", Option("overwrite", True), " gives them up; give one of them."
        )
    there = [j for j in jobs if (out / j.name / DONE).exists() or (out / j.name / "adapter").exists()]
    if overwrite or not there:
        return {}
    if not resume:
        names = ", ".join(j.name for j in there[:3])
        raise OptionError(
            f"{str(out)!r} already holds {len(there)} of these jobs ({names}{', …' if len(there) > 3 else ''}); keep them with ",
            Option("resume", True),
            ", choose another folder, or give them up with ",
            Option("overwrite", True),
            ".",
        )
    found = {j.name: _read(out / j.name / DONE) for j in there if (out / j.name / DONE).exists()}
    for j in there:
        wanted = settings_of(j, shared)
        if j.name in found and found[j.name].settings != wanted:
            got = found[j.name].settings
            key = next(k for k in wanted if got.get(k) != wanted[k])
            raise OptionError(
                f"{str(out / j.name)!r} was made with {key} = {got.get(key)!r}, but this job has {wanted[key]!r}; "
                "choose another folder, or give it up with ",
                Option("overwrite", True),
                ".",
            )
    return found


def _read(path: Path) -> JobResult:
    try:
        return JobResult(**{**json.loads(path.read_text(encoding="utf-8")), "kept": True})
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}); remove it, or give it up with ", Option("overwrite", True), "."
        ) from error


def _save(r: Running, outcome: JobResult, out: Path) -> None:
    """The adapter first, the file that says so last."""
    folder = out / r.job.name
    shutil.rmtree(folder, ignore_errors=True)
    r.adapter.save(folder / "adapter")
    replace_file(folder / DONE, json.dumps(dataclasses.asdict(outcome), indent=2, default=float).encode())


# --- the sweep ------------------------------------------------------------------------------------------------
def sweep(
    model: nn.Module,
    jobs: Sequence[AdapterJob],
    shared: Shared,
    out: str | Path,
    *,
    together: int = 8,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int], None] = lambda name, step: None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> list[JobResult]:
    """Train every job, ``together`` at a time, evaluate it and save it to ``out/NAME``; in the order of ``jobs``.

    What cannot share a batch is trained afterwards, one after another, and ``tell`` says so with the reason.  A job that
    diverges, or whose recipe does not fit the model, is told of by name and the others go on.

    Args:
        model: the base; left as it was.
        jobs: each of a name of its own.
        shared: their data, of :func:`prepare`.
        out: folder for a folder a job.
        together: jobs in one batch.
        resume: keep the jobs that are finished in ``out``.
        overwrite: train them anew.
        progress: called with a job's name and its steps so far.
        tell: called with a sentence on a job.

    Raises:
        OptionError: see :func:`earlier`; two jobs of one name.
    """
    out = Path(out)
    outcomes = earlier(out, jobs, shared, resume, overwrite)
    for name in outcomes:
        tell(f"{name}: finished before, kept")
    score = lambda: evaluate(model, shared.held, pad_id=shared.collator.pad_id, bytes_=shared.bytes_)
    before = next(iter(outcomes.values())).before if len(outcomes) == len(jobs) else score()
    fresh = {j.name: JobResult(j.name, settings_of(j, shared), before) for j in jobs if j.name not in outcomes}
    outcomes |= fresh

    def finished(r: Running) -> None:
        done = fresh[r.job.name]
        done.losses, done.seconds, done.trainable = r.losses, r.seconds, r.adapter.numel()
        if r.error is not None:
            done.error = r.error
            tell(f"{r.job.name}: stopped. {r.error}")
            return
        with view(model, {r.job.name: 1.0}):
            done.after = score()
        _save(r, done, out)

    def refused(job: AdapterJob, error: RankwiseError) -> None:
        fresh[job.name].error = str(error)
        tell(f"{job.name}: refused. {error}")

    for group, width in _groups(model, [j for j in jobs if j.name in fresh], fresh, together, refused, tell):
        train_together(model, group, shared.collator, together=width, finished=finished, refused=refused, progress=progress)
    return [outcomes[j.name] for j in jobs]


def _groups(
    model: nn.Module,
    jobs: Sequence[AdapterJob],
    fresh: Mapping[str, JobResult],
    together: int,
    refused: Callable[[AdapterJob, RankwiseError], None],
    tell: Callable[[str], None],
) -> list[tuple[list[AdapterJob], int]]:
    """Jobs that share batches, and those that cannot; each with how many train at a time."""
    shared: list[AdapterJob] = []
    apart: list[AdapterJob] = []
    for job in jobs:
        try:
            reason = why_alone(model, job.recipe)
        except RankwiseError as error:
            refused(job, error)
            continue
        (apart if reason else shared).append(job)
        if reason and together > 1:
            fresh[job.name].note = reason
            tell(f"{job.name}: trained apart from the others, since {reason}")
    return [(group, width) for group, width in ((shared, together), (apart, 1)) if group]
