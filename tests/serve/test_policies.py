"""Laws that every policy keeps, run over the whole registry on the virtual clock."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rankwise import catalogue
from rankwise.errors import OptionError, RankwiseError, UnknownName
from rankwise.serve.cache.block_pool import ADAPTER, KV
from rankwise.serve.policies.base import Policy, Verdict, tried
from rankwise.serve.policies.chain import make, names
from rankwise.serve.policies.cluster import Cluster
from rankwise.serve.policies.default import Default
from rankwise.serve.policies.early_abort import EarlyAbort
from rankwise.serve.policies.fcfs import Fcfs
from rankwise.serve.policies.lorax import Lorax
from rankwise.serve.simulate.merge_mode import MergeMode
from rankwise.serve.simulate.requests import Sent, SimOptions
from rankwise.serve.simulate.simulator import Simulator
from tests.serve.traffic import OPTIONS, Spy, flood, job, make_pool, simulator, state, trace

ALL = sorted(names())
LIGHT = trace(rate=2, seconds=20, cv=1)
HEAVY = trace(rate=40, seconds=3)


def test_the_registry_holds_the_policies_built() -> None:
    """And none that only the simulator follows, which is imported here."""
    assert set(ALL) >= {"fcfs", "early_abort", "cluster", "vtc", "drain", "lorax", "pets", "chain", "default"}
    assert all(catalogue.find("policy", n).doc for n in ALL) and MergeMode.name not in ALL


@pytest.mark.parametrize("name", ALL)
def test_requests_and_memory_are_conserved_and_runs_repeat(name: str) -> None:
    def look(sim: Simulator) -> None:
        done = sum(r.outcome is not None for r in sim.records)
        assert len(sim.waiting) + len(sim.running) + done == len(sim.records)
        assert len(sim.running) <= OPTIONS.max_num_seqs and sim.pool.used_bytes <= sim.pool.budget
        assert all(sim.pool.count(f"request:{i}", KV) for i in sim.running)
        assert {x.job.adapter for x in sim.running.values()} <= {a for a in sim.fetched if sim.pool.count(a, ADAPTER)}

    def once() -> tuple[object, Spy, Simulator]:
        spy = Spy(make(name))
        sim = simulator(spy, make_pool(budget=60), on_step=look)
        return sim.run(HEAVY), spy, sim

    report, spy, sim = once()
    assert report.finished + report.aborted + report.rejected == report.requests == len(HEAVY)  # type: ignore[attr-defined]
    assert sorted(set(spy.let_in)) == sorted(r.id for r in sim.records if r.tokens)
    assert sim.pool.used(KV) == 0 and sim.pool.used(ADAPTER) == sum(sim.pool.count(a, ADAPTER) for a in sim.idle)
    again = once()
    assert again[0] == report and again[1].let_in == spy.let_in


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("pets", "lorax")])
def test_under_light_load_it_is_first_come_first_served_and_nobody_is_let_go(name: str) -> None:
    policy, plain = Spy(make(name)), Spy(Fcfs())
    got, expected = simulator(policy).run(LIGHT), simulator(plain).run(LIGHT)
    assert policy.let_in == plain.let_in == [s.id for s in LIGHT]
    assert got == expected and got.aborted == got.rejected == 0 and got.attainment == 1


@pytest.mark.parametrize("policy", [Lorax(), MergeMode()], ids=["lorax", "merge_mode"])
def test_others_let_nobody_go_either(policy: Policy) -> None:
    got = simulator(policy).run(LIGHT)
    assert got.finished == got.requests and got.attainment > 0.95


@pytest.mark.parametrize(
    ("free", "limited"),
    [(Cluster(d=10**6), None), (EarlyAbort(slo=None), None), (EarlyAbort(slo=1e9), None), (Default(d=10**6, max_wait=1e9), None)],
    ids=["cluster d=∞", "abort without limit", "abort with an infinite limit", "default without tenants"],
)
def test_without_its_limit_a_policy_is_first_come_first_served(free: Policy, limited: None) -> None:
    requests = [dataclasses.replace(s, tenant="") for s in HEAVY]
    spy, plain = Spy(free), Spy(Fcfs())
    got, expected = simulator(spy, make_pool(budget=60)).run(requests), simulator(plain, make_pool(budget=60)).run(requests)
    assert spy.let_in == plain.let_in and got == expected
    assert expected.ttft_p90 > 5 * simulator(Fcfs()).run(LIGHT).ttft_p90  # heavy indeed


def test_a_head_that_does_not_fit_blocks_only_under_strict_order() -> None:
    big = Sent("big", 0.5, 200, 40)
    requests = [*flood(30, 2, (None,)), big]
    pool = 34  # blocks of 8 tokens: big needs 31
    spies = {strict: Spy(Fcfs(strict=strict)) for strict in (False, True)}
    for spy in spies.values():
        simulator(spy, make_pool(blocks=pool)).run(requests)
    wait = {strict: spy.at["big"] - 0.5 for strict, spy in spies.items()}
    passed = [
        i for i in spies[False].let_in if i != "big" and int(i[4:]) / 30 > 0.5 and spies[False].at[i] < spies[False].at["big"]
    ]
    assert wait[True] < 0.4 < 1 < wait[False] and len(passed) > 30
    assert spies[True].let_in.index("big") == sum(s.at <= 0.5 for s in requests[:-1])


def test_a_request_that_does_not_fit_is_passed_over_and_one_let_go_takes_no_room() -> None:
    class Picky(Policy):
        def verdict(self, job, state):  # type: ignore[no-untyped-def]
            return {"late": Verdict.ABORT, "later": Verdict.DEFER}.get(job.id, Verdict.ADMIT)

    waiting = [job("a"), job("late"), job("later"), job("big"), job("b")]
    asked: list[str] = []

    def fits(j) -> bool:  # type: ignore[no-untyped-def]
        asked.append(j.id)
        return {"big": False, "gone": None}.get(j.id, True)

    policy = Picky()
    assert [(j.id, v) for j, v in tried(policy, state(waiting), fits)] == [
        ("a", Verdict.ADMIT), ("late", Verdict.ABORT), ("b", Verdict.ADMIT)
    ]  # fmt: skip
    assert asked == ["a", "big", "b"]
    policy.blocking = True
    assert [j.id for j, _ in tried(policy, state(waiting), fits)] == ["a", "late"]
    assert [j.id for j, _ in tried(policy, state([job("gone"), job("b")]), fits)] == ["b"], "what has ended blocks nobody"


@pytest.mark.parametrize("peak", [True, False])
def test_the_peak_test_never_puts_a_request_back(peak: bool) -> None:
    """Without it, under the same pressure, requests are."""
    got = simulator(Fcfs(), make_pool(budget=40), peak=peak).run(HEAVY)
    assert (got.preemptions == 0) == peak and got.finished == len(HEAVY)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("claster", UnknownName, "did you mean 'cluster'"),
        ({"name": "cluster", "dd": 3}, OptionError, "no option 'dd'; did you mean 'd'"),
        ({"d": 3}, OptionError, "under 'name'"),
        ({"name": "cluster", "d": 0}, OptionError, "cluster got d = 0; it is at least 1"),
        ({"name": "fcfs", "max_wait": -1}, OptionError, "max_wait = -1"),
        ({"name": "vtc", "weights": {"a": 0}}, OptionError, "weight of 0 for the tenant 'a'"),
        ({"name": "early_abort", "slo": 0}, OptionError, "slo = 0"),
        ({"name": "early_abort", "patience": 2}, OptionError, "patience = 2"),
        ({"name": "lorax", "slots": 0}, OptionError, "slots = 0"),
        ({"name": "drain", "slots": 0}, OptionError, "slots = 0"),
        ("merge_mode", OptionError, "is for the simulator: it wants the engine to merge an adapter"),
        ({"name": "pets", "max_batch": 0}, OptionError, "max_batch = 0"),
        ({"name": "chain", "rules": ()}, OptionError, "no rules"),
        ({"name": "default", "d": 0}, OptionError, "d = 0"),
    ],
)
def test_wrong_names_and_options_are_one_sentence(given: object, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        make(given)  # type: ignore[arg-type]


def test_the_simulator_refuses_what_can_never_fit_and_a_policy_that_lets_nobody_in() -> None:
    class Never(Policy):
        def order(self, state):  # type: ignore[no-untyped-def]
            return []

    with pytest.raises(OptionError, match="the pool can never give them"):
        simulator(Fcfs(), make_pool(blocks=4)).run([Sent("r", 0, 100, 10)])
    with pytest.raises(OptionError, match="needs 1 or more"):
        simulator(Fcfs()).run([Sent("r", 0, 0, 10)])
    with pytest.raises(RankwiseError, match="lets nobody in"):
        simulator(Never()).run([Sent("r", 0, 10, 10)])
    with pytest.raises(OptionError, match="page = 0"):
        SimOptions(page=0)
    assert math.isnan(simulator(Fcfs()).run([]).ttft_mean)
