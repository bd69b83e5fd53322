"""Nobody starves, and tenants get their shares: bounds of each policy on the virtual clock, beside what happens without it."""

from __future__ import annotations

import pytest

from rankwise.serve.policies.base import Policy
from rankwise.serve.policies.chain import ChainPolicy
from rankwise.serve.policies.cluster import Cluster
from rankwise.serve.policies.default import Default
from rankwise.serve.policies.drain import Drain
from rankwise.serve.policies.early_abort import EarlyAbort
from rankwise.serve.policies.fcfs import Fcfs
from rankwise.serve.policies.lorax import Lorax
from rankwise.serve.policies.pets import Pets
from rankwise.serve.policies.vtc import VirtualTokenCounter
from rankwise.serve.simulate.merge_mode import MergeMode
from rankwise.serve.simulate.requests import Sent
from rankwise.serve.simulate.simulator import Simulator
from rankwise.serve.types import Outcome
from tests.serve.traffic import OPTIONS, Spy, flood, make_pool, simulator

LONGEST = 0.6  #: seconds that a request of a flood runs at most, measured by test_the_yardstick
FLOOD = 4.0  #: seconds that floods last


def wait_of_victim(policy: Policy, victim: Sent, requests: list[Sent], blocks: int = 200, pages: int = 200) -> float:
    spy = Spy(policy)
    sim = simulator(spy, make_pool(blocks, pages))
    sim.run([*requests, victim])
    record = next(r for r in sim.records if r.id == victim.id)
    assert record.outcome is Outcome.LENGTH
    return spy.at[victim.id] - victim.at


def test_the_yardstick() -> None:
    sim = simulator(Fcfs())
    sim.run(flood(70, 2))
    assert max((r.end or 0) - (r.first or 0) for r in sim.records) < LONGEST


BIG = Sent("big", 0.5, 200, 40)  # nearly the whole cache
RARE = Sent("rare", 0.5, 16, 16, "one", "rare", 8)
WIDE = Sent("wide", 0.5, 16, 16, "one", "wide", 32)  # four pages
CACHE = {"blocks": 34}
PAGES = {"pages": 4}
HOT, BUSY = flood(70, FLOOD), flood(40, FLOOD, ("a", "b", "c", "d"))
CASES = {
    # protected policy, its bound, the same without protection, who waits, among whom, what is scarce
    "fcfs": (Fcfs(max_wait=1.0), 1.0 + LONGEST, Fcfs(), BIG, flood(30, FLOOD, (None,)), CACHE),
    "cluster": (Cluster(d=1, max_wait=1.0), 1.0 + LONGEST, Cluster(d=1, max_wait=1e9), RARE, HOT, {}),
    "drain": (Drain(max_wait=1.0), 1.0 + 2 * LONGEST, Fcfs(), WIDE, BUSY, PAGES),
    "drain of the cache": (Drain(max_wait=1.0), 1.0 + LONGEST, Fcfs(), BIG, flood(30, FLOOD, (None,)), CACHE),
    "default": (
        Default(max_wait=1.0),
        1.0 + 2 * LONGEST,
        ChainPolicy(({"name": "cluster", "max_wait": 1e9}, "vtc")),
        WIDE,
        BUSY,
        PAGES,
    ),
    "default, clustered": (Default(d=1, max_wait=1.0), 1.0 + 2 * LONGEST, Cluster(d=1, max_wait=1e9), RARE, HOT, {}),
    "lorax": (Lorax(1, max_active=1.0), 1.0 + LONGEST, Lorax(1, max_active=1e9), RARE, HOT, {}),
    "merge_mode": (
        MergeMode(3.0, 5.0, credit=50),
        50 * 0.03 + LONGEST,
        MergeMode(3.0, 5.0, credit=1e9),
        RARE,
        flood(25, FLOOD),
        {},
    ),
    "vtc": (VirtualTokenCounter(), 2 * LONGEST, Fcfs(), Sent("rare", 3.5, 16, 16, "one", "rare", 8), HOT, {}),
    "pets": (Pets(), 2 * LONGEST + 1.0, None, RARE, HOT, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_nobody_starves(case: str) -> None:
    policy, bound, without, victim, requests, scarce = CASES[case]
    assert wait_of_victim(policy, victim, requests, **scarce) < bound
    if without is not None:
        assert wait_of_victim(without, victim, requests, **scarce) > min(1.5 * bound, 2.5)


def test_with_a_limit_everybody_is_let_in_or_let_go_by_then() -> None:
    spy = Spy(EarlyAbort(slo=OPTIONS.slo))
    sim = simulator(spy)
    report = sim.run(flood(150, 5))
    assert report.aborted > 100 and report.finished > 100
    for r in sim.records:
        decided = spy.at[r.id] if r.outcome is Outcome.LENGTH else r.end
        assert decided is not None and decided - r.at <= OPTIONS.slo + 0.1  # a step


def backlog(weights: dict[str, float], long: int = 60) -> tuple[list[tuple[float, float, float]], Simulator]:
    """Two tenants that always wait, one with long prompts: (service, service, time) after each step while both do."""
    policy = VirtualTokenCounter(weights)
    seen: list[tuple[float, float, float]] = []

    def look(sim: Simulator) -> None:
        if {x.job.tenant for x in sim.waiting.values()} == {"a", "b"}:
            had = dict.fromkeys("ab", 0)
            for r in sim.records:
                had[r.tenant] += 2 * r.tokens + (r.prompt if r.id not in sim.waiting else 0)
            seen.append((had["a"], had["b"], sim.now))

    sim = simulator(policy, on_step=look)
    sim.run(
        [Sent(f"a{i}", 0.0, long, 12, "a", "x", 8) for i in range(150)]
        + [Sent(f"b{i}", 0.0, 8, 30, "b", "y", 8) for i in range(150)]
    )
    return seen, sim


def test_the_service_of_two_tenants_that_always_wait_stays_within_a_constant() -> None:
    seen, _ = backlog({})
    assert len(seen) > 200
    bound = 2 * max(60, 2 * OPTIONS.max_num_seqs * 30)  # the largest prompt, or what a batch makes until it ends
    assert max(abs(a - b) for a, b, _ in seen) <= bound
    early, late = (max(abs(a - b) for a, b, _ in part) for part in (seen[: len(seen) // 2], seen[len(seen) // 2 :]))
    assert late < 2 * early + 60, "the difference grows with time"
    assert seen[-1][0] > 10 * bound / 2


def test_weights_give_proportional_shares() -> None:
    seen, _ = backlog({"a": 3.0})
    a, b, _ = seen[-1]
    assert a / b == pytest.approx(3.0, rel=0.25) and b > 500


def test_a_flood_of_one_tenant_leaves_the_others_first_tokens_alone() -> None:
    requests = flood(200, 3, tenant="many") + flood(4, 3, tenant="few", start=0.3)

    def worst(policy: Policy) -> float:
        sim = simulator(policy)
        sim.run(requests)
        return max(r.ttft for r in sim.records if r.tenant == "few")

    fair, plain = worst(VirtualTokenCounter()), worst(Fcfs())
    assert fair < LONGEST < 2 * LONGEST < plain
