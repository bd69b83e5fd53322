"""The bytes on the wire, and the mailbox between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rankwise.serve.http.errors import EngineFault
from rankwise.serve.http.stream import ClientGone, EventQueue, Generation, SlowReader
from rankwise.serve.types import Event, Finished, Outcome, Overloaded, Request, Token
from tests.serve.http.live import Live, base, greedy

HTTP = httpx.Client(timeout=30)


def masked(raw: bytes) -> list[bytes]:
    raw = re.sub(rb'"id":"(cmpl|chatcmpl)-[0-9a-f]{32}"', rb'"id":"\1-X"', raw)
    return re.sub(rb'"created":\d+', b'"created":0', raw).split(b"\n\n")


def test_golden_bytes_of_a_completion(live: Live) -> None:
    model, tokenizer = base()
    ids = tokenizer("import")["input_ids"]
    one, two = (tokenizer.decode([t]).encode() for t in greedy(model, ids, 2))
    body = {
        "model": "base",
        "prompt": "import",
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    r = HTTP.post(live.url + "/v1/completions", json=body)
    assert r.headers["content-type"] == "text/event-stream; charset=utf-8"
    head = b'data: {"id":"cmpl-X","object":"text_completion","created":0,"model":"base","system_fingerprint":"rankwise-base","choices":'
    assert masked(r.content) == [
        head + b'[{"index":0,"text":"' + one + b'","logprobs":null,"finish_reason":null}],"usage":null}',
        head + b'[{"index":0,"text":"' + two + b'","logprobs":null,"finish_reason":null}],"usage":null}',
        head + b'[{"index":0,"text":"","logprobs":null,"finish_reason":"length"}],"usage":null}',
        head + b'[],"usage":{"prompt_tokens":%d,"completion_tokens":2,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":0}}}' % (len(ids), len(ids) + 2),
        b"data: [DONE]",
        b"",
    ]  # fmt: skip


def test_golden_bytes_of_a_chat(live: Live) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0, "stream": True}
    whole = HTTP.post(live.url + "/v1/chat/completions", json=body | {"stream": False}).json()
    text = whole["choices"][0]["message"]["content"].replace("\n", "\\n").encode()
    head = b'data: {"id":"chatcmpl-X","object":"chat.completion.chunk","created":0,"model":"base","system_fingerprint":"rankwise-base","choices":'
    assert masked(HTTP.post(live.url + "/v1/chat/completions", json=body).content) == [
        head + b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}',
        head + b'[{"index":0,"delta":{"content":"' + text + b'"},"logprobs":null,"finish_reason":null}]}',
        head + b'[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}',
        b"data: [DONE]",
        b"",
    ]


class Recorded:
    """An engine's face that keeps what was asked of it; events are sent by the test, from a thread of its own."""

    def __init__(self, refuse: str = "", healthy: bool = True):
        self.calls: dict[str, Callable[[Event], None]] = {}
        self.cancelled: list[str] = []
        self.refuse, self.healthy = refuse, healthy

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        if request.id == self.refuse:
            raise Overloaded("full")
        self.calls[request.id] = on_event

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def stats(self) -> Any:
        return self


def requests(*names: str) -> list[Request]:
    return [Request(n, (1,)) for n in names]


def begun(engine: Recorded, *names: str, buffer: int = 100, quiet: float = 5.0) -> Generation:
    return Generation(engine, requests(*names), buffer=buffer, quiet=quiet)  # type: ignore[arg-type]


def in_thread(fn: Callable[[], Any]) -> None:
    t = threading.Thread(target=fn)
    t.start()
    t.join()


def test_all_events_arrive_in_order_from_many_threads() -> None:
    async def run() -> list[int]:
        box, got = EventQueue(asyncio.get_running_loop(), 10**6), []
        threads = [threading.Thread(target=lambda k=k: [box.post(Token(str(k), i, i)) for i in range(2000)]) for k in range(4)]
        for t in threads:
            t.start()
        while len(got) < 8000:
            got += await box.take()
        for k in range(4):
            assert [e.id for e in got if e.request == str(k)] == list(range(2000))  # type: ignore[union-attr]
        return []

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_full_mailbox_cancels_and_says_why() -> None:
    async def run() -> None:
        engine = Recorded()
        with begun(engine, "a", buffer=8) as g:
            in_thread(lambda: [engine.calls["a"](Token("a", i, i)) for i in range(9)])
            assert engine.cancelled == ["a"]
            with pytest.raises(SlowReader, match="More than 8 tokens"):
                async for _ in g.events():
                    pass

    asyncio.run(run())


def test_submitting_is_all_or_nothing() -> None:
    async def run() -> None:
        engine = Recorded(refuse="c")
        with pytest.raises(Overloaded), begun(engine, "a", "b", "c", "d"):
            pass
        assert sorted(engine.cancelled) == ["a", "b"]
        assert set(engine.calls) == {"a", "b"}

    asyncio.run(run())


def test_a_client_that_leaves_wakes_the_reader_and_cancels_all() -> None:
    async def run() -> None:
        engine, gone = Recorded(), asyncio.Event()

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        with begun(engine, "a", "b") as g:
            g.watch(receive)  # type: ignore[arg-type]
            asyncio.get_running_loop().call_later(0.05, gone.set)
            with pytest.raises(ClientGone):
                async for _ in g.events():
                    pass
        assert set(engine.cancelled) == {"a", "b"}

    asyncio.run(run())


def test_an_engine_that_died_without_a_word_is_noticed() -> None:
    async def run() -> None:
        engine = Recorded(healthy=False)
        with pytest.raises(EngineFault), begun(engine, "a", quiet=0.05) as g:
            async for _ in g.events():
                pass
        alive = Recorded()
        with begun(alive, "a", quiet=0.02) as g:
            asyncio.get_running_loop().call_later(0.2, lambda: alive.calls["a"](Finished("a", Outcome.STOP, 1, 0)))
            assert [e.request async for e in g.events()] == ["a"], "slow is not dead"
        assert alive.cancelled == []

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_was_ended_is_not_heard_again() -> None:
    async def run() -> None:
        engine = Recorded()
        with begun(engine, "a", "b") as g:
            engine.calls["a"](Token("a", 1, 0))
            heard = []
            async for e in g.events():
                heard.append(e)
                if len(heard) == 1:
                    g.end("a")
                    engine.calls["a"](Token("a", 2, 1))
                    engine.calls["b"](Finished("b", Outcome.LENGTH, 1, 0))
            assert [type(e).__name__ + e.request for e in heard] == ["Tokena", "Finishedb"]

    asyncio.run(run())
