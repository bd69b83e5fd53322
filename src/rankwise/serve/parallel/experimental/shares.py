"""Which slice of every linear each of N devices holds.

q, k, v, gate and up are *column-parallel*: device n holds rows of the weight (outputs), whole query heads with the
key/value heads they read, or an equal run of the MLP's channels.  o and down are *row-parallel*: it holds the
columns (inputs) that its own outputs feed, and Σ_n x_n W_nᵀ is the output.  What couples them is what the sites
say (:mod:`rankwise.sites.coupling`), so a fused projection is cut part by part, each in its rows.

H query heads in K groups go to N ≤ K devices by whole groups; N > K devices share the H heads out evenly, and a
key/value head is held by every device that reads it (as often as equal groups of query heads need).
H need not be divisible by N.  Embedding, norms and head are whole on every device; only the first computes the head.

Errors: AttachError where N exceeds the heads or channels, or where a layer holds a linear that is neither sort.
Source: Megatron-LM (arXiv 1909.08053) for the base; S-LoRA (arXiv 2311.03285), section 6, for what follows from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError, OptionError
from rankwise.serve.ops.base import Group
from rankwise.sites.coupling import Axis

if TYPE_CHECKING:
    from rankwise.serve.adapters.layout import Layout
    from rankwise.sites.site import Site

SERVED = (
    "tensor parallelism serves dense decoders whose layers are q, k, v, o and gate, up, down projections with nothing that differs "
    "by head or channel between them (Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, GPT-NeoX)"
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One device's slice of one module: rows ``out`` (column-parallel) or columns ``inp`` (row-parallel), int64; the other is None."""

    out: Tensor | None = None
    inp: Tensor | None = None

    @property
    def row_parallel(self) -> bool:
        return self.inp is not None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What device ``rank`` of ``size`` holds.

    Attributes:
        cuts: module → its slice.
        groups: the base's groups as wide as they are here; ``whole``: as wide as the base has them.
        heads: attention module → (query heads, key/value heads) here.
    """

    rank: int
    size: int
    cuts: Mapping[str, Cut]
    groups: tuple[Group, ...]
    whole: Mapping[str, Group]
    heads: Mapping[str, tuple[int, int]]

    def row_parallel(self, group: str) -> bool:
        return self.cuts[self.whole[group].modules[0]].row_parallel

    def outputs(self, group: str) -> tuple[int, int]:
        """The outputs [lo, hi) of a row-parallel group whose changes this device adds (module 0, the only one)."""
        return bounds(self.whole[group].outs[0], self.rank, self.size)


def bounds(total: int, n: int, of: int) -> tuple[int, int]:
    """Part n of ``total`` things shared out in order; sizes differ by one at most."""
    return n * total // of, (n + 1) * total // of


def heads_of(heads: int, kv: int, n: int, of: int) -> tuple[list[int], list[int]]:
    """(query heads, key/value heads) of one device: its query head i reads its key/value head i·len(kv)//len(q).

    Args:
        heads, kv: how many the model has of each.
        n, of: the device, and how many there are.
    """
    group = heads // kv
    if of <= kv:
        lo, hi = bounds(kv, n, of)
        return list(range(lo * group, hi * group)), list(range(lo, hi))
    lo, hi = bounds(heads, n, of)
    reads = [h // group for h in range(lo, hi)]
    # heads that begin or end inside a group hold its key/value head as often as equal runs of query heads need
    step = math.gcd(*Counter(reads).values())
    return list(range(lo, hi)), reads[::step]


def shares(model: nn.Module, layout: Layout, size: int) -> tuple[Share, ...]:
    """The share of each of ``size`` devices; ``layout`` is the plain model's.

    Raises:
        OptionError: no device. AttachError: see the module.
    """
    if size < 1:
        raise OptionError(f"{size} devices; tensor parallelism takes 1 or more.")
    _refuse_others(model, layout)
    members = {m: list(_members(layout, m)) for g in layout.groups for m in g.modules}
    units = _units(model, [s for sites in members.values() for s in sites], size)
    whole = {g.name: g for g in layout.groups}
    return tuple(_share(members, units, whole, n, size) for n in range(size))


def _share(
    members: Mapping[str, Sequence[Site]], units: Mapping[str, tuple[int, int]], whole: Mapping[str, Group], n: int, size: int
) -> Share:
    cuts = {module: _cut(sites, units, n, size) for module, sites in members.items()}
    groups = tuple(_local(g, [cuts[m] for m in g.modules]) for g in whole.values())
    heads = {
        name.rpartition("#")[0]: tuple(map(len, heads_of(total, kv, n, size)))
        for name, (total, kv) in units.items()
        if name.endswith("#heads")
    }
    return Share(n, size, cuts, groups, whole, heads)  # type: ignore[arg-type]


def _members(layout: Layout, module: str) -> Iterator[Site]:
    """The module's site, or the sites of its parts in the order of their rows."""
    whole = layout.called[module]
    if whole.coupled_axes:
        yield whole
        return
    parts = [s for s in layout.sites.values() if s.spec.module == module and s.spec.rows is not None]
    yield from sorted(parts, key=lambda s: s.spec.rows or (0, 0))


