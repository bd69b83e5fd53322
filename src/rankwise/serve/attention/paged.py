"""Attention of a packed step over a paged cache, under transformers' own modelling code.

transformers calls the function registered as :data:`NAME` with queries, keys and values after rotary embedding; the
plan and the cache are found in :data:`HERE`.  One cell holds one token's keys (or values) of one layer, heads × d;
a block is ``page`` cells.  Decoding rows read their copies side by side (:mod:`rankwise.serve.attention.rows`), or are
gathered from their pages within buckets of like length, with the query heads of one key head folded into the query's
length, so no head is repeated; each chunk of a prompt is one call of its own.  :func:`naive` is the reference: request by request, softmax written out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.serve.attention.rows import RowTables, Turn, cells_of, seen_keys
from rankwise.serve.plan import Span, TokenPlan

NAME = "rankwise_paged"
WASTE = 1.5  #: a bucket of decoding rows may gather this many times the cells it needs


class KvStore:
    """Keys and values of every layer: per layer two tensors (cells, heads, d), made when a layer first runs."""

    def __init__(self, blocks: int, page: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.blocks, self.page, self.dtype, self.device = blocks, page, dtype, device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The store of ``layer``; k, v: (T, heads, d) tell its widths."""
        held = self.layers.get(layer)
        if held is None:
            cells = self.blocks * self.page
            # left unwritten: the system gives memory to the blocks that are used
            held = tuple(torch.empty(cells, *t.shape[1:], dtype=self.dtype, device=self.device) for t in (k, v))  # type: ignore[assignment]
            self.layers[layer] = held  # type: ignore[assignment]
        return held  # type: ignore[return-value]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over the layers seen so far."""
        return sum(t[0].numel() * t.element_size() for pair in self.layers.values() for t in pair) * self.page


@dataclasses.dataclass(slots=True, eq=False)
class Bucket:
    """Decoding rows of like context: ``rows`` (n,) of the packed step, ``cells`` (n·C,), ``lengths`` (n, 1)."""

    rows: Tensor
    cells: Tensor
    lengths: Tensor
    C: int

    def mask(self, window: int | None) -> Tensor:
        """(n, 1, 1, C): which keys a row sees."""
        return seen_keys(self.lengths, self.C, window)


class Step:
    """What every layer's attention needs of one plan, made once: the buckets, the chunks, masks by window."""

    def __init__(self, plan: TokenPlan, rows: RowTables | None = None):
        self.plan = plan
        single = [i for i, s in enumerate(plan.spans) if len(s.tokens) == 1]
        self.turns: list[Turn] = []
        if rows is not None:
            self.turns, rest = rows.turns([(plan.cu_q[i], plan.spans[i]) for i in single], plan.page)
            single = [single[i] for i in rest]
        self.buckets = [_bucket(plan, rows) for rows in _like(plan.spans, single)]
        self.chunks = [(s, slice(plan.cu_q[i], plan.cu_q[i + 1])) for i, s in enumerate(plan.spans) if len(s.tokens) > 1]
        self.cells = [cells_of(s, plan.page) if s.start else None for s, _ in self.chunks]
        self._masks: dict[tuple[str, int, int | None], Tensor | None] = {}

    def turn_mask(self, i: int, window: int | None) -> Tensor:
        key = ("turn", i, window)
        if key not in self._masks:
            self._masks[key] = self.turns[i].mask(window)
        return self._masks[key]  # type: ignore[return-value]

    def bucket_mask(self, i: int, window: int | None) -> Tensor:
        key = ("bucket", i, window)
        if key not in self._masks:
            self._masks[key] = self.buckets[i].mask(window)
        return self._masks[key]  # type: ignore[return-value]

    def chunk_mask(self, i: int, window: int | None) -> Tensor | None:
        """(q, end) of chunk i, or None where plain causality from 0 is meant."""
        key = ("chunk", i, window)
        if key not in self._masks:
            s = self.chunks[i][0]
            self._masks[key] = None if not s.start and (window is None or s.end <= window) else _causal(s, window)
        return self._masks[key]


def _causal(s: Span, window: int | None) -> Tensor:
    q = torch.arange(s.start, s.end)[:, None]
    k = torch.arange(s.end)[None, :]
    seen = k <= q
    return seen if window is None else seen & (k > q - window)


def _like(spans: tuple[Span, ...], rows: list[int]) -> list[list[int]]:
    """Rows in buckets, longest first, so that none gathers more than :data:`WASTE` of what it needs."""
    out: list[list[int]] = []
    for i in sorted(rows, key=lambda i: -spans[i].end):
        longest = spans[out[-1][0]].end if out else 0
        if out and longest <= max(WASTE * spans[i].end, 64):
            out[-1].append(i)
        else:
            out.append([i])
    return out


