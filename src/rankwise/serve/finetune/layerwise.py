"""A served model run layer by layer, for training: modules of its own over the very same memory.

The served model's linears and attention are taken over for good; training beside it works on a :class:`LayerwiseModel`, whose
modules are plain again and may be adapted, trained and dropped without a trace in what serves.  Any causal language
model of transformers whose decoder layers pass one hidden state on, and mix tokens in attention alone, can be one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.runtime.shared_copy import shared_copy
from rankwise.serve.finetune import windowed_attention as window
from rankwise.serve.finetune.windowed_attention import Before, attending

#: what a layer is called with beside the hidden state, for one range of tokens
Call = tuple[tuple[Any, ...], dict[str, Any]]


class LayerwiseModel:
    """A copy (:func:`~rankwise.runtime.shared_copy.shared_copy`) of a causal language model, its decoder layers called one at a time.

    Attributes:
        model: the copy, in evaluation mode, every parameter frozen; attach adapters here.
        layers: its decoder layers; ``hidden`` their width.
        layer_cost: of a pass through one layer, and ``head_cost`` of one through the head, in passes through all layers.

    Raises:
        AttachError: a model whose windowed passes do not give its own logits (only where ``check``).
    """

    def __init__(self, model: nn.Module, *, check: bool = False):
        _layers(model)  # refused before anything is copied
        expected = _own_logits(model) if check else None
        self.model = shared_copy(model, keep_forward=False).eval()
        for p in self.model.parameters():
            p.requires_grad_(False)  # quantised ones are shared: the served model is only ever read
        self.layers = _layers(self.model)
        self.backbone: nn.Module = self.model.base_model
        self._calls: list[Call] | None = None  # filled while layers are passed over
        self._first: Tensor | None = None
        self._injected: Tensor | None = None
        self._tuples = [False] * len(self.layers)
        for i, layer in enumerate(self.layers):
            layer.forward = _Passed(self, i)  # type: ignore[assignment]
        window.install(self.model)
        body = sum(p.numel() for layer in self.layers for p in layer.parameters())
        head = self.model.get_output_embeddings()
        self.layer_cost = 1 / len(self.layers)
        self.head_cost = sum(p.numel() for p in head.parameters()) / max(body, 1)
        if expected is not None:
            self._check(expected)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # --- the three pieces of a forward --------------------------------------------------------------------------
    def enter(self, ids: Tensor, start: int) -> tuple[Tensor, list[Call]]:
        """ids: (w,), the first at position ``start`` → (what enters the first layer: 1×w×h, each layer's other arguments)."""
        self._calls, self._first = [], None
        try:
            self.backbone(**self._inputs(ids, start))
            assert self._first is not None
            return self._first, self._calls
        finally:
            self._calls = self._first = None

    def layer(self, i: int, h: Tensor, call: Call, before: Before) -> Tensor:
        """What one layer makes of a window.

        Args:
            i: the layer.
            h: 1×w×h, what enters it.
            call: its other arguments, of :meth:`enter`.
            before: keys and values of the tokens before the window; the window's own are left there.
        """
        with attending(before):
            out = self.layers[i](h, *call[0], **call[1])
        self._tuples[i] = isinstance(out, tuple)
        return out[0] if self._tuples[i] else out

    def leave(self, ids: Tensor, start: int, h: Tensor) -> Tensor:
        """The logits (1×w×vocabulary) of what left the last layer, by the model's own norm, head and scaling."""
        self._calls, self._injected = [], h
        try:
            return self.model(**self._inputs(ids, start)).logits
        finally:
            self._calls = self._injected = None

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """In this block the copy runs whole sequences, as transformers does (calibration)."""
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(window.NAME)

    def _inputs(self, ids: Tensor, start: int) -> dict[str, Any]:
        positions = torch.arange(start, start + ids.shape[0], device=ids.device)
        return {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}

    # --- the probe ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _check(self, expected: Tensor) -> None:
        """Two windows of a probe must give the model's own logits, or nothing is trained."""
        ids = _probe_ids(self.model, expected.shape[0])
        earlier: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        rows = []
        try:
            for a, b in ((0, 5), (5, ids.shape[0])):
                h, calls = self.enter(ids[a:b], a)
                for i, call in enumerate(calls):
                    before = Before(earlier[i])
                    h = self.layer(i, h, call, before)
                    earlier[i] = joined(earlier[i], before.own)
                rows.append(self.leave(ids[a:b], a, h)[0].float())
            gap = float((torch.cat(rows) - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            raise self._refused(f"({type(error).__name__}: {error})") from error
        if not gap <= (1e-3 if self.dtype in (torch.float32, torch.float64) else 5e-2):
            raise self._refused(f"(its logits are off by {gap:.1e} of the largest)")

    def _refused(self, why: str) -> AttachError:
        return AttachError(
            f"{type(self.model).__name__} cannot be trained window by window {why}: some layer of it mixes tokens outside the "
            "attention interface, or passes more than one hidden state on. Train it apart, with rankwise train."
        )


class _Passed:
    """The forward of a decoder layer: its own, or none at all while only its arguments are wanted."""

    def __init__(self, net: LayerwiseModel, index: int):
        self.net, self.index = net, index

    def __call__(self, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        net, layer = self.net, self.net.layers[self.index]
        if net._calls is None:
            return type(layer).forward(layer, h, *args, **kwargs)  # looked up now: an adapter may have swapped the class
        if self.index == 0:
            net._first, h = h, h if net._injected is None else net._injected
        net._calls.append((args, kwargs))
        return (h,) if net._tuples[self.index] else h


def _layers(model: Any) -> nn.ModuleList:
    """The decoder layers: the one list of modules of that length in the model's body."""
    wanted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    body = getattr(model, "base_model", None)
    found = [m for _, m in body.named_children() if isinstance(m, nn.ModuleList) and len(m) == wanted] if body is not None else []
    if len(found) != 1 or body is model or getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise AttachError(
            f"{type(model).__name__} is no causal language model with one list of decoder layers under a head, so it cannot be "
            "trained beside serving; train it apart, with rankwise train."
        )
    return found[0]


def joined(held: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values with a window's own behind them."""
    assert own is not None
    return own if held is None else (torch.cat((held[0], own[0]), 2), torch.cat((held[1], own[1]), 2))


def _probe_ids(model: Any, n: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _own_logits(model: Any, n: int = 13) -> Tensor:
    """The plain model's logits of a probe; a model that is being served is asked through a plain copy of it."""
    plain = shared_copy(model, keep_forward=False).eval()
    plain.set_attn_implementation("eager")
    return plain(input_ids=_probe_ids(model, n)[None], use_cache=False).logits[0].float()