def _units(model: nn.Module, sites: Sequence[Site], size: int) -> dict[str, tuple[int, int]]:
    """Axis group → (query heads, key/value heads), or (channels, 0).  Raises AttachError where a device would have none."""
    roles: dict[str, dict[str, Site]] = {}
    for s in sites:
        roles.setdefault(s.coupled_axes[0].group, {})[s.spec.role] = s
    out: dict[str, tuple[int, int]] = {}
    for group, mine in roles.items():
        axis = (mine.get("k") or next(iter(mine.values()))).coupled_axes[0]
        out[group] = (mine["q"].spec.out // axis.grain, axis.units) if "k" in mine else (axis.units, 0)
    for group, (total, kv) in out.items():
        if total < size:
            raise AttachError(
                f"{type(model).__name__} has {total} {'query heads' if kv else 'channels'} at {group.rpartition('#')[0]}, too few for "
                f"{size} devices; give --tensor-parallel {total} or less."
            )
    return out


def _cut(sites: Sequence[Site], units: Mapping[str, tuple[int, int]], n: int, size: int) -> Cut:
    index = [_index(s, units[s.coupled_axes[0].group], n, size) for s in sites]
    if sites[0].coupled_axes[0].dim == 1:
        return Cut(inp=index[0])
    rows = [i if s.spec.rows is None else s.spec.row_index()[i] for s, i in zip(sites, index, strict=True)]  # type: ignore[index]
    one = torch.cat(rows)
    # parts that stand together by head (GPT-NeoX) keep their order; parts behind one another keep theirs
    return Cut(out=one.sort().values if sites[0].spec.repeat[0] > 1 else one)


def _index(site: Site, units: tuple[int, int], n: int, size: int) -> Tensor:
    """Rows (or columns) of this site, counted from its own first, that device n holds."""
    axis, (total, kv) = site.coupled_axes[0], units
    if not kv:
        return torch.arange(*bounds(total, n, size))
    q, k = heads_of(total, kv, n, size)
    if site.spec.role in ("k", "v"):
        return axis.index(torch.tensor(k))
    return Axis(axis.group, axis.dim, total, axis.units * axis.grain // total).index(torch.tensor(q))


def _local(g: Group, cuts: Sequence[Cut]) -> Group:
    inp = g.inp if cuts[0].inp is None else len(cuts[0].inp)
    return Group(g.name, g.modules, inp, tuple(out if c.out is None else len(c.out) for out, c in zip(g.outs, cuts, strict=True)))


def _refuse_others(model: nn.Module, layout: Layout) -> None:
    """Every linear but the head is cut, or the model is refused."""
    cut = {m for g in layout.groups for m in g.modules}
    for s in layout.sites.values():
        spec, why = s.spec, ""
        if spec.role == "head" or spec.kind in ("plain", "embedding") or spec.rows is not None:
            continue
        if spec.kind != "linear":
            why = f"a {spec.kind} weight" if spec.kind != "experts" else "a stack of experts"
        elif spec.quantised or spec.transposed or spec.refusal:
            why = "not a plain matrix of torch's Linear"
        elif (
            spec.module not in cut
            or not all(p.coupled_axes for p in _members(layout, spec.module))
            or not list(_members(layout, spec.module))
        ):
            why = "neither kind of projection, or of a layout that is not known"
        if why:
            raise AttachError(f"{type(model).__name__} cannot be cut at {spec.name!r}, which is {why}: {SERVED}.")
