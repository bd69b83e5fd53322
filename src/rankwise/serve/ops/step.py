"""What the operators know of the running step: which pages act on which rows, kept while the composition stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from rankwise.errors import OptionError
from rankwise.serve.ops.base import DeltaOp

if TYPE_CHECKING:
    from rankwise.serve.batch import Segment, TokenPlan
    from rankwise.serve.ops.base import Group, LoraPages

KEPT = 8  #: compositions whose indices are kept

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class RowRun:
    """Rows [start, end) and the pages that act on them, one at least."""

    start: int
    end: int
    pages: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.end - self.start


class OpStep:
    """The segments of one composition with their pages, and what operators derived from them (``notes`` is theirs)."""

    def __init__(self, pages: LoraPages, segments: Sequence[Segment], held: Sequence[Sequence[int]]):
        self.pages, self.segments, self.held = pages, segments, held
        self._touched = frozenset(c for some in held for c in some)
        self._whole: tuple[RowRun, ...] | None = None
        self._runs: dict[str, tuple[RowRun, ...]] = {}
        self._of_group: dict[str, Any] = {}
        self._shared: dict[Any, Any] = {}
        self.notes: dict[str, Any] = {}

    def runs(self, group: Group) -> tuple[RowRun, ...]:
        """The rows that something acts on at ``group``, in order; empty where no adapter of the step touches it.

        One object for all groups that every adapter of the step touches, which is most of them.
        """
        if group.name not in self._runs:
            whole = self.pages.filled(group.name, self._touched)
            if whole and self._whole is not None:
                self._runs[group.name] = self._whole
            else:
                used = [(s, self.pages.used(group.name, held)) for s, held in zip(self.segments, self.held, strict=True)]
                self._runs[group.name] = tuple(RowRun(s.start, s.end, c) for s, c in used if c and s.end > s.start)
            if whole:
                self._whole = self._runs[group.name]
        return self._runs[group.name]

    def kept(self, group: Group, make: Callable[[Group, tuple[RowRun, ...]], T]) -> T:
        """``make(group, runs)``, made once for all groups of equal shape and runs."""
        if group.name not in self._of_group:
            runs = self.runs(group)
            key = (group.inp, group.outs, "all" if runs is self._whole else runs)
            if key not in self._shared:
                self._shared[key] = make(group, runs)
            self._of_group[group.name] = self._shared[key]
        return self._of_group[group.name]


class Op(DeltaOp):
    """Base of the operators; a subclass computes from ``self.step``."""

    name: ClassVar[str]

    def __init__(self, pages: LoraPages):
        self.pages = pages
        self.step = OpStep(pages, (), ())
        self._key: Any = None
        self._steps: dict[Any, OpStep] = {}

    def begin(self, plan: TokenPlan, slots: Mapping[int, Sequence[int]]) -> None:
        """Make ``plan`` the running step.

        Raises:
            OptionError: a segment names a slot that ``slots`` does not hold.
        """
        try:
            held = tuple(tuple(slots[s.slot]) for s in plan.composition)
        except KeyError as e:
            raise OptionError(f"A segment of the step names slot {e.args[0]}, which holds no adapter.") from None
        key = (self.pages.version, held, plan.composition)
        if key == self._key:
            return
        known = self._steps.pop(key) if key in self._steps else None
        self._key, self.step = key, known or OpStep(self.pages, plan.composition, held)
        self._steps[key] = self.step
        if len(self._steps) > KEPT:
            del self._steps[next(iter(self._steps))]  # the one unused for longest

    def shrink(self, group: Group, x: Tensor) -> Any:
        raise NotImplementedError

    def expand(self, group: Group, j: int, v: Any, y: Tensor) -> None:
        raise NotImplementedError

    def apply(self, group: Group, x: Tensor, ys: Sequence[Tensor]) -> None:
        v = self.shrink(group, x)
        for j, y in enumerate(ys):
            self.expand(group, j, v, y)


def joined(ys: Sequence[Tensor]) -> Tensor | None:
    """The matrix whose columns ``ys`` are, one beside the other, as a product of joint weights leaves them; else None."""
    first = ys[0]
    if len(ys) == 1:
        return first
    at, size, row = first.data_ptr(), first.element_size(), first.stride()
    width = 0
    for y in ys:
        if y.data_ptr() != at + width * size or y.stride() != row or y.dtype != first.dtype:
            return None
        width += y.shape[1]
    if row[1] != 1 or row[0] < width:
        return None
    return first.as_strided((first.shape[0], width), row)
