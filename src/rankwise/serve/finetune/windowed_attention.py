"""Attention of one window of a training sample: its queries over the keys and values of earlier windows and its own.

transformers calls the function registered as :data:`NAME` with queries, keys and values after rotary embedding; what
lies before the window is found in ``forward_context.window``, which also keeps the window's own keys and values, with their graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.runtime.context import forward_context

NAME = "rankwise_window"


@dataclasses.dataclass(slots=True, eq=False)
class Before:
    """What one layer's attention finds and leaves.

    Attributes:
        earlier: keys and values of all tokens before the window, each (1, kv heads, start, d), or None at the start.
        own: the window's, set by the call.
    """

    earlier: tuple[Tensor, Tensor] | None = None
    own: tuple[Tensor, Tensor] | None = None


@contextlib.contextmanager
def attending(before: Before) -> Iterator[Before]:
    """Set what the next layer's attention on this thread reads."""
    held, forward_context.window = forward_context.window, before
    try:
        yield before
    finally:
        forward_context.window = held


def window_attention(
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
    """What transformers calls: attention of one window, as ((1, w, heads, d), None).

    Args:
        module: not read.
        query: (1, heads, w, d); ``key``, ``value``: (1, kv heads, w, d).
        attention_mask: not read: a window is causal after what is before it.
        scaling: of the scores (default: d^−½).
        sliding_window: keys that a query sees at most; ``softcap``: s → softcap·tanh(s/softcap) on the scaled scores.
    """
    before = forward_context.window
    if before is None or before.own is not None:
        raise AttachError("Windowed attention serves one layer at a time; this model attends outside its decoder layers.")
    if kwargs.get("s_aux") is not None:
        raise AttachError("Attention sinks are not trained beside serving; use a model without them.")
    before.own = key, value
    if before.earlier is not None:
        key, value = (torch.cat(pair, 2) for pair in zip(before.earlier, (key, value), strict=True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _mask(query.shape[2], key.shape[2], sliding_window, query.device)
    if softcap is not None:
        return _capped(query, key, value, mask, scale, softcap).transpose(1, 2), None
    shared = query.shape[1] != key.shape[1]
    y = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared
    )
    return y.transpose(1, 2), None


def _mask(w: int, end: int, sliding: int | None, device: torch.device) -> Tensor | None:
    """(w, end): which keys a query sees, or None where plain causality from position 0 is meant."""
    if w == end and (sliding is None or end <= sliding):
        return None
    at = torch.arange(end - w, end, device=device)[:, None]
    seen = torch.arange(end, device=device)[None]
    return (seen <= at) if sliding is None else (seen <= at) & (seen > at - sliding)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh((query @ key.transpose(-1, -2)) * (scale / softcap)) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def install(model: nn.Module) -> None:
    """Make ``model`` attend window by window."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, window_attention)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
