"""The seam of forms: how a change of weight is parametrised.

A form works in two phases.  ``plan`` sees all its sites at once (shared banks, global shapes) and refuses
what cannot be met; ``build`` gives each site a :class:`AdapterLayer`, a module with ``delta()`` and, only where
that is faster or where x decides, a ``forward`` of its own.  A form never asks what layer class it is on.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise._renamed import old_names, renamed_attribute, warn
from rankwise.delta.lowrank import LowRank
from rankwise.errors import Option, OptionError, RecipeError
from rankwise.seeds import generator

if TYPE_CHECKING:
    from rankwise.catalogue import MethodInfo
    from rankwise.delta.base import Delta
    from rankwise.sites.site import Site

#: scale policies: a named choice, never implicit
SCALES = {
    "alpha/r": lambda alpha, r: alpha / r,
    "alpha/sqrt_r": lambda alpha, r: alpha / math.sqrt(r),
    "constant": lambda alpha, r: alpha,
}


@dataclasses.dataclass
class Plan:
    """What ``build`` needs of the whole: rank and scale of every site, the seed, shared banks, and a form's own notes."""

    ranks: dict[str, int]
    scales: dict[str, float]
    seed: int = 0
    dropout: float = 0.0
    banks: dict[str, SharedTensors] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def generator(self, purpose: str, name: str) -> torch.Generator:
        """The generator of one draw, by purpose and site name, so order never matters."""
        return generator(self.seed, purpose, name)


class SharedTensors(nn.Module):
    """Tensors shared by many sites: registered, counted, optimised and saved once, read through the module each call."""

    def __init__(self, tensors: Mapping[str, Tensor], *, trainable: bool = True):
        super().__init__()
        for name, t in tensors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(t))
            else:
                self.register_buffer(name, t)


def index_buffer(module: nn.Module, name: str, values: Tensor) -> None:
    """Register integers that no ``.half()`` casts and no optimiser sees (int64, persistent)."""
    module.register_buffer(name, values.to(torch.int64))


