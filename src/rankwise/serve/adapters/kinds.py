"""From an adapter's values by site to what the engine holds of it: pairs, non-LoRA changes, whole parameters.

A low-rank part becomes a pair (exactly: the scale goes into A, a part of a fused projection into its rows of the whole).
A sum is split, so DoRA is a gain of the output beside a pair.  What else is constant becomes a non-LoRA change, or, by an
option, a pair of rank k with its error reported.  What x decides stays the form's own forward.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.delta.dense import Sum
from rankwise.delta.lowrank import LowRank
from rankwise.forms.base import AdapterLayer
from rankwise.runtime.write import whole
from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter, NonLoraChange
from rankwise.serve.adapters.non_lora_changes import Constant, Forward, Offset, tensors_of
from rankwise.serve.ops.base import WIDTH, Pairs
from rankwise.serve.types import AdapterRefused
from rankwise.store.tensorfile import all_finite

if TYPE_CHECKING:
    from rankwise.delta.base import Delta
    from rankwise.serve.adapters.layout import Layout, Spot
    from rankwise.sites.site import Site

#: bytes that files may have beside numbers
HEADERS = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How values are prepared; part of an adapter's identity.

    Attributes:
        dtype: of the prepared pairs (whole parameters keep the base's).
        pair_rank: kinds that are exactly low-rank without being stored so (columns, rows, Kronecker …) become pairs up to this rank.
        lower: cut what is constant but no pair (gains, dense differences …) to a pair of this rank; None keeps it exact and loose.
    """

    dtype: torch.dtype = torch.float32
    pair_rank: int = 64
    lower: int | None = None

    def salt(self) -> str:
        """What of it changes numbers."""
        return f"{self.dtype}/{self.lower}"


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What one adapter may take: ``rank`` of its widest module (in components of a slot), ``nbytes`` on the host."""

    rank: int = 512
    nbytes: int = 2 << 30

    @property
    def most_in_files(self) -> int:
        """Bytes of the largest files: twice the limit (fp64 on disk), and their headers."""
        return 2 * self.nbytes + HEADERS

    def check_file(self, name: str, size: int) -> None:
        """Refuse files before they are read."""
        most = self.most_in_files
        if size > most:
            raise AdapterRefused(f"The adapter {name!r} has files of {size:,} bytes; this server reads at most {most:,}.")

    def check(self, manifest: AdapterMetadata) -> None:
        """Refuse what takes too much once prepared."""
        if manifest.rank > self.rank:
            raise AdapterRefused(
                f"The adapter {manifest.name!r} has rank {manifest.rank} at its widest module; this server takes at most {self.rank}. "
                "Lower it (rankwise convert), or raise the limit."
            )
        if manifest.nbytes > self.nbytes:
            raise AdapterRefused(
                f"The adapter {manifest.name!r} takes {manifest.nbytes:,} bytes; this server takes at most {self.nbytes:,}."
            )


def prepare(
    layout: Layout, changes: Mapping[str, Delta | AdapterLayer], manifest: AdapterMetadata, options: Options | None = None
) -> LoadedAdapter:
    """The adapter ready for a slot; rank, pages, bytes, exactness and error of ``manifest`` are filled in.

    Args:
        changes: site → its value against the untouched base, or the module itself where x decides.

    Raises:
        AdapterRefused: a place that cannot be served by rows, or numbers that are not finite.
    """
    work = _Work(layout, options or Options())
    for name, change in changes.items():
        work.add(name, change)
    served = LoadedAdapter(manifest, work.grouped(), {m: tuple(c) for m, c in work.non_lora_changes.items()}, work.full_params)
    refuse_nonfinite(tensors_in(served), manifest.name)
    return measured(served, exact=work.error is None, error=work.error or 0.0)


def measured(served: LoadedAdapter, exact: bool = True, error: float = 0.0) -> LoadedAdapter:
    """``served`` with a manifest that says what was made."""
    r = rank_of(served.pairs)
    manifest = dataclasses.replace(
        served.manifest, rank=r, pages=pages_for(r), nbytes=size_of(served), exact=exact, error=error,
        meta={**served.manifest.meta, "full_params": tuple(served.full_params), "non_lora_changes": len(served.non_lora_changes)},
    )  # fmt: skip
    return dataclasses.replace(served, manifest=manifest)


def rank_of(pairs: Mapping[str, Pairs]) -> int:
    return max((p[0].shape[0] for g in pairs.values() for p in g if p is not None), default=0)


def pages_for(rank: int) -> int:
    """Pages that a rank fills."""
    return -(-rank // WIDTH)


def size_of(served: LoadedAdapter) -> int:
    """Host bytes of its tensors, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(served)}
    return sum(found.values())


