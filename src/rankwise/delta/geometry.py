"""How a 2-D out×in weight acts on a module's input: on the last axis, as a convolution, or as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rankwise.errors import OptionError

_CONVS = (F.conv1d, F.conv2d, F.conv3d)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a weight acts in ``nn.Linear``, on the last axis of x; base of the other layers'."""

    @property
    def channel_axis(self) -> int:
        """The axis of an output that its channels lie on."""
        return -1

    @property
    def factors(self) -> bool:
        """Whether B·A may be applied as A, then B."""
        return True

    def linear(self, x: Tensor, M: Tensor) -> Tensor:
        """M: out×in applied to x (…, in) → (…, out); a stack M: (E, out, in) acts on x (E, n, in), or on one x (n, in)."""
        return F.linear(x, M) if M.dim() == 2 else x @ M.mT

    def pointwise(self, h: Tensor, B: Tensor) -> Tensor:
        """B: out×r applied to the result h of an earlier ``linear``."""
        return F.linear(h, B) if B.dim() == 2 else h @ B.mT

    def columns(self, x: Tensor, index: Tensor) -> Tensor | None:
        """x at input columns ``index``, or None where inputs are not columns of x."""
        return x.index_select(-1, index)

    def per_channel(self, v: Tensor) -> Tensor:
        """(out,) values shaped to multiply an output."""
        return v

    def scale_out(self, y: Tensor, v: Tensor) -> Tensor:
        """Output channel j times v[j]."""
        return y * self.per_channel(v)

    def strip_bias(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y - self.per_channel(bias.to(y.dtype))

    def add_bias(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + self.per_channel(bias.to(y.dtype))


class Linear(Geometry):
    """``nn.Linear``: the last axis."""


LINEAR = Linear()


@dataclasses.dataclass(frozen=True)
class Conv(Geometry):
    """``nn.Conv1d/2d/3d`` whose kernel is M viewed as (out, in/groups, *kernel); channels are axis 1.

    Attributes:
        kernel, stride, dilation: one int per spatial axis.
        padding: one int per spatial axis, or "same" or "valid".
        groups: of the convolution; above 1 there is no factored path, so ΔW is made dense.
        padding_mode: as torch's.
        nd: number of spatial axes (1, 2 or 3).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    nd: int = 2

    @property
    def factors(self) -> bool:
        return self.groups == 1

    @property
    def channel_axis(self) -> int:
        return -1 - self.nd

    def linear(self, x: Tensor, M: Tensor) -> Tensor:
        _one(M, "convolution")
        W = M.reshape(M.shape[0], -1, *self.kernel)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._both_sides(), mode=self.padding_mode)
            padding = 0
        return _CONVS[self.nd - 1](x, W, None, self.stride, padding, self.dilation, self.groups)

    def _both_sides(self) -> list[int]:
        """F.pad's order: last axis first, both sides of each."""
        if isinstance(self.padding, str):
            total = [d * (k - 1) if self.padding == "same" else 0 for k, d in zip(self.kernel, self.dilation, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in self.padding]
        return [s for pair in reversed(sides) for s in pair]

    def pointwise(self, h: Tensor, B: Tensor) -> Tensor:
        return _CONVS[self.nd - 1](h, B.reshape(*B.shape, *([1] * self.nd)))

    def columns(self, x: Tensor, index: Tensor) -> Tensor | None:
        return None

    def per_channel(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *([1] * self.nd))


@dataclasses.dataclass(frozen=True)
class Embedding(Geometry):
    """``nn.Embedding``: the out×in weight is the transposed table; x holds ids."""

    padding_idx: int | None = None

    def linear(self, x: Tensor, M: Tensor) -> Tensor:
        return F.embedding(x, _one(M, "embedding").mT, self.padding_idx)

    def columns(self, x: Tensor, index: Tensor) -> Tensor | None:
        return None


def _one(M: Tensor, what: str) -> Tensor:
    if M.dim() != 2:
        raise OptionError(f"A stack of changes {tuple(M.shape)} cannot act in one {what}; apply each of them, out×in, by itself.")
    return M
