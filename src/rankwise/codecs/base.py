"""The two seams of storage: a weight codec (tensor ↔ state) and an adapter codec (named tensors ↔ bytes).

A weight codec maps W to a state of tensors that hold exactly the bits its ledger counts, and back to fp32 Ŵ;
an adapter codec maps a whole set of tensors to one self-describing stream.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rankwise.errors import ArtefactError, OptionError

if TYPE_CHECKING:
    from rankwise.catalogue import MethodInfo

State = dict[str, Any]

#: what a constant (absmax, scale, offset) may be stored in, and its bits
SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Codec(ABC):
    """A format for one weight.  Subclasses are dataclasses; their fields are the options.

    ``differentiable`` says whether ``decode`` carries a gradient into the state (a codebook) or the state is
    constant (nf4, int-k).
    """

    info: ClassVar[MethodInfo]
    differentiable: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name under which the codec is registered."""
        return self.info.name

    @abstractmethod
    def encode(self, W: Tensor) -> State:
        """The state of ``W`` (any floating dtype and shape): tensors, and ``shape`` as a tuple."""

    @abstractmethod
    def decode(self, state: Mapping[str, Any]) -> Tensor:
        """fp32 Ŵ of the encoded shape, on the state's device."""

    @abstractmethod
    def bits(self, shape: Sequence[int]) -> float:
        """Stored bits per parameter for a weight of ``shape``, constants included: what the state's tensors hold."""


class AdapterCodec(ABC):
    """A format for a set of named tensors, taken in sorted-name order as one vector of d entries.

    ``exact`` says whether decoding gives back the very bits.
    """

    info: ClassVar[MethodInfo]
    exact: bool = False
    relative: ClassVar[bool] = False  # True where a stream is a difference from another adapter, given by ``bind``
    searchable: ClassVar[bool] = False  # True where its option ``alpha`` may be chosen by a score (:mod:`rankwise.codecs.search`)

    def bind(self, reference: Mapping[str, Tensor]) -> AdapterCodec:
        """The same codec against ``reference``, the tensors of another adapter; only a ``relative`` codec has one."""
        raise OptionError(f"The codec {self.name!r} needs no other adapter; leave the reference out.")

    @property
    def name(self) -> str:
        """The name under which the codec is registered."""
        return self.info.name

    @abstractmethod
    def encode_tensors(self, tensors: Mapping[str, Tensor]) -> bytes:
        """One stream that holds ``tensors`` (floating), with their names, shapes and dtypes."""

    @abstractmethod
    def decode_tensors(self, data: bytes) -> dict[str, Tensor]:
        """The tensors of a stream of this codec; a damaged one raises ArtefactError and nothing else."""

    @abstractmethod
    def bits(self, numel: int | None = None) -> float:
        """Expected bits per parameter of the stream's body; ``numel`` adds the constants of a vector so long."""


def checked_weight(W: Tensor, codec: str) -> Tensor:
    """``W`` as detached fp32, or OptionError if it is empty, not floating or not finite."""
    if not W.is_floating_point() or W.numel() == 0:
        raise OptionError(
            f"{codec} got a weight of shape {tuple(W.shape)} and dtype {W.dtype}; give a floating weight with entries."
        )
    W = W.detach().float()
    if not torch.isfinite(W).all():
        raise OptionError(f"{codec} got a weight with nan or infinite entries; mend the weight first.")
    return W


def checked_range(codec: str, option: str, value: int, low: int, high: int | None = None) -> None:
    """OptionError unless ``value`` is an integer in [low, high].

    Args:
        codec: for the message.
        option: for the message.
        value: what was given.
        low: the least allowed.
        high: the most allowed; None: no bound.
    """
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not ok:
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise OptionError(f"{codec} got {option}={value!r}; give a whole number {span}.")


def scale_dtype(codec: str, name: str) -> torch.dtype:
    """The dtype that option ``scale_dtype`` names."""
    if name not in SCALE_DTYPES:
        raise OptionError(f"{codec} got scale_dtype={name!r}; give one of {', '.join(SCALE_DTYPES)}.")
    return SCALE_DTYPES[name]


def cast_scale(scale: Tensor, dtype: torch.dtype, codec: str) -> Tensor:
    """``scale`` in its stored dtype; OptionError where it would overflow."""
    out = scale.to(dtype)
    if not torch.isfinite(out).all():
        raise OptionError(f"{codec}: a scale of {scale.abs().max().item():.3g} does not fit {dtype}; use scale_dtype='float32'.")
    return out


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits packed without gaps."""
    return math.ceil(count * bits / 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) in [0, 2^bits) → uint8 (⌈n·bits/8⌉,), least significant bit first, on their device."""
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat
    shifts = torch.arange(bits, dtype=torch.uint8, device=flat.device)
    stream = ((flat[:, None] >> shifts) & 1).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 (count,).  ArtefactError if ``packed`` has another length."""
    size = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or packed.numel() != size:
        raise ArtefactError(
            f"The codes are {packed.numel()} entries of {packed.dtype}; {count} codes of {bits} bits take {size} bytes."
        )
    if bits == 8:
        return packed.reshape(-1)
    stream = (packed.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    stream = stream.reshape(-1)[: count * bits].reshape(count, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(1, dtype=torch.uint8)
