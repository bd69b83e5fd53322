"""Traffic and small engines for the tests of policies: everything on the virtual clock."""

from __future__ import annotations

from collections.abc import Callable

from rankwise.serve.cache.block_pool import ADAPTER, KV, PoolUnit
from rankwise.serve.engine.step_time import Coefficients
from rankwise.serve.policies.base import Policy, RequestInfo, State
from rankwise.serve.policies.chain import ChainPolicy
from rankwise.serve.simulate.admission import PeakTest
from rankwise.serve.simulate.pool import SharedBlockPool
from rankwise.serve.simulate.requests import Sent, SimOptions
from rankwise.serve.simulate.simulator import Simulator
from rankwise.serve.simulate.trace import TraceOptions, generate

TRUE = Coefficients(8e-3, 2e-4, 3e-4, 2e-7, 2e-5, 8e-4, knee=16)
OPTIONS = SimOptions(page=8, max_num_seqs=8, max_num_batched_tokens=64, slo=2.0)


def make_pool(blocks: int = 200, pages: int = 200, budget: int | None = None) -> SharedBlockPool:
    """A block and a page of one byte each."""
    return SharedBlockPool({KV: PoolUnit(1, blocks), ADAPTER: PoolUnit(1, pages)}, budget)


class Spy(ChainPolicy):
    """A policy that keeps the ids it let in, in order, and those it let go."""

    def __init__(self, policy: Policy):
        super().__init__((policy,))
        self.let_in: list[str] = []
        self.at: dict[str, float] = {}

    def admitted(self, job: RequestInfo, now: float) -> None:
        super().admitted(job, now)
        self.let_in.append(job.id)
        self.at.setdefault(job.id, now)


def simulator(
    policy: Policy,
    pool: SharedBlockPool | None = None,
    options: SimOptions = OPTIONS,
    *,
    peak: bool = True,
    on_step: Callable[[Simulator], None] | None = None,
) -> Simulator:
    return Simulator(policy, pool or make_pool(), TRUE, options, PeakTest(options.page) if peak else None, on_step)


def trace(rate: float, seconds: float = 10.0, seed: int = 42, tenants: int = 3, cv: float = 2.0, alpha: float = 0.5) -> list[Sent]:
    """Short requests of 12 adapters of ranks 8 … 64."""
    from rankwise.serve.simulate.requests import sent

    o = TraceOptions(12, alpha, rate, cv, seconds, (4, 64), (4, 48), (64, 32, 16, 8), seed)
    return sent(generate(o), tenants)


def flood(
    rate: float, seconds: float, adapters: tuple[str | None, ...] = ("hot",), tenant: str = "many", start: float = 0.0
) -> list[Sent]:
    """Equal requests at even gaps, adapters in turn."""
    return [
        Sent(f"{tenant}{i}", start + i / rate, 16, 16, tenant, adapters[i % len(adapters)], 8 if adapters[i % len(adapters)] else 0)
        for i in range(int(rate * seconds))
    ]


def job(
    name: str, arrival: float = 0.0, adapter: str | None = None, tenant: str = "", prompt: int = 10, bound: int = 10, **more: object
) -> RequestInfo:
    return RequestInfo(name, arrival, prompt, bound, tenant, adapter, **more)  # type: ignore[arg-type]


def state(waiting: list[RequestInfo], running: list[RequestInfo] | None = None, now: float = 0.0, **more: object) -> State:
    return State(now, running or [], waiting, 100, 100, 8, more.pop("free_lora_pages", 100), **more)  # type: ignore[arg-type]


def ids(jobs: list[RequestInfo]) -> str:
    return " ".join(j.id for j in jobs)
