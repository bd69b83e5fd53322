"""Combining the logits of several models at one decoding step: static arithmetic, and strengths found by matching KL shifts.

A combiner sees ``{model: logits}``, who the target is, and the terms w_t·(expert_t − anti_t), and gives one tensor of
logits.  It holds no state: a row's answer depends on that row alone, whatever batch or step it stands in.
:mod:`rankwise.decoding.model` runs the models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.catalogue import MethodInfo, register
from rankwise.errors import OptionError

#: of the search for a strength: steps at the most, and the relative error of the KL that ends it
ROUNDS, TOLERANCE = 60, 1e-9


@dataclasses.dataclass(frozen=True)
class Term:
    """w·(expert − anti), by the names of models."""

    expert: str
    weight: float
    anti: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise OptionError(f"The weight of expert {self.expert!r} must be a finite number; it is {self.weight}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitCombiner:
    """Base of all combiners; dataclass fields are options."""

    info: ClassVar[MethodInfo]
    typed: ClassVar[bool] = True

    def check(self, terms: Sequence[Term]) -> None:
        """Refuse terms that this combiner cannot follow.  Called once, before any forward."""

    def combine(self, logits: Mapping[str, Tensor], target: str, terms: Sequence[Term]) -> Tensor:
        """The models' logits (…, V) in fp64 → fused logits (…, V).

        No entry is infinite: what a model excludes is taken out before, and put back as −∞ afterwards.
        """
        raise NotImplementedError(f"The combiner {type(self).__name__} must combine.")

    def __call__(self, logits: Mapping[str, Tensor], target: str, terms: Sequence[Term]) -> Tensor:
        """:meth:`combine` on what the models gave, in the target's dtype; a token that any of them excludes stays excluded."""
        if not terms:
            return logits[target]
        names = {target, *(n for t in terms for n in (t.expert, t.anti))}
        wide = {n: logits[n].double() for n in names}
        out = torch.stack([w == -torch.inf for w in wide.values()]).any(0)
        fused = self.combine({n: w.masked_fill(out, -1e30) for n, w in wide.items()}, target, terms)
        return fused.masked_fill(out, -torch.inf).to(logits[target].dtype)


