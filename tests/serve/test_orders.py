"""What each policy does in one admission, and the identities of its rule (docs/methods/serving.md)."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankwise.errors import OptionError
from rankwise.serve.policies.base import State, Verdict
from rankwise.serve.policies.chain import ChainPolicy
from rankwise.serve.policies.cluster import Cluster
from rankwise.serve.policies.drain import Drain
from rankwise.serve.policies.early_abort import EarlyAbort
from rankwise.serve.policies.lorax import Lorax
from rankwise.serve.policies.pets import Pets, partition
from rankwise.serve.policies.vtc import VirtualTokenCounter
from rankwise.serve.simulate.merge_mode import MergeMode, ModeSwitch
from tests.serve.traffic import flood, ids, job, simulator, state, trace

RUNNING = [job("x", adapter="A"), job("y", adapter="B")]


def test_clustering_is_a_stable_partition_once_enough_adapters_run() -> None:
    waiting = [job("c1", 1, "C"), job("a1", 2, "A"), job("base", 3), job("c2", 4, "C"), job("b1", 5, "B")]
    assert ids(Cluster(d=2).order(state(waiting, RUNNING))) == "a1 base b1 c1 c2"
    assert ids(Cluster(d=3).order(state(waiting, RUNNING))) == "c1 a1 base c2 b1"
    aged = Cluster(d=2, max_wait=5)
    assert ids(aged.order(state(waiting, RUNNING, now=6.5))) == "c1 a1 base b1 c2" and aged.blocking
    assert not (aged.order(state(waiting, RUNNING, now=1)) and aged.blocking)


def test_an_adapter_that_is_still_being_read_keeps_nobody_waiting() -> None:
    waiting = [job("c1", 0, "C", ready=False), job("a1", 2, "A")]
    policy = Cluster(d=1, max_wait=5)
    assert ids(policy.order(state(waiting, RUNNING, now=6))) == "a1 c1" and not policy.blocking


def test_abort_looks_at_the_predicted_first_token() -> None:
    policy = EarlyAbort(slo=6.0)
    s = state([], now=5.0, step_seconds=0.1, seconds_per_prompt_token=0.01, chunk=50)
    late, just = job("late", prompt=90), job("just", prompt=80)  # 2 steps + 0.9 and + 0.8
    assert policy.verdict(late, s) is Verdict.REJECT and policy.verdict(just, s) is Verdict.ADMIT
    s.waiting = [just, late]
    assert policy.verdict(late, s) is Verdict.ABORT and ids(policy.order(s)) == "late just"
    assert policy.verdict(job("own", deadline=5.5, prompt=90), s) is Verdict.REJECT
    assert policy.verdict(job("begun", prompt=90, generated=1), s) is Verdict.ADMIT
    assert EarlyAbort(slo=None).verdict(late, s) is Verdict.ADMIT
    assert EarlyAbort(slo=6.0, margin=0.5).verdict(just, s) is Verdict.ABORT


def test_the_newest_come_first_only_under_overload() -> None:
    policy = EarlyAbort(slo=6.0, every=1, patience=0.5)
    waiting = [job("old", 0), job("mid", 2), job("new", 3.5), job("free", 1, deadline=1e18)]
    for _ in range(20):  # arrivals fall still: ρ goes to 0
        policy.stepped({}, [], 0)
    assert ids(policy.order(state(waiting, now=4))) == "old mid new free" and policy.rho < policy.beta
    policy = EarlyAbort(slo=6.0, patience=0.5)
    assert ids(policy.order(state(waiting, now=4))) == "new mid free old"
    assert ids(policy.order(state(waiting, now=2.9))) == "old mid new free"  # nobody has spent half of the time


def test_the_published_rates() -> None:
    policy = EarlyAbort(every=1)
    arrivals, admissions = [5, 0, 3, 9], [1, 0, 4, 2]
    rho = beta = 1
    n = 0
    for a, k in zip(arrivals, admissions, strict=True):
        jobs = [job(f"{n + i}", n + i + 1.0) for i in range(a)]
        n += a
        policy.order(state(jobs, now=n))
        for _ in range(k):
            policy.admitted(job("z"), n)
        policy.stepped({}, [], n)
        rho, beta = int(0.7 * a + 0.3 * rho), max(int(0.7 * k + 0.3 * beta), 1)
        assert (policy.rho, policy.beta) == (rho, beta)
    policy = EarlyAbort(every=1)
    a, b = job("a", 1.0), job("b", 5.0)
    for waiting in ([a, b], [a], [b, a]):  # b is let in and put back: it arrived once
        policy.order(state(waiting, now=5))
    policy.stepped({}, [], 5)
    assert policy.rho == int(0.7 * 2 + 0.3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rate", [30, 45])
def test_early_abort_meets_at_least_as_many_limits_as_first_come_first_served(rate: float, seed: int) -> None:
    requests = trace(rate, seconds=6, seed=seed)
    plain = simulator(ChainPolicy(("fcfs",))).run(requests)
    got = simulator(EarlyAbort(slo=2.0)).run(requests)
    assert plain.attainment < 0.95, "no overload"
    assert got.attainment >= plain.attainment and got.satisfaction > plain.satisfaction and got.aborted > 0


def test_tenants_take_turns_by_what_they_have_had() -> None:
    policy = VirtualTokenCounter()
    waiting = [job(f"a{i}", i, tenant="a", prompt=30) for i in range(3)] + [job(f"b{i}", 5 + i, tenant="b") for i in range(5)]
    assert ids(policy.order(state(waiting))) == "a0 b0 b1 b2 a1 b3 b4 a2"
    policy.admitted(waiting[0], 0)
    policy.stepped({"a0": 10}, [waiting[0]], 0)  # 30 + 2·10
    assert policy.counters == {"a": 50, "b": 0}
    policy.admitted(waiting[0], 0)  # put back and let in again: its prompt is not charged twice
    assert policy.counters["a"] == 50


def test_idle_time_earns_no_credit() -> None:
    policy = VirtualTokenCounter()
    a, b = job("a", tenant="a", prompt=100), job("b", tenant="b")
    policy.order(state([a]))
    policy.admitted(a, 0)
    policy.order(state([a, b]))
    assert policy.counters["b"] == policy.counters["a"] == 100
    fresh = VirtualTokenCounter()
    fresh.order(state([a]))
    fresh.admitted(a, 0)
    fresh.order(state([]))
    fresh.order(state([b]))
    assert fresh.counters["b"] == 100  # as the one that left last


def test_drain_stops_the_adapter_nearest_its_end() -> None:
    running = [
        job("x1", adapter="A", bound=50, generated=10, lora_pages=2), job("x2", adapter="A", bound=50, generated=49, lora_pages=2),
        job("y", adapter="B", bound=50, generated=20, lora_pages=2),
    ]  # fmt: skip
    waiting = [job("a", 5, "A"), job("b", 6, "B"), job("d", 7, "D", resident=False, lora_pages=1), job("base", 8)]
    starving = job("c", 0, "C", resident=False, lora_pages=2)
    policy = Drain(max_wait=10)
    assert (
        ids(policy.order(state([starving, *waiting], running, now=9, free_lora_pages=1))) == "c a b d base" and not policy.draining
    )
    assert ids(policy.order(state([starving, *waiting], running, now=11, free_lora_pages=1))) == "c a base"
    assert policy.draining == {"B"} and not policy.blocking  # B has 30 tokens left, A 40
    starving.lora_pages = 4
    assert ids(policy.order(state([starving, *waiting], running, now=11, free_lora_pages=1))) == "c base" and policy.draining == {
        "A",
        "B",
    }
    starving.lora_pages = 1
    assert ids(policy.order(state([starving, *waiting], running, now=11, free_lora_pages=1))) == "c a b d base" and policy.blocking
    limited = Drain(max_wait=10, slots=2)
    assert ids(limited.order(state([starving, *waiting], running, now=11, free_lora_pages=9))) == "c a base"


def test_queues_of_adapters_rotate() -> None:
    policy = Lorax(slots=2, max_active=2.0)
    waiting = [job("a1", 0, "A"), job("b1", 0.1, "B"), job("c1", 0.2, "C"), job("base", 0.3), job("a2", 0.4, "A")]
    assert ids(policy.order(state(waiting, now=1))) == "a1 b1 base a2"
    busy = [job("a1", adapter="A"), job("b1", adapter="B")]
    left = waiting[2:]
    assert ids(policy.order(state(left, busy, now=2.9))) == "base a2"
    assert ids(policy.order(state(left, busy, now=3.1))) == "base"  # A has had its time and C waits: A is closed
    assert ids(policy.order(state(left, busy[1:], now=4))) == "c1 base"  # its requests ended: C takes its place
    assert list(policy.active) == ["B", "C"]
    assert ids(policy.order(state(left, [*busy[1:], job("c0", adapter="C")], now=4.5))) == "c1 base"  # B is closed for A
    idle = Lorax(slots=1)
    idle.order(state([job("a", 0, "A")]))
    idle.order(state([], [job("a", 0, "A")]))
    assert ids(idle.order(state([job("c", 1, "C")], [job("a", 0, "A")], now=1))) == ""
    assert ids(idle.order(state([job("c", 1, "C")], [], now=1))) == "c"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=60), st.sampled_from([1.0, 5.0, 20.0]))
@example([(0, 8)] * 30 + [(8, 0)] * 30, 5.0)  # a long good time earns no longer stay afterwards
def test_switching_costs_at_most_three_times_the_best_plan(costs: list[tuple[int, int]], price: float) -> None:
    switch, mode, paid = ModeSwitch(price), 0, 0.0
    best = [0.0, price]
    for pair in costs:
        best = [min(best[m], best[1 - m] + price) + pair[m] for m in (0, 1)]
        paid += pair[mode]
        if switch.step(pair[mode], pair[1 - mode]):
            mode, paid = 1 - mode, paid + price
    worst_step = max((abs(a - b) for a, b in costs), default=0)
    switches = 1 + paid / (2 * price)  # a step may overshoot the price, once a switch
    assert paid <= 3 * min(best) + 3 * price + worst_step * switches


def test_a_hot_adapter_is_merged_and_those_held_back_take_it_back() -> None:
    with pytest.raises(OptionError, match="price = 0"):
        MergeMode(price=0)
    policy = MergeMode(delta=0.5, price=3.0, credit=6.0)
    hot = [job(f"h{i}", adapter="H") for i in range(4)]
    policy.order(state([], hot))
    for step in range(1, 20):
        policy.stepped({}, hot, step)
        if policy.mode == "H":
            break
    assert step == 6 and policy.mode == "H"  # 3 / 0.5 steps' worth of adapters
    assert policy.ready(state([], hot)) and not policy.ready(state([], [*hot, job("o", adapter="O")]))
    waiting = [job("o", adapter="O"), job("h", adapter="H")]
    assert ids(policy.order(state(waiting, hot))) == "h"
    for step in range(1, 20):
        policy.order(state(waiting, hot))
        policy.stepped({}, hot, step)
        if policy.mode is None:
            break
    assert step <= 6 and ids(policy.order(state(waiting, hot))) == "o h"
    cold = MergeMode(delta=0.05, price=3.0)
    mixed = [job("h", adapter="H"), job("o", adapter="O")]
    for step in range(200):
        cold.order(state([], mixed))
        cold.stepped({}, mixed, step)
        assert cold.mode is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 60))
def test_cuts_are_the_cheapest_there_are(lengths: list[int], most: int, fixed: int) -> None:
    lengths.sort()

    def cost(n: int, longest: int) -> float:
        return fixed + n * longest

    def total(runs: list[tuple[int, int]]) -> float:
        return sum(cost(e - s, lengths[e - 1]) for s, e in runs)

    n = len(lengths)
    plans = []
    for cuts in itertools.product((False, True), repeat=n - 1):
        marks = [0, *(i + 1 for i, c in enumerate(cuts) if c), n]
        runs = list(itertools.pairwise(marks))
        if all(e - s <= most for s, e in runs):
            plans.append(total(runs))
    got = partition(lengths, cost, most)
    assert got[0][0] == 0 and got[-1][1] == n and all(a[1] == b[0] for a, b in itertools.pairwise(got))
    assert total(got) == min(plans)


def test_planned_batches_hold_everybody_once_and_the_oldest_goes_first() -> None:
    policy = Pets(step=500, max_batch=4)
    jobs = [job(f"r{i}", 100 - i, "AB"[i % 2], prompt=1 + 7 * i % 50, lora_pages=i % 2 + 1) for i in range(17)]
    plan = policy.plan(jobs)
    assert Counter(j.id for b in plan for j in b) == Counter(j.id for j in jobs) and max(map(len, plan)) <= 4
    assert [max(j.prompt for j in b) for b in plan] == sorted(max(j.prompt for j in b) for b in plan)
    first = policy.order(state(jobs))
    assert "r16" in ids(first).split() and first in plan
    assert policy.order(state(jobs, RUNNING)) == []
    assert policy.order(state(jobs[:10])) == jobs[:10]  # few: order given


def test_a_chain_applies_its_rules_in_turn() -> None:
    rules = ({"name": "early_abort", "slo": 50}, {"name": "cluster", "d": 2}, "vtc", {"name": "drain", "max_wait": 40})
    policy = ChainPolicy(rules)
    waiting = [
        job("late", -99, "A", "t"), job("c1", 1, "C", "t"), job("a1", 2, "A", "t"), job("u1", 3, "C", "u"), job("u2", 4, "A", "u"),
    ]  # fmt: skip
    assert ids(policy.order(state(waiting, RUNNING, now=5))) == "late a1 u2 c1 u1"
    assert policy.verdict(waiting[0], state(waiting, now=5)) is Verdict.ABORT
    policy.parts[2].counters["t"] = 15.0  # type: ignore[attr-defined]
    assert ids(policy.order(state(waiting, RUNNING, now=5))) == "late u2 u1 a1 c1"
    s = State(41.5, RUNNING, waiting, 0, 100, 8, 0)
    assert ids(policy.order(s)).startswith("late c1") and policy.blocking


def test_floods_are_as_asked() -> None:
    assert [(s.at, s.adapter) for s in flood(2, 2, ("a", None))] == [(0, "a"), (0.5, None), (1, "a"), (1.5, None)]
