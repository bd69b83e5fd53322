"""A real server on a loopback port: shipped base, real engine, adapters in files, merged models as the oracle."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rankwise.assets import load_base
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.http.app import make_app
from rankwise.serve.http.auth import Keys
from rankwise.serve.http.server import HttpServer
from rankwise.serve.http.settings import Settings
from rankwise.serve.model.runner import NativeRunner
from rankwise.serve.server import Sizes, build_server

BLOCKS, PAGE = 96, 16
TARGETS = ("q_proj", "v_proj", "down_proj")


@functools.cache
def base() -> tuple[Any, Any]:
    return load_base()


def paths(model: Any) -> list[str]:
    return [n for n, _ in model.named_modules() if n.endswith(TARGETS)]


def write_adapter(folder: Path, seed: int, rank: int = 4, size: float = 0.12) -> Path:
    """A LoRA in PEFT's files, strong enough to change the greedy text."""
    model, g = base()[0], torch.Generator().manual_seed(seed)
    tensors = {}
    for p in paths(model):
        out, inp = model.get_submodule(p).weight.shape
        tensors[f"base_model.model.{p}.lora_A.weight"] = torch.randn(rank, inp, generator=g) * size
        tensors[f"base_model.model.{p}.lora_B.weight"] = torch.randn(out, rank, generator=g) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(*folders_and_weights: tuple[Path, float]) -> Any:
    """The base with the changes in its weights: what an adapter's answers are compared with."""
    model = copy.deepcopy(base()[0])
    with torch.no_grad():
        for folder, weight in folders_and_weights:
            t = load_file(folder / "adapter_model.safetensors")
            for p in paths(model):
                a, b = (t[f"base_model.model.{p}.lora_{k}.weight"] for k in "AB")
                model.get_submodule(p).weight += weight * (b @ a)
    return model


def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """Tokens of transformers' own generate, end of text left out."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, pad_token_id=2)[0, len(ids) :].tolist()
    return out[: out.index(1)] if 1 in out else out


class Slowed:
    """The runner, waiting a moment in each step, so that a test can act in the middle of an answer."""

    def __init__(self, runner: NativeRunner):
        self.runner, self.page, self.seconds = runner, runner.page, 0.0
        self.fault: Exception | None = None

    def run(self, plan: Any, slots: Any) -> torch.Tensor:
        if self.fault is not None:
            raise self.fault
        time.sleep(self.seconds)
        return self.runner.run(plan, slots)


class Live:
    """One server over the adapters in a folder, and what is behind it."""

    def __init__(
        self, root: Path, keys: Keys | None = None, options: dict[str, Any] | None = None, registry: Path | None = None, **more: Any
    ):
        behind = build_server(
            copy.deepcopy(base()[0]), lambda adapter_loader: FolderSource(root, adapter_loader), sizes=Sizes(kv_tokens=BLOCKS * PAGE, page=PAGE, max_lora_blocks=16),
            options=EngineOptions(eos=(1,), **(options or {})), op="bags", pack=False, registry=registry,
        )  # fmt: skip
        self.root, self.engine, self.cache, self.table = root, behind.engine, behind.cache, behind.table
        self.slow = Slowed(behind.runner)
        self.engine.runner = self.slow
        settings = Settings(**{"model": "base", "context": 512, "vocabulary": 4096, "ends": frozenset({1}), **more})
        self.app = make_app(self.engine, self.cache, base()[1], settings, keys)
        self.server = HttpServer(self.app, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.url = ""

    @property
    def metrics(self) -> Any:
        return self.app.state.service.metrics

    def start(self, ready: bool = True) -> Live:
        self.thread.start()
        wait(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        if ready:
            wait(lambda: self.app.state.service.phase.value == "ready")
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server hangs at its end"

    def empty(self) -> bool:
        """Nothing left in the engine: no request, no block in use, no pin."""
        s = self.engine.stats()
        return s.running == s.waiting == 0 and s.kv_used == 0 and not any(e.pins for e in self.cache.list())


@contextlib.contextmanager
def serving(root: Path, **more: Any) -> Iterator[Live]:
    live = Live(root, **more).start()
    try:
        yield live
    finally:
        live.stop()


def wait(condition: Any, seconds: float = 20.0) -> None:
    """Until it holds; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.005)
