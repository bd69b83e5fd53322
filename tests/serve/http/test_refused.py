"""Rows 17 and 18: an adapter that cannot be served is a 4xx with the reason while others are answered exactly; tenants share no prefix."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.serve.http.auth import Keys
from tests.serve.http.live import Live, base, greedy, merged, serving, wait, write_adapter

PROMPT, TOKENS = "def add(a, b):\n", 8
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def changed(fn: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(fn(tensors), folder / WEIGHTS, metadata={"format": "pt"})

    return make


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def header(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[3] = 0x7F  # the header would be two gigabytes long
    (folder / WEIGHTS).write_bytes(bytes(data))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def away(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    shutil.move(folder, outside)
    folder.symlink_to(outside)


def configured(**change: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change)) and None


#: what is wrong → what makes it so, the status, a word of the reason
WRONG: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "cut": (cut, 400, ""),
    "header": (header, 400, ""),
    "NaN": (changed(lambda t: t | {k: v.fill_(torch.nan) for k, v in list(t.items())[:1]}), 400, "finite"),
    "other base": (changed(lambda t: {k: torch.cat([v, v[:, :1]], 1) if "lora_A" in k else v for k, v in t.items()}), 400, ""),
    "other modules": (changed(lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()}), 400, "query"),
    "half": (changed(lambda t: {k: v for k, v in t.items() if "lora_A" in k}), 400, ""),
    "too large": (lambda folder: write_adapter(folder, 5, rank=130), 400, "at most 128"),
    "pickled": (pickled, 400, ""),
    "outside": (away, 400, "outside"),
    "kind": (configured(peft_type="PROMPT_TUNING"), 400, "PROMPT_TUNING"),
    "no config": (lambda folder: (folder / CONFIG).write_text("{"), 400, ""),
    "gone": (shutil.rmtree, 404, "does not exist"),
}


@pytest.fixture
def traffic(tmp_path: Path) -> Iterator[tuple[Live, list[int]]]:
    """A server whose base and whose adapter "good" are asked all the time; every answer is compared with the merged model's."""
    root = tmp_path / "root"
    write_adapter(root / "good", 3)
    model, tokenizer = base()
    ids = tokenizer(PROMPT)["input_ids"]
    truth = {n: tokenizer.decode(greedy(m, ids, TOKENS)) for n, m in (("base", model), ("good", merged((root / "good", 1.0))))}
    answered, stop, wrong = [0], threading.Event(), []
    with serving(root) as live:

        def ask(name: str) -> None:
            with httpx.Client(base_url=live.url, timeout=60) as http:
                while not stop.is_set():
                    r = http.post("/v1/completions", json={"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0})
                    if r.status_code != 200 or r.json()["choices"][0]["text"] != truth[name]:
                        wrong.append((name, r.status_code, r.text))
                    answered[0] += 1

        threads = [threading.Thread(target=ask, args=(n,)) for n in truth]
        [t.start() for t in threads]
        try:
            yield live, answered
        finally:
            stop.set()
            [t.join(60) for t in threads]
        assert not wrong, wrong[:2]
        wait(live.empty)
        assert not live.engine.counters["faults"]


def test_every_kind_of_failure_is_a_4xx_and_the_others_are_exact(traffic: tuple[Live, list[int]], tmp_path: Path) -> None:
    live, answered = traffic
    sound, folder = write_adapter(tmp_path / "sound", 4), live.root / "bad"
    want = base()[1].decode(greedy(merged((sound, 1.0)), base()[1](PROMPT)["input_ids"], TOKENS))
    body = {"model": "bad", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    with httpx.Client(base_url=live.url, timeout=60) as http:
        for kind, (spoil, status, word) in WRONG.items():
            shutil.copytree(sound, folder)
            spoil(folder)
            before = answered[0]
            for path, ask in (("/v1/completions", body), ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "bad"})):
                r = http.post(path, json=ask)
                expected = status if path == "/v1/completions" else 400
                assert r.status_code == expected, (kind, r.status_code, r.text)
                error = r.json()["error"]
                assert error["code"] == {400: "adapter_refused", 404: "model_not_found"}[expected], (kind, r.text)
                assert str(tmp_path) not in r.text, "no path of the server"
                assert (word if path == "/v1/completions" else "") in error["message"], (kind, r.text)
            wait(lambda: answered[0] > before)  # noqa: B023
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(tmp_path / "outside", ignore_errors=True)
            shutil.copytree(sound, folder)
            again = http.post("/v1/completions", json=body)
            assert again.status_code == 200 and again.json()["choices"][0]["text"] == want, (kind, again.text)
            shutil.rmtree(folder)
    assert "new" not in live.cache.names()


def test_tenants_share_no_prefix(tmp_path: Path) -> None:
    """The same prompt under two keys and two salts is found only by who computed it."""
    keys = [{"name": n, "key": f"{n}-key-0123456789"} for n in ("ann", "ben")]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    (tmp_path / "root").mkdir()
    prompt = list(range(10, 60))
    with serving(tmp_path / "root", keys=Keys.read(tmp_path / "keys.json")) as live:

        def reused(name: str, salt: str | None = None) -> int:
            body = {"model": "base", "prompt": prompt, "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
            r = httpx.post(
                live.url + "/v1/completions", json=body, headers={"Authorization": f"Bearer {name}-key-0123456789"}, timeout=60
            )
            return int(r.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        everybody = [(n, s) for n in ("ann", "ben") for s in (None, "ann", "ben", "x")]
        assert [reused(*who) for who in everybody] == [0] * len(everybody)
        assert [reused(*who) for who in everybody] == [48] * len(everybody)
        counters = live.engine.counters
        assert counters["prefix_hit_tokens"] == 48 * len(everybody)
