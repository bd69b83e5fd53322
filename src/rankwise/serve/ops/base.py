"""The seam of the delta operators: many low-rank changes, each on its own tokens, added to one product's output.

Modules that share an input (q, k, v; gate, up) form a :class:`Group` with one shrink and one expand a module.
Adapters live in :class:`Cells`: a cell is eight components of one adapter at *every* module, so the pool that
hands cells out sees one size, and an adapter of rank r owns ⌈r/8⌉ of them, the rest of the last one zero.

    v = A x  (shrink, once a group)          y_j += B_j v_j  (expand, once a module; the scale is in A)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.serve.plan import TokenPlan

WIDTH = 8  #: components in a cell


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Modules that are called with the same input: ``inp`` its width, ``outs`` each one's output width."""

    name: str
    modules: tuple[str, ...]
    inp: int
    outs: tuple[int, ...]

    @property
    def cell_numel(self) -> int:
        """Numbers a cell holds at this group."""
        return WIDTH * (self.inp * len(self.modules) + sum(self.outs))


#: what one adapter has at one group: per module (A: r×in with the scale in it, B: out×r), or None where it has nothing
Pairs = Sequence[tuple[Tensor, Tensor] | None]


class Cells:
    """The numbers of all resident adapters, ``count`` cells of every group, in one dtype.

    ``shrink[g]``: (count·in, WIDTH·m), row (c·in + i) holds column i of the A's of cell c, module after module.
    ``expand[g][j]``: (count·WIDTH, out_j), row (c·WIDTH + k) holds component k of cell c at module j.
    """

    def __init__(self, groups: Sequence[Group], count: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.groups = {g.name: g for g in groups}
        self.count = count
        self.dtype = dtype
        # left unwritten on purpose: the system gives memory to the cells that are used
        self.shrink = {g.name: torch.empty(count * g.inp, WIDTH * len(g.modules), dtype=dtype, device=device) for g in groups}
        self.expand = {g.name: [torch.empty(count * WIDTH, out, dtype=dtype, device=device) for out in g.outs] for g in groups}

    @property
    def cell_bytes(self) -> int:
        return sum(g.cell_numel for g in self.groups.values()) * self.dtype.itemsize

    @torch.no_grad()
    def write(self, cells: Sequence[int], pairs: Mapping[str, Pairs]) -> None:
        """Fill ``cells`` with one adapter; groups it does not name, and the tail of the last cell, become zero.

        Raises:
            OptionError: a rank above WIDTH·len(cells).
        """
        for name, g in self.groups.items():
            mine = pairs.get(name) or [None] * len(g.modules)
            for k, c in enumerate(cells):
                self._write_one(g, c, k * WIDTH, mine)
            for pair in mine:
                if pair is not None and pair[0].shape[0] > WIDTH * len(cells):
                    raise OptionError(f"A rank of {pair[0].shape[0]} does not fit {len(cells)} cells of {WIDTH} components.")

    def _write_one(self, g: Group, c: int, first: int, pairs: Pairs) -> None:
        rows = self.shrink[g.name][c * g.inp : (c + 1) * g.inp]
        for j, pair in enumerate(pairs):
            n = 0 if pair is None else max(0, min(WIDTH, pair[0].shape[0] - first))
            at = rows[:, j * WIDTH : (j + 1) * WIDTH]
            out = self.expand[g.name][j][c * WIDTH : (c + 1) * WIDTH]
            at[:, n:] = 0
            out[n:] = 0
            if pair is not None and n:
                at[:, :n] = pair[0][first : first + n].t()
                out[:n] = pair[1][:, first : first + n].t()

    def read(self, cells: Sequence[int], group: str, j: int) -> tuple[Tensor, Tensor]:
        """(A: r×in, B: out×r) of module ``j`` of a group as the cells hold it, r = WIDTH·len(cells)."""
        g = self.groups[group]
        A = torch.cat([self.shrink[group][c * g.inp : (c + 1) * g.inp, j * WIDTH : (j + 1) * WIDTH].t() for c in cells])
        B = torch.cat([self.expand[group][j][c * WIDTH : (c + 1) * WIDTH].t() for c in cells], 1)
        return A, B


class DeltaOp(Protocol):
    """One way to compute the changes of a step; all ways agree (1e-5 of the size in fp32).

    ``slots`` maps a slot to its cells.  A slot that a segment names is in it; a token outside every segment is the base's
    and costs nothing.  ``begin`` is called once a step, before any product, and keeps what depends on
    ``plan.composition`` alone.
    """

    name: str

    def begin(self, plan: TokenPlan, slots: Mapping[int, Sequence[int]]) -> None: ...

    def shrink(self, group: Group, x: Tensor) -> Tensor:
        """What :meth:`expand` needs of x: T×in; opaque to the caller, made once a group and step."""
        ...

    def expand(self, group: Group, j: int, v: Tensor, y: Tensor) -> None:
        """y: T×out_j, changed in place."""
        ...
