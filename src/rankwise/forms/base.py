"""Base classes of forms.  A form is how ΔW is parametrised: LoRA, DoRA and LoRA-XS are forms.

A form works in two phases.  ``plan`` sees all its sites (the adapted weights) at once, makes shared tensors and refuses
what is not possible; ``build`` gives each site an :class:`AdapterLayer`, a module with ``delta()`` and, only where that is
faster or where ΔW depends on x, a ``forward`` of its own.  A form never asks what class of layer it adapts.
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

#: the recipe's ``scale`` → s of ΔW = s·B·A from alpha and r
SCALES = {
    "alpha/r": lambda alpha, r: alpha / r,
    "alpha/sqrt_r": lambda alpha, r: alpha / math.sqrt(r),
    "constant": lambda alpha, r: alpha,
}


@dataclasses.dataclass
class Plan:
    """What is decided for all sites before any is built.

    Attributes:
        ranks: site name → r.
        scales: site name → s of ΔW = s·B·A.
        seed: of the run.
        dropout: probability of dropping an input feature in training.
        banks: key → tensors that several sites share; a form adds its own in ``plan``.
        notes: whatever else the form's ``plan`` has to tell its ``build``.
    """

    ranks: dict[str, int]
    scales: dict[str, float]
    seed: int = 0
    dropout: float = 0.0
    banks: dict[str, SharedTensors] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def generator(self, purpose: str, name: str) -> torch.Generator:
        """The generator of one random draw, seeded by (seed, purpose, site name), so the order of sites never matters."""
        return generator(self.seed, purpose, name)


class SharedTensors(nn.Module):
    """Tensors that many sites share (MoS's pools): registered, counted, optimised and saved once.

    A layer keeps a reference to this module and reads the tensor from it at each call, so that ``.to()`` and FSDP work.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, trainable: bool = True):
        super().__init__()
        for name, t in tensors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(t))
            else:
                self.register_buffer(name, t)


def index_buffer(module: nn.Module, name: str, values: Tensor) -> None:
    """Register indices as a persistent int64 buffer, which ``.half()`` leaves alone."""
    module.register_buffer(name, values.to(torch.int64))


