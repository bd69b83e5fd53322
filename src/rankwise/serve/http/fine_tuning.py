"""Fine-tuning jobs beside serving: OpenAI's routes, with the data in the request or in a file of the server's.

``suffix`` is the name under which the finished adapter is served; a name that is served already gets a new version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rankwise._renamed import warn
from rankwise.errors import UnknownName
from rankwise.serve.finetune.chunked_backward import Sample
from rankwise.serve.finetune.job import FineTuningJob, Note, TrainSpec
from rankwise.serve.http.errors import Refusal, bad
from rankwise.serve.http.schemas import Body, Name, noted, read
from rankwise.serve.http.service import Service, log
from rankwise.train.data.readers import read as read_records
from rankwise.train.data.tokens import OVERLONG, Truncation, tokenize

if TYPE_CHECKING:
    from rankwise.serve.finetune.queue import TrainStream
    from rankwise.serve.http.auth import Caller

Auto = Literal["auto"]
#: learning rate that ``learning_rate_multiplier`` multiplies
RATE = TrainSpec.lr


class Hyperparameters(Body):
    """OpenAI's; ``auto`` is the default of a job here."""

    n_epochs: Auto | float = "auto"
    batch_size: Auto | int = "auto"
    learning_rate_multiplier: Auto | float = "auto"


class Create(Body):
    """OpenAI's body.  Extensions: ``training_data`` (records in place of a file), ``recipe``, and the fields below it."""

    model: Name
    training_file: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    training_data: list[dict[str, Any]] | None = None
    suffix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    seed: int = 0
    validation_file: None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    format: str = "auto"
    max_length: int | None = None
    truncation: Literal["auto", "split"] | bool = "auto"
    overlong: Literal["auto", "error", "truncate", "split"] | None = None  # the old spelling of truncation
    lr: float | None = None
    steps: int | None = None
    schedule: str = TrainSpec.schedule
    warmup: float = TrainSpec.warmup
    weight_decay: float = TrainSpec.weight_decay
    max_grad_norm: float | None = TrainSpec.max_grad_norm
    checkpoint_every: int = 20


async def create(request: Request, service: Service, caller: Caller) -> Response:
    """Queue a job.

    Raises:
        Refusal: a body that is wrong; no training here; a file from elsewhere.
        DataError, RecipeError, OptionError: data, recipe or numbers that cannot be trained on.
    """
    stream = _stream(service)
    s = service.settings
    body, ignored = await read(request, Create, dataclasses.replace(s, body_bytes=s.train_bytes))
    if body.model != s.model:
        raise bad(f"model is the base's name {s.model!r}; adapters are trained on the base. It is {body.model!r}.", "model")
    if body.suffix == s.model:
        raise bad(f"{body.suffix!r} is the base's name; give the adapter another one.", "suffix")
    if (body.training_file is None) == (body.training_data is None):
        raise bad("Give either training_file or training_data.", "training_file")
    source: Path | list[dict[str, Any]] = body.training_data or []
    if body.training_file is not None:
        source = _inside(body.training_file, s.train_roots)
    length = min(body.max_length or stream.context, stream.context)
    records = await service.read(read_records, source, body.format)
    examples = await service.write(tokenize, records, service.tokenizer, length, truncation=_truncation(body))
    samples = tuple(Sample(tuple(e.input_ids), tuple(e.labels)) for e in examples)
    job = await service.read(lambda: stream.submit(_spec(body, samples)))
    log.info("fine-tuning job %s queued: %s, %d samples, %d steps", job.id, body.suffix, len(samples), job.spec.total_steps)
    return JSONResponse(_shown(job, service), headers=noted(ignored))


async def jobs(request: Request, service: Service, caller: Caller) -> Response:
    """All jobs, the newest first, ``limit`` of them after the one called ``after``."""
    found = sorted(_stream(service).jobs.values(), key=lambda j: (j.created, j.id), reverse=True)
    page, more = _page(found, [j.id for j in found], request)
    return JSONResponse({"object": "list", "data": [_shown(j, service) for j in page], "has_more": more})


async def job(request: Request, service: Service, caller: Caller) -> Response:
    """One job.  Raises Refusal (404)."""
    return JSONResponse(_shown(_job(request, service), service))


async def cancel(request: Request, service: Service, caller: Caller) -> Response:
    """End a job; what it was.  A job that has ended stays as it is."""
    found = _job(request, service)
    _stream(service).cancel(found.id)
    return JSONResponse(_shown(found, service))