def refuse_nonfinite(tensors: Iterable[Tensor], name: str) -> None:
    """Refuse numbers that are not finite: a scale can make them so, whatever the file holds."""
    if not all(all_finite(t) for t in tensors if t.is_floating_point()):
        raise AdapterRefused(f"The adapter {name!r} holds NaN or infinite numbers once its scale is applied.")


def tensors_in(served: LoadedAdapter) -> Iterator[Tensor]:
    for group in served.pairs.values():
        yield from (t for pair in group if pair is not None for t in pair)
    for changes in served.non_lora_changes.values():
        yield from tensors_of(changes)
    yield from served.full_params.values()


class _Work:
    """One preparation: values in, pairs by module, non-LoRA changes and whole parameters out."""

    def __init__(self, layout: Layout, options: Options):
        self.layout, self.options = layout, options
        self.pairs: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.non_lora_changes: dict[str, list[NonLoraChange]] = defaultdict(list)
        self.full_params: dict[str, Tensor] = {}
        self.error: float | None = None

    def add(self, name: str, change: Delta | AdapterLayer) -> None:
        site = self.layout.sites[name]
        module, spot = site.spec.module, self.layout.spots.get(name)
        why = self.layout.refusal(site.spec)
        if why:
            raise AdapterRefused(f"The adapter changes {name!r}, where it cannot be served: {why}.")
        if isinstance(change, AdapterLayer):
            self.non_lora_changes[module].append(Forward(change, site.spec.row_index()))
        elif site.spec.mode == "plain":
            self.non_lora_changes[module].append(Offset(change.dense(site.read() if change.needs_weight else None).reshape(-1)))
        elif change.kind == "dense" and site.spec.rows is None and site.spec.role in ("head", "embed"):
            self.full_params[f"{module}.{site.spec.param}"] = whole(site, change)
        else:
            self._weight(site, spot, change)

    def _weight(self, site: Site, spot: Spot | None, change: Delta) -> None:
        parts = change.parts if isinstance(change, Sum) else (change,)
        low = [p for p in parts if spot is not None and self._is_pair(p)]
        rest = [p for p in parts if p not in low]
        if rest and spot is not None and self.options.lower is not None:
            rank = min(self.options.lower, site.spec.max_rank)
            value, error = change.to_lowrank(rank=rank, weight=site.read() if change.needs_weight else None)
            self.error = max(self.error or 0.0, error)
            low, rest = [value], []
        for p in low:
            assert spot is not None
            self._pair(spot, p.to_lowrank()[0])
        for p in rest:
            self.non_lora_changes[site.spec.module].append(Constant(site, p, site.spec.row_index()))

    def _is_pair(self, part: Delta) -> bool:
        rank = part.exact_rank
        return isinstance(part, LowRank) or (rank is not None and rank <= self.options.pair_rank)

    def _pair(self, spot: Spot, low: LowRank) -> None:
        if low.r:
            self.pairs[spot.group, spot.j].append(lifted(spot, *scaled_pair(low, self.options.dtype)))

    def grouped(self) -> dict[str, Pairs]:
        return grouped(self.layout, self.pairs)


def scaled_pair(low: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A with the scale in it, B with the core in it) in host memory, the products in fp32; copies, so that no file's buffer is kept."""
    if low.core is not None:
        A, B = dataclasses.replace(low, scale=1.0).to(dtype=torch.float32).factors()
    else:
        A, B = low.A, low.B
    return (A.float() * float(low.scale)).to("cpu", dtype), B.to("cpu", dtype, copy=True)


def lifted(spot: Spot, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of the whole module: a part's B stands in its rows, zeros elsewhere."""
    if spot.rows is None:
        return A, B
    return A, B.new_zeros(spot.out, B.shape[1]).index_copy(0, spot.rows, B)


def _joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(found) == 1:
        return found[0]
    return torch.cat([A for A, _ in found]), torch.cat([B for _, B in found], 1)


def grouped(layout: Layout, found: Mapping[tuple[str, int], list[tuple[Tensor, Tensor]]]) -> dict[str, Pairs]:
    """Pairs by (group, module index) as the groups have them: one a module (its parts side by side), None where there is nothing."""
    names = {name for name, _ in found}
    pairs = {at: _joined(those) for at, those in found.items()}
    return {g.name: tuple(pairs.get((g.name, j)) for j in range(len(g.modules))) for g in layout.groups if g.name in names}
