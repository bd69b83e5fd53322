"""Stragglers: the few layers whose path from the base to the fine-tune is bumpy, found and thinned out.

θ(α) = θ₀ + α·ΔW.  A layer's path moves that layer alone, from θ_1 = θ₀ + ΔW with the layer at θ₀ (α = 0) to θ_1 (α = 1):

    g_ℓ(α)    = loss(θ_1 with layer ℓ at α)
    barrier_ℓ = max_α [g_ℓ(α) − ((1 − α)·g_ℓ(0) + α·g_ℓ(1))]         on a grid; a coarse grid misses barriers
    straggler: barrier_ℓ > Q_2 + 1.5·(Q_3 − Q_1) of the other layers' barriers
    sharpness_ℓ = loss(θ_1 + ε_ℓ) − loss(θ_1),  ε_ℓ = ρ·‖θ_ℓ‖·∇_ℓ/‖∇_ℓ‖   (one normalised step up, radius relative to the layer)

The paper's own definitions of straggler and sharpness are not published: these are a reconstruction (after arXiv 2410.16476).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from rankwise._renamed import renamed_argument
from rankwise.adapter import attach
from rankwise.delta.state import AdapterState
from rankwise.errors import OptionError
from rankwise.merge.engine.base import merge_states, share
from rankwise.merge.judge.functional import call
from rankwise.merge.judge.state_values import plain
from rankwise.recipe import Recipe
from rankwise.runtime.switch import view
from rankwise.sites.discover import find_sites

if TYPE_CHECKING:
    from rankwise.merge.judge.evaluator import Evaluator

Groups = Mapping[str, Sequence[str]]
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
NAME = "__sharpness"


@dataclasses.dataclass(frozen=True)
class Path:
    """One layer's path: α, the cost there (lower is better), and how far it rises above the straight line."""

    alphas: tuple[float, ...]
    costs: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """≥ 0: the ends are on the line."""
        a, b = self.costs[0], self.costs[-1]
        return max(g - ((1 - t) * a + t * b) for t, g in zip(self.alphas, self.costs, strict=True))


def layers(model: nn.Module, state: AdapterState, by: Literal["layer", "site"] = "layer") -> dict[str, list[str]]:
    """The state's sites by transformer block ("layer 3"; a site outside the blocks alone), or each alone."""
    known = getattr(model._modules.get("rankwise"), "known", None) or find_sites(model)
    out: dict[str, list[str]] = {}
    for n in state.sites:
        index = known[n].spec.layer if by == "layer" else -1
        out.setdefault(n if index < 0 else f"layer {index}", []).append(n)
    return out


@renamed_argument("oracle", "evaluator")
def profile(
    evaluator: Evaluator, state: AdapterState, groups: Groups, *, grid: Sequence[float] = GRID, split: str | None = None
) -> dict[str, Path]:
    """Each layer's path under the evaluator's score; len(grid) scores a layer, of which the end is shared.

    Args:
        evaluator: scores on its model.
        state: the fine-tune.
        groups: layer → sites (:func:`layers`).
        grid: of α.
        split: of the evaluator's scores; default its first.

    Raises:
        OptionError: a grid that does not run from 0 to 1; a site the state lacks.
    """
    grid = tuple(float(a) for a in grid)
    if len(grid) < 3 or grid[0] != 0 or grid[-1] != 1 or sorted(grid) != list(grid):
        raise OptionError(f"A path is scored from 0 to 1 with a place between, in order; it got {list(grid)}.")
    _known(state, groups)
    return {
        layer: Path(grid, tuple(evaluator.cost(_at(state, names, a), split) for a in grid))
        if _moves(state, names)
        else _flat(evaluator, state, grid, split)
        for layer, names in groups.items()
    }


def stragglers(barriers: Mapping[str, float], *, floor: float = 1e-4) -> list[str]:
    """The outliers among the layers, the worst first: above the others' median + 1.5·IQR.

    A barrier up to ``floor``, in the score's units, is no barrier: where all paths are straight their rounding would else
    make outliers.

    Raises:
        OptionError: fewer than four layers, of which no quartile means anything.
    """
    if len(barriers) < 4:
        raise OptionError(f"Outliers are told from at least three other layers; there are {len(barriers)} in all.")
    found = []
    for layer, value in barriers.items():
        others = torch.tensor([v for n, v in barriers.items() if n != layer], dtype=torch.float64)
        q1, q2, q3 = others.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        if value > max(floor, q2 + 1.5 * (q3 - q1)):
            found.append(layer)
    return sorted(found, key=lambda n: -barriers[n])


