"""nf-k: blocks of a weight as nearest quantiles of a normal, with doubly quantised block scales."""

from __future__ import annotations

import dataclasses
import functools
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

#: the published probability of the outermost level: the mean of 1 − 1/32 and 1 − 1/30
DELTA = 0.9677083


@functools.cache
def levels(bits: int) -> Tensor:
    """The 2^bits ascending levels (fp32) from −1 to 1, zero among them, one more above zero than below."""
    half = 2 ** (bits - 1)
    below = torch.special.ndtri(torch.linspace(1 - DELTA, 0.5, half, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, DELTA, half + 1, dtype=torch.float64))
    out = torch.cat([below[:-1], above]) / above[-1]
    out[0], out[half - 1] = -1.0, 0.0
    return out.float()


@register("codec", "nf4", title="nf-k: normal-float blocks", paper="QLoRA, arXiv:2305.14314", reference="180")
@dataclasses.dataclass
class NormalFloat(Codec):
    """Blockwise k-bit normal-float codes with optional double quantisation of the block scales.

    W is flattened to blocks of ``block`` (the last may be short); c_b = max|w|, code = nearest level to w/c_b
    (boundaries are midpoints), ŵ = level·c_b.  Levels: Φ⁻¹ of 2^{k−1} even steps in [1−δ, ½] and 2^{k−1}+1 in
    [½, δ], one zero dropped, over Φ⁻¹(δ), δ = 0.9677083 for every k (as LQ-LoRA keeps it).
    Double quantisation (``double_quant``), in blocks of ``scale_block`` scales, with o one fp32 a weight:
    ``scale_offset="mean"`` (QLoRA): o = mean c, (c − o) in signed ``scale_bits`` by absmax; ``"min"`` (LQ-LoRA):
    o = min c, (c − o) in unsigned ``scale_bits``.  The outer scale is kept in ``scale_dtype``.
    Bits: k + b₀/B₀ + b₁/(B₀B₁): 4.127 at the defaults, 4.5 without double quantisation.

    Without double quantisation decode∘encode is idempotent and a block's largest entry decodes exactly; a
    block of zeros decodes to zeros.  Published code and paper part ways in the 8-bit map of the scales
    (bitsandbytes: a dynamic map, torchao: plain int8); plain integers were built.

    Raises OptionError for options out of range and for weights that are empty, not floating or not finite.

    Args:
        k: bits of a code.
        block: entries that share a scale.
        double_quant: quantise the scales too.
        scale_bits: of a quantised scale.
        scale_block: scales that share one of their own.
        scale_dtype: what the last scales are stored in: float32, bfloat16 or float16.
        scale_offset: what is taken off the scales first.
    """

    k: int = 4
    block: int = 64
    double_quant: bool = True
    scale_bits: int = 8
    scale_block: int = 256
    scale_dtype: str = "float32"
    scale_offset: str = "mean"

    def __post_init__(self) -> None:
        checked_range("nf4", "k", self.k, 2, 8)
        checked_range("nf4", "block", self.block, 1)
        checked_range("nf4", "scale_bits", self.scale_bits, 2, 8)
        checked_range("nf4", "scale_block", self.scale_block, 1)
        self._outer_dtype = scale_dtype("nf4", self.scale_dtype)
        if self.scale_offset not in ("mean", "min"):
            raise OptionError(f"nf4 got scale_offset={self.scale_offset!r}; give 'mean' or 'min'.")

    def encode(self, W: Tensor) -> State:
        """Codes (packed uint8) and either ``scale`` (fp32, one a block) or ``scale_codes``, ``outer``, ``offset``."""
        flat = checked_weight(W, "nf4").reshape(-1)
        blocks = _blocks(flat, self.block)
        c = blocks.abs().amax(1)
        table = levels(self.k).to(flat.device)
        unit = blocks / torch.where(c > 0, c, 1.0)[:, None]
        codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).reshape(-1)[: flat.numel()]
        state: State = {"shape": tuple(W.shape), "codes": pack_codes(codes, self.k)}
        return state | (self._encode_scales(c) if self.double_quant else {"scale": c})

    def decode(self, state: Mapping[str, Any]) -> Tensor:
        """fp32 Ŵ of shape ``state["shape"]``."""
        n = math.prod(state["shape"])
        codes = unpack_codes(state["codes"], self.k, n)
        c = self._decode_scales(state, math.ceil(n / self.block)) if self.double_quant else state["scale"]
        values = levels(self.k).to(codes.device)[codes.int()]
        return (values * c.repeat_interleave(self.block)[:n]).reshape(state["shape"])

    def bits(self, shape: Sequence[int]) -> float:
        """Bits per parameter of the state's tensors (the short last blocks, and o, counted)."""
        n = math.prod(shape)
        blocks = math.ceil(n / self.block)
        total = 8 * packed_bytes(n, self.k)
        if self.double_quant:
            outer = math.ceil(blocks / self.scale_block) * SCALE_DTYPES[self.scale_dtype].itemsize
            total += 8 * (packed_bytes(blocks, self.scale_bits) + outer) + 32
        else:
            total += 32 * blocks
        return total / n

    def _steps(self) -> tuple[int, int]:
        """(largest code's value, shift that makes codes unsigned) of the inner quantiser of scales."""
        top = 2 ** (self.scale_bits - 1) - 1
        return (top, top) if self.scale_offset == "mean" else (2**self.scale_bits - 1, 0)

    def _encode_scales(self, c: Tensor) -> State:
        top, shift = self._steps()
        offset = (c.mean() if self.scale_offset == "mean" else c.min()).reshape(1)
        blocks = _blocks(c - offset, self.scale_block)
        outer = cast_scale(blocks.abs().amax(1), self._outer_dtype, "nf4")
        span = outer.float()
        codes = torch.round(blocks / torch.where(span > 0, span, 1.0)[:, None] * top).clamp(-shift, top) + shift
        packed = pack_codes(codes.reshape(-1)[: c.numel()], self.scale_bits)
        return {"scale_codes": packed, "outer": outer, "offset": offset}

    def _decode_scales(self, state: Mapping[str, Any], count: int) -> Tensor:
        top, shift = self._steps()
        codes = unpack_codes(state["scale_codes"], self.scale_bits, count).float() - shift
        outer = state["outer"].float().repeat_interleave(self.scale_block)[:count]
        return codes / top * outer + state["offset"]


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) → (⌈n/size⌉, size), the tail filled with zeros, which no absmax sees."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
