"""Attention of a packed step over a paged cache, under transformers' own modelling code.

transformers calls the function registered as :data:`NAME` with queries, keys and values after rotary embedding; the
plan and the cache are found in ``forward_context.attention``.  One KV slot holds one token's keys (or values) of one layer, heads × d;
a block is ``page`` KV slots.  Decoding rows read their copies side by side (:mod:`rankwise.serve.model.decode_tables`), or are
gathered from their pages within buckets of like length, with the query heads of one key head folded into the query's
length, so no head is repeated; each chunk of a prompt is one call of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.runtime.context import forward_context
from rankwise.serve.model.decode_tables import RowTables, Turn, kv_slots_of, seen_keys

if TYPE_CHECKING:
    from rankwise.serve.batch import Span, TokenPlan

NAME = "rankwise_paged"
WASTE = 1.5  #: a bucket of decoding rows may gather this many times the KV slots it needs


class KvStore:
    """Keys and values of every layer: per layer two tensors (KV slots, heads, d), made when a layer first runs.

    Args:
        blocks, page: how many blocks there are, and how many tokens one holds.
        dtype, device: of the tensors.
    """

    def __init__(self, blocks: int, page: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.blocks, self.page, self.dtype, self.device = blocks, page, dtype, device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The store of ``layer``; k, v: (T, heads, d) tell its widths."""
        held = self.layers.get(layer)
        if held is None:
            kv_slots = self.blocks * self.page
            # left unwritten: the system gives memory to the blocks that are used
            held = tuple(torch.empty(kv_slots, *t.shape[1:], dtype=self.dtype, device=self.device) for t in (k, v))  # type: ignore[assignment]
            self.layers[layer] = held  # type: ignore[assignment]
        return held  # type: ignore[return-value]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over the layers seen so far."""
        return sum(t[0].numel() * t.element_size() for pair in self.layers.values() for t in pair) * self.page


@dataclasses.dataclass(slots=True, eq=False)
class Bucket:
    """Decoding rows of like context.

    Attributes:
        rows: (n,), of the packed step; ``lengths``: (n, 1), keys of each.
        kv_slots: (n·C,), where the keys are; ``C``: the longest length.
    """

    rows: Tensor
    kv_slots: Tensor
    lengths: Tensor
    C: int


class AttentionStep:
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
        self.kv_slots = [kv_slots_of(s, plan.page) if s.start else None for s, _ in self.chunks]
        self._biases: dict[tuple[int, int | None, int, torch.dtype], Tensor] = {}
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def bias(self, of: Turn | Bucket, window: int | None, kv: int, dtype: torch.dtype) -> Tensor:
        """(n·kv, 1, C): 0 at the keys that a decoding row sees, −inf at the others.

        Args:
            of: rows that decode together.
            window: keys that a row sees at most (None: all).
            kv: key/value heads.
            dtype: of the scores.
        """
        key = (id(of), window, kv, dtype)
        if key not in self._biases:
            seen = seen_keys(of.lengths, of.C, window)
            bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._biases[key] = bias.repeat_interleave(kv, 0)[:, None]
        return self._biases[key]

    def chunk_mask(self, i: int, window: int | None) -> Tensor | None:
        """(q, end) of chunk i, or None where plain causality from 0 is meant."""
        key = (i, window)
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
    kv_slots = (table[:, :, None] * plan.page + torch.arange(plan.page)).view(len(spans), -1)[:, :C]
    lengths = torch.tensor([[s.end] for s in spans])
    # what lies behind a row's end may be another request's, even NaN, and 0·NaN is NaN: its own first KV slot stands there
    kv_slots = torch.where(torch.arange(C) < lengths, kv_slots, kv_slots[:, :1])
    return Bucket(torch.tensor([plan.cu_q[i] for i in which]), kv_slots.reshape(-1), lengths, C)


