"""The step loop: one thread owns every tensor; requests enter by a queue and leave as events.

A step: commands → admission → plan → forward → sample → publish → training in what is left.  Decoding rows are in every
step; prompts fill the rest of its token budget in chunks (:mod:`rankwise.serve.scheduler`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from queue import Empty, SimpleQueue
from typing import Protocol

import torch

from rankwise.errors import OptionError, RankwiseError
from rankwise.serve.options import EngineOptions, EngineStats
from rankwise.serve.pacing import Pace
from rankwise.serve.plan import Role, Span, TokenPlan, make_plan
from rankwise.serve.prefix import PrefixIndex
from rankwise.serve.runner import Runner
from rankwise.serve.sampler import Drawn, SamplerState, sample
from rankwise.serve.sched.base import Job, Policy
from rankwise.serve.scheduler import Residency, Scheduler
from rankwise.serve.sequence import Sequence
from rankwise.serve.types import Event, Finished, Outcome, Overloaded, Request, ServeError, Token

log = logging.getLogger("rankwise.serve")
Observer = Callable[[str, float, Mapping[str, str]], None]


class Stream(Protocol):
    """Training in what a step leaves: see :mod:`rankwise.serve.train_stream`."""

    def waiting(self) -> int:
        """Tokens it would take now."""
        ...

    def run(self, tokens: int) -> int:
        """Work on up to ``tokens`` tokens; how many it was."""
        ...


class Engine:
    """Serves requests over one runner.

    Args:
        runner, index, adapters, policy: see their modules.
        total_blocks: of the cache, for limits and statistics.
        base: fingerprint of the base, the first field of every prefix salt.
        clock: seconds; a virtual one makes every test instant.
        stream: training beside serving, within what :class:`~rankwise.serve.pacing.Pace` leaves it.
    """

    def __init__(
        self,
        runner: Runner,
        index: PrefixIndex,
        adapters: Residency,
        policy: Policy,
        options: EngineOptions | None = None,
        *,
        total_blocks: int,
        base: str = "",
        clock: Callable[[], float] = time.monotonic,
        stream: Stream | None = None,
    ):
        options = options or EngineOptions()
        self.runner, self.adapters, self.policy, self.options, self.clock = runner, adapters, policy, options, clock
        self.stream = stream
        self.pace = Pace(options.step_tokens, options.step_seconds, options.train_tokens)
        self.observer: Observer | None = None
        self.queue = Scheduler(
            runner.page, total_blocks, index, adapters, policy, options, base, clock, self.pace.prompt_tokens, self._finish
        )
        self.queue.token_seconds = self.pace.token_seconds
        self.counters: Counter[str] = self.queue.counters
        self.steps = 0
        self.error = ""
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._ids: set[str] = set()  # of all that live, so that a second one is refused at once
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._draining = False

    # --- called from any thread -----------------------------------------------------------------------------------
    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        """Queue a request; its events come on the engine's thread, :class:`Finished` last.

        Raises:
            OptionError: longer than a request may be; an id that is in use.
            Overloaded: the queue is full, or the engine is going down.
        """
        self._check_length(request)
        with self._lock:
            if request.id in self._ids:
                raise OptionError(f"A request with the id {request.id!r} is being served; give each its own.")
            if self._draining or self._stopping.is_set():
                raise Overloaded("The server is going down; try another one.", 5.0)
            if len(self._ids) >= self.options.max_waiting + self.options.max_running:
                raise Overloaded(f"{len(self._ids)} requests are being served or waiting, as many as may; try again later.")
            self._ids.add(request.id)
        self._do(lambda: self._take(request, on_event))

    def _check_length(self, request: Request) -> None:
        room = self.queue.total_blocks * self.runner.page
        limit = room if self.options.max_context is None else min(room, self.options.max_context)
        wanted = len(request.prompt) + request.sampling.max_tokens
        if wanted > limit:
            raise OptionError(
                f"The prompt has {len(request.prompt)} tokens and max_tokens is {request.sampling.max_tokens}: {wanted} together, "
                f"but a request may have {limit}; shorten one of them."
            )

    def cancel(self, request_id: str) -> None:
        """End a request within a step; nothing happens where it has ended already."""
        self._do(lambda: self._cancel(request_id))

    def call(self, fn: Callable[[], object]) -> None:
        """Run ``fn`` on the engine's thread between two steps; what it raises is logged and concerns no request."""

        def run() -> None:
            try:
                fn()
            except Exception as error:
                self.counters["faults"] += 1
                log.error("a command between two steps failed", exc_info=error)

        self._do(run)

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    def wanted(self) -> bool:
        """Whether anything has come in since this step began."""
        return self._wake.is_set()

    def stats(self) -> EngineStats:
        """A look from any thread; what was submitted and not yet seen by a step is waiting too."""
        used = self.queue.total_blocks - self.queue.index.available()
        running = len(self.queue.running)
        return EngineStats(
            running, max(len(self._ids) - running, 0), used, self.queue.total_blocks, self.steps, self.queue.step_seconds,
            not self.error, self.error, dict(self.counters), *self.adapters.cells_held(),
        )  # fmt: skip

    # --- life -----------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="rankwise-engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """Take no more requests; ``drain``: finish those that are here, for up to ``timeout`` seconds; cancel the rest."""
        self._draining = True
        end = time.monotonic() + timeout
        while drain and self._ids and time.monotonic() < end and self._thread is not None and self._thread.is_alive():
            time.sleep(0.005)
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        self._drain_commands()
        for seq in [*self.queue.running.values(), *self.queue.waiting.values()]:
            self._finish(seq, Outcome.CANCELLED, "The server is going down.")

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                busy = self.step()
            except Exception as error:  # outside the forward it is not known whom it concerns: nobody is left waiting
                busy = False
                self._fail(error)
            if not busy:
                # adapters being read wake the loop when they are there; the wait bounds what a lost wake costs
                self._wake.wait(0.05)

    def _fail(self, error: Exception) -> None:
        """End every request with an error, and go on."""
        log.error("the engine failed outside a forward", exc_info=error)
        self.error = f"{type(error).__name__}: {error}"
        self.counters["faults"] += 1
        for seq in [*self.queue.running.values(), *self.queue.waiting.values()]:
            try:
                self._finish(seq, Outcome.ERROR, "The engine failed; the request was not completed.")
            except Exception:
                log.exception("request %s could not be ended", seq.request.id)

    # --- one step -------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Everything of one step; True where there was something to compute."""
        self._drain_commands()
        self.queue.admit()
        for seconds in self.queue.take_queued():
            self._observe("queue_seconds", seconds)
        spans = self.queue.spans()
        if spans:
            self._serve(spans)
        return self._train(bool(spans)) or bool(spans)

    def _drain_commands(self) -> None:
        self._wake.clear()  # what comes in from here on is seen by this step or wakes the next one
        with contextlib.suppress(Empty):
            while True:
                self._commands.get_nowait()()

    def _take(self, request: Request, emit: Callable[[Event], None]) -> None:
        """Queue a request, or end it alone where that fails."""
        try:
            self._enqueue(request, emit)
        except Exception as error:
            log.error("request %s could not be queued", request.id, exc_info=error)
            self.counters["faults"] += 1
            self.queue.waiting.pop(request.id, None)
            with self._lock:
                self._ids.discard(request.id)
            emit(Finished(request.id, Outcome.ERROR, len(request.prompt), 0, message="The engine could not queue the request."))

    def _enqueue(self, request: Request, emit: Callable[[Event], None]) -> None:
        now = self.clock()
        job = Job(
            request.id,
            now,
            len(request.prompt),
            request.sampling.max_tokens,
            request.tenant,
            request.adapter,
            deadline=request.deadline,
        )
        first = self.queue.first_link(request)
        seq = Sequence(
            request, emit, job, SamplerState.of(request.sampling, self.options.seed, request.id), list(request.prompt), first
        )
        self.queue.waiting[request.id] = seq
        if request.adapter is not None:
            try:
                seq.fetched = self.adapters.fetch(request.adapter)
            except ServeError as error:
                self._finish(seq, Outcome.REJECTED, str(error), error)
                return
            job.cells = self.adapters.cells(request.adapter)
            seq.fetched.add_done_callback(lambda _: self._wake.set())

    def _cancel(self, request_id: str) -> None:
        seq = self.queue.running.get(request_id) or self.queue.waiting.get(request_id)
        if seq is not None:
            self._finish(seq, Outcome.CANCELLED)

    # --- the forward ----------------------------------------------------------------------------------------------
    def _serve(self, spans: list[Span]) -> None:
        start = self.clock()
        plan = make_plan(spans, self.runner.page)
        seqs = [self.queue.running[s.request] for s in plan.spans]
        load = self.queue.load(spans)
        try:
            logits = self.runner.run(plan, self.adapters.slots)
        except Exception as error:  # a fault of the model or a kernel: these requests end, the others go on
            log.error("a step failed", exc_info=error)
            self.error = f"{type(error).__name__}: {error}"
            self.counters["faults"] += 1
            for seq in seqs:
                self._finish(seq, Outcome.ERROR, "The engine failed in a step; the request was not completed.")
            return
        self.error = ""
        self._advance(plan, seqs, logits)
        self.steps += 1
        self.queue.step_seconds = self.clock() - start
        self._report_step(plan, self.pace.served(load, self.queue.step_seconds))

    def _advance(self, plan: TokenPlan, seqs: list[Sequence], logits: torch.Tensor) -> None:
        """Tokens from logits, to their requests; a verified guess is a token like any other."""
        states = [seq.sampler for span, seq in zip(plan.spans, seqs, strict=True) for _ in range(span.samples)]
        finite = torch.isfinite(logits.sum(-1)).tolist() if states else []
        drawn = sample(logits if all(finite) else torch.nan_to_num(logits), states)
        produced: dict[str, int] = {}
        at = 0
        for span, seq in zip(plan.spans, seqs, strict=True):
            mine = slice(at, at + span.samples)
            at = mine.stop
            if not all(finite[mine]):
                self._finish(seq, Outcome.ERROR, "The model's logits are not finite for this request.")
                continue
            fault = next((d.fault for d in drawn[mine] if d.fault), "")
            if fault:
                self._finish(seq, Outcome.ERROR, f"No token could be drawn for this request ({fault}).")
                continue
            right = _verified(span, drawn[mine])
            seq.computed += len(span.tokens) - max(span.samples - 1, 0) + max(len(right) - 1, 0)
            if span.role is not Role.VERIFY:
                self._complete(seq)
            for token in right:
                if seq.request.id in self.queue.running:
                    self._publish(seq, token)
                    produced[seq.request.id] = produced.get(seq.request.id, 0) + 1
            if span.role is Role.VERIFY:
                self.counters["guesses"] += span.samples - 1
                self.counters["guesses_right"] += len(right) - 1
                if seq.request.id in self.queue.running:
                    self._complete(seq)
        self.policy.stepped(produced, [s.job for s in seqs], self.clock())

    def _complete(self, seq: Sequence) -> None:
        """Enter the blocks that have become full."""
        page = self.runner.page
        while (seq.full + 1) * page <= seq.computed:
            at = seq.full * page
            seq.chain = self.queue.index.complete(seq.blocks[seq.full], seq.chain, seq.tokens[at : at + page])
            seq.full += 1

    def _publish(self, seq: Sequence, token: Drawn) -> None:
        now = self.clock()
        self._observe(
            *(
                ("time_to_first_token_seconds", now - seq.job.arrival)
                if seq.last is None
                else ("inter_token_seconds", now - seq.last)
            )
        )
        seq.last = now
        index = seq.generated
        seq.tokens.append(token.id)
        seq.job.generated = seq.generated
        self.counters["generated_tokens"] += 1
        self._emit(seq, Token(seq.request.id, token.id, index, token.logprob, token.top))
        s = seq.request.sampling
        if token.id in s.stop_ids or (token.id in self.options.eos and not s.ignore_eos):
            self._finish(seq, Outcome.STOP)
        elif seq.generated >= s.max_tokens:
            self._finish(seq, Outcome.LENGTH)

    def _emit(self, seq: Sequence, event: Event) -> None:
        try:
            seq.emit(event)
        except Exception as error:  # a listener's fault must not end the others' step
            self.counters["listener_faults"] += 1
            self.error = f"A listener failed: {type(error).__name__}: {error}"

    def _finish(self, seq: Sequence, outcome: Outcome, message: str = "", error: RankwiseError | None = None) -> None:
        r = seq.request
        was_running = self.queue.running.pop(r.id, None) is not None
        if not was_running and self.queue.waiting.pop(r.id, None) is None:
            return
        self.queue.let_go(seq)
        if r.adapter is not None and seq.fetched is not None:
            self.adapters.release(r.adapter)
        with self._lock:
            self._ids.discard(r.id)
        self.counters[f"requests_{outcome.value}"] += 1
        self.counters["prompt_tokens"] += seq.prompt if seq.generated else 0
        self._observe("request_seconds", self.clock() - seq.job.arrival)
        self.policy.finished(seq.job, self.clock())
        self._emit(seq, Finished(r.id, outcome, seq.prompt, seq.generated, seq.reused, message, error))

    # --- training and reports -------------------------------------------------------------------------------------
    def _train(self, served: bool) -> bool:
        """Training in what this step left; True where some was done."""
        waiting = self.stream.waiting() if self.stream is not None else 0
        if self.stream is None or not waiting:
            return False
        share = self.pace.training_tokens(self.queue.step_seconds, waiting) if served else self.options.idle_train_tokens
        start = self.clock()
        done = self.stream.run(share) if share > 0 else 0
        self.pace.trained(done, self.clock() - start)
        self.counters["train_tokens"] += done
        return done > 0

    def _report_step(self, plan: TokenPlan, error: float) -> None:
        """``error``: the step's time over what the step-time model had said."""
        if self.observer is None:
            return
        kind = "mixed" if any(s.role is Role.PREFILL for s in plan.spans) else "decode"
        self._observe("step_seconds", self.queue.step_seconds, kind=kind)
        self._observe("step_tokens", plan.T)
        self._observe("step_time_model_error_ratio", error)
        self._observe("distinct_adapters_per_step", len({s.slot for s in plan.segments}))

    def _observe(self, name: str, value: float, **labels: str) -> None:
        if self.observer is not None:
            self.observer(name, value, labels)

    def idle(self) -> bool:
        return not self.queue.running and not self.queue.waiting and self._commands.empty()


def _verified(span: Span, drawn: list[Drawn]) -> list[Drawn]:
    """The tokens of a span that stand: each guess that is what was drawn before it, and the draw after the last of them."""
    n = 0
    while n < len(drawn) - 1 and drawn[n].id == span.tokens[len(span.tokens) - len(drawn) + 1 + n]:
        n += 1
    return drawn[: n + 1]


def run_until_idle(engine: Engine, most: int = 100_000) -> int:
    """Step an engine without a thread until nothing is left; the number of steps.

    Raises:
        RankwiseError: still busy after ``most`` steps.
    """
    for n in range(most):
        if engine.idle():
            return n
        engine.step()
    raise RankwiseError(f"The engine is still busy after {most} steps.")


def collect(events: Iterable[Event]) -> tuple[list[int], Finished | None]:
    """(token ids, the last event) of one request's events."""
    ids = [e.id for e in events if isinstance(e, Token)]
    done = [e for e in events if isinstance(e, Finished)]
    return ids, done[-1] if done else None
