"""Under fire: a crowd of which a third walks away, while adapters are loaded, replaced and removed; and a killed process.

Every answer that arrives is the merged model's, token for token; what left is gone; nothing is held at the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.serve.http.live import Live, base, merged, serving, wait, write_adapter

PROMPTS = ["def add(a, b):\n", "import", "The quick brown fox", "class Node:\n    def __init__(self", "é日本🙂"]
LONGEST = 12
STABLE, CHURNED, FOLDERS = ("s0", "s1"), ("c0", "c1"), ("s0", "s1", "deep/x", "deep/y")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fire")
    for seed, name in enumerate(FOLDERS, 20):
        write_adapter(root / name, seed, rank=2 + 3 * (seed % 4))
    return root


@pytest.fixture(scope="module")
def truth(root: Path) -> dict[tuple[str, str], list[int]]:
    """(folder or "", prompt) → tokens of the merged model alone, whatever ends a text."""
    return {(f, p): _greedy(merged((root / f, 1.0)) if f else base()[0], p) for f in ("", *FOLDERS) for p in PROMPTS}


@torch.no_grad()
def _greedy(model: Any, prompt: str) -> list[int]:
    ids, new, past = torch.tensor([base()[1](prompt)["input_ids"]]), [], None
    while len(new) < LONGEST:
        out = model(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        new.append(int(ids))
    return new


class Crowd:
    """Clients of one server, each with a fate drawn in advance."""

    def __init__(self, live: Live, truth: dict[tuple[str, str], list[int]], seed: int):
        self.live, self.truth, self.rng = live, truth, random.Random(seed)
        self.folder_of: dict[str, str] = {"rankwise-base": ""}
        self.seen: Counter[str] = Counter()
        self.wrong: list[Any] = []

    async def run(self, clients: int, at_once: int) -> None:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.live.url, timeout=120, limits=limits) as http:
            for name in (*STABLE, *CHURNED):
                await self._load(http, name, name if name in STABLE else "deep/x")
            fire = asyncio.create_task(self._churn(http))
            await asyncio.gather(*(self._client(http, gate) for _ in range(clients)))
            fire.cancel()
            await asyncio.gather(fire, return_exceptions=True)
            assert not fire.cancelled() or self.seen["reloads"] > 0

    async def _load(self, http: httpx.AsyncClient, name: str, folder: str) -> None:
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        r = await http.post("/v1/load_lora_adapter", json=body)
        assert r.status_code == 200, r.text
        self.folder_of["rankwise-" + r.json()["digest"][:16]] = folder

    async def _churn(self, http: httpx.AsyncClient) -> None:
        while True:
            name = self.rng.choice(CHURNED)
            if self.rng.random() < 0.4:
                r = await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
                assert r.status_code == 200, r.text
            await self._load(http, name, self.rng.choice(("deep/x", "deep/y")))
            self.seen["reloads"] += 1
            await asyncio.sleep(self.rng.random() * 0.02)

    async def _client(self, http: httpx.AsyncClient, gate: asyncio.Semaphore) -> None:
        rng = self.rng
        ask = {
            "model": rng.choice(("base", *STABLE, *CHURNED)), "prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(1, LONGEST),
            "n": rng.choice((1, 1, 1, 3)), "temperature": 0, "ignore_eos": True, "stream": rng.random() < 0.6,
        }  # fmt: skip
        leaves = rng.random() < 0.3
        patience = rng.choice((0.0, rng.random() * 0.02, rng.random() * 0.5)) if leaves else None
        async with gate:
            try:
                async with asyncio.timeout(patience):
                    await (self._streamed if ask["stream"] else self._whole)(http, ask)
            except TimeoutError:
                self.seen["left"] += 1
            else:
                self.seen["answered"] += 1

    async def _whole(self, http: httpx.AsyncClient, ask: dict[str, Any]) -> None:
        r = await http.post("/v1/completions", json=ask)
        if self._absent(r.status_code, r.text, ask):
            return
        made = r.json()
        for c in made["choices"]:
            self._check(ask, made["system_fingerprint"], c["text"], c["finish_reason"])

    async def _streamed(self, http: httpx.AsyncClient, ask: dict[str, Any]) -> None:
        async with http.stream("POST", "/v1/completions", json=ask) as r:
            if r.status_code != 200 and self._absent(r.status_code, (await r.aread()).decode(), ask):
                return
            events = [line.removeprefix("data: ") async for line in r.aiter_lines() if line]
        assert events[-1] == "[DONE]", events[-1:]
        texts, ends, who = Counter[int](), {}, ""
        parts: dict[int, str] = {}
        for e in map(json.loads, events[:-1]):
            assert "error" not in e, e
            who = e["system_fingerprint"]
            for c in e["choices"]:
                parts[c["index"]] = parts.get(c["index"], "") + c["text"]
                ends[c["index"]] = c["finish_reason"] or ends.get(c["index"])
        assert len(parts) == ask["n"], texts
        for i, text in parts.items():
            self._check(ask, who, text, ends[i])

    def _absent(self, status: int, text: str, ask: dict[str, Any]) -> bool:
        """Whether a churned name was away just then: the one other answer there may be."""
        if status == 404 and ask["model"] in CHURNED and "model_not_found" in text:
            self.seen["absent"] += 1
            return True
        assert status == 200, (status, text, ask)
        return False

    def _check(self, ask: dict[str, Any], who: str, text: str, end: str | None) -> None:
        folder = self.folder_of.get(who)
        allowed = {"base": {""}, "s0": {"s0"}, "s1": {"s1"}}.get(ask["model"], {"deep/x", "deep/y"})
        tokens = [] if folder is None else self.truth[folder, ask["prompt"]][: ask["max_tokens"]]
        if folder not in allowed or text != base()[1].decode(tokens, skip_special_tokens=True) or end != "length":
            self.wrong.append((ask, who, folder, text, end))
        self.seen["checked"] += 1


def burn(live: Live, truth: Any, clients: int, at_once: int, seed: int) -> Counter[str]:
    crowd = Crowd(live, truth, seed)
    asyncio.run(crowd.run(clients, at_once))
    assert not crowd.wrong, crowd.wrong[:3]
    assert crowd.seen["left"] + crowd.seen["answered"] == clients, "nobody was lost"
    wait(live.empty, 30)
    assert all(s.use.pins == 0 for s in live.table.slots.values())
    assert live.engine.counters["faults"] == live.engine.counters["listener_faults"] == 0
    return crowd.seen


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_crowd_that_partly_leaves_while_adapters_change(root: Path, truth: Any) -> None:
    with serving(root) as live:
        seen = burn(live, truth, clients=60, at_once=60, seed=1)
    assert seen["left"] > 5
    assert seen["checked"] > 30
    assert seen["reloads"] >= 1


@pytest.mark.soak
def test_five_hundred_at_once_again_and_again(root: Path, truth: Any) -> None:
    with serving(root) as live:
        total: Counter[str] = Counter()
        sizes = []
        for r in range(10):
            total += burn(live, truth, clients=500, at_once=500, seed=100 + r)
            sizes.append(rss())
        # the first rounds fill caches (allocator, prefixes, the host tier); after them nothing grows
        assert sizes[-1] <= sizes[3] * 1.02, [s >> 20 for s in sizes]
    assert total["left"] > 500
    assert total["checked"] > 3000
    print(dict(total), [s >> 20 for s in sizes])


# --- a process that is killed ------------------------------------------------------------------------------------------


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
