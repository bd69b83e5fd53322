"""The changes of a step by two Triton kernels: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1) on a CPU.

The tables that say which pages act on which rows live at fixed addresses and are rewritten when the composition
changes, and the grid covers their capacity: a captured graph sees constants.  They grow by doubling, which is when
a graph must be captured afresh (:attr:`Triton.capacity`).  All groups share one table, so an adapter's pages are
read at groups that it leaves alone too, where they are zero; a group that no adapter touches is not launched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import OptionError, need
from rankwise.serve.ops.base import WIDTH, Group, LoraPages
from rankwise.serve.ops.step import Op

if TYPE_CHECKING:
    from rankwise.serve.batch import TokenPlan

CHUNK = 16  #: rows of a prefill piece: a long prompt does not own one program
SMALLEST = 16  #: sides that a tensor core's product needs


class Triton(Op):
    """Segmented (prefill) or row by row (decode) shrink and expand.

    Attributes:
        capacity: (pieces, pairs of a piece and a page, pages of a piece) that the tables and the grid hold.
        rows: of a piece in this step: 1 where every segment is one row, else CHUNK.
    """

    name = "triton"

    def __init__(self, pages: LoraPages):
        super().__init__(pages)
        self.device = next(iter(pages.shrink.values())).device
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if pages.dtype == torch.float64:
            raise OptionError("The Triton operator sums in float32, and the pages hold float64; use 'grouped' for these.")
        if self.device.type == "cpu" and not self.interpreted:
            raise OptionError("The Triton operator needs a GPU, or TRITON_INTERPRET=1 set before the start; on a CPU use 'auto'.")
        try:
            from rankwise.serve.ops import triton_kernels
        except ModuleNotFoundError as e:
            raise need("triton", "triton", "The Triton operator") from e
        self.kernels: Any = triton_kernels
        self.capacity = (0, 0, 0)
        self.rows = 1
        self._v: dict[int, Tensor] = {}
        self._now: Any = None
        self._make(8, 8, 1)

    def begin(self, plan: TokenPlan, slots: Mapping[int, Sequence[int]]) -> None:
        super().begin(plan, slots)
        if self._now is self.step:
            return
        self._now = self.step
        filled = [(s, held) for s, held in zip(self.step.segments, self.step.held, strict=True) if held]
        self.rows = 1 if all(s.end - s.start == 1 for s, _ in filled) else CHUNK
        pieces, pages = [], list[int]()
        for s, held in filled:
            for start in range(s.start, s.end, self.rows):
                pieces.append((start, min(self.rows, s.end - start), len(pages), len(held)))
                pages += held
        self._make(len(pieces), len(pages), max((len(held) for _, held in filled), default=1))
        self.count.fill_(len(pieces))
        if pieces:
            self.pieces[: len(pieces)].copy_(torch.tensor(pieces, dtype=torch.int32))
            self.list[: len(pages)].copy_(torch.tensor(pages, dtype=torch.int32))

    def _make(self, pieces: int, pairs: int, deep: int) -> None:
        """Tables for so many, unless there is room already."""
        wanted = tuple(max(_power(n), old) for n, old in zip((pieces, pairs, deep), self.capacity, strict=True))
        if wanted != self.capacity:
            self.capacity = wanted  # type: ignore[assignment]
            self.pieces = torch.zeros(wanted[0], 4, dtype=torch.int32, device=self.device)
            self.list = torch.zeros(wanted[1], dtype=torch.int32, device=self.device)
            self.count = torch.zeros(1, dtype=torch.int32, device=self.device)
            self._v = {}

    def shrink(self, group: Group, x: Tensor) -> Tensor | None:
        """v: (pairs, rows of a piece, modules·WIDTH), fp32; the same memory at every step."""
        if not self.step.runs(group):
            return None
        columns = WIDTH * len(group.modules)
        if columns not in self._v:
            self._v[columns] = torch.zeros(self.capacity[1] * CHUNK * columns, device=self.device)
        v = self._v[columns]
        widen = self.interpreted or self.rows == 1 or x.dtype != self.pages.dtype
        self.kernels.shrink_kernel[(self.capacity[0], self.capacity[2])](
            x, x.stride(0), x.stride(1), self.pages.shrink[group.name], v, self.pieces, self.list, self.count, group.inp,
            COLUMNS=columns, PADDED=max(SMALLEST, _power(columns)), ROWS=self.rows,
            BLOCK=min(128, max(SMALLEST, _power(group.inp))), WIDEN=widen,
        )  # fmt: skip
        return v

    def expand(self, group: Group, j: int, v: Tensor | None, y: Tensor) -> None:
        if v is None:
            return
        block = min(128, max(SMALLEST, _power(group.outs[j])))
        self.kernels.expand_kernel[(self.capacity[0], -(-group.outs[j] // block))](
            v, self.pages.packed[group.name], y, y.stride(0), y.stride(1), self.pieces, self.list, self.count, group.outs[j], j,
            sum(group.chunks[:j]), sum(group.chunks) * WIDTH * group.chunk, group.chunk,
            COLUMNS=WIDTH * len(group.modules), WIDTH=WIDTH, PADDED=WIDTH if self.rows == 1 else SMALLEST, ROWS=self.rows, BLOCK=block,
        )  # fmt: skip


def _power(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(0, n - 1).bit_length()
