"""The engine without a model: a virtual clock, and the very policies, pool, admission test and step-time model it serves with.

Each step takes what :class:`~rankwise.serve.engine.step_time.Coefficients` say, so a minute of traffic takes a fraction of a second
and gives the same figures on every machine.  A step is the engine's: arrivals, admission, decoding rows, prompts and training in
what is left; where the cache has no room the most recent request is preempted and computed again.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rankwise.errors import OptionError, RankwiseError
from rankwise.serve.cache.block_pool import ADAPTER, KV
from rankwise.serve.engine.step_time import Coefficients, StepBudget, StepLoad, StepTime
from rankwise.serve.ops.base import WIDTH
from rankwise.serve.policies.base import Policy, RequestInfo, State, Verdict, tried
from rankwise.serve.simulate.requests import Sent, SimOptions
from rankwise.serve.simulate.score import Report, RequestRecord, report
from rankwise.serve.types import Outcome

if TYPE_CHECKING:
    from rankwise.serve.simulate.admission import PeakTest
    from rankwise.serve.simulate.pool import SharedBlockPool


OPTIONS = SimOptions()


@dataclasses.dataclass(slots=True, eq=False)
class _Live:
    sent: Sent
    job: RequestInfo
    record: RequestRecord
    computed: int = 0
    last: float = 0.0

    @property
    def pending(self) -> int:
        return self.job.prompt + self.job.generated - self.computed

    @property
    def decoding(self) -> bool:
        return self.job.generated > 0 and self.pending == 1


class Simulator:
    """One run of one policy.

    Args:
        policy: anything that keeps :class:`~rankwise.serve.policies.base.Policy`.
        pool: with the tags kv and adapter.
        true: what steps take; the policy sees only the model fitted to them.
        peak: the test of admission; None: whatever has room for its prompt is let in.
        on_step: called after each step, for tests and plots.
    """

    def __init__(
        self,
        policy: Policy,
        pool: SharedBlockPool,
        true: Coefficients,
        options: SimOptions = OPTIONS,
        peak: PeakTest | None = None,
        on_step: Callable[[Simulator], None] | None = None,
    ):
        self.policy, self.pool, self.true, self.options, self.peak, self.on_step = policy, pool, true, options, peak, on_step
        self.model = StepTime()
        self.budget = StepBudget(self.model.predict, options.max_num_batched_tokens)
        self.now = 0.0
        self.waiting: dict[str, _Live] = {}
        self.running: dict[str, _Live] = {}
        self.idle: dict[str, None] = {}  # resident adapters that no one uses, the longest so first
        self.fetched: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self._copied = 0  # LoRA pages put in slots since the last step
        self._rows = 0
        self._moved = False  # somebody has come or gone since the last admission

    def run(self, requests: Sequence[Sent], rate: float | None = None) -> Report:
        """Send ``requests`` at their times and go on until the last has ended.

        Raises:
            OptionError: a request that can never fit.
            RankwiseError: the policy lets nobody in though nothing runs and nothing is awaited.
        """
        todo = sorted(requests, key=lambda s: s.at)[::-1]
        self.records: list[RequestRecord] = []
        while todo or self.waiting or self.running:
            while todo and todo[-1].at <= self.now:
                self._arrive(todo.pop())
            self._cancel()
            self._admit()
            if not self._step():
                self._wait(todo)
        counts = {n: self.counts[n] for n in ("preemptions", "steps", "loads", "evictions", "trained")}
        running = self._rows / max(self.counts["steps"], 1)
        return report(self.records, self.now, rate, running_mean=running, model_error=self.model.error_ratio(), **counts)

    def _wait(self, todo: Sequence[Sent]) -> None:
        times = [s.at for s in todo[-1:]] + [x.sent.leaves for x in self.waiting.values() if x.sent.leaves < math.inf]
        times += [t for x in self.waiting.values() if (t := self._ready_at(x.job)) > self.now]
        if not times and self.waiting:
            raise RankwiseError(
                f"{len(self.waiting)} requests wait, nothing runs, and the policy {self.policy.name!r} lets nobody in."
            )
        if times:
            self.now, self._moved = min(times), True

    # --- arrivals and ends --------------------------------------------------------------------------------------------
    def _arrive(self, s: Sent) -> None:
        self._moved = True
        lora_pages = -(-s.rank // WIDTH) if s.adapter is not None else 0
        bound = s.output if s.bound is None else s.bound
        self._check(s, lora_pages, bound)
        job = RequestInfo(s.id, s.at, s.prompt, bound, s.tenant, s.adapter, s.adapter is None, lora_pages, s.deadline)
        live = _Live(
            s, job, RequestRecord(s.id, s.tenant, s.at, s.prompt, s.deadline - s.at if s.deadline is not None else self.options.slo)
        )
        self.records.append(live.record)
        if s.adapter is not None:
            self.fetched.setdefault(s.adapter, s.at + self.options.fetch_seconds)
        if self.policy.verdict(job, self._state()) is Verdict.REJECT:
            self._end(live, Outcome.REJECTED)
        else:
            self.waiting[s.id] = live

    def _check(self, s: Sent, lora_pages: int, bound: int) -> None:
        kv, adapter = self.pool.units[KV], self.pool.units[ADAPTER]
        blocks = -(-(s.prompt + bound + 1) // self.options.page)
        total = blocks * kv.bytes + lora_pages * adapter.bytes
        room = self.pool.budget - sum(f for t, f in self.pool.floors.items() if t not in (KV, ADAPTER))
        if not 1 <= s.output <= bound or s.prompt < 1:
            raise OptionError(
                f"Request {s.id!r} has {s.prompt} prompt tokens and makes {s.output} of {bound}; it needs 1 or more of each."
            )
        if blocks > kv.count or lora_pages > adapter.count or total > room:
            raise OptionError(
                f"Request {s.id!r} needs {blocks} blocks and {lora_pages} LoRA pages, {total} bytes; the pool can never give them."
            )

    def _cancel(self) -> None:
        for x in [x for x in (*self.waiting.values(), *self.running.values()) if x.sent.leaves <= self.now]:
            if x.job.id in self.running:
                self._leave(x)
            else:
                del self.waiting[x.job.id]
            self._end(x, Outcome.CANCELLED)

    def _ready_at(self, job: RequestInfo) -> float:
        return -math.inf if job.adapter is None else self.fetched[job.adapter]

    def _end(self, live: _Live, outcome: Outcome) -> None:
        live.record.outcome, live.record.end = outcome, self.now
        self.policy.finished(live.job, self.now)

    # --- admission ----------------------------------------------------------------------------------------------------
    def _state(self) -> State:
        for x in self.waiting.values():
            x.job.resident = x.job.adapter is None or self.pool.count(x.job.adapter, ADAPTER) > 0
            x.job.ready = self._ready_at(x.job) <= self.now
        load = self._load([x for x in self.running.values() if x.decoding], {})
        step = self.model.predict(load)
        idle = sum(self.pool.count(a, ADAPTER) for a in self.idle)
        return State(
            self.now, [x.job for x in self.running.values()], [x.job for x in self.waiting.values()],
            self.pool.room(KV), self.pool.units[KV].count, self.options.page, self.pool.room(ADAPTER) + idle, step,
            (self.model.predict(load.joined(64)) - step) / 64, max(self.options.max_num_batched_tokens - self.options.max_num_seqs, 1),
        )  # fmt: skip

    def _admit(self) -> None:
        due = self._moved or self.counts["steps"] % self.options.admit_every == 0
        self._moved = False
        if not self.waiting or not due:
            return
        for job, verdict in tried(self.policy, self._state(), self._enter):
            if verdict is Verdict.ADMIT:
                self.policy.admitted(job, self.now)
            else:
                self._end(self.waiting.pop(job.id), Outcome.ABORTED if verdict is Verdict.ABORT else Outcome.REJECTED)

    def _enter(self, job: RequestInfo) -> bool:
        """Let it in if there is room: its adapter's pages, and blocks for its tokens."""
        if len(self.running) >= self.options.max_num_seqs or not job.ready:
            return False
        new = 0 if job.adapter is None or self.pool.count(job.adapter, ADAPTER) else job.lora_pages
        if not self._fits(job, self._blocks_without_idle(job.adapter, new)):
            return False  # idle adapters are given up only for one that gets in
        if new and not self._take(new, ADAPTER, job.adapter or "", keep=None):
            return False
        fits = self._fits(job, self.pool.room(KV))
        while not fits and self._evict(keep=job.adapter):
            fits = self._fits(job, self.pool.room(KV))
        if not fits or not self._take(self._blocks(job), KV, self._key(job), keep=job.adapter):
            if new:
                self.pool.release(job.adapter or "")
            return False
        self.counts["loads"] += new > 0
        self._copied += new
        self.idle.pop(job.adapter or "", None)
        live = self.running[job.id] = self.waiting.pop(job.id)
        job.started = self.now if job.started is None else job.started
        live.computed = 0
        return True

    def _blocks_without_idle(self, keep: str | None, lora_pages: int) -> int:
        """Blocks there would be if all idle adapters but one were given up and ``lora_pages`` taken: never too few."""
        kv, adapter = self.pool.units[KV], self.pool.units[ADAPTER]
        idle = sum(self.pool.count(a, ADAPTER) for a in self.idle if a != keep)
        room = self.pool.room(KV) + -(-(idle - lora_pages) * adapter.bytes // kv.bytes)
        return min(room, kv.count - self.pool.used(KV))

    def _fits(self, job: RequestInfo, blocks: int) -> bool:
        """Whether ``blocks`` free blocks are enough for it beside those that run."""
        if blocks < self._blocks(job) + (len(self.running) if self.peak is None else 0):
            return False
        if self.peak is None:
            return True
        chunk = max(self.options.max_num_batched_tokens - self.options.max_num_seqs, 1)
        return self.peak.fits([x.job for x in self.running.values()], job, self.pool.used(KV) + blocks, chunk)

    def _blocks(self, job: RequestInfo) -> int:
        return -(-(job.prompt + job.generated + 1) // self.options.page)

    @staticmethod
    def _key(job: RequestInfo) -> str:
        return f"request:{job.id}"

    def _take(self, n: int, tag: str, owner: str, keep: str | None) -> bool:
        while self.pool.allocate(n, tag, owner) is None:
            if not self._evict(keep):
                return False
        return True

    def _evict(self, keep: str | None) -> bool:
        """Give up the adapter that has been idle longest."""
        gone = next((a for a in self.idle if a != keep), None)
        if gone is None:
            return False
        self.pool.release(gone)
        del self.idle[gone]
        self.counts["evictions"] += 1
        return True

    # --- one step -----------------------------------------------------------------------------------------------------
    def _step(self) -> bool:
        for x in [x for x in self.running.values() if x.decoding]:
            if x.job.id in self.running:
                self._grow(x)
        rows = [x for x in self.running.values() if x.decoding]
        pending = [x for x in self.running.values() if not x.decoding]
        wanted = self.options.max_num_batched_tokens if self.options.train else 0
        prefill, train = self.budget.split(self._load(rows, {}), sum(x.pending for x in pending), wanted, self.options.step_slo)
        chunks = {}
        for x in pending:
            chunks[x.job.id] = n = min(x.pending, prefill)
            prefill -= n
        if not rows and not chunks and not train:
            return False
        if not rows and not chunks and not self.waiting:
            return False  # training alone goes on between requests, and is not what is measured
        self._spend(self._load(rows, chunks).joined(train))
        self.counts["trained"] += train
        self._advance(rows, chunks)
        return True

    def _load(self, rows: Sequence[_Live], chunks: dict[str, int]) -> StepLoad:
        active = [*rows, *(x for x in self.running.values() if chunks.get(x.job.id))]
        ranks = {x.job.adapter: x.sent.rank for x in active if x.job.adapter is not None}
        return StepLoad(len(rows) + sum(chunks.values()), sum(x.computed for x in active), sum(ranks.values()))

    def _spend(self, load: StepLoad) -> None:
        seconds = self.true.seconds(load) + self._copied * self.options.page_seconds
        self._copied = 0
        self.model.observe(load, seconds)
        self.now += seconds
        self.counts["steps"] += 1
        self._rows += len(self.running)

    def _advance(self, rows: Sequence[_Live], chunks: dict[str, int]) -> None:
        produced: dict[str, int] = {}
        jobs = [x.job for x in self.running.values()]
        for x in list(self.running.values()):
            x.computed += 1 if x.decoding else chunks[x.job.id]
            if x.pending == 0:
                produced[x.job.id] = 1
                self._publish(x)
        self.policy.stepped(produced, jobs, self.now)
        if self.on_step is not None:
            self.on_step(self)

    def _publish(self, x: _Live) -> None:
        if x.record.first is None:
            x.record.first = self.now
        else:
            x.record.gaps.append(self.now - x.last)
        x.last = self.now
        x.job.generated += 1
        x.record.tokens += 1
        if x.job.generated == x.sent.output:
            self._leave(x)
            self._end(x, Outcome.LENGTH if x.job.remaining == 0 else Outcome.STOP)
            if self.peak is not None:
                self.peak.finished(x.job)

    def _leave(self, x: _Live) -> None:
        self._moved = True
        del self.running[x.job.id]
        self.pool.release(self._key(x.job))
        adapter = x.job.adapter
        if adapter is not None and all(y.job.adapter != adapter for y in self.running.values()):
            self.idle[adapter] = None

    def _grow(self, x: _Live) -> None:
        """A block for its next token; the most recent request is preempted where there is none."""
        key = self._key(x.job)
        while self.pool.count(key, KV) * self.options.page < x.job.prompt + x.job.generated:
            if self._take(1, KV, key, keep=None):
                continue
            youngest = max(self.running.values(), key=lambda y: (y.job.started, y.job.arrival))
            self._leave(youngest)
            self.counts["preemptions"] += 1
            if self.peak is not None:
                self.peak.preempted()
            self.waiting = {youngest.job.id: youngest, **self.waiting}
            if youngest is x:
                return


def simulate(
    policy: Policy,
    requests: Sequence[Sent],
    pool: SharedBlockPool,
    true: Coefficients,
    options: SimOptions = OPTIONS,
    peak: PeakTest | None = None,
    rate: float | None = None,
) -> Report:
    """One run of ``policy`` over ``requests``.

    Args:
        policy, pool, true, options, peak: see :class:`Simulator`.
        requests: in any order.
        rate: requests a second offered, for the report.
    """
    return Simulator(policy, pool, true, options, peak).run(requests, rate)
