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

from rankwise.errors import OptionError
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.cache import AdapterCache
from rankwise.serve.adapters.kinds import Limits
from rankwise.serve.adapters.residency import AdapterResidency, PoolPages
from rankwise.serve.adapters.slots import SlotTable
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
from rankwise.serve.policies.chain import make as make_policy

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import AdapterSource
    from rankwise.serve.adapters.layout import Layout
    from rankwise.serve.adapters.slots import PageStore


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Memory of a server.

    Attributes:
        kv_tokens: tokens of keys and values; ``page``: tokens of a block.
        max_lora_blocks: LoRA pages of the adapters that are resident at once, eight ranks of every module each.
        memory: bytes that both hold together, where they share one budget (each then grows into what the other leaves);
            None gives each its own.
        host_bytes: of adapters in host memory.
        decode_cache_tokens: tokens of keys and values that decoding rows may keep side by side, a second time and beside
            ``memory`` (None: twice ``kv_tokens``; 0: none, each step gathers them from the blocks).
    """

    kv_tokens: int = 16_384
    page: int = 16
    max_lora_blocks: int = 64
    memory: int | None = None
    host_bytes: int = 4 << 30
    decode_cache_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "page", "max_lora_blocks", "host_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; it is at least 1.")
        if self.decode_cache_tokens is not None and self.decode_cache_tokens < 0:
            raise OptionError(f"decode_cache_tokens = {self.decode_cache_tokens}; it is 0 or more, or None for twice kv_tokens.")
        if self.kv_tokens % self.page:
            raise OptionError(f"kv_tokens = {self.kv_tokens} is no multiple of the page of {self.page} tokens.")

    @property
    def limits(self) -> Limits | None:
        """What the LoRA pages can hold, so that a larger adapter is refused when it is resolved, not when it is to run."""
        return Limits(rank=min(Limits().rank, WIDTH * self.max_lora_blocks)) if self.memory is None else None

    @property
    def copied_tokens(self) -> int:
        """``decode_cache_tokens``, or its default."""
        return 2 * self.kv_tokens if self.decode_cache_tokens is None else self.decode_cache_tokens


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Server:
    """An engine and what it stands on.

    Attributes:
        engine, cache, runner: steps, adapters on the host, the model.
        table, pool, layout: adapters on the device, cache blocks and LoRA pages, the modules that adapters may change.
    """

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
        model: a causal language model of transformers, in evaluation mode.
        source: makes the adapters' source from the model's loader.
        sizes, options: of the memory and of a step; None: the defaults.
        policy: a policy's name, or ``{"name": …, options…}``.
        op: a delta operator's name; ``native``: whether ``auto`` builds and uses the C operator (None: where it can).
        pack: whether steps are packed rows (None: as a probe says).
        loop: whether steps run through :mod:`~rankwise.serve.model.llama_loop`; None where it stands for the model.
        limits: largest adapter; None: what ``sizes`` can hold.
        registry: file that keeps adapters loaded at run time over restarts.
        base: the base's fingerprint, part of every prefix salt.
        share_prefixes: whether requests share blocks of equal prefixes.
        team: other devices to share the model with (:mod:`rankwise.serve.parallel`).
        adapter_split: how they share adapters: auto, split or replicate.
        clock: seconds.

    Raises:
        AttachError, OptionError, UnknownName: a model that cannot be served; sizes, names or options that cannot be.
    """
    sizes, options = sizes or Sizes(), options or EngineOptions()
    limits = limits or sizes.limits
    loader = AdapterLoader(model, limits=limits)  # before anything is hooked: it reads the plain base
    counts = _counts(model, loader.layout, sizes)
    rows, copies = options.max_num_seqs, sizes.copied_tokens
    build = Build(counts[KV], sizes.page, rows, counts[ADAPTER], adapter_split, op, native, pack, loop, copies)
    pages, runner = _devices(model, loader.layout, build, team)
    units = {KV: PoolUnit(runner.store.block_bytes, counts[KV]), ADAPTER: PoolUnit(pages.page_bytes, counts[ADAPTER])}
    pool = BlockPool(units, sizes.memory)
    index = PrefixIndex(pool, sizes.page, tag=KV, share=share_prefixes)
    table = SlotTable(pages, PoolPages(pool), clock=clock)
    cache = AdapterCache(source(loader), loader.layout, nbytes=sizes.host_bytes, limits=limits, registry=registry, clock=clock)
    if isinstance(pages, SharedPages):
        cache.accept = functools.partial(check, share=pages.shares[0], head=runner.head_path or "")
    adapters = AdapterResidency(cache, table, pool, lambda: index.shrink(1) > 0)
    engine = Engine(
        runner, index, adapters, make_policy(policy), options, total_blocks=counts[KV], base=base, clock=clock, copies=runner.rows
    )
    return Server(engine, cache, table, pool, runner, loader.layout)


def _devices(model: nn.Module, layout: Layout, build: Build, team: Team | None) -> tuple[PageStore, NativeRunner]:
    """The LoRA pages and the runner, of this device alone or of a team."""
    if team is not None:
        return lead(team, model, layout, build)
    pages = LoraPages(layout.groups, build.lora_pages, _dtype(model))
    ops = (make_op(build.op, pages, build.native) for _ in range(2))
    runner = NativeRunner(
        model,
        layout.groups,
        pages,
        *ops,
        blocks=build.blocks,
        page=build.page,
        pack=build.pack,
        max_rows=build.max_rows,
        loop=build.loop,
    )
    runner.rows.limit = build.row_tokens
    return pages, runner


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _counts(model: nn.Module, layout: Layout, sizes: Sizes) -> dict[str, int]:
    """Ids of each tag: what is asked for, or on one budget as many as it could hold of either."""
    blocks = sizes.kv_tokens // sizes.page
    if sizes.memory is None:
        return {KV: blocks, ADAPTER: sizes.max_lora_blocks}
    block = sum(g.page_numel for g in layout.groups) * _dtype(model).itemsize
    return {KV: blocks, ADAPTER: max(1, min(sizes.memory // block, 1 << 20))}
