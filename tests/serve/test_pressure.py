"""The scheduler's part of what goes wrong in service: crowds that leave, allocations that fail, requests without measure."""

from __future__ import annotations

import dataclasses
import random

import pytest

from rankwise.serve.cache.block_pool import ADAPTER, KV, BlockPool, PoolUnit
from rankwise.serve.policies.base import Policy
from rankwise.serve.policies.chain import make
from rankwise.serve.simulate.admission import PeakTest
from rankwise.serve.simulate.simulator import Sent, Simulator
from rankwise.serve.types import Outcome
from tests.serve.traffic import OPTIONS, TRUE, make_pool, simulator, trace

POLICIES = ["default", "lorax", {"name": "early_abort", "slo": 2.0}, "merge_mode"]


def crowd(n: int, seed: int) -> list[Sent]:
    """A fifth go away at a random point of their first second."""
    rng = random.Random(seed)
    requests = trace(rate=25, seconds=n / 25, seed=seed)
    return [dataclasses.replace(s, leaves=s.at + rng.random()) if rng.random() < 0.2 else s for s in requests]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("peak", [True, False])
def test_a_crowd_with_cancellations_leaves_nothing_behind(policy: object, peak: bool) -> None:
    """Every request ends once, cancelled ones in any phase, and all memory comes back."""
    made: Policy = make(policy)  # type: ignore[arg-type]
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
    sim = simulator(make(policy), make_pool(budget=60))  # type: ignore[arg-type]
    sim.run(crowd(n, seed=4))
    assert None not in {r.outcome for r in sim.records} and sim.pool.used(KV) == 0


class Failing(BlockPool):
    """The ``k``-th call to allocate finds no room, whatever there is."""

    def __init__(self, k: int):
        super().__init__({KV: PoolUnit(1, 200), ADAPTER: PoolUnit(1, 200)}, 60)
        self.k, self.calls = k, 0

    def allocate(self, n: int, tag: str, owner: str = "") -> tuple[int, ...] | None:
        self.calls += 1
        return None if self.calls == self.k else super().allocate(n, tag, owner)


def test_any_one_allocation_may_fail() -> None:
    """For every k up to the last, all requests still end as they should and nothing is lost."""
    requests = trace(rate=40, seconds=0.3)

    def run(k: int) -> Simulator:
        sim = Simulator(make("default"), Failing(k), TRUE, OPTIONS, PeakTest(OPTIONS.page))
        report = sim.run(requests)
        assert report.finished == len(requests) and sim.pool.used(KV) == 0
        assert set(sim.pool._held) == set(sim.idle)
        return sim

    calls = run(0).pool.calls  # type: ignore[attr-defined]
    assert calls > 30
    for k in range(1, calls + 1):
        assert run(k).pool.calls >= k  # type: ignore[attr-defined]


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


def test_what_is_without_measure_is_refused_at_once() -> None:
    """Sizes are compared, never laid out."""
    pool = make_pool()
    assert pool.allocate(10**15, KV) is None and pool.used_bytes == 0
    test, job = PeakTest(16), Sent("r", 0.0, 10**12, 10**12)
    from tests.serve.traffic import job as make_job

    assert not test.fits([], make_job("r", prompt=job.prompt, bound=job.output), 10**6, chunk=1)
