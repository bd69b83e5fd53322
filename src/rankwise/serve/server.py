"""A server's parts put together for one model: layout, LoRA pages, pool, runner, adapters, policy, engine."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankwise.catalogue import make
from rankwise.errors import OptionError
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.cache import AdapterCache
from rankwise.serve.adapters.kinds import Limits
from rankwise.serve.adapters.residency import AdapterResidency, PoolPages
from rankwise.serve.adapters.slots import PageStore, SlotTable
from rankwise.serve.cache.block_pool import ADAPTER, KV, BlockPool, PoolUnit
from rankwise.serve.cache.prefix import PrefixIndex
from rankwise.serve.engine.engine import Engine
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.model.runner import NativeRunner
from rankwise.serve.ops.base import WIDTH, LoraPages
from rankwise.serve.ops.registry import make_op
from rankwise.serve.parallel.experimental.leader import SharedPages, Team, lead
from rankwise.serve.parallel.experimental.messages import Build
from rankwise.serve.parallel.experimental.non_lora_changes import check

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import AdapterSource
    from rankwise.serve.adapters.layout import Layout


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Memory of a server.

    Attributes:
        kv_tokens: tokens of keys and values; ``page``: tokens of a block.
        lora_pages: of eight adapter components each, over all modules.
        memory: bytes that both hold together, where they share one budget (each then grows into what the other leaves);
            None gives each its own.
        host_bytes: of adapters in host memory.
        row_tokens: tokens of keys and values that decoding rows may keep side by side, a second time and beside ``memory``
            (None: twice ``kv_tokens``; 0: none, each step gathers them from the pages).
    """

    kv_tokens: int = 16_384
    page: int = 16
    lora_pages: int = 64
    memory: int | None = None
    host_bytes: int = 4 << 30
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "page", "lora_pages", "host_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; it is at least 1.")
        if self.row_tokens is not None and self.row_tokens < 0:
            raise OptionError(f"row_tokens = {self.row_tokens}; it is 0 or more, or None for twice kv_tokens.")
        if self.kv_tokens % self.page:
            raise OptionError(f"kv_tokens = {self.kv_tokens} is no multiple of the page of {self.page} tokens.")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Server:
    """An engine and what it stands on."""

    engine: Engine
    cache: AdapterCache
    table: SlotTable
    pool: BlockPool
    runner: NativeRunner
    layout: Layout


def build_server(
    model: nn.Module,
    source: Callable[[AdapterLoader], AdapterSource],
    *,
    sizes: Sizes | None = None,
    options: EngineOptions | None = None,
    policy: str | Mapping[str, Any] = "default",
    op: str = "auto",
    native: bool | None = None,
    pack: bool | None = None,
    loop: bool | None = None,
    limits: Limits | None = None,
    registry: str | Path | None = None,
    base: str = "",
    share_prefixes: bool = True,
    team: Team | None = None,
    adapter_split: str = "auto",
    clock: Callable[[], float] = time.monotonic,
) -> Server:
    """Everything that serves ``model`` (which is taken over); the engine is not started.

    Args:
        source: makes the adapters' source from the model's adapter loader.
        loop: whether steps run through :mod:`~rankwise.serve.model.llama_loop`; None where it stands for the model.
        policy: a policy's name, or ``{"name": …, options…}``; ``op``: a delta operator's name.
        base: the base's fingerprint, part of every prefix salt.
        team: other devices to share the model with (:mod:`rankwise.serve.parallel`); ``adapter_split``: how adapters are
            shared (auto, split, replicate).

    Raises:
        AttachError, OptionError, UnknownName: a model that cannot be served; sizes, names or options that cannot be.
    """
    sizes = sizes or Sizes()
    if limits is None and sizes.memory is None:
        limits = Limits(rank=min(Limits().rank, WIDTH * sizes.lora_pages))  # told when it is resolved, not when it is to run
    adapter_loader = AdapterLoader(model, limits=limits)  # before anything is hooked: it reads the plain base
    layout = adapter_loader.layout
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    counts = _counts(model, layout, sizes, dtype)
    row_tokens = 2 * sizes.kv_tokens if sizes.row_tokens is None else sizes.row_tokens
    max_rows = (options or EngineOptions()).max_running
    lora_pages: PageStore
    runner: NativeRunner
    if team is not None:
        build = Build(counts[KV], sizes.page, max_rows, counts[ADAPTER], adapter_split, op, native, pack, loop, row_tokens)
        lora_pages, runner = lead(team, model, layout, build)
    else:
        lora_pages = own = LoraPages(layout.groups, counts[ADAPTER], dtype)
        runner = NativeRunner(
            model, layout.groups, own, make_op(op, own, native), make_op(op, own, native),
            blocks=counts[KV], page=sizes.page, pack=pack, max_rows=max_rows, loop=loop,
        )  # fmt: skip
        runner.rows.limit = row_tokens
    pool = BlockPool(
        {KV: PoolUnit(runner.store.block_bytes, counts[KV]), ADAPTER: PoolUnit(lora_pages.page_bytes, counts[ADAPTER])},
        sizes.memory,
    )
    index = PrefixIndex(pool, sizes.page, tag=KV, share=share_prefixes)
    table = SlotTable(lora_pages, PoolPages(pool), clock=clock)
    cache = AdapterCache(source(adapter_loader), layout, nbytes=sizes.host_bytes, limits=limits, registry=registry, clock=clock)
    if isinstance(lora_pages, SharedPages):
        cache.accept = functools.partial(check, share=lora_pages.shares[0], head=runner.head_path or "")
    residency = AdapterResidency(cache, table, pool, lambda: index.shrink(1) > 0)
    named = {"name": policy} if isinstance(policy, str) else dict(policy)
    engine = Engine(
        runner, index, residency, make("policy", named.pop("name"), **named), options,
        total_blocks=counts[KV], base=base, clock=clock, copies=runner.rows,
    )  # fmt: skip
    return Server(engine, cache, table, pool, runner, layout)


def _counts(model: nn.Module, layout: Layout, sizes: Sizes, dtype: torch.dtype) -> dict[str, int]:
    """Ids of each tag: what is asked for, or on one budget as many as it could hold of either."""
    blocks, lora_pages = sizes.kv_tokens // sizes.page, sizes.lora_pages
    if sizes.memory is None:
        return {KV: blocks, ADAPTER: lora_pages}
    page_bytes = sum(g.page_numel for g in layout.groups) * dtype.itemsize
    return {KV: blocks, ADAPTER: max(1, min(sizes.memory // page_bytes, 1 << 20))}
