"""A knob between a quality fine-tune and a diversity one.

θ(λ) = (1 − λ)·θ_q + λ·θ_d: θ_q is distilled towards classifier-free guidance (the loss ``cfg_distillation``), θ_d towards
it with a reward for two samples of one prompt that differ (a policy gradient, not built here).  Both from one base.
Card 182: no code is published; the loss's details, γ and the reward's weight are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.delta import AdapterState
from rankwise.errors import OptionError
from rankwise.merge.base import Source
from rankwise.merge.interpolation import GRID, Point, between, scored
from rankwise.merge.oracle import Oracle


def knob(quality: Source, diversity: Source, lam: float) -> AdapterState:
    """(1 − λ)·θ_q + λ·θ_d, exact, λ in [0, 1]."""
    if not 0 <= lam <= 1:
        raise OptionError(f"The knob runs from 0 (quality) to 1 (diversity); it got {lam}.")
    return between(quality, diversity, 1 - lam)


def frontier(oracle: Oracle, quality: Source, diversity: Source, grid: Sequence[float] = GRID) -> list[Point]:
    """The scores on every split of the oracle (say one of quality, one of diversity) along the knob."""
    return [Point(lam, scored(oracle, knob(quality, diversity, lam))) for lam in grid]
