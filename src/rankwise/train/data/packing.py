"""Several documents in one row: best-fit decreasing, every token kept once."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rankwise.errors import DataError, OptionError
from rankwise.train.data.chat import IGNORED

if TYPE_CHECKING:
    from rankwise.train.data.tokens import Example


@dataclasses.dataclass(frozen=True)
class Packed:
    """A row of documents: their ids and labels one after the other, and their lengths."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def position_ids(self) -> list[int]:
        """Positions that start anew with each document."""
        return [p for n in self.lengths for p in range(n)]


def pack(examples: Sequence[Example], max_length: int, strategy: Literal["bfd", "sequential"] = "bfd") -> list[Packed]:
    """Rows of at most ``max_length`` tokens.  The first label of each document is −100, for no token of its own comes before it.

    Args:
        strategy: bfd (best-fit decreasing: each document, longest first, into the fullest row that has room; at most
            11/9 of the fewest rows + 1) or sequential (in the order given; for data whose order matters).

    Raises:
        DataError: a document longer than ``max_length`` (with its file and line).
        OptionError: an unknown strategy.
    """
    if strategy not in ("bfd", "sequential"):
        raise OptionError(f"strategy is bfd or sequential; it is {strategy!r}.")
    for e in examples:
        if len(e) > max_length:
            raise DataError(
                f"{e.where or 'A document'} has {len(e):,} tokens, more than a row of {max_length:,}; tokenize with this max_length."
            )
    lengths = [len(e) for e in examples]
    rows = _best_fit(lengths, max_length) if strategy == "bfd" else _in_order(lengths, max_length)
    return [_join([examples[i] for i in row]) for row in rows]


def _best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows of indices, ordered by their first document.  O(n log size): rows are kept by the room they have left."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(rooms, lengths[i])
        if at == len(rooms):
            row, room = len(rows), size
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(i)
        left = room - lengths[i]
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return sorted(rows, key=min)


def _in_order(lengths: Sequence[int], size: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = 0
    for i, n in enumerate(lengths):
        if n > room or not rows:
            rows.append([])
            room = size
        rows[-1].append(i)
        room -= n
    return rows


def _join(documents: Sequence[Example]) -> Packed:
    ids = [t for d in documents for t in d.input_ids]
    labels = [t for d in documents for t in [IGNORED, *d.labels[1:]]]
    return Packed(ids, labels, [len(d) for d in documents])
