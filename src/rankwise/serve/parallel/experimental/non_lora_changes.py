"""Changes beside an adapter's pairs that are cut over devices: a gain of each output (DoRA's), an offset (a bias's change).

    Δy = g ⊙ y + o      column-parallel: g[rows], o[rows]      row-parallel: g on every device's partial sum (Σ_n g ⊙ y_n = g ⊙ Σ_n y_n),
                                                               o on the first alone, so that the sum holds it once

y: n×out, the base's output without bias; g, o: (out,).  Any other change needs the whole weight or the whole x.
Errors: AdapterRefused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.delta.affine import Scale
from rankwise.serve.adapters.non_lora_changes import Constant, Offset, Weighted
from rankwise.serve.types import AdapterRefused

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter, NonLoraChange
    from rankwise.serve.parallel.experimental.shares import Share


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """Δy = gain ⊙ y + offset over this device's outputs; a :data:`~rankwise.serve.adapters.base.NonLoraChange`."""

    gain: Tensor
    offset: Tensor

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(self.offset.to(y.dtype), y, self.gain.to(y.dtype))


def is_affine(change: NonLoraChange) -> bool:
    """Whether a change looks at the base's output alone, each output at its own."""
    if isinstance(change, Weighted):
        return is_affine(change.inner)
    return isinstance(change, Offset) or (
        isinstance(change, Constant)
        and isinstance(change.value, Scale)
        and change.value.axis == "out"
        and change.value.gain.dim() == 1
    )


def check(served: LoadedAdapter, share: Share, head: str) -> None:
    """Raises AdapterRefused where an adapter has what is not cut: at the linears of the layers only gains and offsets are;
    the head, which the first device has whole, may be changed in any way."""
    wrong = [
        m for m, those in served.non_lora_changes.items() if m != head and not (m in share.cuts and all(map(is_affine, those)))
    ]
    wrong += [p for p in served.full_params if p.rpartition(".")[0] != head]
    if wrong:
        raise AdapterRefused(
            f"The adapter {served.manifest.name!r} changes {wrong[0]!r} by more than a low-rank pair, a gain of outputs and a bias, which "
            "is not served on several devices; serve it without --tensor-parallel."
        )


def local(served: LoadedAdapter, share: Share) -> dict[str, tuple[NonLoraChange, ...]]:
    """The non-LoRA changes of a checked adapter at the cut modules, as this device makes them: one a module."""
    outs = {m: out for g in share.whole.values() for m, out in zip(g.modules, g.outs, strict=True)}
    return {m: (_cut(those, outs[m], m, share),) for m, those in served.non_lora_changes.items() if m in share.cuts}


def _cut(changes: Iterable[NonLoraChange], out: int, module: str, share: Share) -> Affine:
    gain, offset = _of(changes, out)
    rows = share.cuts[module].out
    if rows is not None:
        return Affine(gain[rows], offset[rows])
    return Affine(gain, offset if share.rank == 0 else torch.zeros_like(offset))


def _of(changes: Iterable[NonLoraChange], out: int) -> tuple[Tensor, Tensor]:
    """(g, o) in fp32, read off what the changes do to outputs of one and of zero."""
    ones, none = torch.ones(1, out), torch.zeros(1, out)
    at_none = sum((c(none, none)[0] for c in changes), none[0])
    return sum((c(none, ones)[0] for c in changes), none[0]) - at_none, at_none