@register("logits", "static", title="Logit arithmetic: ℓ + Σ w·(expert − anti)", paper="arXiv 2401.08565", mergeable=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(LogitCombiner):
    """ℓ = ℓ_L + Σ_t w_t·(ℓ_t − ℓ_S), with the same w at every step; proxy tuning is w = 1.  A negative w steers away.

    With the anti-expert the target itself and w = 1 it is the expert to the bit (fp64); w = 0 is the target.  Source: proxy
    tuning (Liu et al.), DExperts.
    """

    def combine(self, logits: Mapping[str, Tensor], target: str, terms: Sequence[Term]) -> Tensor:
        fused = logits[target]
        for t in terms:
            fused = fused + t.weight * (logits[t.expert] - logits[t.anti])
        return fused


@register("logits", "dynamic", title="Dynamic logit fusion: strengths that match KL shifts", reference="195", mergeable=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(LogitCombiner):
    """ℓ = ℓ_L + Σ_t α_t·δ_t, δ_t = ℓ_t − ℓ_S, with α ≥ 0 found anew at each step and row, such that the fused model is as far
    from the target as the experts are from theirs: min over α of Σ_t w_t·[KL(p_α‖p_L) − KL(p_t‖p_S)]².

    The objective sees α through one number, KL(p_α‖p_L), so with T experts its minimisers are a surface, KL(p_α‖p_L) = the
    w-weighted mean of the experts' KLs.  The paper's solver was not found; descent ends wherever it began from.  Built
    here: α = c·π on a fixed ray π (Σ π = 1), along which KL(p_α‖p_L) never falls (derivative c·Var_{p_α}(π·δ)), so that c is
    unique: safeguarded Newton from c = 1.  ``ray="shift"``: π_t ∝ w_t·KL(p_t‖p_S), the expert that has more to say at this
    step leads; ``ray="weight"``: π_t ∝ w_t.  There is no warm start: it would only make a row depend on those before it.

    One expert whose anti is the target has α = 1; clones of one expert get total weight 1; a δ that is constant over the
    vocabulary changes nothing.  Weights are relative, so one expert's must be 1.

    Args:
        cap: c at the most, where the KL asked for cannot be reached (ours; the paper gives no bound).
        ray: "shift" or "weight".
        divergence: "forward" KL(p_α‖p_L), "reverse" KL(p_L‖p_α), or "both" summed, on both sides of the match.

    Source: Facico/Dynamic-Logit-Fusion publishes no code; from the paper (arXiv 2406.15480).  Errors: negative weights, one expert with a
    weight other than 1.
    """

    cap: float = 2.0
    ray: str = "shift"
    divergence: str = "forward"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cap) and self.cap > 0):
            raise OptionError(f"The combiner 'dynamic' takes cap as a positive number; it got {self.cap}.")
        if self.ray not in ("shift", "weight"):
            raise OptionError(f"The combiner 'dynamic' has ray in ['shift', 'weight']; it got {self.ray!r}.")
        if self.divergence not in ("forward", "reverse", "both"):
            raise OptionError(
                f"The combiner 'dynamic' has divergence in ['both', 'forward', 'reverse']; it got {self.divergence!r}."
            )

    def check(self, terms: Sequence[Term]) -> None:
        if bad := [t for t in terms if t.weight < 0]:
            raise OptionError(
                f"The dynamic fusion finds strengths ≥ 0; expert {bad[0].expert!r} has weight {bad[0].weight:g}. Use static to steer away."
            )
        if len(terms) == 1 and terms[0].weight != 1:
            raise OptionError(
                f"The dynamic fusion finds the strength of a single expert itself; leave out the weight {terms[0].weight:g} of "
                f"{terms[0].expert!r}, or use static."
            )

    def strengths(self, logits: Mapping[str, Tensor], target: str, terms: Sequence[Term]) -> Tensor:
        """α: (…, T)."""
        shifts = torch.stack([logits[t.expert] - logits[t.anti] for t in terms], -2)  # (…, T, V)
        antis = torch.stack([logits[t.anti] for t in terms], -2)
        asked = _gap(self.divergence, antis, shifts, torch.ones_like(antis[..., 0]))[0]  # (…, T)
        w = torch.tensor([t.weight for t in terms], dtype=shifts.dtype, device=shifts.device)
        share = w * asked if self.ray == "shift" else w.expand_as(asked)
        total = share.sum(-1, keepdim=True)
        share = torch.where(total > 0, share / total.clamp_min(1e-300), w / w.sum())
        along = (share[..., None] * shifts).sum(-2)
        return share * self._length(logits[target], along, (w * asked).sum(-1) / w.sum())[..., None]

    def _length(self, base: Tensor, along: Tensor, goal: Tensor) -> Tensor:
        """c in [0, cap] with the divergence of ``base + c·along`` from ``base`` = goal, or the end nearest to it."""
        shape, goal = goal.shape, goal.reshape(-1)
        base, along = (t.expand(*shape, t.shape[-1]).reshape(len(goal), -1) for t in (base, along))
        c, low, high = torch.full_like(goal, min(1.0, self.cap)), torch.zeros_like(goal), torch.full_like(goal, self.cap)
        beyond = (_gap(self.divergence, base, along, high)[0] <= goal) & (along.amax(-1) > along.amin(-1))
        c = torch.where(beyond, high, c)
        open_ = (~beyond).nonzero()[:, 0]  # rows still searched: most end after a few steps
        for _ in range(ROUNDS):
            if not len(open_):
                break
            at, aim = c[open_], goal[open_]
            gap, slope = _gap(self.divergence, base[open_], along[open_], at)
            low[open_] = torch.where(gap <= aim, at, low[open_])
            high[open_] = torch.where(gap > aim, at, high[open_])
            new = at - (gap - aim) / slope
            inside = (new >= low[open_]) & (new <= high[open_])
            new = torch.where(inside, new, (low[open_] + high[open_]) / 2)  # also where the slope is 0 or NaN
            met = (gap - aim).abs() <= TOLERANCE * aim + 1e-13
            c[open_] = torch.where(met, at, new)
            open_ = open_[~met]
        return c.reshape(shape)

    def combine(self, logits: Mapping[str, Tensor], target: str, terms: Sequence[Term]) -> Tensor:
        alpha = self.strengths(logits, target, terms)
        return logits[target] + sum(alpha[..., i, None] * (logits[t.expert] - logits[t.anti]) for i, t in enumerate(terms))


def _gap(divergence: str, base: Tensor, along: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of p_c ∝ exp(base + c·along) from p_0, and its derivative in c; base, along: (…, V), c: (…)."""
    p0, pc = base.log_softmax(-1), (base + c[..., None] * along).log_softmax(-1)
    q = pc.exp()
    atc, moved = (q * along).sum(-1), pc - p0
    forward = (q * moved).sum(-1)
    if divergence == "forward":
        return forward, c * (q * (along - atc[..., None]).square()).sum(-1)
    q0 = p0.exp()
    reverse, slope = -(q0 * moved).sum(-1), atc - (q0 * along).sum(-1)
    if divergence == "reverse":
        return reverse, slope
    return forward + reverse, slope + c * (q * (along - atc[..., None]).square()).sum(-1)
