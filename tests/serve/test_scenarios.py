"""Random scenarios: whatever is served together, each greedy answer is that of its own merged model, alone.

Arrivals, chunking, page sizes, tight memory with preempted requests, evicted adapters, shared prefixes, cancels, mixes and every
kind of adapter are drawn at random; a failing seed fails again by ``scenario(seed)``.  Seeds 0 to 249 run at every change, the
rest of the first thousand and 20,000 more in ``make soak``.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.serve.types import Token
from tests.models import VOCAB
from tests.serve.rig import check, check_greedy, scenario

BATCH = 50


@pytest.mark.parametrize(
    "first", [*range(0, 250, BATCH), *(pytest.param(n, marks=pytest.mark.soak) for n in range(250, 1000, BATCH))]
)
def test_each_answer_is_its_merged_models(first: int) -> None:
    for seed in range(first, first + BATCH):
        check(*scenario(seed))


def test_a_wrong_token_would_be_found() -> None:
    run, _ = scenario(0)
    name, ids = next((n, [e.id for e in es if isinstance(e, Token)]) for n, es in run.events.items() if len(es) > 3)
    check_greedy(run.requests[name], ids, run.adapters[name])
    for i in range(len(ids)):
        with pytest.raises(AssertionError, match=f"token {i} is"):
            check_greedy(run.requests[name], [*ids[:i], (ids[i] + 1) % VOCAB, *ids[i + 1 :]], run.adapters[name])


@settings(max_examples=30, deadline=None)
@given(st.integers(1 << 20, 1 << 40))
def test_each_answer_is_its_merged_models_for_seeds_nobody_chose(seed: int) -> None:
    check(*scenario(seed))


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1000, 21_000, 1000))
def test_each_answer_is_its_merged_models_20000_times(first: int) -> None:
    for seed in range(first, first + 1000):
        check(*scenario(seed))
