"""What is refused, with which status and words, and that refusing costs nothing."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tests.serve.http.live import Live, serving, wait

GOOD = {"model": "base", "prompt": "a", "max_tokens": 1}
HTTP = httpx.Client(timeout=30)


def post(live: Live, body: Any, path: str = "/v1/completions", **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(live.url + path, content=content, **more)


def refused(r: httpx.Response, status: int, code: str | None = None, words: str = "") -> None:
    error = r.json()["error"]
    assert r.status_code == status, r.text
    assert set(error) == {"message", "type", "param", "code"}
    assert code in (None, error["code"]), r.text
    assert words in error["message"], r.text
    assert "Traceback" not in r.text


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"model": "base", "prompt": "\xe9"}', b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 40 + b"1" + b"}" * 40],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_json_is_a_400(live: Live, raw: bytes) -> None:
    refused(post(live, raw), 400, "invalid_json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 17}, "from 1 to 16"), ({"n": 0}, "from 1 to 16"), ({"n": True}, "n = True"), ({"n": 10**30}, "n = "),
        ({"stop": ["x"] * 17}, "16"), ({"stop": "x" * 65}, "64"), ({"stop": ""}, "from 1 to 64"), ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": "5"}, "max_tokens = '5'"), ({"max_tokens": 512}, "514 in all"), ({"temperature": -1}, "0 (greedy)"),
        ({"top_p": 0}, "top_p"), ({"logprobs": 21}, "from 0 to 20"), ({"seed": 2**63}, "64 bits"), ({"prompt": []}, "1 to 64"),
        ({"prompt": [4096]}, "0 to 4095"), ({"prompt": ["a"] * 65}, "65 prompts"), ({"prompt": [[]]}, "no token"),
        ({"prompt": [1, "a"]}, "prompt"), ({"prompt": "word " * 1000}, "context is 512"), ({"prompt": "a" * 40_000}, "40000 characters"),
        ({"logit_bias": {"x": 1}}, "token ids"), ({"logit_bias": {"5000": 1}}, "4095"), ({"logit_bias": {"5": 101}}, "-100 to 100"),
        ({"best_of": 3}, "best_of"), ({"suffix": "x"}, "suffix"), ({"min_p": 0.1}, "min_p"), ({"echo": True, "logprobs": 1}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream: true"), ({"adapters": []}, "from 1 to 16"),
        ({"adapters": [{"name": "ada"}, {"name": "ada"}]}, "twice"), ({"adapters": [{"name": "ada", "weight": "1"}]}, "weight"),
        ({"model": "ada", "adapters": [{"name": "bob"}]}, "base's name"), ({"model": None}, "model"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_a_400_with_its_numbers(live: Live, change: dict[str, Any], words: str) -> None:
    refused(post(live, GOOD | change), 400, None, words)


def test_the_other_side_of_each_limit_is_served(live: Live) -> None:
    for change in (
        {"n": 16}, {"stop": ["#" * 64] * 16}, {"max_tokens": 510}, {"logprobs": 20}, {"prompt": ["a"] * 64}, {"prompt": [4095]},
        {"logit_bias": {"4095": -100}}, {"suffix": None, "min_p": 0, "best_of": 1, "user": "me"},
    ):  # fmt: skip
        r = post(live, GOOD | change | ({"stop": ["the", "a", "e", "\n"]} if change == {"max_tokens": 510} else {}))
        assert r.status_code == 200, (change, r.text)
    wait(live.empty)


def test_chats_are_checked_too(live: Live) -> None:
    good = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    for change, words in (
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "logprobs: true"),
        ({"max_completion_tokens": 2}, "differ"),
    ):
        refused(post(live, good | change, "/v1/chat/completions"), 400, None, words)
    assert post(live, good | {"tools": [], "response_format": {"type": "text"}}, "/v1/chat/completions").status_code == 200


def test_unknown_fields_are_listed_or_refused(live: Live) -> None:
    body = GOOD | {"frobnicate": 1, "stream_options": None, "adapters": [{"name": "ada", "wieght": 2}]}
    r = post(live, body)
    assert r.status_code == 200
    assert r.headers["x-rankwise-ignored"] == "frobnicate, adapters.0.wieght"
    assert "x-rankwise-ignored" not in post(live, GOOD).headers
    odd = ["", " a", "b\r\nx-evil: 1", "c\x00\x7f", "\u65e5\u672c", "%d", *(f"{i:03d}," + " " * 20 for i in range(40))]
    for names in ([n] for n in odd), [odd]:
        for some in names:
            r = post(live, GOOD | dict.fromkeys(some, 1))
            assert r.status_code == 200 and "x-evil" not in r.headers, some
    assert r.headers["x-rankwise-ignored"].startswith('"", %20a, b%0D%0Ax-evil:%201, c%00%7F, %E6%97%A5%E6%9C%AC, %25d, 000')
    with serving(live.root, strict=True) as strict:
        refused(post(strict, body), 400, "unknown_field", "frobnicate")
        assert post(strict, GOOD).status_code == 200


def test_a_huge_body_is_refused_before_it_has_come(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {50 << 20}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=10) as s:
        s.sendall(head)
        start = time.monotonic()
        answer = s.recv(65536)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert time.monotonic() - start < 5
    # without a declared length: chunks, refused once past the limit although the client would go on for 50 MB
    sent = 0

    def chunks() -> Any:
        nonlocal sent
        while sent < 50 << 20:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    refused(HTTP.post(live.url + "/v1/completions", content=chunks()), 413, "body_too_large", "1048576")
    assert sent < 20 << 20
    refused(post(live, b"x" * (50 << 20)), 413, "body_too_large")
    at_limit = json.dumps(GOOD).encode().ljust(1 << 20)
    assert post(live, at_limit).status_code == 200
    refused(post(live, at_limit + b" "), 413)


def test_a_body_that_trickles_is_given_up(live: Live) -> None:
    with serving(live.root, body_seconds=0.3) as hasty:
        host, port = hasty.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in s.recv(65536).split(b"\r\n")[0]


def test_headers_that_trickle_or_swell_are_given_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.serve.http.server.HEADER_SECONDS", 0.3)
    host, port = live.url.removeprefix("http://").split(":")
    for start in (b"GET /health HTTP/1.1\r\nHost: 127", b""):
        with socket.create_connection((host, int(port)), timeout=10) as s:
            s.sendall(start)
            assert s.recv(1) == b"", "closed"
    with socket.create_connection((host, int(port)), timeout=10) as s:  # a second request on a connection that was served
        s.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += s.recv(65536)
        assert b" 200 " in answer
        s.sendall(b"GET /health HTTP/1.1\r\nHo")
        assert s.recv(1) == b"", "closed"
    r = HTTP.get(live.url + "/health", headers={"x-big": "x" * 20_000})
    refused(r, 431, "headers_too_large")


def test_slow_senders_do_not_slow_the_others(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    ask = GOOD | {"max_tokens": 20, "temperature": 0}

    def steps() -> int:
        before = live.engine.steps
        assert post(live, ask).status_code == 200
        return live.engine.steps - before

    alone = steps()
    slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(200)]
    try:
        for i, s in enumerate(slow):
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n\r\n{"[: 30 + i])
        assert steps() <= alone + 1, "nothing of theirs entered the engine"
        assert HTTP.get(live.url + "/ready").status_code == 200
    finally:
        for s in slow:
            s.close()


def test_a_full_queue_is_a_429_with_a_time(live: Live) -> None:
    with serving(live.root, options={"max_waiting": 1, "max_num_seqs": 1}) as small:
        small.slow.seconds = 0.05
        r = post(small, GOOD | {"n": 3})
        refused(r, 429, "overloaded")
        assert int(r.headers["retry-after"]) >= 1
        refused(post(small, GOOD | {"n": 3, "stream": True}), 429)
        wait(small.empty)
        small.slow.seconds = 0.0
        assert post(small, GOOD | {"n": 2}).status_code == 200, "what was refused holds no place"


@pytest.mark.parametrize("bounds", [{"stall_seconds": 0.5}, {"buffer": 64}], ids=str)
def test_a_reader_who_stops_is_bounded(live: Live, bounds: dict[str, Any]) -> None:
    """By the time that one write may hang, and apart from that by the tokens that are kept for it."""
    with serving(live.root, **{"stall_seconds": 60.0, "drain_seconds": 0.5, **bounds}) as tight:
        tight.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        host, port = tight.url.removeprefix("http://").split(":")
        ask = {"model": "base", "prompt": "a", "max_tokens": 500, "n": 3, "logprobs": 20, "stream": True, "ignore_eos": True}
        body = json.dumps(ask).encode()
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect((host, int(port)))
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait(lambda: tight.engine.stats().running == 3)
            wait(tight.empty, 30)
            assert tight.engine.counters["requests_cancelled"] == 3, "the engine was not let to make tokens for nobody"


def test_a_deadline_that_cannot_be_kept_is_a_504(live: Live) -> None:
    with serving(live.root, options={"max_num_seqs": 1}) as small:
        small.slow.seconds = 0.05
        first = threading.Thread(target=lambda: post(small, GOOD | {"max_tokens": 30, "ignore_eos": True}))
        first.start()
        wait(lambda: small.engine.stats().running == 1)
        refused(post(small, GOOD | {"deadline": 0.2}), 504, "deadline_exceeded")
        refused(post(small, GOOD | {"deadline": 0.2, "stream": True}), 504, "deadline_exceeded")
        refused(post(small, GOOD | {"deadline": 0}), 400)
        assert post(small, GOOD | {"deadline": 60}).status_code == 200
        first.join()
        wait(small.empty)


@pytest.mark.parametrize("count", [300, pytest.param(100_000, marks=pytest.mark.soak)])
def test_fuzzed_bodies_never_break_anything(live: Live, count: int) -> None:
    rng = random.Random(5)
    values: list[Any] = [None, True, -1, 0, 3, 1e300, "", "base", [], {}, [[]], ["a"], {"a": {"b": []}}, "\ud7ff", 2**70, [1, None]]
    fields = [
        "model",
        "prompt",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "logprobs",
        "logit_bias",
        "adapters",
        "stream_options",
        "echo",
        "top_k",
    ]
    statuses = set()
    with httpx.Client(base_url=live.url, timeout=30) as c:
        for _ in range(count):
            body = dict(GOOD) | {rng.choice(fields): rng.choice(values) for _ in range(rng.randint(1, 3))}
            raw = bytearray(json.dumps(body).encode())
            if rng.random() < 0.3:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            statuses.add(c.post("/v1/completions", content=bytes(raw)).status_code)
    assert statuses <= {200, 400, 404}
    assert {200, 400} <= statuses
    wait(live.empty)


def test_unknown_routes_and_methods(live: Live) -> None:
    refused(HTTP.get(live.url + "/v1/nothing"), 404, "not_found")
    refused(HTTP.get(live.url + "/v1/completions"), 405, "method_not_allowed")
