"""Which bridge a module's quantised weight needs, told by the names of classes, so no library is imported to look.

A module whose format is not known is refused by name: taken for a float weight it would be adapted wrongly.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.codecs.bridge import Bridge
from rankwise.codecs.bridge_bnb import Bits4, Bits8
from rankwise.codecs.bridge_torchao import subclass_bridge
from rankwise.errors import TargetError

__all__ = ["Bridge", "find_bridge", "is_quantised", "keep_stored"]

_BNB: dict[str, Bridge] = dict.fromkeys(("Linear4bit", "Embedding4bit"), Bits4())
_BNB |= dict.fromkeys(("Linear8bitLt", "Embedding8bit"), Bits8())
#: where the quantised linears of other libraries are defined
_QUANTISERS: tuple[str, ...] = (
    "bitsandbytes",
    "torchao",
    "torch.ao.nn",
    "optimum.quanto",
    "quark",
    "compressed_tensors",
    "diffusers.quantizers",
)
_QUANTISERS += (
    "auto_gptq",
    "gptqmodel",
    "awq",
    "hqq",
    "aqlm",
    "eetq",
    "vptq",
    "spqr_quant",
    "fp_quant",
    "transformers.integrations",
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_bridge(module: nn.Module) -> Bridge | None:
    """The bridge for ``module``'s weight; None where the module itself is not quantised (containers included).

    Subclasses made on the fly are seen through, so an adapted module has the bridge of its base.

    Raises TargetError, with the class's name, where the weight is quantised in a way that is not known.
    """
    weight = module._parameters.get("weight")
    by_class, quantiser = _of_class(type(module))  # type: ignore[arg-type]  # a class is hashable
    if weight is not None:
        if by_class is not None:
            return by_class
        bridge = None if type(weight) in (nn.Parameter, Tensor) else subclass_bridge(weight)
        if bridge is not None:
            return bridge
    foreign = _foreign(module, weight, quantiser)
    if foreign:
        raise TargetError(
            f"{foreign} is quantised in a way that rankwise cannot read; known are bitsandbytes' 4-bit and 8-bit "
            "layers and torchao's tensors. Leave it out of the targets, or load the base in one of these or as floats."
        )
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module``'s own weight is quantised, in a known way or not; never raises."""
    try:
        return find_bridge(module) is not None
    except TargetError:
        return True


def keep_stored(model: nn.Module) -> None:
    """Keep the forwards of ``model`` from changing what its quantised weights store, as attaching an adapter does.

    bitsandbytes' 4-bit linears else repack themselves at the first inference on some processors.  What is not known is left.

    Raises TargetError where that has happened already.
    """
    for module in model.modules():
        try:
            bridge = find_bridge(module)
        except TargetError:  # only a target that names it is refused
            continue
        if bridge is not None:
            bridge.keep(module)


def _foreign(module: nn.Module, weight: Tensor | None, quantiser: str) -> str:
    """The name of a quantised module without a bridge, else ""; ``quantiser`` is its class's, where a library of them defines it."""
    if quantiser:
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if isinstance(t, Tensor)]
        if own or "_packed_params" in module._modules:  # torch's own keeps the weight in a child; a container has none
            return quantiser
    cls = type(module)
    if weight is not None and (weight.is_quantized or not (weight.dtype in _FLOATS or weight.is_complex())):
        return f"{cls.__module__}.{cls.__name__} with its {weight.dtype} weight"
    if "qweight" in module._parameters or "qweight" in module._buffers:
        return f"{cls.__module__}.{cls.__name__} with its 'qweight'"
    return ""


@functools.cache
def _of_class(cls: Any) -> tuple[Bridge | None, str]:
    """(the bridge of a bitsandbytes class, the name of a class that a library of quantised layers defines or ""), looked up once a class."""
    bridge, quantiser = None, ""
    for base in cls.__mro__:
        if issubclass(base, nn.Module):  # mixins of a library are not its layers
            if bridge is None and _within(base.__module__, "bitsandbytes"):
                bridge = _BNB.get(base.__name__)
            if not quantiser and any(_within(base.__module__, package) for package in _QUANTISERS):
                quantiser = f"{base.__module__}.{base.__name__}"
    return bridge, quantiser


def _within(path: str, package: str) -> bool:
    return path == package or path.startswith(package + ".")