class AdapterLayer(nn.Module):
    """The change of one site's weight, as a module that holds its tensors.

    Class attributes a form declares:
        components: the axis, counted from the end, along which a tensor is indexed by rank-one component.
        fills: tensors an init may fill.
        roles: what an optimiser should take each tensor for (A, B, core, magnitude, bank, other).
    """

    components: ClassVar[Mapping[str, int]] = {}
    in_place: ClassVar[bool] = False  # the base's own weight moves, so nothing is added to the output
    row_wise: ClassVar[bool] = True  # Δy of a row depends on that row of x alone, and nothing is recorded on the way
    fills: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[Mapping[str, str]] = {}

    A0: Tensor  # these three only where ``has_frozen_start`` is True
    B0: Tensor
    start_scale: float

    def __init__(self, site: Site, *, scale: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.site = site
        self.scale = scale
        self.dropout = dropout
        self.replaced = False  # True while this adapter's own weight stands in W's place
        self.base_weight: Tensor | None = None  # what an init wants W replaced by (base rule *replace*)
        self.has_frozen_start = False  # True once an init's start is carried as a frozen −s₀·B₀A₀
        self.keeps: Callable[[str, Tensor, float], Tensor] | None = None  # (site, x, p) → dropout's mask; None: torch draws it

    # --- what every form fills in -------------------------------------------------------------------------
    def delta(self) -> Delta:
        """The change of weight now, differentiable in the trainable tensors; never another adapter's."""
        raise NotImplementedError(f"{type(self).__name__} must give its delta().")

    def complete(self, filled: Mapping[str, Tensor]) -> None:
        """Fill the tensors an init left out, given those it filled (default: nothing to do)."""

    def on_attach(self, registry: Any, record: Any) -> None:
        """Called once the adapter stands in the model: writes the weight an init wants in W's place."""
        if self.base_weight is not None:
            registry.replace(self.site, record, self.base_weight)
            self.base_weight, self.replaced = None, True

    def on_detach(self, registry: Any, record: Any) -> None:
        """Called before the adapter is taken out: gives a replaced weight its bits back."""
        registry.put_back(self.site, record)

    def before_merge(self, registry: Any) -> None:
        """Called before the change is folded into W."""

    def fused_factors(self) -> list[tuple[Tensor, Tensor, float]] | None:
        """The (A, B, scale) whose Σ scale·B·A is all that this change does to a linear's output, for the fused executor; None: more."""
        return None

    def for_peft(self) -> tuple[Delta, Tensor | None]:
        """What leaves in PEFT's format: a low-rank delta against the untouched W, and a magnitude where the form has one."""
        return self.total_delta(), None

    # --- what the core does for all -----------------------------------------------------------------------
    def forward(self, x: Tensor, y: Tensor, strength: Tensor | None = None) -> Tensor:
        """Δy for the module's input ``x`` and base output ``y`` (with bias), in ``y``'s dtype."""
        d = self.total_delta()
        if strength is not None:
            d = d.scaled(strength)
        return self.dropped(d, self.site, x, y)

    def dropped(self, d: Delta, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Δy of ``d`` for an input with dropout: of its features, or, where x are indices, of whole rows (a one-hot's only entry)."""
        change = apply_delta(d, site, self.drop(x), y)
        if self.dropout and self.training and not x.is_floating_point():
            change = change * self.drop(change.new_ones(*x.shape, 1))
        return change

    def total_delta(self) -> Delta:
        """``delta()`` less the start an init subtracted: what acts on the untouched W."""
        d = self.delta()
        return d + self.start() if self.has_frozen_start else d

    def effective(self) -> Delta:
        """The old spelling of :meth:`total_delta`."""
        warn("AdapterLayer.effective()", "total_delta()")
        return self.total_delta()

    def start(self) -> LowRank:
        """The frozen −s₀·B₀A₀, of the factors as cast to storage."""
        return LowRank(self.A0, -self.B0, self.start_scale)

    def freeze_initial_delta(self) -> None:
        """Freeze today's delta as the part of W that the factors stand for (base rule *subtract*)."""
        d = self.delta()
        if not isinstance(d, LowRank):
            raise RecipeError(
                f"An init that subtracts its start needs a low-rank form, but {type(self).__name__} gives a {d.kind} delta."
            )
        A, B = d.factors()
        self.register_buffer("A0", A.detach().clone())
        self.register_buffer("B0", B.detach().clone())
        self.start_scale = 1.0
        self.has_frozen_start = True

    def file_state(self) -> dict[str, Any]:
        """What a file must say beside the tensors to rebuild this module."""
        start = {"start_scale": self.start_scale} if self.has_frozen_start else {}
        return {**start, "replaced": True} if self.replaced else start

    def file_tensors(self) -> dict[str, Tensor]:
        """Tensors a file holds beside the module's own: the weight that stands in W's place."""
        return {"replaced": self.site.untouched().clone()} if self.replaced else {}

    def restore_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
        """Make room for what :meth:`file_state` told of."""
        if state.get("replaced"):
            self.base_weight = tensors[f"{name}::replaced"]
        if "start_scale" in state:
            self.register_buffer("A0", torch.zeros_like(tensors[f"{name}::A0"]))
            self.register_buffer("B0", torch.zeros_like(tensors[f"{name}::B0"]))
            self.start_scale, self.has_frozen_start = float(state["start_scale"]), True

    def drop(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training and x.is_floating_point()):
            return x
        if self.keeps is None:
            return nn.functional.dropout(x, self.dropout)
        return x * self.keeps(self.site.name, x, self.dropout)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy an init's values in, in the dtype of storage; the form completes what is left."""
        for name, value in tensors.items():
            target = getattr(self, name, None)
            if name not in self.fills or target is None:
                raise RecipeError(
                    f"{type(self).__name__} at {self.site.name!r} has no tensor {name!r} to fill; it takes {', '.join(self.fills) or 'none'}."
                )
            if target.shape != value.shape:
                raise RecipeError(
                    f"The init gave {name} of shape {tuple(value.shape)} for {self.site.name!r}, which needs {tuple(target.shape)}."
                )
            with torch.no_grad():
                target.copy_(value)
        self.complete(tensors)

    def component_count(self) -> int:
        """Number of rank-one components of this site (per expert), 0 where the form has none."""
        for name, axis in self.components.items():
            return operator.attrgetter(name)(self).shape[axis]
        return 0

    def extra_repr(self) -> str:
        return f"{self.site.name}, {'×'.join(map(str, self.site.spec.shape))}, scale={self.scale:.4g}"


def apply_delta(d: Delta, site: Site, x: Tensor, y: Tensor) -> Tensor:
    """Δy of a delta at a site, in ``y``'s dtype; hands over the base output and weight only where they are needed."""
    if any(part.dtype != y.dtype for part in getattr(d, "parts", (d,))):  # the parts of a sum may differ on an fp64 base
        d = d.to(dtype=y.dtype)
    if x.is_floating_point() and x.dtype != y.dtype:
        x = x.to(y.dtype)
    base = site.op.strip_bias(y, site.bias) if d.needs_output else None
    return d.apply(x, base, op=site.op, weight=site.weight().to(y.dtype) if d.needs_weight else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """Base of all forms; a subclass's dataclass fields are its options (rank, scale and dropout are the recipe's).

    Class attributes a form declares:
        kinds: the kinds of site it can adapt.
        gives: words that inits, routers, budgets, optimisers and losses may need: ``fill:A``, ``fill:B`` …,
            ``pair`` (Δ = s·B·A, both trained), ``components`` (can be masked), ``gate`` (a router may gate
            z = A·x), ``core:diag``, ``constant`` (Δ does not depend on x), ``weight`` (trains W itself), ``block``.
        reads: the modes of site it can be at ("called", "read", "plain", "block").
        ranked: whether r means anything to it.
        bounded: whether a rank above min(out, in) is refused.
        peft_fields: what PEFT's LoraConfig calls it, as fields; None: PEFT trains no such form by a LoraConfig.
    """

    info: ClassVar[MethodInfo]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts")
    provides: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[tuple[str, ...]] = ("called", "read")
    ranked: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    peft_fields: ClassVar[Mapping[str, Any] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        renamed_attribute(cls, {"gives": "provides"})

    def plan(self, sites: Sequence[Site], plan: Plan) -> Plan:
        """See all sites at once; add banks and notes to ``plan``; refuse what cannot be met."""
        return plan

    def scaling(self) -> str | None:
        """The scale policy this form stands for; None: the recipe's."""
        return None

    def build(self, site: Site, plan: Plan) -> AdapterLayer:
        """The module for one site, with the form's own first values."""
        raise NotImplementedError(f"The form {type(self).__name__} must build its sites.")

    def check_ranks(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> None:
        """Refuse a rank below 1 or above the matrix, naming the site."""
        for site in sites:
            r = ranks[site.name]
            if r < 1:
                raise OptionError(f"r = {r} at {site.name!r}; a rank is at least 1 (leave the site out instead).")
            if self.bounded and r > site.spec.max_rank:
                raise OptionError(
                    f"r = {r} at {site.name!r} is above its largest possible rank {site.spec.max_rank} ({site.spec.out}×{site.spec.inp}); "
                    "lower r, or give ",
                    Option("rank_pattern", {site.spec.role: site.spec.max_rank}),
                    ".",
                )


def factor(shape: Sequence[int], g: torch.Generator, *, fan_in: int, device: torch.device) -> Tensor:
    """Kaiming-uniform with a = √5, i.e. U(−1/√fan_in, 1/√fan_in), drawn on the CPU in fp32, then moved."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(*shape).uniform_(-bound, bound, generator=g).to(device)


def lead(site: Site) -> tuple[int, ...]:
    """The leading axes of a site's tensors: (E,) for a stack, else ()."""
    return (site.spec.stack,) if site.spec.stack else ()


__getattr__ = old_names(__name__, "Bank", "SiteDelta")
