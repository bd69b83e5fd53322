"""Forward and backward of one training sample, a window of tokens at a time, in pieces that fit between serving steps.

Kept of a forward are the layers' inputs X_l and the keys and values K_l, V_l alone.  Backward, layer by layer from the
last and window by window from the end, runs the layer again on X_l[a:b] with the earlier keys and values as leaves:

    dX_l[a:b], dK_l[:a], dV_l[:a], dθ  =  gradient of (y, k, v) for (dX_{l+1}[a:b], dK_l[a:b], dV_l[a:b])

Keys of a window are read by that window and later ones only, so dK_l[a:b] is complete when its turn comes, and the sum
is the full sequence's gradient for any cuts, however they differ from piece to piece (after FlexLLM, 2024).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.errors import DataError, TrainingError
from rankwise.runtime.view import View, entered
from rankwise.serve.finetune.windowed_attention import Before
from rankwise.train.data.chat import IGNORED

if TYPE_CHECKING:
    from rankwise.serve.finetune.layerwise import Call, LayerwiseModel


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and their labels (−100: no loss), of equal length, at least 2.

    Raises:
        DataError: lengths that differ, fewer than two tokens, or no label after the first token.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.labels) or len(self.tokens) < 2:
            raise DataError(
                f"A sample has {len(self.tokens)} tokens and {len(self.labels)} labels; give as many of one as of the other, two at least."
            )
        if not self.learnt:
            raise DataError("A sample has no token to learn: every label after the first is -100.")

    @classmethod
    def of(cls, tokens: Sequence[int], labels: Sequence[int] | None = None) -> Sample:
        """Of ids, with every token to be learnt where no labels are given."""
        return cls(tuple(tokens), tuple(tokens if labels is None else labels))

    @property
    def learnt(self) -> int:
        """Labels that count."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class WorkPiece:
    """One piece of work.

    Attributes:
        kind: forward, loss, backward (of ``layer``) or embed.
        start, end: the tokens [start, end) that it is done on.
        cost: passes of one token through all layers, the measure of a budget.
    """

    kind: str
    start: int
    end: int
    cost: float
    layer: int = -1


