"""On the engine itself: a crowd of which a fifth is cancelled at a random moment; who finished is exact, all memory comes back."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rankwise.serve.types import Event, Finished, Outcome, Overloaded, Request, Sampling, Token
from tests.models import VOCAB
from tests.serve.rig import check_greedy, configure, digest_of, nothing_is_held, server

KINDS: tuple[tuple[tuple[str, float], ...], ...] = (
    (), (("one", 1.0),), (("three", 1.0),), (("eight", 1.0),), (("nine", 1.0),), (("dora", 1.0),), (("one", 0.5), ("eight", 1.0)),
)  # fmt: skip
PROMPTS = [tuple(random.Random(n).choices(range(VOCAB), k=n)) for n in (3, 8, 13, 21)]
LONGEST = 6


@pytest.mark.parametrize("count", [256, pytest.param(2_000, marks=pytest.mark.soak), pytest.param(20_000, marks=pytest.mark.soak)])
def test_a_crowd_of_which_a_fifth_goes_away(count: int) -> None:
    rnd, made = random.Random(count), server(4, 24, 5, "bags", True, "default")
    configure(made, max_num_seqs=8, max_waiting=30, max_num_batched_tokens=24)
    engine, seen = made.engine, Counter[str]()
    digests = [digest_of(made, k) for k in KINDS]
    events: dict[str, list[Event]] = {}
    asked: dict[str, tuple[Request, int]] = {}
    leaving: dict[int, list[str]] = {}
    step = sent = 0
    while sent < count or not engine.idle():
        for _ in range(rnd.randrange(8)):
            if sent == count:
                break
            k, id = rnd.randrange(len(KINDS)), f"r{sent}"
            request = Request(
                id, rnd.choice(PROMPTS), Sampling(max_tokens=rnd.randrange(1, LONGEST + 1), ignore_eos=True), digests[k],
                tenant=rnd.choice("abc"),
            )  # fmt: skip
            try:
                engine.submit(request, events.setdefault(id, []).append)
            except Overloaded:
                seen["full"] += 1
                break
            asked[id], sent = (request, k), sent + 1
            if rnd.random() < 0.2:
                leaving.setdefault(step + rnd.randrange(40), []).append(id)
        for id in leaving.pop(step, ()):
            engine.cancel(id)
        engine.step()
        step += 1
    for id, (request, k) in asked.items():
        ends = [e for e in events[id] if isinstance(e, Finished)]
        assert len(ends) == 1 and events[id][-1] is ends[0], id
        ids = [e.id for e in events[id] if isinstance(e, Token)]
        check_greedy(request, ids, KINDS[k])
        assert ends[0].outcome in (Outcome.LENGTH, Outcome.CANCELLED)
        assert ends[0].outcome is Outcome.CANCELLED or len(ids) == request.sampling.max_tokens
        seen[ends[0].outcome.value] += 1
    assert seen["length"] > count * 0.75 and seen["cancelled"] > count * 0.05 and seen["full"], seen
    assert not engine.counters["faults"]
    nothing_is_held(made)
