"""Both products as weighted sums of rows: `embedding_bag`, the fastest way in plain PyTorch on a CPU.

Shrink: the bag of a token and a page holds the ``in`` rows of the page's A, weighted by x.  Expand: the bag of a token
and a chunk of outputs holds the WIDTH rows of each of its pages, weighted by v.  So the weights stay where they are,
mixed ranks need no padding, tokens without an adapter are empty bags, and one call expands all modules of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.serve.ops.base import WIDTH, Group
from rankwise.serve.ops.step import Op, RowRun, joined

SUM = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Index:
    """Rows [lo, hi) of the step, P pairs (token, page) on them.

    Attributes:
        token: (P,) the row of each pair from ``lo`` on; None where every row has one page.
        shrink, shrink_at: (P·in,) rows of ``Pages.shrink`` and (P+1,) where each pair's begin.
        pick: rows of v, seen as (P·m, WIDTH), in the order of the expanding bags.
        expand, expand_at: rows of ``Pages.packed``, and where each (token, chunk) begins.
        widths: of each module's part of the expanded rows.
    """

    lo: int
    hi: int
    token: Tensor | None
    shrink: Tensor
    shrink_at: Tensor
    pick: Tensor
    expand: Tensor
    expand_at: Tensor
    widths: list[int]


class Bags(Op):
    """Weighted sums of rows by torch's embedding_bag, both for the shrink and for all expands of a group at once."""

    name = "bags"

    def shrink(self, group: Group, x: Tensor) -> tuple[Index, Sequence[Tensor]] | None:
        """Each module's change, rows × out: expanding is part of it, since one call does it for all of them."""
        made = self._change(group, x)
        return made and (made[0], made[1].split(made[0].widths, 1))

    def expand(self, group: Group, j: int, v: tuple[Index, Sequence[Tensor]] | None, y: Tensor) -> None:
        if v is None:
            return
        at, changes = v
        change = changes[j]
        if change.shape[1] != group.outs[j]:
            change = change[:, : group.outs[j]]
        (y if at.hi - at.lo == y.shape[0] else y[at.lo : at.hi]).add_(change)

    def apply(self, group: Group, x: Tensor, ys: Sequence[Tensor]) -> None:
        together = joined(ys) if group.padded_outs == group.outs else None
        if together is None:
            super().apply(group, x, ys)
        elif made := self._change(group, x):
            at, change = made
            (together if at.hi - at.lo == x.shape[0] else together[at.lo : at.hi]).add_(change)

    def _change(self, group: Group, x: Tensor) -> tuple[Index, Tensor] | None:
        """The changes of all modules side by side, each as wide as its chunks."""
        if not self.step.runs(group):
            return None
        at = self.step.kept(group, self._index)
        if at.hi - at.lo != x.shape[0]:
            x = x[at.lo : at.hi]
        if x.dtype != self.pages.dtype:
            x = x.to(self.pages.dtype)
        weights = x if at.token is None else x.index_select(0, at.token)
        v = self._summed(group, _bags(self.pages.shrink[group.name], at.shrink, at.shrink_at, weights.reshape(-1)))
        weights = v.view(-1, WIDTH).index_select(0, at.pick)
        return at, _bags(self.pages.packed[group.name], at.expand, at.expand_at, weights.view(-1)).view(at.hi - at.lo, -1)

    def _summed(self, group: Group, v: Tensor) -> Tensor:
        """v (P, WIDTH·m) of all components and inputs; devices that share these override it."""
        return v

    def _index(self, group: Group, runs: tuple[RowRun, ...]) -> Index:
        return make_index(group, runs, self.pages.count)


def _bags(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    # the bare operator: F.embedding_bag around it costs twice as much as a small call itself
    return torch._embedding_bag_forward_only(rows, index, offsets, False, SUM, False, weights, True, -1)[0]  # type: ignore[attr-defined]


def make_index(group: Group, runs: Sequence[RowRun], count: int) -> Index:
    """The bags of ``runs`` (one at least); int32 while ``count`` pages can be counted in it."""
    chunks, modules = sum(group.chunks), len(group.outs)
    kind: Any = np.int32 if count * max(group.inp, chunks * WIDTH) < 2**31 else np.int64
    lo, hi = runs[0].start, runs[-1].end
    page = np.array([c for run in runs for c in run.pages * run.rows], kind)
    pairs = len(page)
    pick = np.arange(pairs)[:, None] * modules + np.repeat(np.arange(modules), group.chunks)
    expand = (page * (chunks * WIDTH))[:, None] + np.arange(chunks * WIDTH, dtype=kind)
    expand_at = np.arange(pairs * chunks + 1, dtype=kind) * WIDTH
    token = None
    if pairs != hi - lo or any(len(run.pages) != 1 for run in runs):
        pages_of = np.zeros(hi - lo, np.int64)
        for run in runs:
            pages_of[run.start - lo : run.end - lo] = len(run.pages)
        token = np.repeat(np.arange(hi - lo), pages_of)
        expand_at = np.concatenate([[0], np.cumsum(np.repeat(pages_of, chunks) * WIDTH)]).astype(kind)
        # pair p of token t goes, for chunk q, to place first[t]·chunks + q·pages_of[t] + (p - first[t]) of the expanding bags
        first = np.cumsum(pages_of) - pages_of
        place = ((chunks - 1) * first[token] + np.arange(pairs))[:, None] + np.arange(chunks) * pages_of[token][:, None]
        pick, expand = _placed(pick, place), _placed(expand.reshape(pairs, chunks, WIDTH), place)
    return Index(
        lo,
        hi,
        None if token is None else torch.from_numpy(token),
        torch.from_numpy(((page * group.inp)[:, None] + np.arange(group.inp, dtype=kind)).reshape(-1)),
        torch.from_numpy(np.arange(pairs + 1, dtype=kind) * group.inp),
        torch.from_numpy(pick.reshape(-1)),
        torch.from_numpy(expand.reshape(-1)),
        torch.from_numpy(expand_at),
        list(group.padded_outs),
    )


def _placed(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(pairs·chunks, …): each of ``values`` (pairs, chunks, …) at its place."""
    out = np.empty((place.size, *values.shape[2:]), values.dtype)
    out[place] = values
    return out
