"""From before the start to after the end: ready, metrics, draining, and what a terminate signal leaves."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rankwise.serve.http.metrics import OTHER, Labels, Metrics
from rankwise.serve.http.service import Phase
from tests.serve.http.live import Live, serving, wait

HTTP = httpx.Client(timeout=30)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values without the model's …) → value, of every sample."""
    return {
        (s.name, *(f"{k}={v}" for k, v in sorted(s.labels.items()) if k not in ("model", "le"))): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
        if not s.name.endswith(("_bucket", "_created"))
    }


def test_ready_before_and_after_the_start_and_at_the_end(tmp_path: Path) -> None:
    live = Live(tmp_path)
    hold = threading.Event()
    plain = live.engine.start
    live.engine.start = lambda: (hold.wait(20), plain())[1]  # type: ignore[method-assign]
    live.start(ready=False)
    try:
        get = lambda p: HTTP.get(live.url + p)
        assert (get("/ready").status_code, get("/ready").json()) == (503, {"status": "starting"})
        assert get("/health").status_code == get("/version").status_code == 200
        early = HTTP.post(live.url + "/v1/completions", json={"model": "base", "prompt": "a"})
        assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
        assert early.headers["retry-after"]
        hold.set()
        wait(lambda: get("/ready").status_code == 200)
        live.engine.error = "kernel fault /secret"
        assert get("/health").status_code == get("/ready").status_code == 503
        assert "secret" not in get("/health").text + get("/ready").text
        live.engine.error = ""
        assert get("/health").status_code == 200
        live.app.state.service.phase = Phase.DRAINING
        assert get("/ready").json() == {"status": "draining"}
    finally:
        live.stop()
    assert live.engine._thread is not None
    assert not live.engine._thread.is_alive()


