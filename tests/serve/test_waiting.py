"""The queue of those that wait: what a policy is shown of it, that everybody's turn comes, and that a step's work does not grow with it."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.serve.engine.prompt_lookup import NGRAM, REACH, PromptLookup
from rankwise.serve.engine.sampler import SamplerState
from rankwise.serve.engine.scheduler import SWEPT, WINDOW
from rankwise.serve.engine.sequence import Sequence
from rankwise.serve.engine.waiting import Waiting
from rankwise.serve.policies.base import Policy, RequestInfo
from rankwise.serve.simulate.drive import collect, run_until_idle
from rankwise.serve.types import Event, Outcome, Request, Sampling, UnknownAdapter
from tests.serve.rig import configure, server


def made(id: str, tenant: str = "", fetched: Any = None) -> Sequence:
    request = Request(id, (1,), tenant=tenant)
    state = SamplerState.of(request.sampling, 0, id)
    return Sequence(request, lambda e: None, RequestInfo(id, 0.0, 1, 1, tenant), state, [1], b"", fetched=fetched)


def lookup(tokens: list[int], most: int, gram: int = NGRAM) -> tuple[int, ...]:
    """Up to ``most`` tokens that followed the latest earlier occurrence of the last ``gram`` (then fewer, at least 2) tokens."""
    n = len(tokens)
    low = max(0, n - REACH)
    for size in range(gram, 1, -1):
        if n < size + 1:
            continue
        last = tokens[n - size :]
        for at in range(n - size - 1, low - 1, -1):
            if tokens[at : at + size] == last:
                return tuple(tokens[at + size : at + size + most])
    return ()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30))
def test_it_is_what_a_plain_list_gives(seed: int) -> None:
    """Beside it a list in order: who comes, is preempted, and so in front, goes, and whose adapter is read late."""
    rnd, waiting = random.Random(seed), Waiting()
    plain: list[Sequence] = []
    reading: dict[str, Future[Any]] = {}
    for i in range(rnd.randrange(5, 80)):
        what = rnd.random()
        if what < 0.6 or not plain:
            late = rnd.random() < 0.3
            seq = made(f"r{i}", rnd.choice("aaab") if seed % 2 else f"t{rnd.randrange(12)}", Future() if late else None)
            if late:
                reading[seq.request.id] = seq.fetched  # type: ignore[assignment]
            front = rnd.random() < 0.2
            waiting.push(seq, front=front)
            plain.insert(0 if front else len(plain), seq)
        elif what < 0.8:
            gone = plain.pop(rnd.randrange(len(plain)))
            assert waiting.pop(gone.request.id) is gone and gone.request.id not in waiting
        elif reading:
            id = rnd.choice(sorted(reading))
            reading.pop(id).set_result(None)
        ready = [s for s in plain if s.fetched is None or s.fetched.done()]
        n = rnd.choice([1, 2, 5, 16, 200])
        shown = waiting.window(n)
        assert shown == [s for s in ready if s in shown] and len(shown) <= n, "in order, each once"
        assert shown[: n - n // 2] == ready[: n - n // 2], "the oldest"
        assert len(shown) == len(ready) or len(shown) >= n - n // 2
        tenants = {s.request.tenant for s in ready}
        if len(tenants) <= n // 2:
            assert {s.request.tenant for s in shown} == tenants, "every tenant has its head in it"
        assert len(waiting) == len(plain) and sorted(s.request.id for s in waiting.values()) == sorted(s.request.id for s in plain)
    assert waiting.pop("nobody") is None and waiting.get("nobody") is None


def test_an_id_that_came_again_is_another_request() -> None:
    waiting, first, second = Waiting(), Future[Any](), Future[Any]()
    waiting.push(made("r", fetched=first))
    waiting.pop("r")
    waiting.push(made("r", fetched=second))
    first.set_result(None)
    assert waiting.window(4) == []
    second.set_result(None)
    assert [s.request.id for s in waiting.window(4)] == ["r"]


def test_everybody_is_looked_at_in_turn() -> None:
    waiting = Waiting()
    for i in range(100):
        waiting.push(made(f"r{i}"))
    seen = Counter(s.request.id for _ in range(10) for s in waiting.sweep(30))
    assert set(seen.values()) == {3}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30))
def test_kept_runs_give_the_guesses_of_a_search(seed: int) -> None:
    rnd, grams = random.Random(seed), PromptLookup()
    alphabet = rnd.choice([2, 5, 40])
    tokens = [rnd.randrange(alphabet) for _ in range(rnd.choice([1, 2, 3, 5, 30, REACH - 1, REACH + 40]))]
    for _ in range(40):
        most = rnd.randrange(1, 6)
        assert grams.guess(tokens, most) == lookup(tokens, most)
        tokens += [rnd.randrange(alphabet) for _ in range(rnd.choice([0, 1, 1, 3]))]


class Counting(Policy):
    """First come, first served; counts what it is shown and asked."""

    def __init__(self) -> None:
        self.shown: list[int] = []
        self.asked = 0

    def order(self, state: Any) -> list[RequestInfo]:
        self.shown.append(len(state.waiting))
        return list(state.waiting)

    def verdict(self, job: RequestInfo, state: Any) -> Any:
        self.asked += 1
        return super().verdict(job, state)


def work(waiting: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int, int]:
    """(most that a policy was shown, verdicts, looks at adapters, looks at blocks) in 20 steps behind a long queue."""
    one = server(4, 20, 8, "bags", False, "fcfs")
    configure(one, max_num_seqs=6, max_waiting=3000, max_num_batched_tokens=16)
    policy, looks, matched = Counting(), Counter[str](), Counter[str]()
    resident, match = one.engine.adapters.resident, one.engine.scheduler.index.match
    monkeypatch.setattr(one.engine, "policy", policy)
    monkeypatch.setattr(one.engine.scheduler, "policy", policy)
    monkeypatch.setattr(one.engine.adapters, "resident", lambda d: (looks.update("x"), resident(d))[1])
    monkeypatch.setattr(one.engine.scheduler.index, "match", lambda links: (matched.update("x"), match(links))[1])
    digest = one.cache.resolve("one").digest
    one.cache.fetch(digest).result(60)
    events: list[list[Event]] = [[] for _ in range(waiting)]
    for i, mine in enumerate(events):
        request = Request(f"r{i}", (1, 2, 3, *range(i % 40, i % 40 + 9)), Sampling(max_tokens=20, ignore_eos=True), digest)
        one.engine.submit(request, mine.append)
    for _ in range(20):
        one.engine.step()
    assert len(one.engine.scheduler.waiting) > waiting - 30
    for i in range(waiting):
        one.engine.cancel(f"r{i}")
    run_until_idle(one.engine)
    assert all(collect(mine)[1] is not None for mine in events)
    return max(policy.shown), policy.asked, looks["x"], matched["x"]


def test_a_steps_work_does_not_grow_with_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = work(200, monkeypatch), work(2000, monkeypatch)
    assert few == many and many[0] == WINDOW and many[1] <= 20 * (WINDOW + SWEPT)


def test_who_waits_out_of_sight_is_told_when_it_is_too_late_or_its_adapter_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    one = server(4, 30, 8, "bags", False, "default")
    configure(one, max_num_seqs=1, max_waiting=3000, max_num_batched_tokens=16)
    fetched, reading = one.engine.adapters.fetch, Future[Any]()
    digest = one.cache.resolve("eight").digest
    for i in range(300):
        one.engine.submit(Request(f"r{i}", (1, 2, 3), Sampling(max_tokens=40, ignore_eos=True)), lambda e: None)
    late: list[Event] = []
    lost: list[Event] = []
    one.engine.submit(Request("late", (1, 2, 3), Sampling(max_tokens=4), deadline=one.engine.clock() - 1), late.append)
    monkeypatch.setattr(one.engine.adapters, "fetch", lambda d: (fetched(d), reading)[1])
    one.engine.submit(Request("lost", (1, 2, 3), Sampling(max_tokens=4), digest), lost.append)
    one.engine.step()
    reading.set_exception(UnknownAdapter("It is gone."))
    for _ in range(2 + 302 // SWEPT):
        one.engine.step()
    assert len(one.engine.scheduler.waiting) >= 298
    assert [getattr(e, "outcome", None) for e in late] == [Outcome.ABORTED]
    assert [getattr(e, "outcome", None) for e in lost] == [Outcome.REJECTED]
    for i in range(300):
        one.engine.cancel(f"r{i}")
    run_until_idle(one.engine)