async def events(request: Request, service: Service, caller: Caller) -> Response:
    """What happened in a job, the newest first; ``since=N``: from its N-th event on, the oldest first."""
    notes = list(enumerate(_job(request, service).notes))
    since = request.query_params.get("since")
    if since is not None:
        if not since.isdigit():
            raise bad(f"since = {since!r}; it is the number of an event, 0 or more.", "since")
        return JSONResponse({"object": "list", "data": [_event(i, n) for i, n in notes[int(since) :]], "has_more": False})
    page, more = _page(notes[::-1], [_event_id(i) for i, _ in notes[::-1]], request)
    return JSONResponse({"object": "list", "data": [_event(i, n) for i, n in page], "has_more": more})


# --- inside -----------------------------------------------------------------------------------------------------
def _stream(service: Service) -> TrainStream:
    if service.training is None:
        raise Refusal(403, "training_disabled", "This server trains nothing; start it with --train FOLDER.")
    return service.training


def _inside(given: str, roots: tuple[Path, ...]) -> Path:
    """The real path of a training file, if it lies below a folder from which this server may read; else nothing is said of it."""
    if not roots:
        raise Refusal(403, "files_disabled", "This server reads no training files; send the records as training_data.")
    for root in roots:
        try:
            real = (root / given).resolve()
        except (OSError, ValueError, RuntimeError):
            break
        if real.is_relative_to(root.resolve()):
            return real
    raise bad("training_file does not lie below a folder from which this server may read.", "training_file", "path_not_allowed")


def _truncation(body: Create) -> Truncation:
    """The field, or its old spelling."""
    if body.overlong is None:
        return body.truncation
    if body.truncation != "auto":
        raise bad("Give either truncation or overlong, its old spelling.", "truncation")
    warn("The field 'overlong'", "'truncation'")
    return OVERLONG.get(body.overlong, body.overlong)  # type: ignore[arg-type]


def _job(request: Request, service: Service) -> FineTuningJob:
    try:
        return _stream(service).get(request.path_params["id"])
    except UnknownName as error:
        raise Refusal(404, "job_not_found", str(error)) from None


def _spec(body: Create, samples: tuple[Sample, ...]) -> TrainSpec:
    h = body.hyperparameters
    lr = body.lr
    if h.learning_rate_multiplier != "auto":
        if lr is not None:
            raise bad("Give either lr or hyperparameters.learning_rate_multiplier.", "lr")
        lr = RATE * h.learning_rate_multiplier
    same = ("recipe", "steps", "schedule", "warmup", "weight_decay", "max_grad_norm", "seed", "checkpoint_every")
    given: dict[str, Any] = {name: getattr(body, name) for name in same}
    given |= {name: value for name, value in (("epochs", h.n_epochs), ("batch_size", h.batch_size)) if value != "auto"}
    return TrainSpec(body.suffix, samples, lr=RATE if lr is None else lr, **given)


def _page(rows: list[Any], ids: list[str], request: Request) -> tuple[list[Any], bool]:
    """A page after the row called ``after``, and whether there are more."""
    limit, after = request.query_params.get("limit", "20"), request.query_params.get("after")
    if not limit.isdigit() or not 1 <= int(limit) <= 1000:
        raise bad(f"limit = {limit!r}; it is from 1 to 1000.", "limit")
    if after is not None and after not in ids:
        raise bad(f"after = {after[:80]!r} is not in this list.", "after")
    first = 0 if after is None else ids.index(after) + 1
    return rows[first : first + int(limit)], first + int(limit) < len(rows)


def _shown(job: FineTuningJob, service: Service) -> dict[str, Any]:
    spec = job.spec
    multiplier = spec.lr / RATE
    last: Mapping[str, Any] = next(reversed(job.records), {})
    return {
        "object": "fine_tuning.job", "id": job.id, "created_at": int(job.created),
        "finished_at": None if job.finished is None else int(job.finished), "model": service.settings.model,
        "fine_tuned_model": spec.name if job.version is not None else None, "organization_id": "", "result_files": [],
        "status": job.status.value, "trained_tokens": job.tokens or None, "training_file": "", "validation_file": None,
        "hyperparameters": {"n_epochs": spec.epochs, "batch_size": spec.batch_size, "learning_rate_multiplier": multiplier},
        "error": {"code": "job_failed", "message": job.error, "param": None} if job.error else None, "seed": spec.seed,
        # beyond the protocol
        "suffix": spec.name, "version": job.version, "step": job.step, "total_steps": spec.total_steps, "samples": len(spec.samples),
        "loss": last.get("loss"), "recipe": dict(spec.recipe),
    }  # fmt: skip


def _event_id(index: int) -> str:
    return f"ftevent-{index}"


def _event(index: int, note: Note) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event", "id": _event_id(index), "created_at": int(note.at), "level": note.level,
        "message": note.message, "type": "metrics" if note.data else "message", "data": dict(note.data) or None,
    }  # fmt: skip