class ChunkedBackward:
    """Forward and backward of one sample; gradients are added to the acting adapter's ``.grad``.

    Args:
        view: which adapters act (on ``net.model``), None for none.
        divisor: of the summed loss; the sample's own number of labels unless a batch shares one.
        most: tokens of the largest window.
    """

    def __init__(self, net: LayerwiseModel, sample: Sample, view: View | None, *, divisor: int | None = None, most: int = 256):
        self.net, self.sample, self.view, self.most = net, sample, view, most
        self.T = len(sample.tokens)
        self.divisor = sample.learnt if divisor is None else divisor
        self.ids = torch.tensor(sample.tokens, device=net.device)
        self.targets = torch.tensor([*sample.labels[1:], IGNORED], device=net.device)
        self.loss = 0.0
        self.X: list[Tensor | None] = [None] * (len(net.layers) + 1)
        self.K: list[Tensor | None] = [None] * len(net.layers)
        self.V: list[Tensor | None] = [None] * len(net.layers)
        self.dY: Tensor | None = None
        self.dK: Tensor | None = None
        self.dV: Tensor | None = None
        self.stage, self.at = "forward", 0
        self.level = len(net.layers) - 1
        self._calls: dict[tuple[int, int], list[Call]] = {}

    @property
    def finished(self) -> bool:
        return self.stage == "done"

    def saved_bytes(self) -> int:
        """Of the kept layer inputs, keys and values: after the forward (h·(L+1) + 2·h_kv·L)·T numbers, less from layer to layer."""
        return sum(t.numel() * t.element_size() for t in (*self.X, *self.K, *self.V) if t is not None)

    # --- which piece comes next -------------------------------------------------------------------------------------
    def peek(self, budget: float) -> WorkPiece:
        """The next piece, of as many tokens as ``budget`` pays for, one at least."""
        net = self.net
        rates = {"forward": 1.0, "loss": 2 * net.head_cost, "backward": 2 * net.layer_cost, "embed": net.layer_cost}
        rate = rates[self.stage]
        n = max(1, int(min(self.most, budget / rate + 1e-9)))
        layer = self.level if self.stage == "backward" else -1
        if self.stage in ("backward", "loss"):
            return WorkPiece(self.stage, max(self.at - n, 0), self.at, rate * min(n, self.at), layer)
        end = min(self.at + n, self.T)
        return WorkPiece(self.stage, self.at, end, rate * (end - self.at))

    def take(self, budget: float = math.inf) -> WorkPiece:
        """Do the next piece; what it was."""
        unit = self.peek(budget)
        piece = {"forward": self._forward, "loss": self._loss, "backward": self._backward, "embed": self._embed}[unit.kind]
        with entered(self.view) if self.view is not None else contextlib.nullcontext():
            piece(unit.start, unit.end)
        return unit

    # --- the pieces -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _forward(self, a: int, b: int) -> None:
        h, calls = self.net.enter(self.ids[a:b], a)
        for i, call in enumerate(calls):
            self._keep(self.X, i, h, 1, a, b)
            before = Before(self._earlier(i, a))
            h = self.net.layer(i, h, call, before)
            assert before.own is not None
            self._keep(self.K, i, before.own[0], 2, a, b)
            self._keep(self.V, i, before.own[1], 2, a, b)
        self._keep(self.X, len(calls), h, 1, a, b)
        self.at = b
        if b == self.T:
            self.stage = "loss"

    def _keep(self, store: list[Tensor | None], i: int, t: Tensor, axis: int, a: int, b: int) -> None:
        held = store[i]
        if held is None:
            shape = list(t.shape)
            shape[axis] = self.T
            held = store[i] = t.new_empty(shape)
        held.narrow(axis, a, b - a).copy_(t)

    def _earlier(self, i: int, a: int) -> tuple[Tensor, Tensor] | None:
        K, V = self.K[i], self.V[i]
        return None if not a or K is None or V is None else (K[:, :, :a], V[:, :, :a])

    @torch.enable_grad()
    def _loss(self, a: int, b: int) -> None:
        X = self.X[-1]
        assert X is not None
        if self.dY is None:
            self.dY = torch.zeros_like(X)
        targets = self.targets[a:b]
        if bool((targets != IGNORED).any()):
            h = X[:, a:b].detach().requires_grad_()
            logits = self.net.leave(self.ids[a:b], a, h)[0]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / self.divisor
            self.loss += float(loss.detach())
            if not math.isfinite(self.loss):
                raise TrainingError(f"The loss is {self.loss}; lower the learning rate, or look at the sample.")
            loss.backward()
            assert h.grad is not None
            self.dY[:, a:b] = h.grad
        self.at = a
        if not a:
            self.X[-1] = None
            self.stage, self.at = "backward", self.T

    @torch.enable_grad()
    def _backward(self, a: int, b: int) -> None:
        i, dY = self.level, self.dY
        X, K, V = self.X[i], self.K[i], self.V[i]
        assert X is not None and K is not None and V is not None and dY is not None
        if b == self.T:
            self.dK, self.dV = torch.zeros_like(K), torch.zeros_like(V)
        assert self.dK is not None and self.dV is not None
        x = X[:, a:b].detach().requires_grad_()
        earlier = self._earlier(i, a)
        before = Before(None if earlier is None else (earlier[0].detach().requires_grad_(), earlier[1].detach().requires_grad_()))
        y = self.net.layer(i, x, self._call(i, a, b), before)
        assert before.own is not None
        torch.autograd.backward([y, *before.own], [dY[:, a:b], self.dK[:, :, a:b], self.dV[:, :, a:b]])
        assert x.grad is not None
        dY[:, a:b] = x.grad
        if before.earlier is not None:
            for total, leaf in zip((self.dK, self.dV), before.earlier, strict=True):
                assert leaf.grad is not None
                total[:, :, :a] += leaf.grad
        self.at = a
        if not a:
            self._layer_done()

    def _call(self, i: int, a: int, b: int) -> Call:
        """Layer i's other arguments for tokens [a, b); positions and masks, so made again rather than kept from the forward."""
        if (a, b) not in self._calls:
            if len(self._calls) >= 64:
                self._calls.clear()
            with torch.no_grad():
                self._calls[a, b] = self.net.enter(self.ids[a:b], a)[1]
        return self._calls[a, b][i]

    def _layer_done(self) -> None:
        self.X[self.level] = self.K[self.level] = self.V[self.level] = None
        self.level, self.at = self.level - 1, self.T
        if self.level < 0:
            self.dK = self.dV = None
            self._calls.clear()
            self.stage, self.at = "embed", 0

    @torch.enable_grad()
    def _embed(self, a: int, b: int) -> None:
        """What reached the embedding; nothing to do where it is not trained."""
        first, _ = self.net.enter(self.ids[a:b], a)
        if not first.requires_grad:
            b = self.T
        else:
            assert self.dY is not None
            first.backward(self.dY[:, a:b])
        self.at = b
        if b == self.T:
            self.stage, self.dY = "done", None


def run(work: ChunkedBackward, forward: int, backward: int) -> float:
    """All of a pass in windows of these sizes; the loss."""
    while not work.finished:
        work.most = forward if work.stage in ("forward", "embed") else backward
        work.take()
    return work.loss
