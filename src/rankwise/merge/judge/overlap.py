"""How adapters overlap before they are merged: shared subspaces, shared components, and entries that pull apart.

All is site by site and from factors; only the sign conflict looks at entries, by blocks of rows.  A number near its value
for unrelated adapters (:attr:`SourcePair.chance`) says nothing: two random subspaces of rank r in n dimensions share r/n.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.delta.solve import thin_svd_of_product
from rankwise.errors import MergeError, OptionError
from rankwise.merge.engine.base import Source, factors_of
from rankwise.merge.engine.stack import FactorStack, one_shape

#: singular values below this share of the largest are the rounding of a factor, not a direction of the change
RANK_TOL = 1e-6


@dataclasses.dataclass(frozen=True)
class SourcePair:
    """Two sources at one site.

    Attributes:
        left, right: cosines of the principal angles between the column spaces (of B) and row spaces (of A), falling; as many
            as the smaller rank.
        cosine: ⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖·‖ΔW_b‖).
        shared_left, shared_right: mean squared cosine, 0 (orthogonal) to 1 (the smaller space lies in the other).
        matched_a, matched_b: share of a's (b's) energy in components that have a partner in the other one-to-one:
            |⟨u, u'⟩·⟨v, v'⟩| at least ``match``, for components of the SVDs.
        chance: what shared_left and shared_right are for random spaces of these ranks: (r/out, r/in), r the larger rank.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]
    cosine: float
    shared_left: float
    shared_right: float
    matched_a: float
    matched_b: float
    chance: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SiteOverlap:
    """All sources at one site.

    Attributes:
        ranks, energies: of each source, numerical rank and ‖ΔW‖² (0 where absent).
        pairs: (a, b), a < b, of those that both change the site.
        gram: inner products of the changes, T×T.
        conflict: {(a, b): share}: Σ 2·min(|x|, |y|) over entries of opposite sign / Σ |x| + |y|, each change scaled to norm
            1 first, so that the larger does not hide the smaller.
        conflicts: the same of all sources together: 1 − Σ|Σ_t x_t| / Σ Σ_t |x_t|, what cancels in their plain sum.
    """

    ranks: tuple[int, ...]
    energies: tuple[float, ...]
    gram: Tensor
    pairs: dict[tuple[int, int], SourcePair]
    conflict: dict[tuple[int, int], float]
    conflicts: float


@dataclasses.dataclass(frozen=True)
class Overlap:
    """``sites``: name → :class:`SiteOverlap`; ``sources``: how many."""

    sites: dict[str, SiteOverlap]
    sources: int

    def over(self, names: Iterable[str] | None = None) -> dict[tuple[int, int], dict[str, float]]:
        """(a, b) → cosine, shared_left, shared_right, matched_a, matched_b, conflict, chance, over some sites.

        The cosine is that of the changes at all these sites as one vector; the rest are means weighted by √(‖ΔW_a‖²·‖ΔW_b‖²).  A
        pair that shares no site is not in the answer.
        """
        chosen = [self.sites[n] for n in (self.sites if names is None else names)]
        found = {}
        for a, b in sorted({p for s in chosen for p in s.pairs}):
            size = math.sqrt(sum(s.energies[a] for s in chosen) * sum(s.energies[b] for s in chosen))
            row = {"cosine": sum(float(s.gram[a, b]) for s in chosen) / size}
            both = [(s, math.sqrt(s.energies[a] * s.energies[b])) for s in chosen if (a, b) in s.pairs]
            total = sum(w for _, w in both)
            for key in ("shared_left", "shared_right", "matched_a", "matched_b"):
                row[key] = sum(w * getattr(s.pairs[a, b], key) for s, w in both) / total
            row["conflict"] = sum(w * s.conflict[a, b] for s, w in both) / total
            row["chance"] = sum(w * sum(s.pairs[a, b].chance) / 2 for s, w in both) / total
            found[a, b] = row
        return found

    def cosines(self) -> Tensor:
        """T×T over all sites, fp64; NaN in the row of a source that changes nothing."""
        gram = torch.stack([s.gram for s in self.sites.values()]).sum(0)
        size = gram.diagonal().clamp_min(0).sqrt()
        return gram / (size[:, None] * size[None])

    def energy(self) -> list[float]:
        """‖ΔW‖² of each source over all sites."""
        return [sum(s.energies[t] for s in self.sites.values()) for t in range(self.sources)]


