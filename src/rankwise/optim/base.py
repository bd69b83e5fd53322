"""Base classes of optimisers: a transform takes gradients and returns additive updates, and keeps a state.

A :class:`GradTransform` works on dictionaries keyed by parameter name.  Its state is a tree of plain dicts
whose leaves are tensors, numbers, strings or None, so that a checkpoint is ``torch.save`` of that tree and
nothing else.  In the tree, structure (which link of a chain, which branch) has keys that begin with ``/``,
and everything that belongs to one parameter lies under that parameter's name; by that rule alone moments
can be counted, freed and moved without knowing the transform that made them (:mod:`rankwise.optim.state`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rankwise import seeds
from rankwise.errors import Option, OptionError, RecipeError

State = dict[str, Any]
Fused = tuple[set[str], list[Callable[[], None]]]
Policy = Literal["keep", "drop", "zero", "slice"]
POLICIES = ("keep", "drop", "zero", "slice")

#: separates a parameter's name from the name of one of its coordinates (see ``reparam``)
PART = "::"


@dataclasses.dataclass
class Param:
    """One trainable tensor and what an optimiser may know of it.

    Attributes:
        name: unique; the key of its gradient, update and state.
        tensor: the parameter (the same object as in the torch ``param_groups``).
        site: the adapted weight; the A and the B of one LoRA layer have the same.
        role: "A", "B", "core", "magnitude", "weight", "bank" or "other".
        scale: s of Δ = s·B·A for factors, else None.
        component_axis: the axis of ``tensor`` that runs over rank-one components (A: 0, B: 1; in a stack
            with a leading expert axis 1 and 2), or None.
        decay: whether weight decay applies.
    """

    name: str
    tensor: Tensor
    site: str = ""
    role: str = "other"
    scale: float | None = None
    component_axis: int | None = None
    decay: bool = True


@dataclasses.dataclass
class Context:
    """What a transform may know of the step.

    Attributes:
        step: t, 1 at the first step.
        lr: the base learning rate now.
        lr_ratio: ``lr`` over its value at construction (what a scheduler has made of it).
        seed: of the run.
        params: all parameters by name.
        lrs: learning rate by parameter name (its group's).
        decays: weight decay by parameter name.
        logs: for the transform to write to; becomes the optimiser's ``logs``.
    """

    step: int
    lr: float
    lr_ratio: float = 1.0
    seed: int = 0
    params: Mapping[str, Param] = dataclasses.field(default_factory=dict)
    lrs: dict[str, float] = dataclasses.field(default_factory=dict)
    decays: dict[str, float] = dataclasses.field(default_factory=dict)
    logs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def pairs(self) -> Iterator[tuple[str, Param, Param, float]]:
        """Every (site, A, B, scale) among all parameters, in the order of the sites' names."""
        return iter(pairs(self.params))

    def rng(self, purpose: str, name: str) -> torch.Generator:
        """A CPU generator of (run seed, purpose, name)."""
        return seeds.generator(self.seed, purpose, name)

    def lr_of(self, name: str) -> float:
        """The rate of one parameter (its group's), also for one of its coordinates."""
        return self.lrs.get(name.split(PART)[0], self.lr)

    def decay_of(self, name: str) -> float:
        """The weight decay of one parameter, also for one of its coordinates."""
        return self.decays.get(name.split(PART)[0], 0.0)


class GradTransform:
    """A gradient transformation.  The base class is the identity.

    ``update`` must not change the gradients it is given; it changes ``state`` in place.  Of a chain, the last
    link includes the sign: the optimiser adds what it gets.
    """

    #: whether ``update`` reads parameter values (then it cannot run inside a subspace, which has none)
    reads_params: bool = False

    def init(self, params: Mapping[str, Param]) -> State:
        """The state of ``params``, each with its own entry; called again for parameters that join later."""
        return {}

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        """Updates, to be added to the parameters, in the shape and dtype of the gradients.

        Args:
            grads: name → gradient, fp32 (fp64 of fp64 parameters); must not be written to.
            state: what :meth:`init` returned, changed in place.
            params: by name, at least those of ``grads``.
            ctx: step, rates, seed.

        Returns:
            name → update; a parameter that is left out is not touched at all, by weight decay neither.
        """
        return grads

    def fuse(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> Fused:
        """Names whose complete step (moments, update, apply) a fused kernel does, and the calls that will do it.

        Nothing may change before the calls: they run once the other updates have been computed, because those may
        read the same parameters.

        Args:
            grads, state, params, ctx: as :meth:`update` gets them.
        """
        return set(), []

    def after_update(self, params: Mapping[str, Param], state: State, ctx: Context) -> None:
        """Change the stepped ``params`` in place: prox, retraction, requantisation."""

    def resync(self, state: State, name: str, kept: Tensor | None, policy: str) -> None:
        """Adjust the state of a parameter whose components were pruned, grown or restarted.

        Args:
            state: what :meth:`init` returned, changed in place.
            name: the parameter.
            kept: (k,) int64 along its component axis, or None for the full tensor.
            policy: see :meth:`TransformOptimizer.resync <rankwise.optim.optimizer.TransformOptimizer.resync>`.
        """

    def rotate(self, state: State, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` of basis to the statistics of ``name`` that are linear in the gradient."""


class OptimizerMethod:
    """A registered optimiser: a dataclass of options that wires transforms together.

    The rate, its schedule and the weight decay are the :class:`~rankwise.optim.optimizer.TransformOptimizer`'s.
    """

    @property
    def requires(self) -> tuple[str, ...]:
        """Words that the form's ``provides`` must hold ("pair", "weight")."""
        info = getattr(self, "info", None)
        return info.requires if info is not None else ()

    def transform(self, params: Mapping[str, Param]) -> GradTransform:
        """The transformation for ``params``; RecipeError if it would act on nothing."""
        raise NotImplementedError

    def lr_multiplier(self, param: Param) -> float:
        """The factor on the base rate of ``param``; parameters of one factor share a param group."""
        return 1.0


def pairs(params: Mapping[str, Param]) -> list[tuple[str, Param, Param, float]]:
    """(site, A, B, scale) of every LoRA layer: each site that has both an A and a B, sorted by site.

    Raises:
        RecipeError: a site has two factors of one role, or no scale is known.
    """
    sides: dict[str, dict[str, Param]] = {}
    for p in params.values():
        if p.role in ("A", "B"):
            side = sides.setdefault(p.site, {})
            if p.role in side:
                raise RecipeError(
                    f"Site {p.site!r} has two factors {p.role} ({side[p.role].name!r} and {p.name!r}), so which A "
                    "belongs to which B is open; give each adapter's site a name of its own."
                )
            side[p.role] = p
    out = []
    for site in sorted(sides):
        if len(sides[site]) == 2:
            a, b = sides[site]["A"], sides[site]["B"]
            scale = b.scale if a.scale is None else a.scale
            if scale is None:
                raise RecipeError(f"The pair at {site!r} has no scale; its form must give the s of Δ = s·B·A.")
            out.append((site, a, b, float(scale)))
    return out


def work_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of moments and updates: fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def refuse_sharded(param: Param, method: str) -> None:
    """RecipeError if the parameter is a shard: what follows needs the whole matrix."""
    if hasattr(param.tensor, "placements"):
        raise RecipeError(
            f"{method} needs whole matrices, but {param.name!r} is sharded (DTensor); train it under DDP, or choose ",
            Option("optimizer", "adamw"),
            " for sharded parameters.",
        )


def check_betas(betas: Any, eps: float) -> tuple[float, float]:
    """The pair (β1, β2) as floats; OptionError outside 0 ≤ β < 1, or for a negative ε."""
    values = tuple(float(b) for b in betas)
    if len(values) != 2 or not all(0.0 <= b < 1.0 for b in values):
        raise OptionError(f"betas is {betas!r}; expected two numbers in [0, 1), for example (0.9, 0.999).")
    if not eps >= 0.0:
        raise OptionError(f"eps is {eps!r}; expected a number ≥ 0, for example 1e-8.")
    return values[0], values[1]


def choose(option: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``; else OptionError that lists them."""
    if value not in allowed:
        raise OptionError(f"{option} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")
    return value
