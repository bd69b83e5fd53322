"""The seam of merges: every source is a value (an AdapterState); a method combines one site's deltas at a time.

Sums are made in fp64 and cast once.  A site that only some sources have counts as zero in the others.  Every merge
reports, site by site, how far its result is from the weighted sum Σ w_t·ΔW_t, so that what it approximates is seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.catalogue import MethodInfo, make
from rankwise.delta import AdapterState, Delta, LowRank
from rankwise.errors import MergeError, OptionError
from rankwise.seeds import generator

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


@dataclasses.dataclass(frozen=True)
class Lifted:
    """One site's sources as fp64 factors with √s of their scales on each side: A_t (r_t, in), B_t (out, r_t); None where absent."""

    site: str
    pairs: tuple[tuple[Tensor, Tensor] | None, ...]
    weights: tuple[float, ...]

    def present(self) -> list[tuple[Tensor, Tensor, float]]:
        return [(p[0], p[1], w) for p, w in zip(self.pairs, self.weights, strict=True) if p is not None]

    @property
    def shape(self) -> tuple[int, int]:
        A, B, _ = self.present()[0]
        return B.shape[0], A.shape[1]

    def total(self) -> LowRank:
        """The exact weighted sum, of rank Σ r_t."""
        return LowRank(torch.cat([A for A, _, _ in self.present()]), torch.cat([w * B for _, B, w in self.present()], dim=1))

    def rank(self, rank: int | None) -> int:
        return min(rank or max(A.shape[0] for A, _, _ in self.present()), *self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Base of all merges; dataclass fields are options.

    ``gauge_invariant``: the result does not change when a source's (A, B) becomes (G·A, B·G⁻¹).
    """

    info: ClassVar[MethodInfo]
    gauge_invariant: ClassVar[bool] = True

    def combine(self, lifted: Lifted, g: torch.Generator) -> LowRank:
        """One site's merged delta (fp64 or fp32 low-rank)."""
        raise NotImplementedError(f"The merge {type(self).__name__} must combine.")


def merge_states(
    states: Sequence[AdapterState],
    weights: Sequence[float] | None = None,
    method: str | Merge = "cat",
    *,
    seed: int = 0,
    **options: Any,
) -> AdapterState:
    """The merged value.

    Args:
        states: low-rank values (``adapter.lower()``).
        weights: one a source; default 1/T each.
        method: a registered merge or its name with ``options``.

    Returns:
        A state whose ``meta["errors"]`` has ‖merged − Σ w·ΔW‖/‖Σ w·ΔW‖ by site.

    Raises:
        MergeError: no source, a site that is not low-rank, shapes that differ between sources.
    """
    if not states:
        raise MergeError("There is nothing to merge; give at least one adapter.")
    weights = tuple(1 / len(states) for _ in states) if weights is None else tuple(weights)
    if len(weights) != len(states):
        raise OptionError(f"{len(weights)} weights for {len(states)} adapters; give one each.")
    rule = make("merge", method, **options) if isinstance(method, str) else method
    sites: dict[str, Delta] = {}
    errors: dict[str, float] = {}
    for name in sorted({n for s in states for n in s.sites}):
        lifted = Lifted(name, tuple(_factors(s.sites.get(name), name) for s in states), weights)
        _same_shape(lifted)
        merged = rule.combine(lifted, generator(seed, f"merge:{rule.info.name}", name))
        errors[name] = _distance(merged, lifted.total())
        A, B = merged.factors()
        sites[name] = LowRank(A.float(), B.float(), 1.0)
    return AdapterState(sites, meta={"errors": errors, "method": rule.info.name, "weights": list(weights)})


def _factors(d: Delta | None, name: str) -> tuple[Tensor, Tensor] | None:
    if d is None:
        return None
    if not isinstance(d, LowRank):
        raise MergeError(f"The source at {name!r} is a {d.kind} delta; lower() it to low rank first, which reports the error.")
    if d.A.dim() != 2:
        raise MergeError(f"The source at {name!r} is a stack of {d.A.shape[0]} experts; merge experts one by one.")
    if d.core is not None:
        A, B = d.factors()
        return A.double(), B.double()
    s = float(d.scale)  # √|s| on each side, which factor-wise rules can tell
    return d.A.double() * abs(s) ** 0.5, d.B.double() * math.copysign(abs(s) ** 0.5, s)


def _same_shape(lifted: Lifted) -> None:
    shapes = {(B.shape[0], A.shape[1]) for A, B, _ in lifted.present()}
    if len(shapes) > 1:
        raise MergeError(f"The sources at {lifted.site!r} have shapes {sorted(shapes)}; they were made for different bases.")


def _distance(a: LowRank, b: LowRank) -> float:
    """‖a − b‖/‖b‖ in fp64, from r-wide products; 0 where both vanish."""
    (A, B), (C, D) = a.factors(), b.factors()
    A, B, C, D = (t.double() for t in (A, B, C, D))
    left, right = torch.cat([B, -D], 1), torch.cat([A, C], 0)
    gap = ((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0).sqrt()
    size = ((D.mT @ D) * (C @ C.mT)).sum().clamp_min(0).sqrt()
    return float(gap / size) if size > 0 else float(gap > 0)


def read_state(model: nn.Module, folder: str | Path, *, rank: int | None = None) -> AdapterState:
    """A folder's adapter as a value against the untouched base of ``model``, which is left as it was.

    ``rank`` cuts every site to it; without, a change that is not exactly low-rank (DoRA …) is refused.
    """
    from rankwise.files import load

    name = f"__reading {folder}".replace("/", " ").replace("\\", " ")[:120]
    adapter = load(model, folder, name=name, activate=False)
    try:
        return adapter.lower(rank=rank)
    except OptionError as error:
        raise MergeError(f"{folder}: {error}") from error
    finally:
        adapter.detach()


def attach_state(model: nn.Module, state: AdapterState, *, name: str = "merged", activate: bool = True) -> Adapter:
    """Attach a low-rank value as an ordinary ``lora`` adapter of uneven ranks."""
    from rankwise.files import rebuild
    from rankwise.recipe import Recipe

    ranks = {n: int(d.exact_rank or 0) for n, d in state.sites.items()}
    recipe = Recipe(form="lora", targets=list(ranks), r=max(ranks.values()))
    entry = {
        "part": {"form": "lora", "targets": list(ranks), "r": max(ranks.values())},
        "ranks": ranks,
        "scales": dict.fromkeys(ranks, 1.0),
    }
    tensors: dict[str, Tensor] = {}
    for n, d in state.sites.items():
        A, B = d.factors()  # type: ignore[attr-defined]
        tensors |= {f"{n}::A": A, f"{n}::B": B}
    return rebuild(model, recipe, {"parts": [entry], "states": {}}, tensors, name, activate)


def attach_merged(
    model: nn.Module,
    folders: Sequence[str],
    method: str = "cat",
    weights: Sequence[float] | None = None,
    *,
    name: str = "merged",
    source_rank: int | None = None,
    **options: Any,
) -> Adapter:
    """Read adapter folders (cut to ``source_rank`` where given), merge them, attach the result."""
    states = [read_state(model, f, rank=source_rank) for f in folders]
    return attach_state(model, merge_states(states, weights, method, **options), name=name)


def truncated(total: LowRank, rank: int) -> LowRank:
    """The best rank-``rank`` part of a low-rank value (QR + small SVD), √S on each side."""
    low, _ = total.to_lowrank(rank=rank)
    return low