def sparsified(state: AdapterState, sites: Iterable[str], density: float, *, rank: int | None = None) -> AdapterState:
    """Only the largest ``density`` share of |ΔW| at ``sites``, the rest of the state as it is; scale it for θ(α).

    What is kept is lowered by an SVD, exactly where ``rank`` is None; the share that a rank loses is in
    ``meta["truncation"]``.  Density 1 leaves the state alone: the ordinary interpolation.

    Args:
        state: the fine-tune.
        sites: which are thinned.
        density: the share kept, in (0, 1].
        rank: of what is kept; None: exact.
    """
    share("sparsified", "density", density)
    chosen = sorted(set(sites))
    _known(state, {"": chosen})
    if density == 1 or not chosen:
        return state
    widest = max(max(state.sites[n].shape[-2:]) for n in chosen)
    some = AdapterState({n: state.sites[n] for n in chosen})
    thin = merge_states([some], [1.0], "magnitude_prune", density=density, rank=rank or widest)
    return AdapterState({**state.sites, **thin.sites}, state.full, {**state.meta, "truncation": thin.meta["truncation"]})


@renamed_argument("oracle", "evaluator")
def sharpness(evaluator: Evaluator, state: AdapterState, groups: Groups, *, radius: float = 0.01) -> dict[str, float]:
    """loss(θ_1 + ε_ℓ) − loss(θ_1) of each layer, the mean over the evaluator's batches; ``radius`` is ρ, relative to ‖θ_ℓ‖.

    θ_ℓ are the layer's whole weights W + ΔW, so it does not depend on the gauge of the factors.  One gradient of the size
    of all groups' weights, and a forward a layer and batch.  A layer without gradient has sharpness 0.

    Args:
        evaluator: its loss and batches are used.
        state: the fine-tune.
        groups: layer → sites (:func:`layers`).
        radius: ρ.
    """
    if not evaluator.batches:
        raise OptionError("Sharpness needs a gradient; give Evaluator(model, batches=…).")
    if not radius > 0:
        raise OptionError(f"The radius of sharpness is relative to a layer's norm and above 0; it got {radius}.")
    sites = sorted({n for names in groups.values() for n in names})
    _known(state, {"": sites})
    state = plain(state)
    with evaluator.attached(state) as adapter:
        assert adapter is not None
        extra = attach(evaluator.model, Recipe(form="dense", targets=sites), name=NAME, activate=False)
        try:
            with view(evaluator.model, {adapter.name: 1.0, NAME: 1.0}):
                return _ascents(evaluator, state, groups, extra, radius)
        finally:
            extra.detach()


def _ascents(evaluator: Evaluator, state: AdapterState, groups: Groups, extra: object, radius: float) -> dict[str, float]:
    """The step in each layer through the tensors D of a dense change at zero, which nothing is written to."""
    held = extra.tensors(buffers=False)  # type: ignore[attr-defined]
    zero = {k: t.detach().clone().requires_grad_() for k, t in held.items()}
    start = _mean_loss(evaluator, zero)
    found = torch.autograd.grad(start, list(zero.values()))
    grads = {k.removesuffix("::D"): g for k, g in zip(zero, found, strict=True)}
    known = extra.sites  # type: ignore[attr-defined]
    out = {}
    with torch.no_grad():
        for layer, names in groups.items():
            up = _norm(grads[n] for n in names)
            size = _norm(known[n].site.read() + state.sites[n].dense().float() for n in names)
            if up == 0:
                out[layer] = 0.0
                continue
            step = {f"{n}::D": radius * size / up * grads[n] for n in names}
            out[layer] = float(_mean_loss(evaluator, step) - start)
    return out


def _mean_loss(evaluator: Evaluator, tensors: Mapping[str, Tensor]) -> Tensor:
    losses = [evaluator.of(call(evaluator.model, tensors, b, name=NAME), b) for b in evaluator.batches]
    return torch.stack(losses).mean()


def _norm(parts: Iterable[Tensor]) -> float:
    return float(sum(p.double().square().sum() for p in parts)) ** 0.5


def _at(state: AdapterState, names: Sequence[str], alpha: float) -> AdapterState:
    """The state with some sites scaled; at 1 itself, so that its score is asked once."""
    return state if alpha == 1 else AdapterState({n: d.scaled(alpha) if n in names else d for n, d in state.sites.items()})


def _moves(state: AdapterState, names: Sequence[str]) -> bool:
    return any(float(state.sites[n].norm()) > 0 for n in names)


def _flat(evaluator: Evaluator, state: AdapterState, grid: tuple[float, ...], split: str | None) -> Path:
    return Path(grid, (evaluator.cost(state, split),) * len(grid))


def _known(state: AdapterState, groups: Groups) -> None:
    lacking = [n for names in groups.values() for n in names if n not in state.sites]
    if lacking:
        raise OptionError(f"The adapter changes nothing called {lacking[0]!r}; its sites are {', '.join(list(state.sites)[:4])} …")