def compare_states(states: Sequence[Source], *, match: float = 0.5, progress: Callable[[str], None] = lambda name: None) -> Overlap:
    """Compare low-rank adapters of one base.

    Args:
        states: values, or folders read one site at a time; two or more.
        match: the least similarity of two components that count as the same one.

    Raises:
        OptionError: fewer than two, a ``match`` outside (0, 1].
        MergeError: a change that is not low-rank, shapes that differ, a stack of experts, sources without a common site.
    """
    if len(states) < 2:
        raise OptionError(f"A comparison is between two adapters or more; it got {len(states)}.")
    if not 0 < match <= 1:
        raise OptionError(f"match is a similarity in (0, 1]; it got {match}.")
    sites = {}
    for name in sorted({n for s in states for n in s.sites}):
        stack = FactorStack(name, (1.0,) * len(states), pairs=tuple(factors_of(s.sites.get(name), name) for s in states))
        one_shape(stack)
        sites[name] = _site(stack, match)
        progress(name)
    if not any(s.pairs for s in sites.values()):
        raise MergeError(
            "No two of the adapters change the same place, so there is nothing to compare; they can be added as they are."
        )
    return Overlap(sites, len(states))


def _site(stack: FactorStack, match: float) -> SiteOverlap:
    svds = [_svd(p) if p is not None else None for p in stack.pairs]
    gram = stack.gram()
    there = [t for t, s in enumerate(svds) if s is not None and len(s[1])]
    pairs = {(a, b): _pair(svds[a], svds[b], match, stack.shape) for i, a in enumerate(there) for b in there[i + 1 :]}
    conflict, conflicts = _conflict(stack, there, gram.diagonal().clamp_min(0).sqrt())
    ranks = tuple(len(s[1]) if s is not None else 0 for s in svds)
    return SiteOverlap(ranks, tuple(float(g) for g in gram.diagonal().clamp_min(0)), gram, pairs, conflict, conflicts)


def _svd(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh) of B·A by QR of both factors, cut to the numerical rank."""
    U, S, Vh = thin_svd_of_product(pair[1], pair[0])
    r = int((RANK_TOL * S.max().clamp_min(1e-300) < S).sum()) if len(S) else 0
    return U[:, :r], S[:r], Vh[:r]


def _pair(x: Any, y: Any, match: float, shape: tuple[int, int]) -> SourcePair:
    (U, S, V), (P, Q, R) = x, y
    left, right = U.mT @ P, V @ R.mT  # r×r': cosines between basis vectors
    cosine = float((S[:, None] * left * right * Q).sum() / (S.norm() * Q.norm()))
    angles = [torch.linalg.svdvals(m).clamp(max=1.0) for m in (left, right)]
    a, b = _matched((left * right).abs(), match)
    share_a, share_b = (float(s[i].square().sum() / s.square().sum()) for s, i in ((S, a), (Q, b)))
    r = max(len(S), len(Q))
    return SourcePair(
        left=tuple(angles[0].tolist()),
        right=tuple(angles[1].tolist()),
        cosine=cosine,
        shared_left=float(angles[0].square().mean()),
        shared_right=float(angles[1].square().mean()),
        matched_a=share_a,
        matched_b=share_b,
        chance=(r / shape[0], r / shape[1]),
    )


def _matched(like: Tensor, least: float) -> tuple[list[int], list[int]]:
    """Components of a and of b paired one to one, the most alike first (each counts once)."""
    left = like.clone()
    a: list[int] = []
    b: list[int] = []
    while left.numel() and float(left.max()) >= least:
        i, j = divmod(int(left.argmax()), left.shape[1])
        a.append(i)
        b.append(j)
        left[i], left[:, j] = -1.0, -1.0
    return a, b


def _conflict(stack: FactorStack, there: Sequence[int], size: Tensor) -> tuple[dict[tuple[int, int], float], float]:
    """Sign conflicts of each pair and of all together, by blocks of rows; ``size``: norms."""
    pairs = [(a, b) for i, a in enumerate(there) for b in there[i + 1 :]]
    lost = dict.fromkeys(pairs, 0.0)
    sums = dict.fromkeys(there, 0.0)
    whole = 0.0
    for rows in stack.blocks(copies=len(there) + 2):
        x = {t: stack.block(t, rows) / float(size[t]) for t in there}
        for t in there:
            sums[t] += float(x[t].abs().sum(dtype=torch.float64))
        for a, b in pairs:  # |x| + |y| − |x + y| = 2·min(|x|, |y|) where the signs differ, else 0
            lost[a, b] += float((x[a].abs() + x[b].abs() - (x[a] + x[b]).abs()).sum(dtype=torch.float64))
        if len(there) > 1:
            whole += float(sum(x.values()).abs().sum(dtype=torch.float64))  # type: ignore[union-attr]
    total = sum(sums.values())
    together = 1 - whole / total if len(there) > 1 else 0.0
    return {(a, b): lost[a, b] / (sums[a] + sums[b]) for a, b in pairs}, together