class AdapterLayer(nn.Module):
    """ΔW of one site: the module that holds an adapter's tensors for one weight.

    Class attributes that a subclass sets:
        components: tensor → the axis, counted from the end, that runs over rank-one components (A: −2, B: −1).
        in_place: the base's own weight is trained, so nothing is added to the output.
        row_wise: Δy of a row depends on that row of x alone, and nothing is recorded on the way.
        fills: tensors that an init may set.
        roles: tensor → what an optimiser takes it for (A, B, core, magnitude, bank, other).

    Args:
        site: the weight to adapt.
        scale: s of ΔW = s·B·A.
        dropout: probability of dropping an input feature in training.
    """

    components: ClassVar[Mapping[str, int]] = {}
    in_place: ClassVar[bool] = False
    row_wise: ClassVar[bool] = True
    fills: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[Mapping[str, str]] = {}

    A0: Tensor  # the initial factors, which an init like PiSSA subtracts; these three only where ``has_frozen_start``
    B0: Tensor
    start_scale: float

    def __init__(self, site: Site, *, scale: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.site = site
        self.scale = scale
        self.dropout = dropout
        self.replaced = False  # True while W holds ``base_weight`` (LoftQ's quantised weight)
        self.base_weight: Tensor | None = None  # what an init replaces W by (base rule *replace*)
        self.has_frozen_start = False  # True once the initial −s·B₀·A₀ is subtracted (base rule *subtract*)
        self.keeps: Callable[[str, Tensor, float], Tensor] | None = None  # (site, x, p) → dropout's mask; None: torch draws it

    # --- what a form defines ------------------------------------------------------------------------------
    def delta(self) -> Delta:
        """ΔW now, differentiable in the trainable tensors; of this adapter alone."""
        raise NotImplementedError(f"{type(self).__name__} must give its delta().")

    def complete(self, filled: Mapping[str, Tensor]) -> None:
        """Set the tensors that an init did not, given those that it did (default: nothing to do)."""

    def on_attach(self, registry: Any, record: Any) -> None:
        """Called when the adapter has been added to the model: replaces W where an init asks for that."""
        if self.base_weight is not None:
            registry.replace(self.site, record, self.base_weight)
            self.base_weight, self.replaced = None, True

    def on_detach(self, registry: Any, record: Any) -> None:
        """Called before the adapter is removed from the model: restores a replaced weight bit for bit."""
        registry.put_back(self.site, record)

    def before_merge(self, registry: Any) -> None:
        """Called before ΔW is merged into W."""

    def fused_factors(self) -> list[tuple[Tensor, Tensor, float]] | None:
        """[(A, B, scale), …] if ΔW = Σ scale·B·A and nothing else, for the fused forward of ``runtime/fast.py``; else None."""
        return None

    def for_peft(self) -> tuple[Delta, Tensor | None]:
        """What an export to PEFT holds: a low-rank ΔW against the original W, and DoRA's magnitude where there is one."""
        return self.total_delta(), None

    # --- the same for all forms ---------------------------------------------------------------------------
    def forward(self, x: Tensor, y: Tensor, strength: Tensor | None = None) -> Tensor:
        """Δy for the module's input ``x`` and base output ``y`` (with bias), in ``y``'s dtype; ``strength`` multiplies it."""
        d = self.total_delta()
        if strength is not None:
            d = d.scaled(strength)
        return self.dropped(d, self.site, x, y)

    def dropped(self, d: Delta, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Δy of ``d`` with dropout on the input.

        Args:
            d: the ΔW to apply.
            site: where.
            x: the module's input; of ids (an embedding's) the one-hot is dropped out, that is, full rows of Δy.
            y: the base's output, with bias.
        """
        change = apply_delta(d, site, self.drop(x), y)
        if self.dropout and self.training and not x.is_floating_point():
            change = change * self.drop(change.new_ones(*x.shape, 1))
        return change

    def total_delta(self) -> Delta:
        """``delta()`` minus the initial ΔW where an init subtracted it: what is added to the original W."""
        d = self.delta()
        return d + self.start() if self.has_frozen_start else d

    def effective(self) -> Delta:
        """The old spelling of :meth:`total_delta`."""
        warn("AdapterLayer.effective()", "total_delta()")
        return self.total_delta()

    def start(self) -> LowRank:
        """The frozen −s·B₀·A₀ of the initial factors as they are stored."""
        return LowRank(self.A0, -self.B0, self.start_scale)

    def freeze_initial_delta(self) -> None:
        """Subtract the initial s·B·A (PiSSA's residual) from now on, as frozen buffers beside the unchanged W."""
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
        """What a file stores beside the tensors to rebuild this module, JSON-able."""
        start = {"start_scale": self.start_scale} if self.has_frozen_start else {}
        return {**start, "replaced": True} if self.replaced else start

    def file_tensors(self) -> dict[str, Tensor]:
        """Tensors that a file stores beside the module's own: the weight that replaces W."""
        return {"replaced": self.site.untouched().clone()} if self.replaced else {}

    def restore_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
        """Prepare for loading the tensors of a file, from what :meth:`file_state` stored."""
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
        """Copy in an init's tensors (cast to the stored dtype), then :meth:`complete` the others."""
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
        """Number of rank-one components (per expert), 0 where the form has none."""
        for name, axis in self.components.items():
            return operator.attrgetter(name)(self).shape[axis]
        return 0

    def extra_repr(self) -> str:
        return f"{self.site.name}, {'×'.join(map(str, self.site.spec.shape))}, scale={self.scale:.4g}"


def apply_delta(d: Delta, site: Site, x: Tensor, y: Tensor) -> Tensor:
    """Δy of a ΔW at a site, in ``y``'s dtype.

    Args:
        d: the ΔW.
        site: for the layer's geometry, its bias and, where ``d`` needs it, W.
        x: the module's input, (…, in) or ids.
        y: the base's output with bias, (…, out).
    """
    if any(part.dtype != y.dtype for part in getattr(d, "parts", (d,))):  # the parts of a sum may differ on an fp64 base
        d = d.to(dtype=y.dtype)
    if x.is_floating_point() and x.dtype != y.dtype:
        x = x.to(y.dtype)
    base = site.op.strip_bias(y, site.bias) if d.needs_output else None
    return d.apply(x, base, op=site.op, weight=site.weight().to(y.dtype) if d.needs_weight else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """Base of all forms; a subclass's dataclass fields are its options (rank, alpha, scale and dropout are the recipe's).

    Class attributes that a subclass sets:
        kinds: the kinds of site it can adapt.
        provides: what other parts of a recipe may require of the form: ``fill:A``, ``fill:B`` … (an init can set that
            tensor), ``pair`` (ΔW = s·B·A, both trained), ``components`` (can be masked), ``gate`` (a router may gate
            z = A·x), ``core:diag``, ``constant`` (ΔW does not depend on x), ``lowrank``, ``weight`` (trains W itself), ``block``.
        reads: the modes of site it can adapt ("called", "read", "plain", "block").
        ranked: whether r means anything to it.
        bounded: whether a rank above min(out, in) is refused.
        peft_fields: what PEFT's LoraConfig calls it, as fields; None: PEFT trains no such form by a LoraConfig.

    >>> from rankwise.catalogue import make
    >>> from rankwise.sites import find_sites
    >>> site = find_sites(nn.Sequential(nn.Linear(6, 4)))["0"]
    >>> layer = make("form", "lora").build(site, Plan(ranks={"0": 2}, scales={"0": 0.5}))
    >>> {name: tuple(p.shape) for name, p in layer.named_parameters()}, layer.delta().kind
    ({'A': (2, 6), 'B': (4, 2)}, 'lowrank')
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
        """Look at all sites at once: add shared tensors and notes to ``plan``, refuse what is not possible."""
        return plan

    def scaling(self) -> str | None:
        """The rule for s that this form fixes, a key of ``SCALES`` (rsLoRA: α/√r); None: the recipe's."""
        return None

    def build(self, site: Site, plan: Plan) -> AdapterLayer:
        """The layer for one site, with the form's own initial values."""
        raise NotImplementedError(f"The form {type(self).__name__} must build its sites.")

    def check_ranks(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> None:
        """Refuse a rank below 1 or above min(out, in), naming the site."""
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
    """Initial values of a factor: Kaiming-uniform with a = √5, i.e. U(−1/√fan_in, 1/√fan_in), as ``nn.Linear`` draws them.

    Args:
        shape: of the tensor, usually (r, in).
        g: the generator, on the CPU, so that every device gets the same values.
        fan_in: input features.
        device: where the fp32 result goes.
    """
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(*shape).uniform_(-bound, bound, generator=g).to(device)


def lead(site: Site) -> tuple[int, ...]:
    """The leading axes of a site's tensors: (E,) for a stack, else ()."""
    return (site.spec.stack,) if site.spec.stack else ()


__getattr__ = old_names(__name__, "Bank", "SiteDelta")
