"""Fine-tuning in what serving leaves: jobs one after another, their work in pieces that the engine asks for.

The engine's thread calls :meth:`TrainStream.run` between two steps; that is the only place where a job's tensors move,
so there are no locks around them.  What would hold a step up (attaching, saving, publishing) runs on one helper thread
while the job rests.  A finished adapter is saved as a new version and handed on by name: requests that run keep the
version that they began with.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise.errors import OptionError, RankwiseError, unknown
from rankwise.host import Helpers
from rankwise.serve.finetune.job import FILE, FineTuningJob, Status, TrainSpec
from rankwise.serve.finetune.layerwise import LayerwiseModel
from rankwise.serve.finetune.training import Task, Training
from rankwise.train.checkpoint import RUN_STATE

if TYPE_CHECKING:
    from rankwise.serve.server import Server

log = logging.getLogger("rankwise.serve")
SLIVER = 0.25  #: of what was asked for, below which no further piece is begun: its calls would cost more than its arithmetic

#: name and folder of a finished adapter; raises where it cannot be served
Publish = Callable[[str, Path], object]


class TrainStream:
    """Queue of fine-tuning jobs over one served model, and the one that is in work.

    Args:
        model: the served model, hooked or not; it is only read.
        home: jobs, checkpoints and finished adapters are kept here, and found again by the next stream.
        publish: called on the helper thread for each finished adapter.
        context: most tokens of a sample; ``most``: of one window.

    Raises:
        AttachError: a model that cannot be trained window by window.
    """

    def __init__(self, model: nn.Module, home: str | Path, publish: Publish, *, context: int = 2048, most: int = 256):
        self.model, self.home, self.publish = model, Path(home), publish
        self.context, self.most = context, most
        LayerwiseModel(model, check=True)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self.jobs: dict[str, FineTuningJob] = {}
        self.wake: Callable[[], None] = lambda: None  # tells the engine's loop that there is something to do
        self.wanted: Callable[[], bool] = lambda: False  # whether a request came in: then a piece is not followed by another
        self.job: FineTuningJob | None = None
        self.training: Training | None = None
        self._tasks: Iterator[Task] | None = None
        self._task: Task | None = None
        self._resting: Future[Any] | None = None  # what the job in work waits for
        self._then: Callable[[Any], None] = lambda _: None
        self._helper = Helpers(1, "rankwise-train")
        self._saved = 0  # step of the last checkpoint
        self._restore()

    # --- from any thread ------------------------------------------------------------------------------------------
    def submit(self, spec: TrainSpec) -> FineTuningJob:
        """Queue a job.

        Raises:
            OptionError: a sample that is too long, or with token ids that the model has not.
        """
        for i, s in enumerate(spec.samples):
            if len(s.tokens) > self.context:
                raise OptionError(f"Sample {i} has {len(s.tokens)} tokens, but a sample may have {self.context}; split it.")
            if not 0 <= min(s.tokens) <= max(s.tokens) < self.vocabulary or max(s.labels) >= self.vocabulary:
                raise OptionError(f"Sample {i} has token ids outside 0…{self.vocabulary - 1}, the model's vocabulary.")
        id = f"ftjob-{secrets.token_hex(8)}"
        job = FineTuningJob(id, spec, self.home / "jobs" / id)
        job.note("The job is queued.")
        job.write()
        self.jobs[id] = job
        self.wake()
        return job

    def get(self, id: str) -> FineTuningJob:
        """Raises UnknownName."""
        job = self.jobs.get(id)
        if job is None:
            raise unknown("fine-tuning job", id, self.jobs)
        return job

    def cancel(self, id: str) -> FineTuningJob:
        """End a job within a piece of its work; nothing happens where it has ended already.  Raises UnknownName."""
        job = self.get(id)
        job.cancelling = True
        self.wake()
        return job

    # --- on the engine's thread -----------------------------------------------------------------------------------
    def ready(self) -> bool:
        """Whether a job is in work and does not rest."""
        self._turn()
        return self._tasks is not None and self._resting is None

    def run(self, tokens: int, seconds: float | None = None) -> int:
        """Work worth up to ``tokens`` passes of a token through the layers.

        No further piece is begun once less than a quarter of ``tokens`` is left, ``seconds`` have gone by, or (where there are
        no ``seconds``) a request waits.

        Returns:
            The passes it was, rounded up; an optimiser step is none.
        """
        spent, begun = 0.0, time.monotonic()
        while tokens - spent >= max(1.0, SLIVER * tokens):
            late = self.wanted() if seconds is None else time.monotonic() - begun > seconds
            if not self.ready() or (spent and late):
                break
            try:
                spent += self._piece(tokens - spent)
            except Exception as error:  # the job's own fault (or a defect): serving and the other jobs go on
                self._fail(error)
        return -int(-spent // 1)

    def _piece(self, budget: float) -> float:
        assert self._tasks is not None and self.job is not None and self.training is not None
        if self._task is None:
            self._task = next(self._tasks, None)
            if self._task is None:
                self._rest(self._deliver, self._delivered)
                return 0.0
            every = self.job.spec.checkpoint_every
            if every and self.job.step % every == 0 and self.job.step > self._saved:
                self._saved = self.job.step
                self._rest(self._checkpoint, lambda _: None)
                return 0.0
        cost = self._task.take(budget)
        if self._task.done:
            self._task = None
        return cost

    # --- the life of a job ----------------------------------------------------------------------------------------
    def _turn(self) -> None:
        """See what the helper has done, end what was cancelled, begin what is next."""
        if self._resting is not None:
            if not self._resting.done():
                return
            done, self._resting = self._resting, None
            error = done.exception()
            if error is not None:
                self._fail(error)
            else:
                self._then(done.result())
        for job in [j for j in self.jobs.values() if j.cancelling and not j.status.final]:
            if job is self.job:
                self._end(Status.CANCELLED, "The job was cancelled.")
            else:
                self._close(job, Status.CANCELLED, "The job was cancelled before it began.")
        if self.job is None:
            self._begin(next((j for j in self.jobs.values() if j.status is Status.QUEUED), None))

    def _rest(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self._then = then
        self._resting = self._helper.submit(work)
        self._resting.add_done_callback(lambda _: self.wake())

    def _begin(self, job: FineTuningJob | None) -> None:
        if job is None:
            return
        self.job, job.status = job, Status.RUNNING
        job.note("The job has begun.")
        self._rest(self._prepare, self._prepared)

    def _prepare(self) -> Training:
        assert self.job is not None
        job = self.job
        net = LayerwiseModel(self.model)
        training = Training(net, job.spec.parsed(), job.spec.samples, most=self.most, **job.spec.session_options())
        held = [p for p in job.home.glob("checkpoint-*") if (p / RUN_STATE).exists()]
        if held:
            newest = max(held, key=lambda p: int(p.name.rpartition("-")[2]))
            job.tokens = int(training.restore(newest)["tokens"])
            job.step = training.session.t
            job.note(f"The job goes on after step {job.step}.")
        else:
            job.step = job.tokens = 0
        return training

    def _prepared(self, training: Training) -> None:
        assert self.job is not None
        self.training, self._saved = training, self.job.step
        self._tasks = self.job.schedule(training)

    def _checkpoint(self) -> None:
        assert self.job is not None and self.training is not None
        self.training.checkpoint(self.job.home, {"tokens": self.job.tokens})
        self.job.write()

    def _deliver(self) -> tuple[int, Path]:
        """Save the adapter as the next version of its name, and hand it on."""
        assert self.job is not None and self.training is not None
        name = self.job.spec.name
        folder = self.home / "adapters" / name
        taken = [int(p.name[1:]) for p in folder.glob("v*") if p.name[1:].isdigit()]
        version = max(taken, default=0) + 1
        path = folder / f"v{version}"
        self.training.save(path)
        self.publish(name, path)
        return version, path

    def _delivered(self, made: tuple[int, Path]) -> None:
        assert self.job is not None
        self.job.version, self.job.folder = made
        self._end(Status.SUCCEEDED, f"The adapter is served as {self.job.spec.name!r}, version {made[0]}.")

    def _fail(self, error: BaseException) -> None:
        known = isinstance(error, RankwiseError)
        if not known:
            log.error("a fine-tuning job failed", exc_info=error)
        self._end(Status.FAILED, str(error) if known else f"The server failed at it ({type(error).__name__}).")

    def _end(self, status: Status, message: str) -> None:
        """Let go of all that the job in work holds."""
        job, training = self.job, self.training
        self.job = self.training = self._tasks = self._task = None
        if training is not None:
            training.close()
        if job is not None:
            self._close(job, status, message)

    def _close(self, job: FineTuningJob, status: Status, message: str) -> None:
        job.error = message if status is Status.FAILED else ""
        job.finished = time.time()
        job.note(message, "error" if status is Status.FAILED else "info")
        job.status = status
        self._helper.submit(self._tidy, job)

    def _tidy(self, job: FineTuningJob) -> None:
        try:
            job.write()
            for path in job.home.glob("checkpoint-*"):
                shutil.rmtree(path, ignore_errors=True)
        except RankwiseError as error:
            log.error("the end of job %s is not on disk: %s", job.id, error)

    # --- start and end --------------------------------------------------------------------------------------------
    def _restore(self) -> None:
        """Jobs of an earlier stream: those that had ended are listed, the others begin again from their last checkpoint."""
        found = [FineTuningJob.read(p.parent) for p in (self.home / "jobs").glob(f"*/{FILE}")]
        for job in sorted(found, key=lambda j: (j.created, j.id)):
            if not job.status.final:
                job.status = Status.QUEUED
                job.note("The server was started again; the job is queued.")
            self.jobs[job.id] = job

    def close(self) -> None:
        """Stop where it is: jobs that have not ended go on from their last checkpoint in the next stream.  The engine has stopped."""
        self._helper.shutdown(wait=True)
        training, self.training = self.training, None
        self.job = self._tasks = self._task = None
        if training is not None:
            training.close()


def beside(server: Server, home: str | Path, *, context: int = 2048, most: int = 256) -> TrainStream:
    """A stream in ``server``'s engine, over its model; what is finished is loaded under its name.  See :class:`TrainStream`.

    Args:
        server: its source of adapters must be able to open ``home/adapters``.
        home: folder of the jobs and their adapters.
        context: tokens of the longest sample.
        most: tokens of the largest window.
    """

    def load(name: str, folder: Path) -> object:
        return server.cache.load(name, str(folder))

    stream = TrainStream(server.runner.model, home, load, context=context, most=most)
    stream.wake = lambda: server.engine.call(lambda: None)
    stream.wanted = server.engine.wanted
    server.engine.stream = stream
    return stream
