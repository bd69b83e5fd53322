"""The k-th allocation fails, for every k: no request is lost, every answer is right, all memory is given back.

What allocates: blocks and pages of the pool, an adapter's tensors into its pages, an adapter read to the host, and every tensor of a
step.  What fails once is done again, so all requests end as if nothing had been; what fails for good ends them with a 429.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.serve.engine.sampler import SamplerState, sample
from rankwise.serve.server import Server
from rankwise.serve.simulate.drive import collect, run_until_idle
from rankwise.serve.types import Event, Outcome, Overloaded, Request, Sampling
from tests.serve.faults.tools import FailingAt
from tests.serve.rig import check_greedy, configure, digest_of, nothing_is_held, server

PROMPT = (5, 9, 11, 40, 3, 8, 22, 17, 30)
#: (adapters, prompt, tokens): shared beginnings, pages that evict one another, blocks that do not suffice for all at once
WORK = (
    (("one",), PROMPT, 4), (("nine",), PROMPT[::-1], 5), ((), PROMPT, 6), (("one",), (*PROMPT, 1, 2), 4), (("eight", "three"), PROMPT, 3),
    (("dora",), PROMPT[2:], 4), ((), PROMPT[3:], 5),
)  # fmt: skip
DRAWN = len(WORK) - 1  #: the one that is drawn at a temperature, whose draws must not depend on what failed
#: (what fails, how it says so, how often the work asks for it at least); only the pool says no by None
CASES = [
    ("block", "error", 12),
    ("block", "none", 12),
    ("page", "error", 4),
    ("page", "none", 4),
    ("write", "error", 4),
    ("host", "error", 5),
]
NO_ROOM = "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."


class Tensors(TorchDispatchMode):
    """Fails where an operator makes a tensor."""

    def __init__(self, fails: FailingAt):
        super().__init__()
        self.fails = fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.is_mutable and not func.is_view and self.fails():
            raise RuntimeError(NO_ROOM)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def failing(made: Server, what: str, fails: FailingAt, how: str = "error") -> Iterator[None]:
    def before(fn: Callable[..., Any], mine: Callable[..., bool] = lambda *a: True) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if mine(*args) and fails():
                if how == "none":
                    return None
                raise MemoryError
            return fn(*args, **more)

        return wrapped

    def afterwards(*args: Any, **more: Any) -> None:
        write(*args, **more)  # the worst moment: all is written when it fails
        if fails():
            raise MemoryError

    def stepping(*args: Any) -> Any:
        with Tensors(fails):
            return run(*args)

    write, run = made.table._pages.write, made.engine._drawn
    with pytest.MonkeyPatch.context() as m:
        if what in ("block", "page"):
            tag = {"block": "kv", "page": "adapter"}[what]
            m.setattr(made.pool, "allocate", before(made.pool.allocate, lambda n, t, *a: t == tag))
        elif what == "write":
            m.setattr(made.table._pages, "write", afterwards)
        elif what == "host":
            m.setattr(made.cache.source, "fetch", before(made.cache.source.fetch))
        else:
            m.setattr(made.engine, "_drawn", stepping)
        yield


@pytest.fixture(scope="module")
def made() -> Iterator[Server]:
    made = server(4, 14, 3, "bags", True, "fcfs")
    configure(made, max_num_seqs=3, max_num_batched_tokens=8)
    log = logging.getLogger("rankwise.serve")
    level = log.level
    log.setLevel(logging.ERROR)
    yield made
    log.setLevel(level)


def mixed(names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    return tuple((name, 1.0) for name in names)


def requests(made: Server) -> list[Request]:
    """All work, each time under the same ids; what earlier runs left in memory is freed first."""
    made.engine.scheduler.index.shrink(10**6)
    while made.table.shrink():
        pass
    made.cache.relieve()
    assert made.pool.used_bytes == made.cache.nbytes == 0
    return [
        Request(
            f"r{i}",
            prompt,
            Sampling(max_tokens=n, ignore_eos=True, temperature=float(i == DRAWN), seed=7),
            digest_of(made, mixed(names)),
        )
        for i, (names, prompt, n) in enumerate(WORK)
    ]


def served(made: Server, fails: FailingAt, what: str, how: str = "error") -> list[list[Event]]:
    """The events of each request of the work."""
    todo = requests(made)
    events: list[list[Event]] = [[] for _ in todo]
    with failing(made, what, fails, how):
        for request, mine in zip(todo, events, strict=True):
            made.engine.submit(request, mine.append)
        while not made.engine.idle():
            made.engine.inbox.run_all()
            for s in list(made.engine.scheduler.waiting.values()):
                if s.fetched is not None:  # it is read by another thread; waited for, so that every run is the same
                    s.fetched.exception(60)
            made.engine.step()
    nothing_is_held(made)
    assert not made.cache._loading
    assert made.pool.used("adapter") == sum(len(s.pages) for s in made.table.slots.values())
    return events


@functools.cache
def alone(made: Server) -> list[int]:
    """The tokens of the one that is drawn, served alone."""
    events: list[Event] = []
    _, prompt, n = WORK[DRAWN]
    made.engine.submit(
        Request("alone", prompt, Sampling(max_tokens=n, ignore_eos=True, temperature=1.0, seed=7), salt="alone"), events.append
    )
    run_until_idle(made.engine)
    return collect(events)[0]


def check(made: Server, events: list[list[Event]]) -> None:
    """All ended as they should, token for token."""
    for i, ((names, prompt, n), mine) in enumerate(zip(WORK, events, strict=True)):
        ids, done = collect(mine)
        assert done is not None and done is mine[-1] and sum(e is done for e in mine) == 1
        assert done.outcome is Outcome.LENGTH and len(ids) == n, (i, done)
        if i == DRAWN:
            assert ids == alone(made)
            continue
        check_greedy(Request(f"r{i}", prompt), ids, mixed(names))


@pytest.mark.parametrize(("what", "how", "least"), CASES)
def test_any_one_allocation_may_fail(made: Server, what: str, how: str, least: int) -> None:
    count = FailingAt()
    check(made, served(made, count, what, how))
    assert count.calls >= least
    for k in range(1, count.calls + 1):
        fails = FailingAt(k)
        check(made, served(made, fails, what, how))
        assert fails.calls >= k
    assert made.engine.counters["faults"] == 0


@pytest.mark.parametrize("every", [127, pytest.param(1, marks=pytest.mark.soak)])
def test_any_tensor_of_a_step_may_fail(made: Server, every: int) -> None:
    count = FailingAt()
    check(made, served(made, count, "tensor"))
    assert count.calls > 1000
    for k in range(1, count.calls + 1, every):
        fails = FailingAt(k)
        check(made, served(made, fails, "tensor"))
        assert fails.calls >= k
    assert made.engine.counters["faults"] == 0


def test_a_draw_that_finds_no_memory_is_no_draw() -> None:
    states = [
        SamplerState.of(Sampling(temperature=1.0, top_p=0.9, seed=i, frequency_penalty=1.0, logprobs=2), 0, "") for i in range(3)
    ]
    logits, before = torch.randn(3, 20), [s.generator.get_state() for s in states]
    count = FailingAt()
    with Tensors(count):
        sample(logits, states)
    for s, was in zip(states, before, strict=True):
        s.generator.set_state(was), s.said.clear()
    for k in range(1, count.calls + 1):
        with pytest.raises(RuntimeError, match="can't allocate"), Tensors(FailingAt(k)):
            sample(logits, states)
        assert all(torch.equal(s.generator.get_state(), was) and not s.said for s, was in zip(states, before, strict=True))


@pytest.mark.parametrize("what", ["write", "host", "tensor"])
def test_what_lasts_ends_with_a_429_and_is_over_when_it_is_over(made: Server, what: str) -> None:
    for k in (1, 3, 300) if what == "tensor" else (1, 3):
        ended = [collect(e)[1] for e in served(made, FailingAt(k, lasting=True), what)]
        assert all(d is not None for d in ended)
        cut = [d for d in ended if d.outcome is not Outcome.LENGTH]  # type: ignore[union-attr]
        assert cut and all(d.outcome is Outcome.REJECTED and isinstance(d.error, Overloaded) for d in cut)  # type: ignore[union-attr]
        assert all("memory" in d.message for d in cut)  # type: ignore[union-attr]
    check(made, served(made, FailingAt(), what))
    run_until_idle(made.engine)