def _bucket(plan: TokenPlan, which: list[int]) -> Bucket:
    spans = [plan.spans[i] for i in which]
    C = max(s.end for s in spans)
    n = -(-C // plan.page)
    table = torch.tensor([(*s.blocks[:n], *(s.blocks[0],) * (n - len(s.blocks))) for s in spans])
    cells = (table[:, :, None] * plan.page + torch.arange(plan.page)).view(len(spans), -1)[:, :C]
    lengths = torch.tensor([[s.end] for s in spans])
    # what lies behind a row's end may be another request's, even NaN, and 0·NaN is NaN: its own first cell stands there
    cells = torch.where(torch.arange(C) < lengths, cells, cells[:, :1])
    return Bucket(torch.tensor([plan.cu_q[i] for i in which]), cells.reshape(-1), lengths, C)


class _Here(threading.local):
    step: Step | None = None
    store: KvStore | None = None


HERE = _Here()


@contextlib.contextmanager
def attending(step: Step, store: KvStore) -> Iterator[None]:
    """Set what this thread's attention layers read and write."""
    before, (HERE.step, HERE.store) = (HERE.step, HERE.store), (step, store)
    try:
        yield
    finally:
        HERE.step, HERE.store = before


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, T, d), key, value: (1, kv heads, T, d) → ((1, T, heads, d), None); writes the cache first."""
    step, store = HERE.step, HERE.store
    if step is None or store is None:
        raise AttachError("Paged attention runs inside the serving engine only; load the model afresh to use it elsewhere.")
    if kwargs.get("s_aux") is not None:
        raise AttachError("Attention sinks are not served; use a model without them.")
    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    K, V = store.of(module.layer_idx, k, v)  # type: ignore[arg-type]
    K.index_copy_(0, step.plan.cell, k.to(K.dtype))
    V.index_copy_(0, step.plan.cell, v.to(V.dtype))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = query.new_empty(query.shape[2], query.shape[1], v.shape[-1])
    for i, turn in enumerate(step.turns):
        kk, vv = turn.update(module.layer_idx, K, V, k, v)  # type: ignore[arg-type]
        out[turn.rows] = _decode(query, kk, vv, turn.rows, step.turn_mask(i, sliding_window), scale, softcap)
    for i, b in enumerate(step.buckets):
        kk, vv = (t.index_select(0, b.cells).view(b.rows.shape[0], b.C, *t.shape[1:]).transpose(1, 2) for t in (K, V))
        out[b.rows] = _decode(query, kk, vv, b.rows, step.bucket_mask(i, sliding_window), scale, softcap)
    for i, (span, rows) in enumerate(step.chunks):
        cells = step.cells[i]
        kk, vv = (k[rows], v[rows]) if cells is None else (K[cells], V[cells])
        out[rows] = _chunk(query[0, :, rows], kk, vv, step.chunk_mask(i, sliding_window), scale, softcap)
    return out[None], None


def _decode(query: Tensor, K: Tensor, V: Tensor, rows: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(n, heads, d) of decoding rows; K, V: (n, kv heads, C, d)."""
    n, heads, kv = rows.shape[0], query.shape[1], K.shape[1]
    q = query[0].index_select(1, rows).transpose(0, 1).reshape(n, kv, heads // kv, -1)
    return _attend(q, K.to(q.dtype), V.to(q.dtype), mask, scale, softcap).reshape(n, heads, -1)


def _chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """(q, heads, d) of one chunk: q (heads, q, d); k, v (end, kv, d); ``mask`` None is causal from position 0."""
    heads, kv = q.shape[0], k.shape[1]
    k, v = (t.transpose(0, 1).to(q.dtype) for t in (k, v))
    if mask is None and softcap is None:
        y = nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=heads != kv
        )
        return y[0].transpose(0, 1)
    if mask is None:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
    if heads == kv or softcap is not None:
        k, v = (t.repeat_interleave(heads // kv, 0) for t in (k, v))
        return _attend(q[None], k[None], v[None], mask, scale, softcap)[0].transpose(0, 1)
    y = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True)
    return y[0].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """softmax(q·kᵀ·scale)·v where ``mask`` is true.

    A few queries over keys that lie together are two products, 2.5 times as fast as the fused kernel at 64 keys on the
    CPU; over keys with other heads between them they are many times slower.
    """
    together = k.stride(-2) == k.shape[-1] and q.shape[-2] <= 16 and k.shape[-2] <= 512 and k.device.type == "cpu"
    if softcap is None and not together:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.masked_fill_(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def naive(query: Tensor, K: Tensor, V: Tensor, plan: TokenPlan, scale: float, window: int | None = None) -> Tensor:
    """(T, heads, d) by the definition, request by request and row by row; the caches already hold this step."""
    out = []
    for s, first in zip(plan.spans, plan.cu_q, strict=False):
        cells = cells_of(s, plan.page)
        for t in range(len(s.tokens)):
            at = s.start + t
            low = 0 if window is None else max(0, at + 1 - window)
            k, v = K[cells[low : at + 1]], V[cells[low : at + 1]]
            k, v = (c.repeat_interleave(query.shape[1] // K.shape[1], 1) for c in (k, v))
            weight = torch.einsum("hd,chd->hc", query[0, :, first + t], k).mul(scale).softmax(-1)
            out.append(torch.einsum("hc,chd->hd", weight, v))
    return torch.stack(out)


def install(model: nn.Module) -> str:
    """Make ``model`` attend through the paged cache; returns the name of what it used before."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return str(before)
