"""int-k: groups of a row as evenly spaced integers, symmetric by absmax or affine with a zero point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.codecs.base import (
    SCALE_DTYPES,
    Codec,
    State,
    cast_scale,
    checked_range,
    checked_weight,
    pack_codes,
    packed_bytes,
    scale_dtype,
    unpack_codes,
)  # fmt: skip
from rankwise.errors import OptionError


@register("codec", "intk", title="Groupwise int-k, symmetric or affine", paper="ZeroQuant, arXiv:2206.01861")
@dataclasses.dataclass
class IntK(Codec):
    """Groupwise integers of k bits along the last axis; ``group`` entries share a scale, 0 is a whole row.

    Symmetric: c = max|w|, m = 2^{k−1} − 1, q = round(w/c·m), ŵ = q/m·c: the largest entry of a group decodes
    exactly and decode∘encode is idempotent.
    Affine (``symmetric=False``): lo = min(0, min w), hi = max(0, max w), s = (hi − lo)/(2^k − 1), z = round(−lo/s),
    q = clamp(round(w/s) + z, 0, 2^k − 1), ŵ = s·(q − z): zero is exact, codes are idempotent, values to rounding.
    A row's last group may be short; groups never cross rows; a group of zeros decodes to zeros.
    Bits: k + b/group, and k/group more for the zero points, with b the bits of ``scale_dtype`` (int4 at group 64
    with fp32 scales: 4.5).

    Raises OptionError for options out of range, weights that are empty, not floating or not finite, and scales
    that overflow ``scale_dtype``.

    Args:
        k: bits of a code.
        group: entries that share a scale; 0: a whole row.
        symmetric: codes around 0; else each group has an offset.
        scale_dtype: what scales are stored in: float32, bfloat16 or float16.
    """

    k: int = 4
    group: int = 64
    symmetric: bool = True
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        checked_range("intk", "k", self.k, 2, 8)
        checked_range("intk", "group", self.group, 0)
        if not isinstance(self.symmetric, bool):
            raise OptionError(f"intk got symmetric={self.symmetric!r}; give true or false.")
        self._dtype = scale_dtype("intk", self.scale_dtype)

    def encode(self, W: Tensor) -> State:
        """``codes`` and, where affine, ``zero`` (packed uint8), and ``scale``, one a group."""
        groups, valid = self._groups(checked_weight(W, "intk"))
        state: State = {"shape": tuple(W.shape)}
        if self.symmetric:
            top = 2 ** (self.k - 1) - 1
            scale = cast_scale(groups.abs().amax(1), self._dtype, "intk")
            c = scale.float()[:, None]
            codes = torch.round(groups / torch.where(c > 0, c, 1.0) * top).clamp(-top, top) + top
        else:
            top = 2**self.k - 1
            low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
            scale = cast_scale((high - low) / top, self._dtype, "intk")
            s = torch.where(scale > 0, scale.float(), 1.0)
            zero = torch.round(-low / s).clamp(0, top)
            codes = (torch.round(groups / s[:, None]) + zero[:, None]).clamp(0, top)
            state["zero"] = pack_codes(zero, self.k)
        return state | {"codes": pack_codes(codes[valid], self.k), "scale": scale}

    def decode(self, state: Mapping[str, Any]) -> Tensor:
        """fp32 Ŵ of shape ``state["shape"]``."""
        shape = state["shape"]
        size, each = self._layout(shape)
        rows = math.prod(shape[:-1])
        codes = unpack_codes(state["codes"], self.k, rows * shape[-1]).float().reshape(rows, shape[-1])
        scale = state["scale"].float()
        if self.symmetric:
            top = 2 ** (self.k - 1) - 1
            return ((codes - top) / top * _spread(scale, rows, size, shape[-1])).reshape(shape)
        zero = unpack_codes(state["zero"], self.k, rows * each).float()
        out = _spread(scale, rows, size, shape[-1]) * (codes - _spread(zero, rows, size, shape[-1]))
        return out.reshape(shape)

    def bits(self, shape: Sequence[int]) -> float:
        """Bits per parameter of the state's tensors."""
        n, groups = math.prod(shape), math.prod(shape[:-1]) * self._layout(shape)[1]
        total = packed_bytes(n, self.k) + groups * SCALE_DTYPES[self.scale_dtype].itemsize
        if not self.symmetric:
            total += packed_bytes(groups, self.k)
        return 8 * total / n

    def _layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """(entries of a group, groups of a row)."""
        size = min(self.group or shape[-1], shape[-1])
        return size, math.ceil(shape[-1] / size)

    def _groups(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Groups (G, size) with tails filled by zeros, and the mask of entries that are not filling."""
        if W.dim() == 0:
            raise OptionError("intk got a weight without axes; give at least one axis to group along.")
        size, _ = self._layout(W.shape)
        fill = (0, -W.shape[-1] % size)
        rows = W.reshape(-1, W.shape[-1])
        valid = torch.nn.functional.pad(torch.ones_like(rows, dtype=torch.bool), fill)
        return torch.nn.functional.pad(rows, fill).reshape(-1, size), valid.reshape(-1, size)


def _spread(constant: Tensor, rows: int, size: int, width: int) -> Tensor:
    """One constant a group → (rows, width), each over its group's entries."""
    return constant.reshape(rows, -1).repeat_interleave(size, dim=1)[:, :width]
