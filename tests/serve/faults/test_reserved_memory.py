"""Requests whose blocks and adapter's pages share one budget: what can never fit is refused at once, with the figure that would."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from rankwise.errors import OptionError
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.server import Server, Sizes, build_server
from rankwise.serve.simulate.drive import collect, run_until_idle
from rankwise.serve.types import Event, Outcome, Request, Sampling
from tests.serve.rig import base_model, check_greedy, folder, server

PROMPT = (5, 9, 11, 40, 3, 8, 22, 17, 30)
BLOCK = 4 * 2 * 2 * 2 * 8 * 4  #: bytes of four tokens: keys and values of two layers, two heads of eight, fp32


def shared(blocks: int, pages: int, **sizes: Any) -> Server:
    """A server whose blocks and pages live on one budget, which would hold so many of either."""
    page = server(4, 14, 3, "bags", True, "fcfs").table._pages.page_bytes
    return build_server(
        base_model(), lambda intake: FolderSource(folder(), intake), op="bags", pack=True, policy="fcfs",
        sizes=Sizes(kv_tokens=160, page=4, memory=blocks * BLOCK + pages * page, **sizes), options=EngineOptions(max_num_seqs=3, max_num_batched_tokens=16),
    )  # fmt: skip


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
        made = shared(40, 1, decode_cache_tokens=tokens)
        events: list[Event] = []
        made.engine.submit(Request("r", PROMPT, Sampling(max_tokens=5)), events.append)
        run_until_idle(made.engine)
        check_greedy(Request("r", PROMPT), collect(events)[0], ())
        held = made.engine.stats().copies_bytes
        assert held == (3 * 64 * BLOCK // 4 if some else 0)
    with pytest.raises(OptionError, match="decode_cache_tokens = -1"):
        Sizes(decode_cache_tokens=-1)
