"""A server process that is killed while adapters are loaded and unloaded finds them again at its next start."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.http.live import wait


class Process:
    """``rankwise serve`` as a process of its own."""

    def __init__(self, root: Path, registry: Path):
        args = [sys.executable, "-m", "rankwise.cli.main", "serve", "--model", "base", "--adapters", str(root), "--port", "0"]
        self.child = subprocess.Popen(
            [*args, "--registry", str(registry), "--kv-tokens", "1024"], stdout=subprocess.PIPE, text=True
        )
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        self.http = httpx.Client(base_url=found.group(), timeout=60)
        wait(lambda: self.http.get("/ready").status_code == 200, 60)

    def names(self) -> set[str]:
        return {m["id"] for m in self.http.get("/v1/models").json()["data"]}

    def end(self, how: int) -> int:
        self.child.send_signal(how)
        code = self.child.wait(30)
        self.http.close()
        return code


@pytest.fixture
def started() -> Iterator[list[Process]]:
    every: list[Process] = []
    yield every
    for p in every:
        if p.child.poll() is None:
            p.end(signal.SIGKILL)


def _one_life(p: Process, known: set[str], rng: random.Random, seconds: float) -> list[set[str]]:
    """Load and unload until killed in the middle; the states that may be found afterwards."""
    end = time.monotonic() + seconds
    while True:
        name = f"n{rng.randrange(4)}"
        after = known ^ {name}
        path, body = ("/v1/unload_lora_adapter", {}) if name in known else ("/v1/load_lora_adapter", {"lora_path": "deep/x"})
        request = p.http.build_request("POST", path, json={"lora_name": name, **body})
        if time.monotonic() > end:
            timer = subprocess.Popen(["/bin/sh", "-c", f"sleep {rng.random() * 0.02}; kill -9 {p.child.pid}"])
            try:
                p.http.send(request)
                known = after
            except httpx.TransportError:
                return [known, after]
            finally:
                timer.wait()
                p.child.wait(30)
            return [known]
        assert p.http.send(request).status_code == 200
        known = after


def _kill_and_look(root: Path, registry: Path, started: list[Process], kills: int, seconds: float) -> None:
    rng = random.Random(7)
    p = Process(root, registry)
    started.append(p)
    known = p.names()
    assert known == {"base", "s0", "s1"}
    # whatever the churn comes to, these two are never as the folder alone would have it
    assert p.http.post("/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": "deep/y"}).status_code == 200
    assert p.http.post("/v1/unload_lora_adapter", json={"lora_name": "s1"}).status_code == 200
    known = {"base", "s0", "kept"}
    for _ in range(kills):
        possible = _one_life(p, known, rng, seconds)
        p = Process(root, registry)
        started.append(p)
        known = p.names()
        assert known in possible
        for name in sorted(known - {"base"}):
            r = p.http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
            assert r.status_code == 200, r.text
    assert p.end(signal.SIGTERM) == 0


def test_a_killed_server_finds_its_adapters_again(root: Path, tmp_path: Path, started: list[Process]) -> None:
    _kill_and_look(root, tmp_path / "registry.json", started, kills=1, seconds=0.5)


@pytest.mark.soak
def test_twenty_kills(root: Path, tmp_path: Path, started: list[Process]) -> None:
    _kill_and_look(root, tmp_path / "registry.json", started, kills=20, seconds=1.0)
