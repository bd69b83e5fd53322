"""The step loop: one thread owns every tensor; requests enter by a queue and leave as events.

A step: commands → admission → plan → forward → sample → publish → training in what is left.  Decoding rows are in every
step; prompts fill the rest of its token budget in chunks.  What does not fit waits or is put back (its tokens are kept
and computed again), so a step never fails for want of room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Protocol

import torch

from rankwise.errors import OptionError, RankwiseError
from rankwise.serve.adapters.base import Served
from rankwise.serve.plan import BASE, Role, Span, TokenPlan, make_plan
from rankwise.serve.prefix import PrefixIndex, salt
from rankwise.serve.runner import Runner, Slot
from rankwise.serve.sampler import Drawn, SamplerState, sample
from rankwise.serve.sched.base import Job, Policy, State, Verdict
from rankwise.serve.sequence import Sequence
from rankwise.serve.types import Event, Finished, Outcome, Overloaded, Request, ServeError, Token

Observer = Callable[[str, float, Mapping[str, str]], None]


class Residency(Protocol):
    """Adapters as the engine sees them: read in the background, put in slots between steps."""

    slots: Mapping[int, Slot]

    def fetch(self, digest: str) -> Future[Served]:
        """Pin the adapter and begin to read it; every call is answered by one :meth:`release`."""
        ...

    def enter(self, digest: str, served: Served) -> int | None:
        """Its slot, held once more until :meth:`leave`; None where there is no room now."""
        ...

    def leave(self, slot: int) -> None: ...

    def release(self, digest: str) -> None: ...

    def resident(self, digest: str) -> bool: ...

    def cells(self, digest: str) -> int: ...

    def shrink(self) -> bool:
        """Give up one idle slot; False where there is none."""
        ...


class Stream(Protocol):
    """Training in what a step leaves: see :mod:`rankwise.serve.train_stream`."""

    def waiting(self) -> int:
        """Tokens it would take now."""
        ...

    def run(self, tokens: int) -> int:
        """Work on up to ``tokens`` tokens; how many it was."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """Limits of the engine.

    Attributes:
        max_running: requests in a step; ``max_waiting``: in the queue, above which a request is refused.
        step_tokens: most tokens of one step (decoding rows are never held back by it).
        max_context: most tokens of one request, None for what the cache holds.
        eos: token ids that end a request.
        seed: of the draws of requests that bring none.
        train_tokens: training tokens beside a step that serves, where no step-time model decides; ``idle_train_tokens``: alone.
    """

    max_running: int = 32
    max_waiting: int = 1024
    step_tokens: int = 256
    max_context: int | None = None
    eos: tuple[int, ...] = ()
    seed: int = 0
    train_tokens: int = 32
    idle_train_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "step_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; it is at least 1.")


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine; ``counters`` only grow."""

    running: int
    waiting: int
    kv_used: int
    kv_total: int
    steps: int
    step_seconds: float
    healthy: bool
    error: str
    counters: Mapping[str, float]
    cells_used: int = 0
    cells_total: int = 0


