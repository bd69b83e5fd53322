"""A real server on a loopback port: shipped base, real engine, adapters in files, merged models as the oracle."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rankwise.assets import load_base
from rankwise.serve.adapters.base import Manifest, Served
from rankwise.serve.engine import Engine
from rankwise.serve.http.app import make_app
from rankwise.serve.http.auth import Keys
from rankwise.serve.http.server import Server
from rankwise.serve.http.settings import Settings
from rankwise.serve.ops.base import Group
from rankwise.serve.options import EngineOptions
from rankwise.serve.pool import BlockPool, Unit
from rankwise.serve.prefix import PrefixIndex
from rankwise.serve.runner import NativeRunner
from rankwise.serve.sched.fcfs import Fcfs
from rankwise.serve.types import AdapterRefused, UnknownAdapter

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


class Shelf:
    """Adapters of PEFT's files for the engine and for the routes: read on load, pinned while requests run."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.names: dict[str, Manifest] = {}
        self.held: dict[str, Served] = {}
        self.pins: dict[str, int] = {}
        self.slots: dict[int, Any] = {}
        self.at: dict[str, tuple[int, int]] = {}  # digest → slot, entries

    # --- the routes' side
    def load(self, name: str, path: str) -> Manifest:
        file = Path(path) / "adapter_model.safetensors"
        if not file.is_file():
            raise AdapterRefused(f"The adapter {name!r} has no adapter_model.safetensors.")
        digest = sha256(file.read_bytes()).hexdigest()
        tensors = load_file(file)
        rank = next(iter(tensors.values())).shape[0]
        m = Manifest(digest, name, str(path), "lora", rank, 1, sum(t.nbytes for t in tensors.values()))
        loose = {}
        for p in paths(base()[0]):
            a, b = (tensors[f"base_model.model.{p}.lora_{k}.weight"] for k in "AB")
            loose[p] = (functools.partial(_delta, a, b),)
        with self.lock:
            self.held[digest] = Served(m, {}, loose)
            self.names[name] = m
        return m

    def unload(self, name: str) -> None:
        with self.lock:
            if self.names.pop(name, None) is None:
                raise UnknownAdapter(f"no adapter {name!r}; there are {list(self.names)}")

    def resolve(self, name: str) -> Manifest:
        with self.lock:
            if name not in self.names:
                raise UnknownAdapter(f"no adapter {name!r}; there are {list(self.names)}")
            return self.names[name]

    def mix(self, parts: Any) -> Manifest:
        made = [(self.resolve(n), w) for n, w in parts]
        digest = sha256(repr([(m.digest, w) for m, w in made]).encode()).hexdigest()
        loose = {
            p: tuple(functools.partial(_scaled, self.held[m.digest].loose[p][0], w) for m, w in made) for p in paths(base()[0])
        }
        m = Manifest(digest, "mix", "", "mix", 8, 1, 0, parts=tuple((x.digest, w) for x, w in made))
        with self.lock:
            self.held[digest] = Served(m, {}, loose)
        return m

    def list(self) -> Any:
        with self.lock:
            return [(n, m, "host", self.pins.get(m.digest, 0)) for n, m in self.names.items()]

    # --- the engine's side
    def fetch(self, digest: str) -> Future[Served]:
        done: Future[Served] = Future()
        with self.lock:
            self.pins[digest] = self.pins.get(digest, 0) + 1
            done.set_result(self.held[digest])
        return done

    def enter(self, digest: str, served: Served) -> int | None:
        slot, n = self.at.get(digest, (len(self.slots), 0))
        self.slots[slot] = SimpleNamespace(number=slot, cells=(), served=served, loose=served.loose, whole=served.whole)
        self.at[digest] = (slot, n + 1)
        return slot

    def leave(self, slot: int) -> None:
        digest = next(d for d, (s, _) in self.at.items() if s == slot)
        self.at[digest] = (slot, self.at[digest][1] - 1)
        assert self.at[digest][1] >= 0

    def release(self, digest: str) -> None:
        with self.lock:
            self.pins[digest] -= 1
            assert self.pins[digest] >= 0

    def resident(self, digest: str) -> bool:
        return digest in self.at

    def cells(self, digest: str) -> int:
        return 0

    def free_cells(self) -> int:
        return 0

    def shrink(self) -> bool:
        return False


def _delta(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ a.T) @ b.T


def _scaled(fn: Any, w: float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return w * fn(x, y)


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


def make_engine(shelf: Shelf, **options: Any) -> Engine:
    model, _ = base()
    model = copy.deepcopy(model)
    groups = []
    for p in (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n):
        out, inp = model.get_submodule(p).weight.shape
        groups.append(Group(p, (p,), inp, (out,)))
    runner = NativeRunner(model, groups, None, None, None, blocks=BLOCKS, page=PAGE, pack=False)  # type: ignore[arg-type]
    index = PrefixIndex(BlockPool({"kv": Unit(1, BLOCKS)}), page=PAGE)
    return Engine(Slowed(runner), index, shelf, Fcfs(), EngineOptions(eos=(1,), **options), total_blocks=BLOCKS)


class Live:
    """One server and what is behind it."""

    def __init__(self, shelf: Shelf, keys: Keys | None = None, options: dict[str, Any] | None = None, **more: Any):
        self.shelf, self.engine = shelf, make_engine(shelf, **(options or {}))
        self.slow: Slowed = self.engine.runner  # type: ignore[assignment]
        settings = Settings(**{"model": "base", "context": 512, "vocabulary": 4096, "ends": frozenset({1}), **more})
        self.app = make_app(self.engine, shelf, base()[1], settings, keys)
        self.server = Server(self.app, "127.0.0.1", 0)
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
        return s.running == s.waiting == 0 and s.kv_used == 0 and not any(self.shelf.pins.values())


@contextlib.contextmanager
def serving(shelf: Shelf, **more: Any) -> Iterator[Live]:
    live = Live(shelf, **more).start()
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
