"""Over HTTP: many clients of which a third disconnect, while adapters are loaded, replaced and removed.

Every answer that arrives is the merged model's, token for token; requests of those who left are gone; nothing is held at the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.serve.faults.conftest import FOLDERS
from tests.serve.http.live import Live, base, merged, serving, wait

PROMPTS = ["def add(a, b):\n", "import", "The quick brown fox", "class Node:\n    def __init__(self", "é日本🙂"]
LONGEST = 12
STABLE, CHURNED = ("s0", "s1"), ("c0", "c1")


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
