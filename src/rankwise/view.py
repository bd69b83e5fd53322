"""What acts in a call: an immutable value {adapter: strength} with optional row and token masks.

``with rw.view(model, {"a": 1.0, "b": 0.3}):`` sets it for this thread; ``rw.activate`` sets a model's default.
There is no other "active adapter" state.  The empty view is the base, so teacher, reference and student share
one copy of the weights.  Strengths are tensors: a new value does not recompile a compiled graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import ViewError, unknown

if TYPE_CHECKING:
    from rankwise.roster import Roster

Rows = Sequence[str | None] | Mapping[str, Any]


class _Here(threading.local):
    """This thread's view, the batch the running forward sees, and the decisions of the blocks it is in."""

    view: View | None = None
    batch: tuple[int, int] | None = None  # rows and tokens of the running root forward
    rows: Tensor | None = None  # the batch row of each row of x, inside a block that expanded its rows
    decisions: dict[str, Any] | None = None  # block → what its linears need to know of the rows they see
    padding: Tensor | None = None  # (B, T): which tokens of the running root forward are real, for routers


HERE = _Here()


class View:
    """Strength of each acting adapter (0-d fp32 tensors), and the batch rows and tokens each one acts on.

    Attributes:
        strengths: adapter → 0-d tensor.
        rows: adapter → float mask (B,), or empty.
        tokens: adapter → float mask (B, T), or empty.
        runs: (adapter or None for the base, first row, row after the last) over the whole batch, where every row is under
            at most one adapter and each adapter of the view has one; else None.
    """

    __slots__ = ("numbers", "parent", "roster", "rows", "runs", "strengths", "tokens")

    def __init__(
        self,
        roster: Roster,
        strengths: Mapping[str, float | Tensor],
        rows: Rows | None = None,
        tokens: Mapping[str, Tensor] | None = None,
    ):
        self.roster = roster
        self.parent: View | None = None
        for n, s in strengths.items():
            if not _finite(s):
                raise ViewError(f"The strength of {n!r} is {float(s)}; it is a finite number.")
        roster.check_view(strengths)
        self.numbers = {n: float(s) for n, s in strengths.items() if not isinstance(s, Tensor)}
        self.strengths = {n: s if isinstance(s, Tensor) else torch.tensor(float(s)) for n, s in strengths.items()}
        self.rows = _masks(rows, self.strengths) if rows is not None else {}
        self.tokens = {n: t.float() for n, t in (tokens or {}).items()}
        for n in self.tokens:
            if n not in self.strengths:
                raise unknown("adapter in this view", n, self.strengths)
        self.runs = None if self.tokens else _runs(self.rows, self.strengths)
        roster.check_masks({**self.rows, **self.tokens})
        if (self.rows or self.tokens) and (bad := roster.unmaskable(self.strengths)):
            raise ViewError(
                f"Row and token masks cannot reach {bad!r}: another forward reads that weight for all rows at once; "
                "leave that site out of the adapter, or split the batch."
            )

    def number(self, name: str, strength: Tensor) -> float | Tensor:
        """The strength as a plain number where it was given as one, and no compiler would make a constant of it."""
        return strength if torch.compiler.is_compiling() else self.numbers.get(name, strength)

    def __repr__(self) -> str:
        inside = ", ".join(f"{n!r}: {float(s):.3g}" for n, s in self.strengths.items())
        return f"View({{{inside}}}{', rows' if self.rows else ''}{', tokens' if self.tokens else ''})"

    def mask(self, name: str, y: Tensor, routed: bool) -> Tensor | None:
        """The mask of adapter ``name`` for a site's output ``y``, broadcastable to it, or None where all rows act."""
        rows, tokens = self.rows.get(name), self.tokens.get(name)
        if rows is None and tokens is None:
            return None
        if routed:
            raise ViewError("A row mask cannot follow rows that the model routes to experts; leave the experts out of the adapter.")
        n = y.shape[0]
        if tokens is not None:
            return _fit_tokens(tokens, rows, y)
        assert rows is not None
        if HERE.rows is not None:
            return rows.to(y.device, y.dtype)[HERE.rows].view(n, *([1] * (y.dim() - 1)))
        m = rows.to(y.device, y.dtype).repeat_interleave(_repeats(rows.shape[0], n, y.dim()))
        return m.view(n, *([1] * (y.dim() - 1)))

    def spans(self, n: int, dims: int) -> list[tuple[str | None, int, int]] | None:
        """:attr:`runs` in the ``n`` leading rows of a site's tensor of ``dims`` axes; None where a mask is needed."""
        if self.runs is None or HERE.rows is not None:
            return None
        k = _repeats(self.runs[-1][2], n, dims)
        return [(name, a * k, b * k) for name, a, b in self.runs]


def _repeats(B: int, n: int, dims: int) -> int:
    """How many of a site's ``n`` leading rows each of the view's ``B`` rows stands for (beams, or tokens of a flat batch)."""
    batch = HERE.batch[0] if HERE.batch else B
    if batch % B or not (n == batch or (dims == 2 and n % batch == 0)):
        raise ViewError(
            f"The view has {B} rows, but a site sees {n} in a forward of {batch}; give one entry for each row of the batch."
        )
    return n // B


