"""What a served adapter computes, the naive way: every module's own output plus pairs, non-LoRA changes, whole parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.base import LoadedAdapter
from rankwise.serve.adapters.cache import AdapterCache
from rankwise.serve.adapters.layout import Layout
from rankwise.serve.adapters.source import FolderSource
from tests.models import FAMILIES, batch_for, llama, move


@contextlib.contextmanager
def acting(layout: Layout, served: LoadedAdapter) -> Iterator[None]:
    """In this block the layout's base computes with the served adapter for every row."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for g in layout.groups:
        for module, pair in zip(g.modules, served.pairs.get(g.name, ()), strict=False):
            if pair is not None:
                pairs[module] = pair
    hooks = []
    for path in {*pairs, *served.non_lora_changes}:
        module = layout.called[path].module

        def add(module: Any, args: Any, y: Tensor, path: str = path) -> Tensor:
            x = args[0]
            rows = x.reshape(-1) if isinstance(module, nn.Embedding) else x.reshape(-1, x.shape[-1])
            flat = y.reshape(-1, y.shape[-1])
            bias = getattr(module, "bias", None)
            plain = flat if bias is None else flat - bias
            total = flat
            if path in pairs:
                A, B = pairs[path]
                total = total + (rows @ A.T) @ B.T
            for change in served.non_lora_changes.get(path, ()):
                total = total + change(rows, plain)
            return total.reshape(y.shape)

        hooks.append(module.register_forward_hook(add))
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def served_logits(model: Any, layout: Layout, served: LoadedAdapter, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad(), acting(layout, served):
        return torch.func.functional_call(model, dict(served.full_params), kwargs=batch, tie_weights=False).logits


def family(name: str) -> Any:
    return FAMILIES[name][0]()


def attached(model: Any, recipe: Any, seed: int = 3) -> Any:
    adapter = rw.attach(model, recipe)
    move(adapter, seed=seed)
    return adapter


def folder_of(tmp_path: Path, *names: str, seed: int = 0, **recipe: Any) -> tuple[Any, Path]:
    """A small Llama and a folder with one plain LoRA a name, all different."""
    root = tmp_path / "root"
    for i, name in enumerate(names):
        model = llama()  # a handle does not keep its model alive
        attached(model, {"r": 4, **recipe}, seed=seed + i).save(root / name)
    root.mkdir(exist_ok=True)
    return llama(), root


def cache_of(model: Any, root: Path, *, adapter_loader: dict[str, Any] | None = None, **more: Any) -> AdapterCache:
    source = FolderSource(root, AdapterLoader(model, **(adapter_loader or {})))
    return AdapterCache(source, source.adapter_loader.layout, **more)


def fetched(cache: AdapterCache, name: str) -> LoadedAdapter:
    return cache.fetch(cache.resolve(name).digest).result(timeout=60)


def batch(model: Any) -> dict[str, Tensor]:
    return {k: v for k, v in batch_for(model).items() if k != "labels"}
