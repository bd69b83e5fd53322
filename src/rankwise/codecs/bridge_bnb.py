"""Bridges to bitsandbytes: 4-bit (nf4, fp4; scales doubly quantised or not) and 8-bit rows, linears and embeddings.

The library keeps a weight's constants beside it, in two places that its forward moves them between; these
bridges write to where they are now.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.codecs.bridge import Bridge, weight_of
from rankwise.errors import TargetError


class Bits4(Bridge):
    """``Linear4bit`` and ``Embedding4bit``: packed codes in ``weight.data``, constants in a ``QuantState``.

    An inference forward on a processor with AVX512-bf16 repacks both in place (rounding the scales to bf16, and failing
    where a row is no multiple of the block); a module that :meth:`keep` was called on computes from the stored form.
    ``read`` understands a packed weight, and ``write`` goes back to the plain form.
    """

    name = "bitsandbytes-4bit"

    def keep(self, module: nn.Module) -> None:
        """By the module's own switch; a packed weight is refused, for it passes no gradient and its scales are lost."""
        state = getattr(weight_of(module), "quant_state", None) or getattr(module, "quant_state", None)
        if _packed(state):
            raise TargetError(
                f"An inference forward of bitsandbytes has repacked this {type(module).__name__} for the processor and rounded its "
                "scales, so it is no longer the base that was loaded; load it again, and attach adapters (or call "
                "rankwise.codecs.keep_stored(model)) before its first forward."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            switched: Any = module
            switched.support_avx512bf16_for_cpu = False

    def read(self, module: nn.Module) -> Tensor:
        """fp32 decode, also where the state's own dtype is bfloat16."""
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(_state(module))
        data = weight_of(module).data
        if _packed(state):
            data, state = _unpack(data, state)
        state.dtype = torch.float32
        return dequantize_4bit(data, state).reshape(state.shape).float()

    def put(self, module: nn.Module, W: Tensor) -> None:
        """Quantise with the block size, type, nesting and storage dtype that the weight has."""
        from bitsandbytes.functional import quantize_4bit

        old, weight = _state(module), weight_of(module)
        packed = _packed(old)
        data, state = quantize_4bit(
            W.contiguous(),
            blocksize=old.blocksize,
            quant_type=old.quant_type,
            compress_statistics=old.original_nested if packed else old.nested,
            quant_storage=getattr(weight, "quant_storage", torch.uint8),
        )
        state.dtype = old.original_dtype if packed else old.dtype
        _store(module, data, state)

    def snapshot(self, module: nn.Module) -> Any:
        """(codes, constants)."""
        return weight_of(module).data.clone(), copy.deepcopy(_state(module))

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Codes and constants, in the packing they had."""
        data, state = snapshot
        _store(module, data.clone(), copy.deepcopy(state))

    def settle(self, module: nn.Module) -> None:
        """Out of the processor's packing: the library saves scales that were never nested in packed order, which no reader undoes."""
        state = copy.copy(_state(module))
        if _packed(state):
            data, state = _unpack(weight_of(module).data, state)
            state.packing_format_for_cpu, state.nested, state.dtype = False, False, state.original_dtype
            storage = getattr(state, "original_storage_type", None)
            data = data.reshape(state.original_qshape)
            _store(module, data if storage is None else data.view(storage), state)


def _state(module: nn.Module) -> Any:
    """The QuantState, which FSDP may have left on the module only."""
    state = getattr(weight_of(module), "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise _not_yet(module)
    return state


def _not_yet(module: nn.Module) -> TargetError:
    return TargetError(
        f"A {type(module).__name__} still holds the float weight it was built with; quantise it first, by .to(device)."
    )


def _store(module: nn.Module, data: Tensor, state: Any) -> None:
    weight: Any = weight_of(module)
    weight.data, weight.quant_state = data, state
    if hasattr(module, "quant_state"):
        module.quant_state = state


def _packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _unpack(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Plain codes and constants of the processor's packing; ``state`` is a copy and may be changed.

    Not the library's own inverse, for that leaves scales that were never nested in packed order.
    """
    n, k = state.shape
    # 32 bytes are two columns of 32 rows: rows 0–15 in the low half bytes, rows 16–31 in the high
    both = data.reshape(-1, 32)
    codes = torch.cat([both & 15, both >> 4], -1).reshape(n // 32, k // 2, 32, 2).transpose(1, 2).reshape(-1)
    state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    return ((codes[::2] << 4) | codes[1::2]).reshape(-1, 1), state


class Bits8(Bridge):
    """``Linear8bitLt`` and ``Embedding8bit``: int8 rows ``CB`` with ``SCB`` = max|row|, ŵ = CB·SCB/127.

    The first forward moves both from the weight to ``module.state``.  With ``has_fp16_weights`` the float weight
    is what is stored, and the state a cache that is dropped here when the weight changes.
    """

    name = "bitsandbytes-8bit"

    def read(self, module: nn.Module) -> Tensor:
        """CB·SCB/127, or the float weight of ``has_fp16_weights``."""
        if _keeps_float(module):
            return weight_of(module).data.float().clone()
        home = _home(module)
        return home.CB.float() * (home.SCB.float() / 127.0)[:, None]

    def put(self, module: nn.Module, W: Tensor) -> None:
        """Rows by their absmax, in fp32 (the library rounds to fp16 first and divides rows of zeros by zero)."""
        if _keeps_float(module):
            _put_float(module, W)
            return
        scale = W.abs().amax(1)
        codes = torch.round(W * (127.0 / torch.where(scale > 0, scale, 1.0))[:, None]).to(torch.int8)
        self.restore(module, (codes, scale))

    def snapshot(self, module: nn.Module) -> Any:
        """(CB, SCB), or the float weight alone."""
        if _keeps_float(module):
            return (weight_of(module).data.clone(),)
        home = _home(module)
        return home.CB.clone(), home.SCB.clone()

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """To where the module keeps them now, before or after its first forward."""
        if _keeps_float(module):
            _put_float(module, snapshot[0])
            return
        codes, scale = (t.clone() for t in snapshot)
        home: Any = _home(module)
        home.CB, home.SCB = codes, scale
        weight_of(module).data = codes


def _put_float(module: Any, W: Tensor) -> None:
    """Into the float weight; the codes that the last forward left are dropped."""
    weight_of(module).data.copy_(W)
    module.state.reset_grads()


def _keeps_float(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "state", None), "has_fp16_weights", False))


def _home(module: nn.Module) -> Any:
    """The object that holds CB and SCB: the weight until the first forward, then ``module.state``."""
    weight = weight_of(module)
    home = weight if getattr(weight, "CB", None) is not None else getattr(module, "state", None)
    if getattr(home, "CB", None) is None or getattr(home, "SCB", None) is None:
        raise _not_yet(module)
    return home
