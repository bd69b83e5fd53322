"""The step loop: one thread owns every tensor; requests enter by a queue and leave as events.

A step: commands → admission → plan → forward → sample → publish → training in what is left.  Decoding rows are in every
step; prompts fill the rest of its token budget in chunks (:mod:`rankwise.serve.engine.scheduler`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from rankwise.errors import OptionError, RankwiseError
from rankwise.host import release_workers
from rankwise.serve.batch import Role, Span, TokenPlan, make_plan
from rankwise.serve.engine.inbox import Inbox
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.engine.pacing import Pace, TrainingWork
from rankwise.serve.engine.prompt_lookup import verified
from rankwise.serve.engine.sampler import Drawn, SamplerState, sample
from rankwise.serve.engine.scheduler import Scheduler
from rankwise.serve.engine.sequence import Sequence
from rankwise.serve.memory import no_memory
from rankwise.serve.policies.base import Policy, RequestInfo
from rankwise.serve.types import Event, Finished, Outcome, Request, ServeError, Token

if TYPE_CHECKING:
    from rankwise.serve.cache.prefix import PrefixIndex
    from rankwise.serve.engine.interfaces import Copies, Residency
    from rankwise.serve.model.runner import Runner

TRAIN_FAULTS = 3  #: in a row, after which training beside serving is ended
log = logging.getLogger("rankwise.serve")
Observer = Callable[[str, float, Mapping[str, str]], None]


class Engine(Inbox):
    """Serves requests over one runner.

    Raises:
        OptionError: a policy that only the simulator can follow.

    Args:
        runner, index, adapters, policy: see their modules.
        total_blocks: of the cache, for limits and statistics.
        base: fingerprint of the base, the first field of every prefix salt.
        clock: seconds; a virtual one makes every test instant.
        copies: what the runner keeps a second time and can do without.
        stream: training beside serving, within what :class:`~rankwise.serve.engine.pacing.Pace` leaves it.
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
        stream: TrainingWork | None = None,
        copies: Copies | None = None,
    ):
        super().__init__()
        if policy.unserved:
            raise OptionError(
                f"The policy {policy.name!r} is for the simulator: it wants the engine to {policy.unserved}; use 'default'."
            )
        options = options or EngineOptions()
        self.runner, self.adapters, self.policy, self.options, self.clock = runner, adapters, policy, options, clock
        self.stream = stream
        self.pace = Pace(options.step_tokens, options.step_seconds, options.train_tokens)
        self.observer: Observer | None = None
        self.queue = Scheduler(
            runner.page, total_blocks, index, adapters, policy, options, base, clock, self.pace.prompt_tokens, self._finish
        )
        self.queue.copies = copies
        self.queue.token_seconds = self.pace.token_seconds
        self.counters: Counter[str] = self.queue.counters
        self.steps = self._train_faults = 0
        self.error = ""
        self._thread: threading.Thread | None = None

    # --- life -----------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Step on a thread of its own from now on, which has the processors: the calling thread's own workers are let go."""
        release_workers()
        self._thread = threading.Thread(target=self._loop, name="rankwise-engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """Take no more requests; ``drain``: finish those that are here, for up to ``timeout`` seconds; cancel the rest."""
        with self._lock:
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
        return self._beside(bool(spans)) or bool(spans)

    def _take(self, request: Request, emit: Callable[[Event], None]) -> None:
        """Queue a request, or end it alone where that fails."""
        job = RequestInfo(
            request.id, self.clock(), len(request.prompt), request.sampling.max_tokens, request.tenant, request.adapter,
            deadline=request.deadline,
        )  # fmt: skip
        seq: Sequence | None = None
        try:
            first = self.queue.first_link(request)
            state = SamplerState.of(request.sampling, self.options.seed, request.id)
            seq = Sequence(request, emit, job, state, list(request.prompt), first)
            self._fetch(seq)
        except Exception as error:
            # it may not have come so far as to be one
            self._untaken(seq or Sequence(request, emit, job, None, list(request.prompt), b""), error)  # type: ignore[arg-type]
        else:
            self.queue.waiting.push(seq)
            if seq.fetched is not None:
                seq.fetched.add_done_callback(
                    lambda _: self._wake.set()
                )  # after the queue's own, so that the step it wakes finds it

    def _fetch(self, seq: Sequence) -> None:
        """Have its adapter read."""
        digest = seq.request.adapter
        if digest is not None:
            seq.fetched = self.adapters.fetch(digest)
            seq.job.lora_pages = self.adapters.lora_pages(digest)

    def _untaken(self, seq: Sequence, error: Exception) -> None:
        """End a request that could not be queued, by why it could not."""
        self.queue.waiting.push(seq)
        if isinstance(error, ServeError):
            self._finish(seq, Outcome.REJECTED, str(error), error)
        elif no_memory(error):
            self.queue.turn_away(seq)
        else:
            log.error("request %s could not be queued", seq.request.id, exc_info=error)
            self.counters["faults"] += 1
            self._finish(seq, Outcome.ERROR, "The engine could not queue the request.")

    def _cancel(self, request_id: str) -> None:
        seq = self.queue.running.get(request_id) or self.queue.waiting.get(request_id)
        if seq is not None:
            self._finish(seq, Outcome.CANCELLED)

    # --- the forward ----------------------------------------------------------------------------------------------
    def _serve(self, spans: list[Span]) -> None:
        start, load = self.clock(), self.queue.load(spans)
        try:
            plan = make_plan(spans, self.runner.page)
            seqs = [self.queue.running[s.request] for s in plan.spans]
            finite, drawn = self._drawn(plan, seqs)
        except Exception as error:
            self._failed([self.queue.running[s.request] for s in spans], load.tokens, error)
            return
        self.error = ""
        self._advance(plan, seqs, finite, drawn)
        self.queue.shortage.went_well(self.options.max_running, self.options.step_tokens)
        self.steps += 1
        self.queue.step_seconds = self.clock() - start
        self._report_step(plan, self.pace.served(load, self.queue.step_seconds))

    def _failed(self, seqs: list[Sequence], tokens: int, error: Exception) -> None:
        """A step did not come to its end, so none of its requests has moved."""
        if no_memory(error):
            self.queue.make_way(seqs, tokens)
            return
        # a fault of the model or a kernel: these requests end, the others go on
        log.error("a step failed: %s", error, exc_info=None if isinstance(error, RankwiseError) else error)
        self.error = f"{type(error).__name__}: {error}"
        self.counters["faults"] += 1
        for seq in seqs:
            self._finish(seq, Outcome.ERROR, "The engine failed in a step; the request was not completed.")

    def _drawn(self, plan: TokenPlan, seqs: list[Sequence]) -> tuple[list[bool], list[Drawn]]:
        """For each sample row of the step: whether its logits are finite, and the token drawn from it."""
        logits = self.runner.run(plan, self.adapters.slots)
        states = [seq.sampler for span, seq in zip(plan.spans, seqs, strict=True) for _ in range(span.samples)]
        finite = torch.isfinite(logits.sum(-1)).tolist() if states else []
        return finite, sample(logits if all(finite) else torch.nan_to_num(logits), states)

    def _advance(self, plan: TokenPlan, seqs: list[Sequence], finite: list[bool], drawn: list[Drawn]) -> None:
        """Tokens to their requests; a verified guess is a token like any other."""
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
            right = verified(span, drawn[mine])
            seq.short = 0
            seq.computed += len(span.tokens) - max(span.samples - 1, 0) + max(len(right) - 1, 0)
            if span.samples and span.role is not Role.VERIFY:
                self._complete(seq)  # not before logits that hang on all of its tokens have been seen to be finite
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
        if not was_running and self.queue.waiting.pop(r.id) is None:
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
    def _beside(self, served: bool) -> bool:
        """:meth:`_train`, whose faults concern no request; one that lasts ends the training."""
        try:
            trained = self._train(served)
        except Exception as error:
            log.error("training beside serving failed", exc_info=error)
            self.counters["faults"] += 1
            self._train_faults += 1
            if self._train_faults >= TRAIN_FAULTS:
                log.error("training beside serving has failed %d times in a row and is ended; serving goes on", TRAIN_FAULTS)
                self.stream = None
            return False
        self._train_faults = 0
        return trained

    def _train(self, served: bool) -> bool:
        """Training in what this step left; True where some was done."""
        if self.stream is None or not self.stream.ready():
            return False
        share = self.pace.training_tokens(self.queue.step_seconds) if served else self.options.idle_train_tokens
        left = self.pace.slo - self.queue.step_seconds if served and self.pace.slo is not None else None
        start = self.clock()
        # within a limit of its own a step keeps nobody waiting for longer, and taking newcomers in one by one costs a step each
        done = self.stream.run(share, left) if share > 0 else 0
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
