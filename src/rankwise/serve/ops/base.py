"""The seam of the delta operators: many low-rank changes, each on its own tokens, added to one product's output.

Modules that share an input (q, k, v; gate, up) form a :class:`Group` with one shrink and one expand a module.
Adapters live in :class:`LoraPages`: a page is eight components of one adapter at *every* module, so the pool that
hands pages out sees one size, and an adapter of rank r owns ⌈r/8⌉ of them, the rest of the last one zero.

    v = A x  (shrink, once a group)          y_j += B_j v_j  (expand, once a module; the scale is in A)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from rankwise.errors import OptionError, unknown

if TYPE_CHECKING:
    from rankwise.serve.batch import TokenPlan

WIDTH = 8  #: components in a page
NARROW, WIDE = 64, 256  #: bounds of a chunk of outputs


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Modules that are called with the same input.

    Attributes:
        name: of the group; ``modules``: paths in the model.
        inp: width of the input; ``outs``: each module's output width.
    """

    name: str
    modules: tuple[str, ...]
    inp: int
    outs: tuple[int, ...]

    @property
    def chunk(self) -> int:
        """Outputs in a chunk: one size for all modules of the group, so that one call expands them together."""
        return _chunk(self.outs)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of each module; the last one is padded where ``chunk`` does not divide the output."""
        return _chunks(self.outs)

    @property
    def padded_outs(self) -> tuple[int, ...]:
        """Outputs of each module with those that fill its last chunk."""
        return tuple(n * self.chunk for n in self.chunks)

    @property
    def page_numel(self) -> int:
        """Numbers a page holds at this group."""
        return WIDTH * (self.inp * len(self.modules) + sum(self.chunks) * self.chunk)


@functools.cache
def _chunk(outs: tuple[int, ...]) -> int:
    common = math.gcd(*outs)
    divisors = [d for d in range(NARROW, min(common, WIDE) + 1) if common % d == 0]
    return max(divisors, key=lambda d: (d % 16 == 0, d), default=NARROW)


@functools.cache
def _chunks(outs: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-out // _chunk(outs)) for out in outs)


#: what one adapter has at one group: per module (A: r×in with the scale in it, B: out×r), or None where it has nothing
Pairs = Sequence[tuple[Tensor, Tensor] | None]


class LoraPages:
    """The numbers of all resident adapters, ``count`` pages of every group, in one dtype.

    A page's numbers at a group lie together, in the order in which they are read, so that a step streams them:

    ``shrink[g]``: (count·in, WIDTH·m), row (c·in + i) holds column i of the A's of page c, module after module.
    ``packed[g]``: (count·chunks·WIDTH, chunk), row ((c·chunks + q)·WIDTH + k) holds component k of page c at chunk q
    of the outputs, the chunks of all modules one after the other.  ``expand[g][j]`` is the same memory seen as
    (count, chunks_j, WIDTH, chunk) for module j.

    Args:
        across: group → components of each A that are held here, where devices share a page's (default: all WIDTH).

    Attributes:
        version: changes with every write, for whoever keeps what depends on the contents.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        count: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        across: Mapping[str, int] | None = None,
    ):
        self.groups = {g.name: g for g in groups}
        self.count = count
        self.dtype = dtype
        self.version = 0
        # left unwritten on purpose: the system gives memory to the pages that are used
        empty = functools.partial(torch.empty, dtype=dtype, device=device)
        self.across = {g.name: (across or {}).get(g.name, WIDTH) for g in groups}
        self.shrink = {g.name: empty(count * g.inp, self.across[g.name] * len(g.modules)) for g in groups}
        self.packed = {g.name: empty(count * sum(g.chunks) * WIDTH, g.chunk) for g in groups}
        self.expand = {g.name: self._by_module(g) for g in groups}
        self._blank: dict[str, set[int]] = {g.name: set() for g in groups}

    def _by_module(self, g: Group) -> list[Tensor]:
        whole = self.packed[g.name].view(self.count, sum(g.chunks), WIDTH, g.chunk)
        return list(whole.split(list(g.chunks), 1))

    @property
    def page_bytes(self) -> int:
        spared = sum((WIDTH - self.across[n]) * g.inp * len(g.modules) for n, g in self.groups.items())
        return (sum(g.page_numel for g in self.groups.values()) - spared) * self.dtype.itemsize

    def leave(self, pages: Sequence[int]) -> None:
        """From now on these act nowhere here (their adapter is held in another way); nothing is written."""
        self.version += 1
        for blank in self._blank.values():
            blank.update(pages)

    def used(self, group: str, pages: Sequence[int]) -> tuple[int, ...]:
        """Those of ``pages`` that are not all zero at ``group``: an adapter that leaves it alone costs nothing there."""
        blank = self._blank[group]
        return tuple(c for c in pages if c not in blank)

    def filled(self, group: str, pages: Set[int]) -> bool:
        """Whether none of ``pages`` is all zero at ``group``."""
        return self._blank[group].isdisjoint(pages)

    @torch.no_grad()
    def write(self, pages: Sequence[int], pairs: Mapping[str, Pairs]) -> None:
        """Fill ``pages`` with one adapter; groups it does not name, and the tail of the last page, become zero.

        Raises:
            UnknownName: a group that is not there.
            OptionError: a rank above WIDTH·len(pages), factors that do not fit the group, a page that is not there.
        """
        for name in pairs:
            if name not in self.groups:
                raise unknown("group of modules", name, self.groups)
        for name, g in self.groups.items():
            check_pairs(g, pairs.get(name), len(pages), self.across[name])
        if wrong := [c for c in pages if not 0 <= c < self.count]:
            raise OptionError(f"Page {wrong[0]} is not one of the {self.count} pages 0 to {self.count - 1}.")
        self.version += 1
        for name, g in self.groups.items():
            mine = pairs.get(name) or [None] * len(g.modules)
            for k, c in enumerate(pages):
                filled = self._write_one(g, c, k, mine)
                (self._blank[name].discard if filled else self._blank[name].add)(c)

    def _write_one(self, g: Group, c: int, k: int, pairs: Pairs) -> bool:
        """Page ``c``, the adapter's k-th; whether anything of the adapter falls into it, here or on another device."""
        rows = self.shrink[g.name][c * g.inp : (c + 1) * g.inp]
        across, first = self.across[g.name], k * WIDTH
        counts = [0 if p is None else max(0, min(WIDTH, p[1].shape[1] - first)) for p in pairs]
        for j, (pair, n) in enumerate(zip(pairs, counts, strict=True)):
            at = rows[:, j * across : (j + 1) * across]
            out = self.expand[g.name][j][c]
            A = None if pair is None or not n else pair[0][k * across : (k + 1) * across]
            at[:, 0 if A is None else A.shape[0] :] = 0
            out[:, n:] = 0
            if pair is not None and A is not None:
                at[:, : A.shape[0]] = A.t()
                B = pair[1][:, first : first + n].t()
                if short := out.shape[0] * g.chunk - B.shape[1]:
                    B = torch.nn.functional.pad(B, (0, short))
                out[:, :n] = B.unflatten(1, (-1, g.chunk)).transpose(0, 1)
        return any(counts)

    def read(self, pages: Sequence[int], group: str, j: int) -> tuple[Tensor, Tensor]:
        """(A: r×in, B: out×r) of module ``j`` of a group as the pages hold it, r = WIDTH·len(pages)."""
        g = self.groups[group]
        A = torch.cat([self.shrink[group][c * g.inp : (c + 1) * g.inp, j * WIDTH : (j + 1) * WIDTH].t() for c in pages])
        B = torch.cat([self.expand[group][j][c].transpose(0, 1).flatten(1).t() for c in pages], 1)
        return A, B[: g.outs[j]]


