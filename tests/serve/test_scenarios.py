"""Random scenarios: whatever is served together, each greedy answer is that of its own merged model, alone.

Arrivals, chunking, page sizes, tight memory with preempted requests, evicted adapters, shared prefixes, cancels, mixes and every
kind of adapter are drawn at random; a failing seed fails again by ``scenario(seed)``.  Seeds 0 to 249 run at every change, the
rest of the first thousand and 20,000 more in ``make soak``.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.rig import check, scenario

BATCH = 50


@pytest.mark.parametrize(
    "first", [*range(0, 250, BATCH), *(pytest.param(n, marks=pytest.mark.soak) for n in range(250, 1000, BATCH))]
)
def test_each_answer_is_its_merged_models(first: int) -> None:
    for seed in range(first, first + BATCH):
        check(*scenario(seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(1 << 20, 1 << 40))
def test_each_answer_is_its_merged_models_for_seeds_nobody_chose(seed: int) -> None:
    check(*scenario(seed))


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1000, 21_000, 1000))
def test_each_answer_is_its_merged_models_20000_times(first: int) -> None:
    for seed in range(first, first + 1000):
        check(*scenario(seed))