@contextlib.contextmanager
def attending(step: AttentionStep, store: KvStore) -> Iterator[None]:
    """Set what this thread's attention layers read and write."""
    before, forward_context.attention = forward_context.attention, (step, store)
    try:
        yield
    finally:
        forward_context.attention = before


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
    """What transformers calls: :func:`attend` as ((1, T, heads, d), None).

    Args:
        module: with a ``layer_idx``.
        query: (1, heads, T, d); ``key``, ``value``: (1, kv heads, T, d).
        attention_mask: not read: the plan says who sees whom.
        scaling: of the scores (default: d^−½); ``sliding_window``, ``softcap``: see :func:`attend`.
    """
    if kwargs.get("s_aux") is not None:
        raise AttachError("Attention sinks are not served; use a model without them.")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(module.layer_idx, q, k, v, scale, sliding_window, softcap)[None], None  # type: ignore[arg-type]


def attend(
    layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Attention of the running step, (T, heads, d); writes the cache first.

    Args:
        layer: its index.
        q: (T, heads, d); ``k``, ``v``: (T, kv heads, d).
        scale: of the scores.
        window: keys that a row sees at most (None: all).
        softcap: s → softcap·tanh(s/softcap) on the scaled scores (None: left out).
    """
    if forward_context.attention is None:
        raise AttachError("Paged attention runs inside the serving engine only; load the model afresh to use it elsewhere.")
    step, store = forward_context.attention
    K, V = store.of(layer, k, v)
    K.index_copy_(0, step.plan.kv_slots, k.to(K.dtype))
    V.index_copy_(0, step.plan.kv_slots, v.to(V.dtype))
    if len(step.turns) == 1 and not step.buckets and not step.chunks and step.turns[0].in_order:
        kk, vv = step.turns[0].update(layer, K, V, k, v)  # every row decodes, and the table's order is the step's
        return _decode(q, kk, vv, step.bias(step.turns[0], window, K.shape[1], q.dtype), scale, softcap)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    for turn in step.turns:
        kk, vv = turn.update(layer, K, V, k, v)
        bias = step.bias(turn, window, K.shape[1], q.dtype)
        out.index_copy_(0, turn.rows, _decode(q.index_select(0, turn.rows), kk, vv, bias, scale, softcap))
    for b in step.buckets:
        kk, vv = (t.index_select(0, b.kv_slots).view(b.rows.shape[0], b.C, *t.shape[1:]).transpose(1, 2) for t in (K, V))
        bias = step.bias(b, window, K.shape[1], q.dtype)
        out.index_copy_(0, b.rows, _decode(q.index_select(0, b.rows), kk, vv, bias, scale, softcap))
    for i, (_, rows) in enumerate(step.chunks):
        kv_slots = step.kv_slots[i]
        kk, vv = (k[rows], v[rows]) if kv_slots is None else (K[kv_slots], V[kv_slots])
        out[rows] = _chunk(q[rows].transpose(0, 1), kk, vv, step.chunk_mask(i, window), scale, softcap)
    return out


def _decode(q: Tensor, K: Tensor, V: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(n, heads, d) of decoding rows; q: (n, heads, d), K, V: (n, kv heads, C, d), bias: (n·kv, 1, C).

    A few queries over keys that lie together are two products, 2.5 times as fast as the fused kernel at 64 keys on the
    CPU; over keys with other heads between them they are many times slower.
    """
    n, heads, d = q.shape
    kv, C = K.shape[1], K.shape[2]
    q, K, V = q.reshape(n * kv, heads // kv, d), K.to(q.dtype), V.to(q.dtype)
    if K.stride(2) == d and C <= 512 and heads <= 16 * kv and softcap is None and q.device.type == "cpu":
        scores = torch.baddbmm(bias, q, K.flatten(0, 1).transpose(1, 2), alpha=scale)
        y = scores.softmax(-1) @ V.flatten(0, 1)
    else:
        y = _attend(q.view(n, kv, -1, d), K, V, bias.view(n, kv, 1, C), scale, softcap)
    return y.reshape(n, heads, -1)


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
    """softmax(q·kᵀ·scale)·v where ``mask`` is true, or with ``mask`` added where it is no truth."""
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.tanh((q * scale) @ k.transpose(-1, -2) / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def install(model: nn.Module) -> str:
    """Make ``model`` attend through the paged cache; returns the name of what it used before."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return str(before)
