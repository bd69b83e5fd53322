"""The step loop: one thread owns every tensor; requests come through :class:`~rankwise.serve.engine.inbox.Inbox` and leave as events.

A step: commands → admission → plan → forward → sample → publish → training in what is left.  Decoding rows are in every
step; prompts fill the rest of its token budget in chunks (:mod:`rankwise.serve.engine.scheduler`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rankwise.errors import RankwiseError
from rankwise.host import release_workers
from rankwise.serve.batch import Role, Span, TokenPlan, make_plan
from rankwise.serve.engine.inbox import Inbox
from rankwise.serve.engine.options import EngineOptions, EngineStats
from rankwise.serve.engine.pacing import Pace, TrainingWork
from rankwise.serve.engine.prompt_lookup import verified
from rankwise.serve.engine.sampler import Drawn, sample
from rankwise.serve.engine.scheduler import Scheduler
from rankwise.serve.memory import no_memory
from rankwise.serve.policies.base import Policy, refuse_unserved
from rankwise.serve.types import Event, Finished, Observer, Outcome, Request, Token

if TYPE_CHECKING:
    from rankwise.serve.adapters.residency import AdapterResidency
    from rankwise.serve.cache.prefix import PrefixIndex
    from rankwise.serve.engine.sequence import Sequence
    from rankwise.serve.model.decode_tables import RowTables
    from rankwise.serve.model.runner import Runner

TRAIN_FAULTS = 3  #: in a row, after which training beside serving is ended
log = logging.getLogger("rankwise.serve")


class Engine:
    """Serves requests over one runner.  What has no underscore may be called from any thread, :meth:`step` aside.

    Args:
        runner, index, adapters, policy: see their modules.
        total_blocks: of the cache, for limits and statistics.
        base: fingerprint of the base, the first field of every prefix salt.
        clock: seconds; a virtual one makes every test instant.
        copies: what the runner keeps a second time and can do without.
        stream: training beside serving, within what :class:`~rankwise.serve.engine.pacing.Pace` leaves it.

    Raises:
        OptionError: a policy that only the simulator can follow.
    """

    def __init__(
        self,
        runner: Runner,
        index: PrefixIndex,
        adapters: AdapterResidency,
        policy: Policy,
        options: EngineOptions | None = None,
        *,
        total_blocks: int,
        base: str = "",
        clock: Callable[[], float] = time.monotonic,
        stream: TrainingWork | None = None,
        copies: RowTables | None = None,
    ):
        refuse_unserved(policy.name, policy.unserved)
        options = options or EngineOptions()
        self.runner, self.adapters, self.policy, self.options, self.clock = runner, adapters, policy, options, clock
        self.stream = stream
        self.pace = Pace(options.max_num_batched_tokens, options.step_seconds, options.train_tokens)
        self.observer: Observer | None = None
        self.inbox = Inbox()
        self.scheduler = Scheduler(index, total_blocks, adapters, policy, options, base, clock, self.pace, self._finish, copies)
        self.counters: Counter[str] = self.scheduler.counters
        self.steps = self._train_faults = 0
        self.error = ""
        self._thread: threading.Thread | None = None

    # --- from any thread ------------------------------------------------------------------------------------------
    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        """Queue a request; its events come on the engine's thread, :class:`~rankwise.serve.types.Finished` last.

        Raises:
            OptionError: longer than a request may be; an id that is in use.
            Overloaded: the queue is full, or the engine is going down.
        """
        self.scheduler.check_length(request)
        most = self.options.max_waiting + self.options.max_num_seqs
        self.inbox.submit(request.id, lambda: self._add(request, on_event), most)

    def cancel(self, request_id: str) -> None:
        """End a request within a step; nothing happens where it has ended already."""
        self.inbox.put(lambda: self._cancel(request_id))

    def call(self, fn: Callable[[], object]) -> None:
        """Run ``fn`` on the engine's thread between two steps; what it raises is logged and concerns no request."""
        self.inbox.put(lambda: self._call(fn))

    def wanted(self) -> bool:
        """Whether anything has come in since this step began."""
        return self.inbox.wake.is_set()

    def idle(self) -> bool:
        """Nothing runs, nothing waits, nothing has come in."""
        return not self.scheduler.running and not self.scheduler.waiting and self.inbox.commands.empty()

    def stats(self) -> EngineStats:
        """A look at the engine; what was submitted and not yet seen by a step is waiting too."""
        s, (lora_pages_used, lora_pages_total) = self.scheduler, self.adapters.lora_pages_held()
        return EngineStats(
            running=(running := len(s.running)),
            waiting=max(len(self.inbox.ids) - running, 0),
            kv_used=s.total_blocks - s.index.available(),
            kv_total=s.total_blocks,
            steps=self.steps,
            step_seconds=s.step_seconds,
            healthy=not self.error,
            error=self.error,
            counters=dict(self.counters),
            lora_pages_used=lora_pages_used,
            lora_pages_total=lora_pages_total,
            copies_bytes=0 if s.copies is None else s.copies.nbytes,
        )

    # --- life -----------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Step on a thread of its own from now on, which has the processors: the calling thread's own workers are let go."""
        release_workers()
        self._thread = threading.Thread(target=self._loop, name="rankwise-engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """Take no more requests; ``drain``: finish those that are here, for up to ``timeout`` seconds; cancel the rest."""
        self.inbox.drain()
        end = time.monotonic() + timeout
        while drain and self.inbox.ids and time.monotonic() < end and self._thread is not None and self._thread.is_alive():
            time.sleep(0.005)
        self.inbox.stop()
        if self._thread is not None:
            self._thread.join(timeout)
        self.inbox.run_all()
        for seq in [*self.scheduler.running.values(), *self.scheduler.waiting.values()]:
            self._finish(seq, Outcome.CANCELLED, "The server is going down.")

    def _loop(self) -> None:
        while not self.inbox.stopping.is_set():
            try:
                busy = self.step()
            except Exception as error:  # outside the forward it is not known whom it concerns: nobody is left waiting
                busy = False
                self._fail(error)
            if not busy:
                # adapters being read wake the loop when they are there; the wait bounds what a lost wake costs
                self.inbox.wake.wait(0.05)

    def _fail(self, error: Exception) -> None:
        """End every request with an error, and go on."""
        log.error("the engine failed outside a forward", exc_info=error)
        self.error = f"{type(error).__name__}: {error}"
        self.counters["faults"] += 1
        for seq in [*self.scheduler.running.values(), *self.scheduler.waiting.values()]:
            try:
                self._finish(seq, Outcome.ERROR, "The engine failed; the request was not completed.")
            except Exception:
                log.exception("request %s could not be ended", seq.request.id)

    # --- one step -------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Everything of one step; True where there was something to compute."""
        self.inbox.run_all()
        self.scheduler.admit()
        while self.scheduler.queued:
            self._observe("queue_seconds", self.scheduler.queued.pop(0))
        spans = self.scheduler.spans()
        if spans:
            self._serve(spans)
        return self._beside(bool(spans)) or bool(spans)

    def _add(self, request: Request, emit: Callable[[Event], None]) -> None:
        seq = self.scheduler.add_request(request, emit)
        if seq is not None and seq.fetched is not None:
            # after the waiting queue's own callback, so that the step it wakes finds the adapter
            seq.fetched.add_done_callback(lambda _: self.inbox.wake.set())

    def _call(self, fn: Callable[[], object]) -> None:
        try:
            fn()
        except Exception as error:
            self.counters["faults"] += 1
            log.error("a command between two steps failed", exc_info=error)

    def _cancel(self, request_id: str) -> None:
        seq = self.scheduler.running.get(request_id) or self.scheduler.waiting.get(request_id)
        if seq is not None:
            self._finish(seq, Outcome.CANCELLED)

    # --- the forward ----------------------------------------------------------------------------------------------
    def _serve(self, spans: list[Span]) -> None:
        start, load = self.clock(), self.scheduler.load(spans)
        try:
            plan = make_plan(spans, self.runner.page)
            seqs = [self.scheduler.running[s.request] for s in plan.spans]
            finite, drawn = self._drawn(plan, seqs)
        except Exception as error:
            self._failed([self.scheduler.running[s.request] for s in spans], load.tokens, error)
            return
        self.error = ""
        self._advance(plan, seqs, finite, drawn)
        self.scheduler.oom_backoff.went_well(self.options.max_num_seqs, self.options.max_num_batched_tokens)
        self.steps += 1
        self.scheduler.step_seconds = self.clock() - start
        self._report_step(plan, self.pace.served(load, self.scheduler.step_seconds))

    def _failed(self, seqs: list[Sequence], tokens: int, error: Exception) -> None:
        """A step did not come to its end, so none of its requests has moved."""
        if no_memory(error):
            self.scheduler.make_way(seqs, tokens)
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
                self.scheduler.kv.enter_full(seq)  # not before logits that hang on all of its tokens have been seen to be finite
            for token in right:
                if seq.request.id in self.scheduler.running:
                    self._publish(seq, token)
                    produced[seq.request.id] = produced.get(seq.request.id, 0) + 1
            if span.role is Role.VERIFY:
                self.counters["guesses"] += span.samples - 1
                self.counters["guesses_right"] += len(right) - 1
                if seq.request.id in self.scheduler.running:
                    self.scheduler.kv.enter_full(seq)
        self.policy.stepped(produced, [s.job for s in seqs], self.clock())

    def _publish(self, seq: Sequence, token: Drawn) -> None:
        now = self.clock()
        if seq.last is None:
            self._observe("time_to_first_token_seconds", now - seq.job.arrival)
        else:
            self._observe("inter_token_seconds", now - seq.last)
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
        was_running = self.scheduler.running.pop(r.id, None) is not None
        if not was_running and self.scheduler.waiting.pop(r.id) is None:
            return
        self.scheduler.free(seq)
        if r.adapter is not None and seq.fetched is not None:
            self.adapters.release(r.adapter)
        self.inbox.forget(r.id)
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
        share = self.pace.training_tokens(self.scheduler.step_seconds) if served else self.options.idle_train_tokens
        left = self.pace.slo - self.scheduler.step_seconds if served and self.pace.slo is not None else None
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
        self._observe("step_seconds", self.scheduler.step_seconds, kind=kind)
        self._observe("step_tokens", plan.T)
        self._observe("step_time_model_error_ratio", error)
        self._observe("distinct_adapters_per_step", len({s.slot for s in plan.segments}))

    def _observe(self, name: str, value: float, **labels: str) -> None:
        if self.observer is not None:
            self.observer(name, value, labels)
