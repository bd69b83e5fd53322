"""Keys and values of decoding rows kept side by side, so that a step reads them where they are instead of gathering them.

The pages stay the truth; these are copies.  A request that decodes owns one row of a table (rows × heads × cap × d: a
head's keys lie together, which short contexts gain most from) for each layer, cap being the power of two that holds its context.  A step writes one token a row; a row is filled from the
pages when its request is new, came back, or outgrew its table.  Rows in use are always the first ones: the last row
moves into the place of one that goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankwise.serve.batch import Span

LEAST = 64  #: smallest cap


@dataclasses.dataclass(slots=True, eq=False)
class Turn:
    """What one step does at one table, the same for every layer.

    Attributes:
        moves: (from, to) of rows that close a gap; ``fills``: (row, kv_slots) of rows read from the pages.
        rows: (n,) rows of the packed step, in the order of the table's rows; ``at``: (n,) where each one's token goes.
        C: longest context; ``lengths``: (n, 1).
        in_order: the table's rows are the step's own, one after the other.
    """

    table: Table
    moves: list[tuple[int, int]]
    fills: list[tuple[int, Tensor]]
    rows: Tensor
    at: Tensor
    lengths: Tensor
    C: int
    in_order: bool
    _places: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def update(self, layer: int, K: Tensor, V: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's keys and values side by side, (n, heads, C, d) each.

        Args:
            layer: its index.
            K, V: (KV slots, heads, d), the layer's paged cache.
            k, v: (T, heads, d), the step's own.
        """
        held = self.table.of(layer, K, V)
        n = self.rows.shape[0]
        for own, pages, new in ((held[0], K, k), (held[1], V, v)):
            for src, dst in self.moves:
                own[dst] = own[src]
            for row, kv_slots in self.fills:
                own[row].zero_()  # what an earlier owner left behind may be NaN, and 0·NaN is NaN
                own[row, :, : kv_slots.shape[0]] = pages.index_select(0, kv_slots).transpose(0, 1)
            heads, d = own.shape[1], own.shape[3]
            own.view(-1, d).index_copy_(0, self.places(heads), self.mine(new).to(own.dtype).reshape(-1, d))
        return held[0][:n, :, : self.C], held[1][:n, :, : self.C]

    def mine(self, t: Tensor) -> Tensor:
        """The rows of ``t`` (T, …) in the table's order."""
        return t if self.in_order and t.shape[0] == self.rows.shape[0] else t.index_select(0, self.rows)

    def places(self, heads: int) -> Tensor:
        """(n·heads,): where each row's new token goes in a table seen as rows of d."""
        if heads not in self._places:
            row = torch.arange(self.rows.shape[0])[:, None] * heads + torch.arange(heads)
            self._places[heads] = (row * self.table.cap + self.at[:, None]).reshape(-1)
        return self._places[heads]


class Table:
    """Rows of one cap; see the module."""

    def __init__(self, cap: int, count: int):
        self.cap, self.count = cap, count
        self.owners: list[int] = []  # serial of each row's request
        self.filled: list[int] = []  # tokens of each row that are there
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        held = self.layers.get(layer)
        if held is None:
            # left unwritten: a row is zeroed when it gets an owner
            made = [torch.empty(self.count, t.shape[1], self.cap, t.shape[2], dtype=t.dtype, device=t.device) for t in (K, V)]
            held = self.layers[layer] = (made[0], made[1])
        return held

    def turn(self, spans: Sequence[tuple[int, Span]], page: int) -> Turn:
        """Bring the rows in line with this step's requests; ``spans``: (row of the packed step, span)."""
        wanted = {s.serial for _, s in spans}
        moves: list[tuple[int, int]] = []
        for row in range(len(self.owners) - 1, -1, -1):
            if self.owners[row] not in wanted:
                last = len(self.owners) - 1
                if row != last:
                    moves.append((last, row))
                    self.owners[row], self.filled[row] = self.owners[last], self.filled[last]
                self.owners.pop(), self.filled.pop()
        row_of = {serial: i for i, serial in enumerate(self.owners)}
        fills: list[tuple[int, Tensor]] = []
        order: list[tuple[int, int, Span]] = []
        for at, s in spans:
            row = row_of.get(s.serial, len(self.owners))
            if row == len(self.owners):
                self.owners.append(s.serial)
                self.filled.append(-1)
            if self.filled[row] != s.start:
                fills.append((row, kv_slots_of(s, page)[: s.start]))
            self.filled[row] = s.end
            order.append((row, at, s))
        order.sort(key=lambda x: x[0])
        lengths = torch.tensor([[s.end] for _, _, s in order])
        rows = [at for _, at, _ in order]
        return Turn(
            self, moves, fills, torch.tensor(rows), torch.tensor([s.start for _, _, s in order]), lengths,
            int(lengths.max()), rows == list(range(len(rows))),
        )  # fmt: skip


class RowTables:
    """The tables of one cache.

    Args:
        count: most decoding rows at once; ``most``: largest cap, above which a row is gathered from its pages each step.
        limit: tokens of all tables together (None: no limit); what they cannot take is gathered too.
    """

    def __init__(self, count: int, most: int, limit: int | None = None):
        self.count, self.most, self.limit = count, most, limit
        self.tables: dict[int, Table] = {}

    @property
    def nbytes(self) -> int:
        """Bytes set aside; the system gives memory to those that have been written."""
        layers = [t for table in list(self.tables.values()) for pair in list(table.layers.values()) for t in pair]
        return sum(t.numel() * t.element_size() for t in layers)

    def relieve(self) -> None:
        """Let all tables go, and keep half as much as they were from now on."""
        if self.tables:
            self.limit = sum(self.tables) * self.count // 2
        self.tables.clear()

    def _table(self, cap: int, busy: Set[int]) -> Table | None:
        """The table of ``cap``, for which those that are not ``busy`` make way; None where the limit leaves no room."""
        while cap not in self.tables:
            if self.limit is None or (sum(self.tables) + cap) * self.count <= self.limit:
                self.tables[cap] = Table(cap, self.count)
                break
            idle = next((c for c in self.tables if c not in busy), None)
            if idle is None:
                return None
            del self.tables[idle]
        return self.tables[cap]

    def turns(self, spans: Sequence[tuple[int, Span]], page: int) -> tuple[list[Turn], list[int]]:
        """(what each table does, indices into ``spans`` that no table takes)."""
        by_cap: dict[int, list[int]] = {}
        rest: list[int] = []
        for i, (_, s) in enumerate(spans):
            cap = max(LEAST, 1 << (s.end - 1).bit_length())
            if cap > self.most or s.serial < 0 or len(by_cap.get(cap, ())) >= self.count:
                rest.append(i)
            else:
                by_cap.setdefault(cap, []).append(i)
        turns = []
        for cap in sorted(by_cap):
            table = self._table(cap, by_cap.keys())
            if table is None:
                rest += by_cap[cap]
            else:
                turns.append(table.turn([spans[i] for i in by_cap[cap]], page))
        return turns, rest


def seen_keys(lengths: Tensor, C: int, window: int | None) -> Tensor:
    """(n, C): the keys before each row's end (``lengths``: (n, 1)), and within ``window`` of it."""
    at = torch.arange(C)
    seen = at < lengths
    if window is not None:
        seen &= at >= lengths - window
    return seen


def kv_slots_of(s: Span, page: int) -> Tensor:
    """The KV slots of a span's whole context, in order: (end,)."""
    blocks = torch.tensor(s.blocks)
    return (blocks[:, None] * page + torch.arange(page)).view(-1)[: s.end]