def _runs(rows: Mapping[str, Tensor], strengths: Mapping[str, Tensor]) -> tuple[tuple[str | None, int, int], ...] | None:
    if not rows or rows.keys() != strengths.keys() or torch.compiler.is_compiling():
        return None
    if any(m.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(m) for m in rows.values()):
        return None
    masks = torch.stack(list(rows.values()))
    if not bool(((masks == 0) | (masks == 1)).all() and (masks.sum(0) <= 1).all() and masks.any(1).all()):
        return None
    names = list(rows)
    owner = [next((names[i] for i in range(len(names)) if column[i]), None) for column in masks.t().tolist()]
    starts = [i for i, name in enumerate(owner) if i == 0 or name != owner[i - 1]]
    return tuple((owner[a], a, b) for a, b in zip(starts, [*starts[1:], len(owner)]))


def _finite(strength: float | Tensor) -> bool:
    """Whether a strength is a finite number; what only a device or a transform could tell is taken as such."""
    if not isinstance(strength, Tensor):
        return math.isfinite(float(strength))
    if torch.compiler.is_compiling() or strength.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(strength):
        return True
    return bool(torch.isfinite(strength.detach()).all())


def _fit_tokens(tokens: Tensor, rows: Tensor | None, y: Tensor) -> Tensor:
    m = tokens if rows is None else tokens * rows[:, None]
    m = m.to(y.device, y.dtype)
    if y.dim() >= 3 and y.shape[:2] == m.shape:
        return m.view(*m.shape, *([1] * (y.dim() - 2)))
    if y.dim() == 2 and y.shape[0] == m.numel():
        return m.reshape(-1, 1)
    raise ViewError(
        f"The token mask is {tuple(m.shape)}, but a site's output is {tuple(y.shape)}; give one entry for each token of this call."
    )


def _masks(rows: Rows, strengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(rows, Mapping):
        out = {n: torch.as_tensor(m) for n, m in rows.items()}
        sizes = {m.shape for m in out.values()}
        if len(sizes) > 1 or any(m.dim() != 1 for m in out.values()):
            raise ViewError(f"Row masks must all be of one length, one entry a row; they are {sorted(tuple(s) for s in sizes)}.")
    else:
        names = {n for n in rows if n is not None}
        out = {n: torch.tensor([r == n for r in rows]) for n in sorted(names)}
        length = len(rows)
        for n in strengths:
            out.setdefault(n, torch.zeros(length))
    for n in out:
        if n not in strengths:
            raise unknown("adapter in this view", n, strengths)
    return {n: m.float() for n, m in out.items()}


def current(roster: Roster) -> View:
    """The view in force for ``roster`` in this thread: the innermost entered one, else its default."""
    view = HERE.view
    while view is not None:
        if view.roster is roster:
            return view
        view = view.parent
    return roster.default


@contextlib.contextmanager
def entered(view: View) -> Iterator[View]:
    """Make ``view`` the current one in this thread."""
    before = HERE.view
    view.parent = before
    HERE.view = view
    try:
        yield view
    finally:
        HERE.view = before


@contextlib.contextmanager
def view(
    model: nn.Module,
    strengths: Mapping[str, float | Tensor] | str | Sequence[str] = (),
    *,
    rows: Rows | None = None,
    tokens: Mapping[str, Tensor] | None = None,
) -> Iterator[View]:
    """This block's calls of ``model`` run with these adapters; ``{}`` is the base.

    Args:
        strengths: {name: strength}, or a name or names at strength 1.
        rows: one adapter name (or None for the base) for each batch row, or {name: mask (B,)}.
        tokens: {name: mask (B, T)}.

    Raises:
        ViewError: unknown adapter, a merged adapter left out, masks that cannot reach a site.
    """
    from rankwise.attach import roster_of

    roster = roster_of(model)
    if isinstance(strengths, str):
        strengths = [strengths]
    if not isinstance(strengths, Mapping):
        strengths = dict.fromkeys(strengths, 1.0)
    roster.prepare()
    with entered(View(roster, strengths, rows, tokens)) as v:
        yield v


def keep_view(fn: Callable[..., Any], chosen: View | None = None) -> Callable[..., Any]:
    """``fn`` that always runs under today's view, batch, decisions and padding: for another thread or a checkpoint of your own."""
    kept = chosen if chosen is not None else HERE.view
    kept_here = HERE.batch, HERE.decisions, HERE.rows, HERE.padding

    @functools.wraps(fn, assigned=("__doc__",))
    def run(*args: Any, **kwargs: Any) -> Any:
        before = HERE.view, HERE.batch, HERE.decisions, HERE.rows, HERE.padding
        HERE.view, (HERE.batch, HERE.decisions, HERE.rows, HERE.padding) = kept, kept_here
        try:
            return fn(*args, **kwargs)
        finally:
            HERE.view, HERE.batch, HERE.decisions, HERE.rows, HERE.padding = before

    return run
