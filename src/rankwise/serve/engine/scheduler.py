"""Who runs: waiting and running requests, their blocks and slots, and the spans of the next step.

What does not fit waits; where a running request must grow and nothing is left, the most recent one is preempted: its tokens are
kept, their keys and values found or computed again later.  So a step never fails for want of room.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from rankwise.errors import OptionError, RankwiseError
from rankwise.serve.batch import BASE
from rankwise.serve.engine.kv_cache_manager import KVCacheManager
from rankwise.serve.engine.memory_pressure import TRIES, OomBackoff
from rankwise.serve.engine.prompt_lookup import PromptLookup
from rankwise.serve.engine.sampler import SamplerState
from rankwise.serve.engine.sequence import Sequence
from rankwise.serve.engine.step_time import StepLoad
from rankwise.serve.engine.waiting import Waiting
from rankwise.serve.memory import no_memory
from rankwise.serve.policies.base import Policy, RequestInfo, State, Verdict, tried
from rankwise.serve.types import Event, Outcome, Overloaded, Request, ServeError

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter
    from rankwise.serve.adapters.residency import AdapterResidency
    from rankwise.serve.batch import Span
    from rankwise.serve.cache.prefix import PrefixIndex
    from rankwise.serve.engine.options import EngineOptions
    from rankwise.serve.engine.pacing import Pace
    from rankwise.serve.model.decode_tables import RowTables

WINDOW = 64  #: waiting requests that a policy is shown, at least
SWEPT = 32  #: waiting requests that are looked at in a step whether or not there is a place
log = logging.getLogger("rankwise.serve")
#: (sequence, outcome, message, error): ends a request wherever it is
Finish = Callable[[Sequence, Outcome, str, RankwiseError | None], None]


class Scheduler:
    """Requests between their arrival and their end.

    Args:
        index: the prefix index that hands out the ``total_blocks`` of the cache.
        adapters, policy, options, clock: the engine's.
        base: fingerprint of the base, the first field of every prefix salt.
        pace: how many prompt tokens join a step.
        finish: called for a request that ends here (its adapter cannot be read, a policy's verdict).
        copies: keys and values that the runner keeps a second time, and can do without.
    """

    def __init__(
        self,
        index: PrefixIndex,
        total_blocks: int,
        adapters: AdapterResidency,
        policy: Policy,
        options: EngineOptions,
        base: str,
        clock: Callable[[], float],
        pace: Pace,
        finish: Finish,
        copies: RowTables | None,
    ):
        self.page, self.total_blocks, self.index, self.adapters = index.page, total_blocks, index, adapters
        self.policy, self.options, self.clock = policy, options, clock
        self.pace, self.finish, self.copies = pace, finish, copies
        self.waiting = Waiting()
        self.running: dict[str, Sequence] = {}
        self.counters: Counter[str] = Counter()
        self.kv = KVCacheManager(index, base, adapters.shrink)
        self.oom_backoff = OomBackoff()
        self.step_seconds = 0.0  # of the last step
        self._asked = self._spare = 0
        self.queued: list[float] = []  # seconds in the queue of those let in since it was last read

    # --- arrival --------------------------------------------------------------------------------------------------
    def add_request(self, request: Request, emit: Callable[[Event], None]) -> Sequence | None:
        """Have its adapter read and let it wait; None where that fails, which ends it alone."""
        job = RequestInfo(
            request.id,
            self.clock(),
            len(request.prompt),
            request.sampling.max_tokens,
            request.tenant,
            request.adapter,
            deadline=request.deadline,
        )
        seq = Sequence(request, emit, job, None, list(request.prompt), b"")  # type: ignore[arg-type]  # what may fail comes below
        try:
            seq.chain = self.kv.first_link(request)
            seq.sampler = SamplerState.of(request.sampling, self.options.seed, request.id)
            if request.adapter is not None:
                seq.fetched = self.adapters.fetch(request.adapter)
                job.lora_pages = self.adapters.lora_pages(request.adapter)
        except Exception as error:
            self._refuse(seq, error)
            return None
        self.waiting.push(seq)
        return seq

    def _refuse(self, seq: Sequence, error: Exception) -> None:
        """End a request that could not be queued, by why it could not."""
        self.waiting.push(seq)
        if isinstance(error, ServeError):
            self.finish(seq, Outcome.REJECTED, str(error), error)
        elif no_memory(error):
            self.turn_away(seq)
        else:
            log.error("request %s could not be queued", seq.request.id, exc_info=error)
            self.counters["faults"] += 1
            self.finish(seq, Outcome.ERROR, "The engine could not queue the request.", None)

    # --- admission ------------------------------------------------------------------------------------------------
    def _state(self, shown: Collection[Sequence]) -> State:
        """What a policy sees; ``shown``: of those that wait."""
        for s in shown:
            s.job.resident = s.request.adapter is None or self.adapters.resident(s.request.adapter)
            s.job.ready = s.fetched is None or s.fetched.done()
        return State(
            now=self.clock(),
            running=[s.job for s in self.running.values()],
            waiting=[s.job for s in shown],
            free_blocks=self.index.available(),
            total_blocks=self.total_blocks,
            page=self.page,
            free_lora_pages=self.adapters.free_lora_pages(),
            step_seconds=self.step_seconds,
            seconds_per_prompt_token=self.pace.token_seconds(),
            chunk=max(self.options.max_num_batched_tokens - self.options.max_num_seqs, 1),
        )

    def admit(self) -> None:
        """Try the first of the waiting requests in the policy's order.

        While every place is taken nobody can enter, and the order is asked for every 16th step, for policies that learn from it.
        """
        if not self.waiting:
            return
        self._sweep()
        self._asked += 1
        if len(self.running) >= self._places() and self._asked % 16:
            return
        self._spare = self._spared()
        state = self._state(self.waiting.window(max(WINDOW, 2 * self.options.max_num_seqs)))
        for job, verdict in tried(self.policy, state, self._fits):
            if verdict is not Verdict.ADMIT:
                self._let_go(self.waiting[job.id], verdict)
            else:
                self.policy.admitted(job, state.now)
                state.running = [s.job for s in self.running.values()]
                state.free_blocks = self.index.available()
                self._spare = self._spared()

    def _sweep(self) -> None:
        """A few of all that wait, whether any is to be let go."""
        some = [s for s in self.waiting.sweep(SWEPT) if not self._lost(s)]
        state = self._state(some)
        for seq in some:
            verdict = self.policy.verdict(seq.job, state)
            if verdict in (Verdict.ABORT, Verdict.REJECT):
                self._let_go(seq, verdict)

    def _let_go(self, seq: Sequence, verdict: Verdict) -> None:
        if verdict is Verdict.ABORT:
            self.finish(seq, Outcome.ABORTED, "Its first token would have come after its deadline.", None)
        else:
            self.finish(seq, Outcome.REJECTED, "The server cannot serve it in time; try again later.", None)

    def _fits(self, job: RequestInfo) -> bool | None:
        """Whether it has entered; None where it has ended instead."""
        entered = self._enter(self.waiting[job.id])
        return None if not entered and job.id not in self.waiting else entered

    def _enter(self, seq: Sequence) -> bool:
        """Move a waiting request to the running ones, if there is room for it now."""
        if len(self.running) >= self._places() or self._waits_for_sibling(seq):
            return False
        if self._lost(seq) or (seq.fetched is not None and not seq.fetched.done()) or not self._can_ever(seq):
            return False
        served = None if seq.fetched is None else seq.fetched.result()
        if not seq.blocks:
            self.kv.match(seq)
        fits = self.kv.room(self.kv.lacking(seq) + self._spare)
        slot: int | None = BASE
        if fits and served is not None:
            slot = self._slot(seq, served)
            if seq.request.id not in self.waiting:
                return False
        if not fits or slot is None:
            self.kv.reset(seq)
            return False
        seq.slot = slot
        now = self.clock()
        if seq.job.started is None:
            seq.job.started = now
            self.queued.append(now - seq.job.arrival)
        self.counters["prefix_query_tokens"] += len(seq.tokens)
        self.counters["prefix_hit_tokens"] += seq.reused
        self.waiting.pop(seq.request.id)
        self.running[seq.request.id] = seq
        return True

    def _spared(self) -> int:
        """Blocks that running requests have yet to take, and one more for each, so that one newly let in is not preempted at once."""
        return sum(self.kv.lacking(s) + 1 for s in self.running.values())

    def _places(self) -> int:
        return self.oom_backoff.of_requests(self.options.max_num_seqs)

    def _slot(self, seq: Sequence, served: LoadedAdapter) -> int | None:
        """Its adapter's slot, or None where there is no room now; the request may have ended."""
        assert seq.request.adapter is not None
        try:
            return self.adapters.enter(seq.request.adapter, served)
        except RankwiseError as error:  # it can never be in a slot
            self.finish(seq, Outcome.REJECTED, str(error), error)
        except Exception as error:
            if no_memory(error):
                self._found_none(seq, not self.running)
            else:
                log.error("an adapter could not be put in a slot", exc_info=error)
                self.counters["faults"] += 1
                self.finish(seq, Outcome.ERROR, "The engine failed to place its adapter.", None)
        return None

    def check_length(self, r: Request) -> None:
        """Refuse a request that could not even run alone.

        Raises:
            OptionError: it is longer than the cache, its share beside its adapter, or the options' limit.
        """
        self.options.check_length(r, self.adapters.most_blocks(r.adapter) * self.page, self.total_blocks * self.page)

    def _can_ever(self, seq: Sequence) -> bool:
        """Whether it could run alone, now that it is known what its adapter takes; it is ended where it could not."""
        try:
            self.check_length(seq.request)
        except OptionError as error:
            self.finish(seq, Outcome.REJECTED, str(error), error)
            return False
        return True

    def _waits_for_sibling(self, seq: Sequence) -> bool:
        """A sample of the same prompt is being computed, whose blocks this one will share."""
        group = seq.request.group
        if group is None or not self.index.share:
            return False
        return any(s.request.group == group and s.computed < s.prompt - 1 for s in self.running.values())

    def _lost(self, seq: Sequence) -> bool:
        """Whether its adapter could not be read, which ends it."""
        error = seq.fetched.exception() if seq.fetched is not None and seq.fetched.done() else None
        if error is not None:
            kind = error if isinstance(error, RankwiseError) else None
            self.finish(seq, Outcome.REJECTED if kind else Outcome.ERROR, str(error), kind)
        return error is not None

    # --- the plan -------------------------------------------------------------------------------------------------
    def spans(self) -> list[Span]:
        """The spans of the next step: every decoding row (with its guesses, where there is room), then prompts in chunks."""
        spans: list[Span] = []
        for seq in [s for s in self.running.values() if s.decoding]:
            if seq.request.id in self.running and self._grow(seq, len(seq.tokens)):
                spans.append(seq.span(1, self._guesses(seq)))
        # preemption may have taken one that is in the list already
        spans = [s for s in spans if s.request in self.running]
        waiting = sum(s.pending for s in self.running.values() if not s.decoding)
        budget = max(self.pace.prompt_tokens(self.load(spans), waiting), 0 if spans else 1) if waiting else 0
        budget = self.oom_backoff.of_tokens(budget)
        for seq in [s for s in self.running.values() if not s.decoding]:
            n = min(seq.pending, budget) if seq.request.id in self.running else 0  # else it was preempted for an earlier one
            grow = self.kv.grow if spans else self._grow  # a prompt preempts nobody in a step that has work already
            if n and grow(seq, seq.computed + n):
                spans.append(seq.span(n))
                budget -= n
        return [s for s in spans if s.request in self.running]

    def load(self, spans: list[Span]) -> StepLoad:
        """What a step of these spans computes, as the step-time model sees it."""
        ranks = sum(self.adapters.slots[i].served.manifest.rank for i in {s.slot for s in spans} if i != BASE)
        return StepLoad(sum(len(s.tokens) for s in spans), sum(s.end for s in spans), ranks)

    def _guesses(self, seq: Sequence) -> tuple[int, ...]:
        """Tokens to verify beside the one that is computed; their keys and values need room that nobody else gives up."""
        most = min(self.options.speculate, seq.request.sampling.max_tokens - seq.generated - 1)
        if most < 1 or not seq.sampler.plain:
            return ()
        seq.prompt_lookup = seq.prompt_lookup or PromptLookup()
        guesses = seq.prompt_lookup.guess(seq.tokens, most)
        return guesses if guesses and self.kv.grow(seq, len(seq.tokens) + len(guesses)) else ()

    def _grow(self, seq: Sequence, tokens: int) -> bool:
        """Blocks for ``tokens`` tokens of ``seq``; the most recent requests are preempted for them, ``seq`` last (False)."""
        while not self.kv.grow(seq, tokens):
            if self._preempt_last() is seq:
                return False
        return True

    def _preempt_last(self) -> Sequence:
        """The request that began last goes from running to waiting; its keys and values will be computed (or found) again."""
        seq = max(self.running.values(), key=lambda s: (s.job.started or 0.0, s.job.arrival))
        self.counters["preemptions"] += 1
        del self.running[seq.request.id]
        self.free(seq)
        self.kv.reset(seq)
        self.waiting.push(seq, front=True)
        return seq

    def free(self, seq: Sequence) -> None:
        """Let go of its blocks and of its adapter's slot."""
        self.kv.release(seq)
        if seq.slot != BASE:
            self.adapters.leave(seq.slot)
            seq.slot = BASE

    # --- when memory runs out -------------------------------------------------------------------------------------
    def make_way(self, seqs: list[Sequence], tokens: int) -> None:
        """A step of ``seqs`` and ``tokens`` found no memory: what is idle goes, the more recent half is preempted, and steps are smaller."""
        log.warning("memory ran out in a step of %d requests and %d tokens; the next are smaller", len(seqs), tokens)
        self.oom_backoff.failed(len(seqs), tokens)
        if len(seqs) == 1:
            self._found_none(seqs[0], True)
        else:
            self._relieve(copies=True)
        while len(self.running) > self._places():
            self._preempt_last()

    def _found_none(self, seq: Sequence, alone: bool) -> None:
        """A request found no memory; it is tried again, unless it was ``alone`` and that often enough."""
        self._relieve(copies=alone)
        seq.short += alone
        if seq.short >= TRIES:
            self.turn_away(seq)

    def _relieve(self, *, copies: bool) -> None:
        """Let go of what is idle, and of the runner's ``copies``, which decoding rows would miss."""
        self.counters["out_of_memory"] += 1
        self.adapters.relieve()
        if copies and self.copies is not None:
            self.copies.relieve()

    def turn_away(self, seq: Sequence) -> None:
        """End a request for which there is no memory: 429 with Retry-After."""
        error = Overloaded("The server has no memory left for this request; try again later.", 5.0)
        self.finish(seq, Outcome.REJECTED, str(error), error)
