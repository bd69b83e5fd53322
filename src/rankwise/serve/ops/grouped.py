"""Matrix products: one pair a segment where segments are long, batched ones over equal, short segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.serve.ops.base import WIDTH, Group, LoraPages
from rankwise.serve.ops.step import Op, RowRun

LONG = 16  #: rows from which a segment has products of its own
FEW = 4  #: short segments from which equal ones are batched


def stacked_A(pages: LoraPages, group: Group, held: Sequence[int]) -> Tensor:
    """(len(held), in, WIDTH·m): the shrinking factors; a view of the pages where one is asked for."""
    whole = pages.shrink[group.name].view(pages.count, group.inp, -1)
    return whole[held[0] : held[0] + 1] if len(held) == 1 else whole[list(held)]


def stacked_B(pages: LoraPages, group: Group, j: int, held: Sequence[int]) -> Tensor:
    """The expanding factors of one module, laid out as rows (a copy): (len(held), WIDTH, out_j).

    Args:
        pages: of all adapters.
        group, j: the module, by its place in the group.
        held: ids of the pages that are wanted.
    """
    whole = pages.expand[group.name][j]
    some = whole[held[0] : held[0] + 1] if len(held) == 1 else whole[list(held)]
    return some.transpose(1, 2).flatten(2)[..., : group.outs[j]]


Blocks = tuple[tuple[RowRun, ...], ...]


class Grouped(Op):
    """`addmm_` a segment; short segments with as many rows and pages as one another go through `bmm` together."""

    name = "grouped"

    def shrink(self, group: Group, x: Tensor) -> list[tuple[tuple[RowRun, ...], Tensor]]:
        """Per block of runs, v: (runs, rows, m, pages·WIDTH)."""
        x = x.to(self.pages.dtype)
        return [(runs, self._shrink(group, runs, x)) for runs in self.step.kept(group, _blocks)]

    def _shrink(self, group: Group, runs: tuple[RowRun, ...], x: Tensor) -> Tensor:
        d, n, c = len(runs), runs[0].rows, len(runs[0].pages)
        A = stacked_A(self.pages, group, [page for run in runs for page in run.pages])
        v = torch.matmul(_rows(x, runs).view(d, 1, n, -1), A.view(d, c, group.inp, -1))
        return v.view(d, c, n, -1, WIDTH).permute(0, 2, 3, 1, 4).reshape(d, n, -1, c * WIDTH)

    def expand(self, group: Group, j: int, v: list[tuple[tuple[RowRun, ...], Tensor]], y: Tensor) -> None:
        for runs, vs in v:
            d, n = len(runs), runs[0].rows
            B = stacked_B(self.pages, group, j, [page for run in runs for page in run.pages]).reshape(d, -1, group.outs[j])
            if d == 1 and y.dtype == B.dtype:
                y[runs[0].start : runs[0].end].addmm_(vs[0, :, j], B[0])
                continue
            change = torch.bmm(vs[:, :, j], B).to(y.dtype)
            for run, one in _spans(runs, change.view(d * n, -1)):
                y[run] += one


def _blocks(group: Group, runs: tuple[RowRun, ...]) -> Blocks:
    alike: dict[tuple[int, int], list[RowRun]] = {}
    for run in runs:
        alike.setdefault((run.rows, len(run.pages)), []).append(run)
    out: list[tuple[RowRun, ...]] = []
    for (rows, _), same in alike.items():
        out += [tuple(same)] if rows < LONG and len(same) >= FEW else [(run,) for run in same]
    return tuple(out)


def _rows(x: Tensor, runs: Sequence[RowRun]) -> Tensor:
    parts = [x[span] for span, _ in _spans(runs, x)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def _spans(runs: Sequence[RowRun], packed: Tensor) -> list[tuple[slice, Tensor]]:
    """(rows in the step, their rows of ``packed``), neighbours joined."""
    bounds: list[list[int]] = []
    for run in runs:
        if bounds and bounds[-1][1] == run.start:
            bounds[-1][1] = run.end
        else:
            bounds.append([run.start, run.end])
    out, at = [], 0
    for start, end in bounds:
        out.append((slice(start, end), packed[at : at + end - start]))
        at += end - start
    return out
