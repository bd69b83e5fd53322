"""A vector as signs on a few positions times one magnitude: the value that ComPEFT and ternary planes store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.codecs.stream import DTYPES
from rankwise.errors import ArtefactError, OptionError

if TYPE_CHECKING:
    from rankwise.codecs.bits import I64

F64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Signs:
    """τ̂ = γ·sign on sorted ``positions`` of a vector of ``numel`` entries, zero elsewhere.

    Args:
        numel: entries of the vector.
        positions: of those that are not zero, rising.
        negative: of each position, whether it is −γ.
        gamma: the magnitude.
    """

    numel: int
    positions: I64
    negative: NDArray[np.bool_]
    gamma: float

    def dense(self) -> NDArray[np.float32]:
        """fp32 (numel,); γ is a bfloat16 number, so fp32 holds it exactly."""
        out = np.zeros(self.numel, np.float32)
        out[self.positions] = np.where(self.negative, -self.gamma, self.gamma)
        return out


def prune(tau: F64, density: float, alpha: float, dtypes: Sequence[str], where: str) -> Signs:
    """The int(density·d) largest of ``tau`` (d,) as signs, with γ = alpha·std(tau) in bfloat16.

    Ties go to the first; where there are fewer non-zeros, all of them are kept.  A vector that already is such a
    value keeps its own γ.  OptionError where nothing would be kept, or a dtype of ``dtypes`` cannot hold γ.

    Args:
        tau: the vector, fp64.
        density: the share kept, in (0, 1].
        alpha: γ in standard deviations of tau.
        dtypes: of the tensors that γ is written into.
        where: for the message.
    """
    size = np.abs(tau)
    keep, nonzero = int(density * tau.size), int(np.count_nonzero(tau))
    if keep == 0:
        raise OptionError(f"density={density} keeps none of the {tau.size} entries of {where}; raise it above 1/{tau.size}.")
    positions = _largest(size, min(keep, nonzero))
    gamma = float(size.max())
    if nonzero > keep or to_bf16(gamma) != gamma or not np.all(size[positions] == gamma):
        gamma = to_bf16(alpha * float(tau.std()))
        kinds = [torch.finfo(DTYPES[d]) for d in dtypes]
        if not max(k.smallest_normal for k in kinds) <= gamma <= min(k.max for k in kinds):
            raise OptionError(
                f"γ = alpha·std of {where} is {gamma:.3g}, which {' and '.join(sorted(set(dtypes)))} cannot hold: "
                "the entries are all alike, or too small or too large; change alpha or the dtype."
            )
    return Signs(tau.size, positions, tau[positions] < 0, gamma)


def _largest(size: F64, count: int) -> I64:
    """Sorted positions of the ``count`` largest, ties to the first, in linear time."""
    if count == 0:
        return np.zeros(0, np.int64)
    threshold = np.partition(size, size.size - count)[size.size - count]
    taken = size > threshold
    taken[np.flatnonzero(size == threshold)[: count - int(taken.sum())]] = True
    return np.flatnonzero(taken)


def to_bf16(value: float) -> float:
    """``value`` rounded to bfloat16."""
    return torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item()


def bf16_bits(value: float) -> int:
    """The 16 bits of a bfloat16 number."""
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.uint16).item())


def bf16_value(bits: int) -> float:
    """The magnitude that 16 bits stand for; ArtefactError unless finite and not negative."""
    value = torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16).item()
    if not 0 <= value < float("inf"):
        raise ArtefactError(f"A stored magnitude is {value}: the stream is damaged.")
    return value
