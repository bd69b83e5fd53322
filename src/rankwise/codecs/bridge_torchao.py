"""Bridges to weights that are tensor subclasses: torchao's int8, int-k and NF4, and reading of any other.

The subclass holds plain inner tensors, which are overwritten in place: the Parameter, its ties and whatever
else the subclass remembers stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.codecs.bridge import Bridge, weight_of
from rankwise.errors import TargetError


class Subclass(Bridge):
    """Any tensor subclass with a ``dequantize()`` of its own: read, snapshot and restore, but no writing."""

    writable = False

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, module: nn.Module) -> Tensor:
        """``weight.dequantize()`` in fp32."""
        weight: Any = weight_of(module)
        return weight.dequantize().detach().float().clone()

    def put(self, module: nn.Module, W: Tensor) -> None:
        """Refuses: how this subclass quantises is not known."""
        raise TargetError(
            f"A weight stored as {self.name} can be read but not written here: load the base unquantised to merge "
            "into it, or keep the adapter apart."
        )

    def write(self, module: nn.Module, W: Tensor) -> Tensor:
        """Refuses, unless the subclass is one that can be written."""
        if not self.writable:
            self.put(module, W)
        return super().write(module, W)

    def snapshot(self, module: nn.Module) -> Any:
        """{name: inner tensor}, of subclasses within subclasses too."""
        return _inner(weight_of(module), copy=True)

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Copy the inner tensors back in place."""
        _fill(weight_of(module), snapshot)


class Integer(Subclass):
    """torchao's ``Int8Tensor`` and ``IntxUnpackedToInt8Tensor``, requantised by their own ``from_hp``.

    Row, group or tensor scales as ``block_size`` says; affine where a zero point is not zero, else symmetric.
    """

    writable = True

    def read(self, module: nn.Module) -> Tensor:
        """fp32 decode, also where the weight calls itself bfloat16."""
        weight: Any = weight_of(module)
        if getattr(weight, "act_pre_scale", None) is not None:
            raise TargetError(
                f"This {self.name} weight is smoothed (act_pre_scale): it is not the linear's own; use another config."
            )
        if type(weight).__name__ == "Int8Tensor":
            return weight.dequantize(torch.float32).detach().clone()
        return super().read(module)

    def put(self, module: nn.Module, W: Tensor) -> None:
        """Quantise with the block size, target and mapping that the weight has."""
        from torchao.quantization import MappingType, PerGroup, PerRow, PerTensor

        weight: Any = weight_of(module)
        block = list(weight.block_size)
        affine = weight.zero_point is not None and bool((weight.zero_point != 0).any())
        mapping = MappingType.ASYMMETRIC if affine else MappingType.SYMMETRIC
        if type(weight).__name__ == "Int8Tensor":
            shape = list(weight.shape)
            grain = PerTensor() if block == shape else PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])
            new = type(weight).from_hp(W, grain, mapping, reduce_range=bool(weight.reduce_range))
        else:
            new = type(weight).from_hp(W.to(weight.dtype), tuple(block), weight.target_dtype, mapping_type=mapping)
        _fill(weight, _inner(new))


class NF4(Subclass):
    """torchao's ``NF4Tensor`` (its ``dequantize`` is a look-up in the code book, so it is not the fallback's)."""

    writable = True

    def read(self, module: nn.Module) -> Tensor:
        """fp32 of what the tensor decodes to, in its own dtype."""
        weight: Any = weight_of(module)
        return weight.get_original_weight().detach().float().clone()

    def put(self, module: nn.Module, W: Tensor) -> None:
        """Quantise with the weight's two block sizes."""
        weight: Any = weight_of(module)
        new = type(weight).from_tensor(W.to(weight.dtype), weight.block_size, weight.scaler_block_size)
        _fill(weight, _inner(new))


_BY_CLASS = {"Int8Tensor": Integer, "IntxUnpackedToInt8Tensor": Integer, "NF4Tensor": NF4}


def subclass_bridge(weight: Tensor) -> Bridge | None:
    """The bridge of a weight that is a quantised tensor subclass; None for any other tensor."""
    cls = type(weight)
    name = f"{cls.__module__.partition('.')[0]}-{cls.__name__}"
    if cls.__module__.startswith("torchao.") and cls.__name__ in _BY_CLASS:
        return _BY_CLASS[cls.__name__](name)
    return Subclass(name) if getattr(cls, "dequantize", None) is not torch.Tensor.dequantize else None


def _inner(tensor: Any, copy: bool = False) -> dict[str, Any]:
    """The plain tensors within a subclass, nested as it nests them."""
    if not hasattr(tensor, "__tensor_flatten__"):
        raise TargetError(
            f"A {type(tensor).__name__} does not show its inner tensors (__tensor_flatten__); it cannot be kept safe."
        )
    out = {}
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        out[name] = _inner(part, copy) if hasattr(part, "__tensor_flatten__") else part.detach().clone() if copy else part
    return out


def _fill(tensor: Any, inner: dict[str, Any]) -> None:
    """Copy ``inner`` into the plain tensors of ``tensor``; all shapes are compared before one is touched."""
    plan = list(_pairs(tensor, inner))
    if any(old.shape != new.shape for old, new in plan):
        raise TargetError(f"The parts of a {type(tensor).__name__} changed shape when requantised; it cannot be written in place.")
    with torch.no_grad():
        for old, new in plan:
            old.copy_(new)


def _pairs(tensor: Any, inner: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    out: list[tuple[Tensor, Tensor]] = []
    for name, part in inner.items():
        old = getattr(tensor, name)
        out += _pairs(old, part) if isinstance(part, dict) else [(old, part)]
    return out