def test_an_engine_that_cannot_start_is_unhealthy(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.engine.start = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    live.start(ready=False)
    try:
        wait(lambda: HTTP.get(live.url + "/health").status_code == 503)
        assert HTTP.get(live.url + "/ready").json() == {"status": "failed"}
    finally:
        live.stop()


def test_a_terminate_signal_lets_running_requests_finish(tmp_path: Path) -> None:
    with serving(tmp_path) as live:
        live.slow.seconds = 0.01
        with openai.OpenAI(api_key="none", base_url=live.url + "/v1", max_retries=0) as client:
            stream = client.completions.create(
                model="base", prompt="a", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
            )
            first = next(iter(stream))
            live.server.handle_exit(15, None)
            rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert first.choices[0].text is not None
        live.thread.join(10)
        assert not live.thread.is_alive()


def test_the_drain_time_ends_what_is_left_with_an_error_and_not_a_cut(tmp_path: Path) -> None:
    with serving(tmp_path, drain_seconds=0.4) as live:
        live.slow.seconds = 0.05
        with openai.OpenAI(api_key="none", base_url=live.url + "/v1", max_retries=0) as client:
            stream = client.completions.create(
                model="base", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            start = time.monotonic()
            live.server.handle_exit(15, None)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        live.thread.join(10)
        assert not live.thread.is_alive()
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.soak)])
def test_no_shutdown_hangs(tmp_path: Path, count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        with serving(tmp_path, drain_seconds=rng.choice((0.1, 5.0))) as live:
            live.slow.seconds = 0.01
            ask = {"model": "base", "prompt": "a", "max_tokens": 60, "ignore_eos": True}
            got: list[int] = []
            go = lambda: got.append(httpx.post(live.url + "/v1/completions", json=ask, timeout=30).status_code)  # noqa: B023
            crowd = [threading.Thread(target=go) for _ in range(3)]
            for t in crowd:
                t.start()
            wait(lambda: live.engine.stats().running == 3)
            time.sleep(rng.random() * 0.3)
            live.server.handle_exit(15, None)
            for t in crowd:
                t.join(30)
            assert len(got) == 3
            assert set(got) <= {200, 503}
        assert not live.engine.stats().running


def test_metrics_say_what_was_served(client: Any, live: Live) -> None:
    wait(live.empty)
    before = samples(HTTP.get(live.url + "/metrics").text)
    used = [
        client.completions.create(model="ada", prompt="one two", max_tokens=5, n=2, extra_body={"ignore_eos": True}).usage,
        client.completions.create(model="base", prompt="one two", max_tokens=3, extra_body={"ignore_eos": True}).usage,
    ]
    client.completions.create(
        model="base", prompt="x", max_tokens=2, extra_body={"adapters": [{"name": "ada"}, {"name": "bob"}], "ignore_eos": True}
    )
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="eve", prompt="x")
    live.slow.seconds = 0.02
    stream = client.completions.create(model="ada", prompt="a", max_tokens=300, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    live.slow.seconds = 0.0
    cancelled = ("rankwise_requests_total", "adapter=ada", "outcome=cancelled")
    now: dict[tuple[str, ...], float] = {}

    def counted() -> bool:
        nonlocal now
        now = samples(HTTP.get(live.url + "/metrics").text)
        return now.get(cancelled, 0) > before.get(cancelled, 0)

    wait(counted)
    wait(live.empty)
    gained = lambda *key: now.get(key, 0.0) - before.get(key, 0.0)
    assert gained("rankwise_requests_total", "adapter=ada", "outcome=length") == 2
    assert gained("rankwise_requests_total", "adapter=", "outcome=length") == 1
    assert gained("rankwise_requests_total", "adapter=mix", "outcome=length") == 1
    assert gained(*cancelled) == 1
    assert gained("rankwise_generated_tokens_total", "adapter=") == used[1].completion_tokens == 3
    assert gained("rankwise_prompt_tokens_total", "adapter=") == used[1].prompt_tokens
    assert gained("rankwise_time_to_first_token_seconds_count") == 5
    assert gained("rankwise_queue_seconds_count") == 5
    assert gained("rankwise_steps_total") > 0
    assert now[("rankwise_healthy",)] == 1
    loads = [v for k, v in now.items() if k[0] == "rankwise_adapter_loads_total" and "outcome=ok" in k]
    timed = [v for k, v in now.items() if k[0] == "rankwise_adapter_load_seconds_count"]
    assert sum(loads) == sum(timed) >= 2, "ada and the mix at the least"
    assert {k[1] for k in now if k[0] == "rankwise_step_seconds_count"} == {"kind=decode", "kind=mixed"}
    now = samples(HTTP.get(live.url + "/metrics").text)
    assert ("rankwise_adapter_resident", "adapter=ada", "pinned=false", "tier=host") in now
    listed = {a["id"]: a for a in HTTP.get(live.url + "/v1/adapters").json()["data"]}
    assert listed["ada"]["requests"] >= 3
    assert listed["ada"]["digest"] == live.cache.resolve("ada").digest


def test_aliases_for_gateways_only_where_asked(live: Live) -> None:
    assert "vllm:" not in HTTP.get(live.url + "/metrics").text
    with serving(live.root, aliases=True) as other:
        names = {k[0] for k in samples(HTTP.get(other.url + "/metrics").text)}
    assert {
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:lora_requests_info",
    } <= names


def test_labels_are_bounded_and_go_to_the_busiest() -> None:
    dropped: list[str] = []
    labels = Labels(3, dropped.append)
    for i in range(5000):
        assert labels.of(f"a{i % 1000}") in {OTHER, *labels._shown}
    assert len(labels._shown) == 3
    assert len(labels._counts) <= 16 * 3 + 1
    assert [labels.of("hot") for _ in range(50)][-1] == "hot"
    assert dropped


def test_series_of_a_dropped_label_end() -> None:
    metrics = Metrics("m", labels=2)
    for name in ("a", "b"):
        metrics.served(name, "stop", 1, 1)
    for _ in range(9):
        metrics.served("c", "stop", 1, 1)
    metrics.served("", "stop", 5, 7)
    now = samples(metrics.page().decode())
    adapters = {k[1] for k in now if k[0] == "rankwise_requests_total"}
    assert "adapter=c" in adapters
    assert len(adapters - {"adapter=", "adapter=other"}) == 2
    assert now[("rankwise_generated_tokens_total", "adapter=")] == 7


def test_the_observer_takes_anything_and_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics("m")
    metrics.observe("step_seconds", 0.1, {"kind": "decode"})
    metrics.observe("some_total", 2.0, {})
    metrics.observe("requests_total", 1.0, {})
    metrics.observe("no such name", 1.0, {})
    metrics.observe("step_seconds", 0.1, {"sort": "decode"})
    assert len(caplog.records) == 3
    now = samples(metrics.page().decode())
    assert now[("rankwise_some_total",)] == 2
    assert now[("rankwise_step_seconds_count", "kind=decode")] == 1
