"""What one step computes: the tokens of many owners in one row, made once by the engine, read by every layer.

Requests are ordered by adapter slot before they are packed, so the tokens of one slot lie together and no
permutation is needed.  Layers find the plan in ``forward_context.step``, set around the model's call; nothing of a step is
kept in a layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rankwise.runtime.context import forward_context

BASE = -1  #: the slot of a token that no adapter acts on


class Role(enum.Enum):
    """Why tokens are in a step."""

    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one request in this step.

    Attributes:
        tokens: ids, q of them.
        start: position of the first one; the cache holds ``start`` earlier tokens.
        blocks: the request's block table, covering start + q tokens.
        slot: adapter slot, :data:`BASE` for none.
        samples: how many of the last tokens need logits (0 for an unfinished prompt, 1 usually, more to verify).
        serial: of the request, never used again (an id may be); -1 where nothing is kept between steps.
    """

    request: str
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    slot: int = BASE
    role: Role = Role.DECODE
    samples: int = 1
    serial: int = -1

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens [start, end) of one slot (never :data:`BASE`)."""

    slot: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenPlan:
    """One packed step of T tokens of b requests.  All tensors are int64 on the host.

    Attributes:
        spans: in packed order (by slot).
        tokens, positions: (T,).
        kv_slots: (T,), block·page + offset: where each token's key and value are written.
        cu_q: (b+1,), where each span starts in the packed row.
        segments: runs of equal slot, base tokens left out.
        sample_rows: (S,) rows whose logits are wanted, in the order of the spans.
        composition: equal for steps whose segments are the same, so that what depends on them alone is kept.
    """

    spans: tuple[Span, ...]
    page: int
    tokens: Tensor
    positions: Tensor
    kv_slots: Tensor
    cu_q: tuple[int, ...]
    segments: tuple[Segment, ...]
    sample_rows: Tensor
    composition: tuple[Segment, ...]

    @property
    def T(self) -> int:
        return self.cu_q[-1]


def make_plan(spans: Sequence[Span], page: int) -> TokenPlan:
    """Pack ``spans``, ordered by slot (base first), decoding before prefill within one slot."""
    ordered = tuple(sorted(spans, key=lambda s: (s.slot, s.role is Role.PREFILL)))
    cu = [0]
    ids: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    rows: list[int] = []
    for s in ordered:
        ids += s.tokens
        positions += range(s.start, s.end)
        kv_slots += [s.blocks[p // page] * page + p % page for p in range(s.start, s.end)]
        cu.append(cu[-1] + len(s.tokens))
        rows += range(cu[-1] - s.samples, cu[-1])
    segments = _segments(ordered, cu)
    return TokenPlan(
        ordered, page, torch.tensor(ids), torch.tensor(positions), torch.tensor(kv_slots), tuple(cu), segments,
        torch.tensor(rows, dtype=torch.int64), segments,
    )  # fmt: skip


def _segments(spans: Sequence[Span], cu: Sequence[int]) -> tuple[Segment, ...]:
    out: list[Segment] = []
    for i, s in enumerate(spans):
        if s.slot == BASE:
            continue
        if out and out[-1].slot == s.slot and out[-1].end == cu[i]:
            out[-1] = Segment(s.slot, out[-1].start, cu[i + 1])
        else:
            out.append(Segment(s.slot, cu[i], cu[i + 1]))
    return tuple(out)


@contextlib.contextmanager
def planned(plan: TokenPlan | None) -> Iterator[None]:
    """Make ``plan`` the one this thread's layers read."""
    before, forward_context.step = forward_context.step, plan
    try:
        yield
    finally:
        forward_context.step = before
