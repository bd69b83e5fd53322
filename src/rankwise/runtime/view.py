"""Which adapters act on which rows of this call: an immutable value {adapter: strength} with optional row and token masks.

The empty view is the base, so teacher, reference and student share one copy of the weights.  Strengths are tensors: a new value
does not recompile a compiled graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rankwise.errors import ViewError, unknown
from rankwise.runtime.context import forward_context

Rows = Sequence[str | None] | Mapping[str, Any]


class Owner(Protocol):
    """Whose adapters a view names: it has a default view."""

    @property
    def default(self) -> View: ...


class View:
    """Strength of each acting adapter (0-d fp32 tensors), and the batch rows and tokens each one acts on.

    A plain value: the registry of the model, which makes views (``registry.view``), has held it against its adapters.

    Args:
        registry: of the model it is a view of.
        strengths: {adapter: strength}, a number or a 0-d tensor.
        rows: one adapter name (or None for the base) for each batch row, or {name: mask (B,)}.
        tokens: {name: mask (B, T)}.

    Attributes:
        strengths: adapter → 0-d tensor.
        rows: adapter → float mask (B,), or empty.
        tokens: adapter → float mask (B, T), or empty.
        row_segments: (adapter or None for the base, first row, row after the last) over the whole batch, where every row is under
            at most one adapter and each adapter of the view has one; else None.
    """

    __slots__ = ("numbers", "parent", "registry", "row_segments", "rows", "strengths", "tokens")

    def __init__(
        self,
        registry: Owner,
        strengths: Mapping[str, float | Tensor],
        rows: Rows | None = None,
        tokens: Mapping[str, Tensor] | None = None,
    ):
        self.registry = registry
        self.parent: View | None = None
        self.numbers = {n: float(s) for n, s in strengths.items() if not isinstance(s, Tensor)}
        self.strengths = {n: s if isinstance(s, Tensor) else torch.tensor(float(s)) for n, s in strengths.items()}
        self.rows = _masks(rows, self.strengths) if rows is not None else {}
        self.tokens = {n: t.float() for n, t in (tokens or {}).items()}
        for n in self.tokens:
            if n not in self.strengths:
                raise unknown("adapter in this view", n, self.strengths)
        self.row_segments = None if self.tokens else _row_segments(self.rows, self.strengths)

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
        if forward_context.rows is not None:
            return rows.to(y.device, y.dtype)[forward_context.rows].view(n, *([1] * (y.dim() - 1)))
        m = rows.to(y.device, y.dtype).repeat_interleave(_repeats(rows.shape[0], n, y.dim()))
        return m.view(n, *([1] * (y.dim() - 1)))

    def segments_in(self, n: int, dims: int) -> list[tuple[str | None, int, int]] | None:
        """:attr:`row_segments` in the ``n`` leading rows of a site's tensor of ``dims`` axes; None where a mask is needed."""
        if self.row_segments is None or forward_context.rows is not None:
            return None
        k = _repeats(self.row_segments[-1][2], n, dims)
        return [(name, a * k, b * k) for name, a, b in self.row_segments]


def _repeats(B: int, n: int, dims: int) -> int:
    """How many of a site's ``n`` leading rows each of the view's ``B`` rows stands for (beams, or tokens of a flat batch)."""
    batch = forward_context.batch[0] if forward_context.batch else B
    if batch % B or not (n == batch or (dims == 2 and n % batch == 0)):
        raise ViewError(
            f"The view has {B} rows, but a site sees {n} in a forward of {batch}; give one entry for each row of the batch."
        )
    return n // B


def _row_segments(rows: Mapping[str, Tensor], strengths: Mapping[str, Tensor]) -> tuple[tuple[str | None, int, int], ...] | None:
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


def is_finite(strength: float | Tensor) -> bool:
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


def current(registry: Owner) -> View:
    """The view in force for ``registry`` in this thread: the innermost entered one, else its default."""
    view = forward_context.view
    while view is not None:
        if view.registry is registry:
            return view
        view = view.parent
    return registry.default


@contextlib.contextmanager
def entered(view: View) -> Iterator[View]:
    """Make ``view`` the current one in this thread."""
    before = forward_context.view
    view.parent = before
    forward_context.view = view
    try:
        yield view
    finally:
        forward_context.view = before
