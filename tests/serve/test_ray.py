"""Two real replicas behind Ray Serve: an adapter's requests meet at one of them, and answers are those of a single server."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'rankwise[ray]'")

import httpx

import rankwise as rw
from rankwise.serve.ray_app import affinity

pytestmark = pytest.mark.soak  # Ray takes half a minute and a gigabyte to start


def test_requests_of_one_adapter_or_mix_have_one_key() -> None:
    assert affinity(b'{"model": "a", "prompt": "x"}') == "a"
    assert affinity(b'{"adapters": [{"name": "b", "weight": 1}, {"name": "a", "weight": 2}]}') == "a+b"
    assert affinity(b"not json") == affinity(b"[1]") == affinity(b"") == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rankwise.assets import load_base

    root = tmp_path_factory.mktemp("adapters")
    for i in range(6):
        model, _ = load_base()
        adapter = rw.attach(model, {"r": 4})
        from tests.models import move

        move(adapter, std=0.3, seed=i)
        adapter.save(root / f"a{i}")
    return root


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    import ray
    from ray import serve

    from rankwise.serve.ray_app import application

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"model": "base", "adapters": str(folder), "replicas": 2, "kv-tokens": 1024}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(url: str, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "def main(", "max_tokens": 6, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def test_two_replicas_share_the_adapters_and_each_keeps_its_own(folder: Path) -> None:
    with running(folder) as url:
        seen: dict[str, set[str]] = {}
        answers: dict[str, set[str]] = {}
        for _ in range(4):
            for i in range(6):
                reply = ask(url, f"a{i}")
                assert reply.status_code == 200, reply.text
                seen.setdefault(f"a{i}", set()).add(reply.headers["x-rankwise-replica"])
                answers.setdefault(f"a{i}", set()).add(reply.json()["choices"][0]["text"])
        assert all(len(urls) == 1 for urls in seen.values()), seen
        assert len({u for urls in seen.values() for u in urls}) == 2, "one replica has got every adapter"
        assert all(len(texts) == 1 for texts in answers.values()) and len({t for texts in answers.values() for t in texts}) > 1
        replica = next(iter(seen["a0"]))
        assert ask(replica, "a0").json()["choices"][0]["text"] == next(iter(answers["a0"]))
        missing = ask(url, "nobody")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={"model": "a1", "prompt": "x", "max_tokens": 3, "stream": True}, timeout=60
        ) as r:
            lines = [line for line in r.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) >= 3
