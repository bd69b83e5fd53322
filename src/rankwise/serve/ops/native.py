"""The changes of a step in one C call a group: optional, built by a compiler that is there (:mod:`.build`).

The work is cut into pieces of at most eight rows of one adapter, which read each page together: a prompt reads an
adapter once per eight tokens, a decode step once per request.  Pieces go to the threads, the large ones first.  With
:meth:`Native.apply` a piece is shrunk and expanded by one thread, so a group costs one fork and no v in memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.serve.ops.base import WIDTH, Group, LoraPages
from rankwise.serve.ops.build import load
from rankwise.serve.ops.step import Op, RowRun

ROWS, MODULES = 8, 8  # as in native.c


class _Group(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("shrink", "expand")]
        + [(n, ctypes.c_int64) for n in ("inp", "modules", "chunk", "chunks")]
        + [(n, ctypes.c_int64 * MODULES) for n in ("out", "first")]
    )


@functools.cache
def library() -> Any:
    """The compiled functions; see :func:`rankwise.serve.ops.build.load` for what can go wrong."""
    lib = load(Path(__file__).with_name("native.c"))
    at, n = ctypes.c_void_p, ctypes.c_int64
    lib.rankwise_shrink.argtypes = [at, at, n, at, n, at, at]
    lib.rankwise_expand.argtypes = [at, n, at, n, at, n, at, at]
    lib.rankwise_apply.argtypes = [at, at, n, at, at, at, n, at]
    for fn in (lib.rankwise_shrink, lib.rankwise_expand, lib.rankwise_apply):
        fn.restype = None
    return lib


@dataclasses.dataclass(frozen=True, slots=True)
class NativeWork:
    """Pieces (start, rows, first of its pages, pages) as int32, the list of pages, and their addresses."""

    pieces: Tensor
    pages: Tensor
    at: tuple[int, int, int]


class Native(Op):
    """One C call a group, on fp32 pages in the computer's own memory."""

    name = "native"

    def __init__(self, pages: LoraPages):
        super().__init__(pages)
        if pages.dtype != torch.float32:
            raise OptionError(f"The native operator computes in float32, and the pages hold {pages.dtype}; use 'bags' for these.")
        if wide := [g for g in pages.groups.values() if len(g.modules) > MODULES]:
            raise OptionError(f"The native operator takes {MODULES} modules in a group; {wide[0].name} has {len(wide[0].modules)}.")
        self.lib = library()
        self._y, self._ld = (ctypes.c_void_p * MODULES)(), (ctypes.c_int64 * MODULES)()
        self._groups = {name: _describe(pages, g) for name, g in pages.groups.items()}
        self._address = {name: ctypes.addressof(g) for name, g in self._groups.items()}

    def apply(self, group: Group, x: Tensor, ys: Sequence[Tensor]) -> None:
        if not self.step.runs(group):
            return
        y, ld = self._y, self._ld
        for j, out in enumerate(ys):
            y[j], (ld[j], step) = out.data_ptr(), out.stride()
            if step != 1 or out.dtype != torch.float32:
                super().apply(group, x, ys)
                return
        x, (pieces, n, pages) = _plain(x), self.step.kept(group, _pieces).at
        self.lib.rankwise_apply(self._address[group.name], x.data_ptr(), x.stride(0), y, ld, pieces, n, pages)

    def shrink(self, group: Group, x: Tensor) -> tuple[NativeWork, Tensor] | None:
        """v of every piece and page: (pages of all pieces, ROWS, modules·WIDTH)."""
        if not self.step.runs(group):
            return None
        x, work = _plain(x), self.step.kept(group, _pieces)
        pieces, n, pages = work.at
        v = torch.empty(work.pages.numel(), ROWS, len(group.modules) * WIDTH)
        self.lib.rankwise_shrink(self._address[group.name], x.data_ptr(), x.stride(0), pieces, n, pages, v.data_ptr())
        return work, v

    def expand(self, group: Group, j: int, v: tuple[NativeWork, Tensor] | None, y: Tensor) -> None:
        if v is None:
            return
        work, numbers = v
        pieces, n, pages = work.at
        out = _plain(y)
        self.lib.rankwise_expand(self._address[group.name], j, out.data_ptr(), out.stride(0), pieces, n, pages, numbers.data_ptr())
        if out is not y:
            y.copy_(out)


def _plain(t: Tensor) -> Tensor:
    """``t`` in fp32 with each row's numbers side by side: itself, or a copy."""
    t = t if t.dtype == torch.float32 else t.float()
    return t if t.stride(1) == 1 else t.contiguous()


def _describe(pages: LoraPages, g: Group) -> _Group:
    first = [sum(g.chunks[:j]) for j in range(len(g.outs))]
    pad = [0] * (MODULES - len(first))
    return _Group(
        pages.shrink[g.name].data_ptr(), pages.packed[g.name].data_ptr(), g.inp, len(g.outs), g.chunk, sum(g.chunks),
        (ctypes.c_int64 * MODULES)(*g.outs, *pad), (ctypes.c_int64 * MODULES)(*first, *pad),
    )  # fmt: skip


def _pieces(group: Group, runs: tuple[RowRun, ...]) -> NativeWork:
    pieces: list[tuple[int, int, int, int]] = []
    pages: list[int] = []
    for run in runs:
        for start in range(run.start, run.end, ROWS):
            pieces.append((start, min(ROWS, run.end - start), len(pages), len(run.pages)))
            pages += run.pages
    pieces.sort(key=lambda p: -p[1] * p[3])  # a long piece that comes last would leave the other threads waiting
    table, listed = torch.tensor(pieces, dtype=torch.int32), torch.tensor(pages, dtype=torch.int32)
    return NativeWork(table, listed, (table.data_ptr(), len(pieces), listed.data_ptr()))
