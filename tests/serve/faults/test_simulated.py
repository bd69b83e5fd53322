"""In the simulator: many requests of which some are cancelled, allocations that fail, requests that are far too large."""

from __future__ import annotations

import dataclasses
import random

import pytest

from rankwise.serve.cache.block_pool import ADAPTER, KV, PoolUnit
from rankwise.serve.policies.base import Policy
from rankwise.serve.policies.chain import make
from rankwise.serve.simulate.admission import PeakTest
from rankwise.serve.simulate.merge_mode import MergeMode
from rankwise.serve.simulate.pool import SharedBlockPool
from rankwise.serve.simulate.requests import Sent
from rankwise.serve.simulate.simulator import Simulator
from rankwise.serve.types import Outcome
from tests.serve.faults.tools import FailingAt
from tests.serve.traffic import OPTIONS, TRUE, make_pool, simulator, trace
from tests.serve.traffic import job as make_job

POLICIES = ["default", "lorax", {"name": "early_abort", "slo": 2.0}, "merge_mode"]


def policy_of(named: object) -> Policy:
    return MergeMode() if named == "merge_mode" else make(named)  # type: ignore[arg-type]


def crowd(n: int, seed: int) -> list[Sent]:
    """A fifth go away at a random point of their first second."""
    rng = random.Random(seed)
    requests = trace(rate=25, seconds=n / 25, seed=seed)
    return [dataclasses.replace(s, leaves=s.at + rng.random()) if rng.random() < 0.2 else s for s in requests]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("peak", [True, False])
def test_a_crowd_with_cancellations_leaves_nothing_behind(policy: object, peak: bool) -> None:
    """Every request ends once, cancelled ones in any phase, and all memory comes back."""
    made = policy_of(policy)
    sim = simulator(made, make_pool(budget=60), peak=peak)
    requests = crowd(256, seed=3)
    report = sim.run(requests)
    outcomes = [r.outcome for r in sim.records]
    cancelled = [r for r in sim.records if r.outcome is Outcome.CANCELLED]
    assert len(outcomes) == len(requests) and None not in outcomes
    assert report.finished + report.aborted + report.rejected + len(cancelled) == len(requests)
    assert {bool(r.tokens) for r in cancelled} == {True, False}  # some had begun, some had not
    assert all(r.tokens == s.output for r, s in zip(sim.records, requests, strict=True) if r.outcome is Outcome.LENGTH)
    assert sim.pool.used(KV) == 0 and set(sim.pool._held) == set(sim.idle)


@pytest.mark.soak
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("n", [2_000, 20_000])
def test_a_large_crowd(policy: object, n: int) -> None:
    sim = simulator(policy_of(policy), make_pool(budget=60))
    sim.run(crowd(n, seed=4))
    assert None not in {r.outcome for r in sim.records} and sim.pool.used(KV) == 0


class FailingPool(SharedBlockPool):
    """The ``k``-th call to allocate finds no room, whatever there is."""

    def __init__(self, k: int):
        super().__init__({KV: PoolUnit(1, 200), ADAPTER: PoolUnit(1, 200)}, 60)
        self.fails = FailingAt(k)

    def allocate(self, n: int, tag: str, owner: str = "") -> tuple[int, ...] | None:
        return None if self.fails() else super().allocate(n, tag, owner)


def test_any_one_allocation_may_fail() -> None:
    """For every k up to the last, all requests still end as they should and nothing is lost."""
    requests = trace(rate=40, seconds=0.3)

    def run(k: int) -> int:
        pool = FailingPool(k)
        sim = Simulator(make("default"), pool, TRUE, OPTIONS, PeakTest(OPTIONS.page))
        report = sim.run(requests)
        assert report.finished == len(requests) and pool.used(KV) == 0
        assert set(pool._held) == set(sim.idle)
        return pool.fails.calls

    calls = run(0)
    assert calls > 30
    for k in range(1, calls + 1):
        assert run(k) >= k


def test_unloading_waits_for_those_who_use_it() -> None:
    """Pages that requests hold stay theirs after the registry has let them go."""
    pool = make_pool()
    pages = pool.allocate(4, ADAPTER, "registry") or ()
    for r in ("r1", "r2"):
        pool.share(pages, ADAPTER, r)
    assert pool.release("registry") == {ADAPTER: ()} and pool.used(ADAPTER) == 4
    assert pool.release("r1") == {ADAPTER: ()}
    assert sorted(pool.release("r2")[ADAPTER]) == sorted(pages) and pool.used(ADAPTER) == 0
    assert pool.release("r2") == {}


def test_what_is_far_too_large_is_refused_at_once() -> None:
    """Sizes are compared; nothing of that size is allocated."""
    pool = make_pool()
    assert pool.allocate(10**15, KV) is None and pool.used_bytes == 0
    assert not PeakTest(16).fits([], make_job("r", prompt=10**12, bound=10**12), 10**6, chunk=1)