def check_pairs(g: Group, pairs: Pairs | None, pages: int, across: int = WIDTH) -> None:
    """Refuse factors that do not fit.

    Args:
        g, pairs: a group, and one adapter's factors there (None: it leaves the group alone).
        pages: how many the adapter has.
        across: components of a page that are held here; see :class:`LoraPages`.

    Raises:
        OptionError: more or fewer pairs than modules, another shape, a rank above ``across``·pages.
    """
    if pairs is None:
        return
    if len(pairs) != len(g.modules):
        raise OptionError(f"{g.name} has {len(g.modules)} modules, but {len(pairs)} pairs of factors came.")
    for module, out, pair in zip(g.modules, g.outs, pairs, strict=True):
        if pair is None:
            continue
        A, B = pair
        if A.shape[0] > across * pages:
            raise OptionError(f"A rank of {A.shape[0]} does not fit {pages} pages of {across} components.")
        rank = A.shape[0] if across == WIDTH else B.shape[-1]
        rows = rank if across == WIDTH else -(-rank // WIDTH) * across
        if A.shape != (rows, g.inp) or B.shape != (out, rank):
            raise OptionError(
                f"{module} takes A r×{g.inp} and B {out}×r, but the factors are {'×'.join(map(str, A.shape))} "
                f"and {'×'.join(map(str, B.shape))}."
            )


class DeltaOp(Protocol):
    """One way to compute the changes of a step; all ways agree (1e-5 of the size in fp32).

    ``slots`` maps a slot to its pages.  A slot that a segment names is in it; a token outside every segment is the base's
    and costs nothing.  ``begin`` is called once a step, before any product, and keeps what depends on
    ``plan.composition`` alone.
    """

    name: ClassVar[str]

    def begin(self, plan: TokenPlan, slots: Mapping[int, Sequence[int]]) -> None: ...

    def shrink(self, group: Group, x: Tensor) -> Any:
        """What :meth:`expand` needs of x: T×in; opaque to the caller, made once a group and step."""
        ...

    def expand(self, group: Group, j: int, v: Any, y: Tensor) -> None:
        """Add the change of one module.

        Args:
            group, j: the module, by its place in the group.
            v: what :meth:`shrink` gave.
            y: T×out_j, changed in place.
        """
        ...

    def apply(self, group: Group, x: Tensor, ys: Sequence[Tensor]) -> None:
        """:meth:`shrink`, and :meth:`expand` for every module of the group: faster where all outputs are there already."""
        ...
