"""Each segment by the operator that is fastest here for its length and number, from a small table measured at start."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.serve.batch import Segment, TokenPlan
from rankwise.serve.ops.base import Group, LoraPages
from rankwise.serve.ops.registry import make_op
from rankwise.serve.ops.step import Op

SIDE = 1024  #: widest input or output that the probe multiplies with
SEGMENTS, ROWS = (1, 4, 16), (1, 8, 64, 256)  #: classes: at most so many segments, of at most so many rows
MOST = 512  #: rows that a probed step has at most
GAIN = 0.9  #: an operator must take less than this of the first candidate's time to be chosen before it
ROUNDS, SECONDS = (2, 5), 0.2  #: rounds of a class: two at least, five at most, none begun after so long
LIMIT = 3.0  #: seconds after which a machine that is busy with other work is not measured further: the first candidate stands

logger = logging.getLogger("rankwise.serve")

Table = Mapping[tuple[int, int], str]  #: (segments, rows) → operator


class Auto(Op):
    """Sends each segment to the fastest operator for its class; a step without adapters costs nothing.

    Args:
        native: build and use the C operator; None asks the environment (RANKWISE_NATIVE=1).

    Attributes:
        table: the choice of each class, for whoever wants to be told.
    """

    name = "auto"

    def __init__(self, pages: LoraPages, native: bool | None = None):
        super().__init__(pages)
        names = candidates(pages, _wanted() if native is None else native)
        self.ops = {name: make_op(name, pages) for name in names}
        self.table = table(list(pages.groups.values()), pages, names)
        self._parts: Sequence[tuple[Op, TokenPlan]] = ()

    def begin(self, plan: TokenPlan, slots: Mapping[int, Sequence[int]]) -> None:
        super().begin(plan, slots)
        notes = self.step.notes
        if "parts" not in notes:
            notes["parts"] = self._split(plan)
        self._parts = notes["parts"]
        for op, part in self._parts:
            op.begin(part, slots)

    def shrink(self, group: Group, x: Tensor) -> list[tuple[Op, Any]]:
        return [(op, op.shrink(group, x)) for op, _ in self._parts]

    def expand(self, group: Group, j: int, v: list[tuple[Op, Any]], y: Tensor) -> None:
        for op, part in v:
            op.expand(group, j, part, y)

    def apply(self, group: Group, x: Tensor, ys: Sequence[Tensor]) -> None:
        for op, _ in self._parts:
            op.apply(group, x, ys)

    def _split(self, plan: TokenPlan) -> list[tuple[Op, TokenPlan]]:
        by_rows: dict[int, list[Segment]] = {}
        for s in plan.composition:
            by_rows.setdefault(_class(s.end - s.start, ROWS), []).append(s)
        by_op: dict[str, list[Segment]] = {}
        for rows, segments in by_rows.items():
            by_op.setdefault(self.table[_class(len(segments), SEGMENTS), rows], []).extend(segments)
        parts = {name: tuple(sorted(some, key=lambda s: s.start)) for name, some in by_op.items()}
        return [(self.ops[n], dataclasses.replace(plan, segments=some, composition=some)) for n, some in parts.items()]


def _wanted() -> bool:
    value = os.environ.get("RANKWISE_NATIVE", "")
    if value not in ("", "0", "1"):
        raise OptionError(f"RANKWISE_NATIVE is {value!r}; it can be 1 (build and use the native operator) or 0.")
    return value == "1"


def candidates(pages: LoraPages, native: bool) -> tuple[str, ...]:
    """Names of the operators that may run on ``pages``, the one to prefer first."""
    if next(iter(pages.shrink.values())).device.type != "cpu":
        return ("triton", "grouped") if pages.dtype != torch.float64 else ("grouped", "cat")
    return ("native", "bags", "grouped", "cat") if native else ("bags", "grouped", "cat")


def _class(n: int, classes: tuple[int, ...]) -> int:
    return next((c for c in classes if n <= c), classes[-1])


_tables: dict[Any, Table] = {}


def table(groups: Sequence[Group], pages: LoraPages, names: Sequence[str]) -> Table:
    """The fastest of ``names`` in each class; measured once per process, shapes, dtype, device and thread count."""
    shapes = {(min(g.inp, SIDE), tuple(min(out, SIDE) for out in g.outs)) for g in groups}
    device = next(iter(pages.shrink.values())).device.type
    key = (frozenset(shapes), pages.dtype, device, tuple(names), torch.get_num_threads())
    if key not in _tables:
        _tables[key] = _measure(sorted(shapes), pages.dtype, device, names)
    return _tables[key]


@torch.no_grad()
def _measure(shapes: Sequence[Any], dtype: torch.dtype, device: str, names: Sequence[str]) -> Table:
    groups = [Group(f"g{i}", tuple(map(str, range(len(outs)))), inp, outs) for i, (inp, outs) in enumerate(shapes)]
    pages = LoraPages(groups, max(SEGMENTS), dtype, device)
    gen = torch.Generator().manual_seed(0)
    for t in (*pages.shrink.values(), *pages.packed.values()):
        t.copy_(torch.randn(t.shape, generator=gen).div_(8))
    ops = [make_op(name, pages) for name in names]
    ops = [op for op in ops if _right(op, make_op("reference", pages))]
    if not ops:
        raise OptionError(f"None of the delta operators {', '.join(names)} computes rightly on this machine; use 'reference'.")
    found, begun = {}, time.perf_counter()
    for d, n in ((d, n) for n in ROWS for d in SEGMENTS if d * n <= MOST):
        late = time.perf_counter() - begun > LIMIT
        found[d, n] = ops[0].name if late else _fastest(ops, d, n)
    # too many rows to time at start: what more segments of that length would be is told by fewer
    return {(d, n): found.get((d, n)) or found[max(k for k in SEGMENTS if k * n <= MOST), n] for n in ROWS for d in SEGMENTS}


def _step(op: Op, segments: int, rows: int, seed: int = 0) -> list[tuple[Group, Tensor, list[Tensor]]]:
    """Begin a step of equal segments; the inputs and outputs of every group."""
    runs = tuple(Segment(d, d * rows, (d + 1) * rows) for d in range(segments))
    none = torch.empty(0, dtype=torch.int64)
    op.begin(TokenPlan((), 1, none, none, none, (0, segments * rows), runs, none, runs), {d: (d,) for d in range(segments)})
    gen, like = torch.Generator().manual_seed(seed), next(iter(op.pages.shrink.values()))

    def random_(width: int) -> Tensor:
        return torch.randn(segments * rows, width, generator=gen).to(like)

    return [(g, random_(g.inp), [random_(out) for out in g.outs]) for g in op.pages.groups.values()]


def _right(op: Op, evaluator: Op) -> bool:
    """True where ``op`` gives what the reference gives; else it is left out, and the log says so."""
    bound = 1e-4 if op.pages.dtype in (torch.float32, torch.float64) else 5e-2
    for (group, x, ys), (_, _, wants) in zip(_step(op, 3, 9), _step(evaluator, 3, 9), strict=True):
        op.apply(group, x, ys)
        evaluator.apply(group, x, wants)
        worst = max(float((y - w).norm() / w.norm()) for y, w in zip(ys, wants, strict=True))
        if not worst <= bound:
            logger.warning("The delta operator %r is off by %.1e here and is not used.", op.name, worst)
            return False
    return True


def _fastest(ops: Sequence[Op], segments: int, rows: int) -> str:
    """Rounds in random order after one that is not counted: a busy neighbour slows all of them alike."""
    times: dict[str, list[float]] = {op.name: [] for op in ops}
    steps = [(op, _step(op, segments, rows)) for op in ops]
    begun = time.perf_counter()
    for done in range(-1, ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - begun > SECONDS:
            break
        for op, step in random.sample(steps, len(steps)):
            start = time.perf_counter()
            for group, x, ys in step:
                op.apply(group, x, ys)
            if done >= 0:
                times[op.name].append(time.perf_counter() - start)
    return _winner(times)


def _winner(times: Mapping[str, Sequence[float]]) -> str:
    """The first, unless another beats it by the margin in the median and in the best run: a neighbour spoils one, rarely both."""
    first, *others = times

    def ratio(name: str) -> float:
        return max(f(times[name]) / f(times[first]) for f in (statistics.median, min))

    best = min(others, key=ratio, default=first)
    return best if ratio(best) < GAIN else first
