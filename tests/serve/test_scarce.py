"""Memory runs out at the k-th place that asks for some, for every k; nobody is lost, all answers are right, all is given back.

Places: blocks and pages of the pool, an adapter's numbers into its pages, an adapter read to the host, and every tensor that a step
makes.  What fails once is done again, so all requests end as if nothing had been; what fails for good ends them with a 429.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.errors import OptionError
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.engine.engine import collect, run_until_idle
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.engine.sampler import SamplerState, sample
from rankwise.serve.server import Server, Sizes, build_server
from rankwise.serve.types import Event, Outcome, Overloaded, Request, Sampling
from tests.serve.rig import base_model, check_greedy, configure, folder, server

PROMPT = (5, 9, 11, 40, 3, 8, 22, 17, 30)
#: (adapters, prompt, tokens): shared beginnings, pages that evict one another, blocks that do not suffice for all at once
WORK = (
    (("one",), PROMPT, 4), (("nine",), PROMPT[::-1], 5), ((), PROMPT, 6), (("one",), (*PROMPT, 1, 2), 4), (("eight", "three"), PROMPT, 3),
    (("dora",), PROMPT[2:], 4), ((), PROMPT[3:], 5),
)  # fmt: skip
DRAWN = len(WORK) - 1  #: the one that is drawn at a temperature, whose draws must not depend on what failed
PLACES = ("block", "page", "write", "host")
NO_ROOM = "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."


class Failing:
    """Counts what asks for memory at ``place``; the ``k``-th time, or every time from then on, there is none."""

    def __init__(self, k: int = 0, lasting: bool = False):
        self.k, self.lasting, self.calls = k, lasting, 0

    def __call__(self) -> bool:
        self.calls += 1
        return bool(self.k) and (self.calls == self.k or (self.lasting and self.calls > self.k))


class Tensors(TorchDispatchMode):
    """Fails where an operator makes a tensor."""

    def __init__(self, fails: Failing):
        super().__init__()
        self.fails = fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.is_mutable and not func.is_view and self.fails():
            raise RuntimeError(NO_ROOM)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def failing(made: Server, place: str, fails: Failing, how: str = "error") -> Iterator[None]:
    def before(fn: Callable[..., Any], mine: Callable[..., bool] = lambda *a: True) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if mine(*args) and fails():
                if how == "none":
                    return None
                raise MemoryError
            return fn(*args, **more)

        return wrapped

    def afterwards(*args: Any, **more: Any) -> None:
        write(*args, **more)  # the worst moment: all but the last number is there
        if fails():
            raise MemoryError

    def stepping(*args: Any) -> Any:
        with Tensors(fails):
            return run(*args)

    write, run = made.table._pages.write, made.engine._drawn
    with pytest.MonkeyPatch.context() as m:
        if place in ("block", "page"):
            tag = {"block": "kv", "page": "adapter"}[place]
            m.setattr(made.pool, "allocate", before(made.pool.allocate, lambda n, t, *a: t == tag))
        elif place == "write":
            m.setattr(made.table._pages, "write", afterwards)
        elif place == "host":
            m.setattr(made.cache.source, "fetch", before(made.cache.source.fetch))
        else:
            m.setattr(made.engine, "_drawn", stepping)
        yield


@pytest.fixture(scope="module")
def made() -> Server:
    made = server(4, 14, 3, "bags", True, "fcfs")
    configure(made, max_running=3, step_tokens=8)
    logging.getLogger("rankwise.serve").setLevel(logging.ERROR)
    return made


def digest_of(made: Server, names: tuple[str, ...]) -> str | None:
    if len(names) > 1:
        return made.cache.mix([(n, 1.0) for n in names]).digest
    return made.cache.resolve(names[0]).digest if names else None


def requests(made: Server) -> list[Request]:
    """All work, each time under the same ids; what earlier runs left is let go first."""
    made.engine.queue.index.shrink(10**6)
    while made.table.shrink():
        pass
    made.cache.relieve()
    assert made.pool.used_bytes == made.cache.nbytes == 0
    return [
        Request(
            f"r{i}", prompt, Sampling(max_tokens=n, ignore_eos=True, temperature=float(i == DRAWN), seed=7), digest_of(made, names)
        )
        for i, (names, prompt, n) in enumerate(WORK)
    ]


def served(made: Server, fails: Failing, place: str, how: str = "error") -> list[list[Event]]:
    """The events of each request of the work."""
    todo = requests(made)
    events: list[list[Event]] = [[] for _ in todo]
    with failing(made, place, fails, how):
        for request, mine in zip(todo, events, strict=True):
            made.engine.submit(request, mine.append)
        while not made.engine.idle():
            made.engine._drain_commands()
            for s in list(made.engine.queue.waiting.values()):
                if s.fetched is not None:  # it is read by another thread; waited for, so that every run is the same
                    s.fetched.exception(60)
            made.engine.step()
    assert not made.engine._ids and not made.cache._pins and not made.cache._loading
    assert not any(s.use.pins for s in made.table.slots.values())
    assert made.engine.queue.index.available() == made.engine.queue.total_blocks and not made.engine.queue.index.refs
    assert made.pool.used("adapter") == sum(len(s.pages) for s in made.table.slots.values())
    return events


@functools.cache
def alone(made: Server) -> list[int]:
    """What the drawn one says with nobody beside it."""
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
        check_greedy(Request(f"r{i}", prompt), ids, tuple((name, 1.0) for name in names))


@pytest.mark.parametrize("how", ["error", "none"])
@pytest.mark.parametrize("place", PLACES)
def test_any_one_allocation_may_fail(made: Server, place: str, how: str) -> None:
    if how == "none" and place not in ("block", "page"):
        pytest.skip("only the pool says no by None")
    count = Failing()
    check(made, served(made, count, place, how))
    assert count.calls >= {"block": 12, "page": 4, "write": 4, "host": 5}[place]
    for k in range(1, count.calls + 1):
        fails = Failing(k)
        check(made, served(made, fails, place, how))
        assert fails.calls >= k
    assert made.engine.counters["faults"] == 0


@pytest.mark.parametrize("every", [127, pytest.param(1, marks=pytest.mark.soak)])
def test_any_tensor_of_a_step_may_fail(made: Server, every: int) -> None:
    count = Failing()
    check(made, served(made, count, "tensor"))
    assert count.calls > 1000
    for k in range(1, count.calls + 1, every):
        fails = Failing(k)
        check(made, served(made, fails, "tensor"))
        assert fails.calls >= k
    assert made.engine.counters["faults"] == 0


def test_a_draw_that_finds_no_memory_is_no_draw() -> None:
    states = [
        SamplerState.of(Sampling(temperature=1.0, top_p=0.9, seed=i, frequency_penalty=1.0, logprobs=2), 0, "") for i in range(3)
    ]
    logits, before = torch.randn(3, 20), [s.generator.get_state() for s in states]
    count = Failing()
    with Tensors(count):
        sample(logits, states)
    for s, was in zip(states, before, strict=True):
        s.generator.set_state(was), s.said.clear()
    for k in range(1, count.calls + 1):
        with pytest.raises(RuntimeError, match="can't allocate"), Tensors(Failing(k)):
            sample(logits, states)
        assert all(torch.equal(s.generator.get_state(), was) and not s.said for s, was in zip(states, before, strict=True))


@pytest.mark.parametrize("place", ["write", "host", "tensor"])
def test_what_lasts_ends_with_a_429_and_is_over_when_it_is_over(made: Server, place: str) -> None:
    for k in (1, 3, 300) if place == "tensor" else (1, 3):
        ended = [collect(e)[1] for e in served(made, Failing(k, lasting=True), place)]
        assert all(d is not None for d in ended)
        cut = [d for d in ended if d.outcome is not Outcome.LENGTH]  # type: ignore[union-attr]
        assert cut and all(d.outcome is Outcome.REJECTED and isinstance(d.error, Overloaded) for d in cut)  # type: ignore[union-attr]
        assert all("memory" in d.message for d in cut)  # type: ignore[union-attr]
    check(made, served(made, Failing(), place))
    run_until_idle(made.engine)


# --- what is reserved -------------------------------------------------------------------------------------------------
def shared(blocks: int, pages: int, **sizes: Any) -> Server:
    """A server whose blocks and pages live on one budget, which would hold so many of either."""
    page = server(4, 14, 3, "bags", True, "fcfs").table._pages.page_bytes
    return build_server(
        base_model(), lambda adapter_loader: FolderSource(folder(), adapter_loader), op="bags", pack=True, policy="fcfs",
        sizes=Sizes(kv_tokens=160, page=4, memory=blocks * BLOCK + pages * page, **sizes), options=EngineOptions(max_running=3, step_tokens=16),
    )  # fmt: skip


BLOCK = 4 * 2 * 2 * 2 * 8 * 4  #: bytes of four tokens: keys and values of two layers, two heads of eight, fp32


def test_what_can_never_fit_beside_its_adapter_is_refused_at_once() -> None:
    made = shared(20, 2)
    assert made.pool.units["kv"].bytes == BLOCK
    digest, left = made.cache.resolve("nine").digest, 80  # "nine" has two pages
    with pytest.raises(
        OptionError, match=rf"9 tokens and max_tokens is {left - 8}: {left + 1} together, but a request may have {left} beside"
    ):
        made.engine.submit(Request("long", PROMPT, Sampling(max_tokens=left - 8), digest), print)
    events: list[Event] = []
    made.cache.fetch(digest).result(60)
    made.engine.submit(Request("fits", PROMPT, Sampling(max_tokens=left - 9, ignore_eos=True), digest), events.append)
    run_until_idle(made.engine, 400)
    assert len(collect(events)[0]) == left - 9
    made.engine.submit(Request("base", PROMPT, Sampling(max_tokens=left - 8)), events.append)
    run_until_idle(made.engine, 400)
    with pytest.raises(OptionError, match="but a request may have 160; shorten"):
        made.engine.submit(Request("base", PROMPT, Sampling(max_tokens=152)), print)
    large = shared(0, 2)
    with pytest.raises(OptionError, match="but a request may have 0 beside its adapter"):
        large.engine.submit(Request("none", PROMPT, Sampling(max_tokens=1), large.cache.resolve("nine").digest), print)


def test_an_adapter_larger_than_its_header_said_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made = shared(20, 2)
    digest = made.cache.resolve("nine").digest
    said = dataclasses.replace(made.cache.known(digest), pages=0)
    monkeypatch.setitem(made.cache._known, digest, said)
    events: list[Event] = []
    made.engine.submit(Request("long", PROMPT, Sampling(max_tokens=150), digest), events.append)
    for _ in range(400):
        made.engine.step()
        time.sleep(0.001)
        if events:
            break
    done = collect(events)[1]
    assert done is not None and done.outcome is Outcome.REJECTED and "beside its adapter" in done.message


def test_copies_of_decoding_rows_are_told_and_bounded() -> None:
    for tokens, some in ((None, True), (3 * 64, True), (3 * 64 - 1, False), (0, False)):
        made = shared(40, 1, row_tokens=tokens)
        events: list[Event] = []
        made.engine.submit(Request("r", PROMPT, Sampling(max_tokens=5)), events.append)
        run_until_idle(made.engine)
        check_greedy(Request("r", PROMPT), collect(events)[0], ())
        held = made.engine.stats().copies_bytes
        assert held == (3 * 64 * BLOCK // 4 if some else 0)
    with pytest.raises(OptionError, match="row_tokens = -1"):
        Sizes(row_tokens=-1)