class Engine:
    """Serves requests over one runner.

    Args:
        runner, index, adapters, policy: see their modules.
        total_blocks: of the cache, for limits and statistics.
        base: fingerprint of the base, the first field of every prefix salt.
        clock: seconds; a virtual one makes every test instant.
        stream: training beside serving; ``split(serving tokens, training tokens waiting)`` says how many join a step.
    """

    def __init__(
        self,
        runner: Runner,
        index: PrefixIndex,
        adapters: Residency,
        policy: Policy,
        options: EngineOptions = EngineOptions(),  # noqa: B008  frozen
        *,
        total_blocks: int,
        base: str = "",
        clock: Callable[[], float] = time.monotonic,
        stream: Stream | None = None,
        split: Callable[[int, int], int] | None = None,
    ):
        self.runner, self.index, self.adapters, self.policy, self.options = runner, index, adapters, policy, options
        self.total_blocks, self.base, self.clock = total_blocks, base, clock
        self.stream, self.split = stream, split
        self.observer: Observer | None = None
        self.waiting: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.counters: Counter[str] = Counter()
        self.steps = 0
        self.step_seconds = 0.0
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
        self._do(lambda: self._enqueue(request, on_event))

    def _check_length(self, request: Request) -> None:
        room = self.total_blocks * self.runner.page
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
        """Run ``fn`` on the engine's thread between two steps."""
        self._do(lambda: (fn(), None)[1])

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    def stats(self) -> EngineStats:
        used = self.total_blocks - self.index.available()
        return EngineStats(
            len(self.running), len(self.waiting), used, self.total_blocks, self.steps, self.step_seconds,
            not self.error, self.error, dict(self.counters),
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
        for seq in [*self.running.values(), *self.waiting.values()]:
            self._finish(seq, Outcome.CANCELLED, "The server is going down.")

    def _loop(self) -> None:
        while not self._stopping.is_set():
            if not self.step():
                # adapters being read wake the loop when they are there; the wait bounds what a lost wake costs
                self._wake.wait(0.05)
            self._wake.clear()

    # --- one step -------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Everything of one step; True where there was something to compute."""
        self._drain_commands()
        self._admit()
        spans = self._spans()
        if spans:
            self._serve(spans)
        return self._train(sum(len(s.tokens) for s in spans)) or bool(spans)

    def _drain_commands(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._commands.get_nowait()()

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
        first = salt({"base": self.base, "adapter": request.adapter or "", "tenant": request.tenant, "salt": request.salt})
        seq = Sequence(
            request, emit, job, SamplerState.of(request.sampling, self.options.seed, request.id), list(request.prompt), first
        )
        self.waiting[request.id] = seq
        if request.adapter is not None:
            try:
                seq.fetched = self.adapters.fetch(request.adapter)
            except ServeError as error:
                self._finish(seq, Outcome.REJECTED, str(error), error)
                return
            job.cells = self.adapters.cells(request.adapter)
            seq.fetched.add_done_callback(lambda _: self._wake.set())

    def _cancel(self, request_id: str) -> None:
        seq = self.running.get(request_id) or self.waiting.get(request_id)
        if seq is not None:
            self._finish(seq, Outcome.CANCELLED)

    # --- admission ------------------------------------------------------------------------------------------------
    def _state(self) -> State:
        for s in self.waiting.values():
            s.job.resident = s.request.adapter is None or self.adapters.resident(s.request.adapter)
        return State(
            self.clock(), [s.job for s in self.running.values()], [s.job for s in self.waiting.values()],
            self.index.available(), self.total_blocks, self.runner.page, 0, self.step_seconds,
        )  # fmt: skip

    def _admit(self) -> None:
        if not self.waiting:
            return
        state = self._state()
        for job in self.policy.order(state):
            seq = self.waiting[job.id]
            verdict = self.policy.verdict(job, state)
            if verdict is Verdict.ABORT:
                self._finish(seq, Outcome.ABORTED, "Its first token would have come after its deadline.")
            elif verdict is Verdict.REJECT:
                self._finish(seq, Outcome.REJECTED, "The server cannot serve it in time; try again later.")
            elif verdict is Verdict.ADMIT:
                if self._enter(seq):
                    self.policy.admitted(job, state.now)
                    state.running = [s.job for s in self.running.values()]
                    state.free_blocks = self.index.available()
                elif self.policy.blocking and seq.request.id in self.waiting:
                    break

    def _enter(self, seq: Sequence) -> bool:
        """Move a waiting request to the running ones, if there is room for it now."""
        if len(self.running) >= self.options.max_running or self._waits_for_sibling(seq):
            return False
        served = self._fetched(seq)
        if served is None and seq.request.adapter is not None:
            return False
        if not seq.blocks:
            self._match(seq)
        wanted = -(-(len(seq.tokens) + 1) // self.runner.page) - len(seq.blocks)
        # a block for each request that runs is left, so that one newly let in is not put back in the next step
        spare = 0 if not self.running else len(self.running)
        fits = self._room(wanted + spare)
        slot: int | None = BASE
        if fits and served is not None:
            assert seq.request.adapter is not None
            slot = self.adapters.enter(seq.request.adapter, served)
        if not fits or slot is None:
            self._unmatch(seq)
            return False
        seq.slot = slot
        now = self.clock()
        if seq.job.started is None:
            seq.job.started = now
            self._observe("queue_seconds", now - seq.job.arrival)
        self.counters["prefix_hit_tokens"] += seq.reused
        self.running[seq.request.id] = self.waiting.pop(seq.request.id)
        return True

    def _waits_for_sibling(self, seq: Sequence) -> bool:
        """A sample of the same prompt is being computed, whose blocks this one will share."""
        group = seq.request.group
        return (
            group is not None
            and self.index.share
            and any(s.request.group == group and s.computed < s.prompt - 1 for s in self.running.values())
        )

    def _fetched(self, seq: Sequence) -> Served | None:
        if seq.fetched is None or not seq.fetched.done():
            return None
        error = seq.fetched.exception()
        if error is None:
            return seq.fetched.result()
        kind = error if isinstance(error, RankwiseError) else None
        self._finish(seq, Outcome.REJECTED if kind else Outcome.ERROR, str(error), kind)
        return None

    def _match(self, seq: Sequence) -> None:
        seq.blocks, hashes = self.index.match(seq.chain, seq.tokens)
        seq.full = len(hashes)
        seq.computed = seq.reused = seq.full * self.runner.page
        seq.chain = hashes[-1] if hashes else seq.chain

    def _unmatch(self, seq: Sequence) -> None:
        """Back to before :meth:`_match`: what waits holds no block."""
        self.index.release(seq.blocks)
        self._reset(seq)

    def _reset(self, seq: Sequence) -> None:
        r = seq.request
        seq.blocks, seq.computed, seq.full, seq.reused = [], 0, 0, 0
        seq.chain = salt({"base": self.base, "adapter": r.adapter or "", "tenant": r.tenant, "salt": r.salt})

    def _room(self, blocks: int) -> bool:
        """Whether ``blocks`` can be taken; idle adapters make way for them."""
        while self.index.available() < blocks:
            if not self.adapters.shrink():
                return False
        return True

    # --- the plan -------------------------------------------------------------------------------------------------
    def _spans(self) -> list[Span]:
        spans: list[Span] = []
        for seq in [s for s in self.running.values() if s.decoding]:
            if seq.request.id in self.running and self._grow(seq, len(seq.tokens), preempt=True):
                spans.append(self._span(seq, 1))
        # putting a request back may have taken one that is in the list already
        spans = [s for s in spans if s.request in self.running]
        budget = max(self.options.step_tokens - len(spans), 0 if spans else 1)
        for seq in [s for s in self.running.values() if not s.decoding]:
            n = min(seq.pending, budget)
            if n and self._grow(seq, seq.computed + n, preempt=not spans):
                spans.append(self._span(seq, n))
                budget -= n
        return [s for s in spans if s.request in self.running]

    def _span(self, seq: Sequence, n: int) -> Span:
        last = n == seq.pending
        at = seq.computed
        role = Role.DECODE if seq.decoding else Role.PREFILL
        return Span(seq.request.id, tuple(seq.tokens[at : at + n]), at, tuple(seq.blocks), seq.slot, role, 1 if last else 0)

    def _grow(self, seq: Sequence, tokens: int, *, preempt: bool) -> bool:
        """Blocks for ``tokens`` tokens of ``seq``; ``preempt``: the youngest request is put back where there is no room."""
        wanted = -(-tokens // self.runner.page) - len(seq.blocks)
        while wanted > 0:
            if self._room(wanted):
                taken = self.index.take(wanted)
                if taken is not None:
                    seq.blocks += taken
                    return True
            if not preempt:
                return False
            youngest = max(self.running.values(), key=lambda s: (s.job.started or 0.0, s.job.arrival))
            self._put_back(youngest)
            if youngest is seq:
                return False
        return True

    def _put_back(self, seq: Sequence) -> None:
        """From running to waiting: its tokens stay, their keys and values will be computed (or found) again."""
        self.counters["preemptions"] += 1
        del self.running[seq.request.id]
        self._let_go(seq)
        self._reset(seq)
        self.waiting = {seq.request.id: seq, **self.waiting}

    def _let_go(self, seq: Sequence) -> None:
        self.index.release(seq.blocks)
        seq.blocks = []
        if seq.slot != BASE:
            self.adapters.leave(seq.slot)
            seq.slot = BASE

    # --- the forward ----------------------------------------------------------------------------------------------
    def _serve(self, spans: list[Span]) -> None:
        start = self.clock()
        plan = make_plan(spans, self.runner.page)
        seqs = [self.running[s.request] for s in plan.spans]
        try:
            logits = self.runner.run(plan, self.adapters.slots)
        except Exception as error:  # a fault of the model or a kernel: these requests end, the others go on
            self.error = f"{type(error).__name__}: {error}"
            self.counters["faults"] += 1
            for seq in seqs:
                self._finish(seq, Outcome.ERROR, "The engine failed in a step; the request was not completed.")
            return
        self.error = ""
        self._advance(plan, seqs, logits)
        self.steps += 1
        self.step_seconds = self.clock() - start
        self._report_step(plan)

    def _advance(self, plan: TokenPlan, seqs: list[Sequence], logits: torch.Tensor) -> None:
        for span, seq in zip(plan.spans, seqs, strict=True):
            seq.computed += len(span.tokens)
            self._complete(seq)
        sampled = [seq for span, seq in zip(plan.spans, seqs, strict=True) if span.samples]
        finite = torch.isfinite(logits).all(-1).tolist() if sampled else []
        drawn = sample(torch.nan_to_num(logits), [s.sampler for s in sampled])
        produced: dict[str, int] = {}
        for seq, token, good in zip(sampled, drawn, finite, strict=True):
            if not good:
                self._finish(seq, Outcome.ERROR, "The model's logits are not finite for this request.")
                continue
            produced[seq.request.id] = 1
            self._publish(seq, token)
        self.policy.stepped(produced, [s.job for s in seqs], self.clock())

    def _complete(self, seq: Sequence) -> None:
        """Enter the blocks that have become full."""
        page = self.runner.page
        while (seq.full + 1) * page <= seq.computed:
            at = seq.full * page
            seq.chain = self.index.complete(seq.blocks[seq.full], seq.chain, seq.tokens[at : at + page])
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
        was_running = self.running.pop(r.id, None) is not None
        if not was_running and self.waiting.pop(r.id, None) is None:
            return
        self._let_go(seq)
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
    def _train(self, serving: int) -> bool:
        if self.stream is None:
            return False
        waiting = self.stream.waiting()
        if not waiting:
            return False
        if not serving:
            share = self.options.idle_train_tokens
        else:
            share = self.options.train_tokens if self.split is None else self.split(serving, waiting)
        done = self.stream.run(share) if share > 0 else 0
        self.counters["train_tokens"] += done
        return done > 0

    def _report_step(self, plan: TokenPlan) -> None:
        if self.observer is None:
            return
        kind = "mixed" if any(s.role is Role.PREFILL for s in plan.spans) else "decode"
        self._observe("step_seconds", self.step_seconds, kind=kind)
        self._observe("step_tokens", plan.T)
        self._observe("distinct_adapters_per_step", len({s.slot for s in plan.segments}))

    def _observe(self, name: str, value: float, **labels: str) -> None:
        if self.observer is not None:
            self.observer(name, value, labels)

    def idle(self) -> bool:
        return not self.running and not self.waiting and self._commands.empty()


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
