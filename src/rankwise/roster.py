"""What a model knows of its adapters: one added child, ``model.rankwise``, with every adapter tensor on it.

:class:`Roster` holds the records of the attached adapters, the default :class:`~rankwise.view.View`, the journal of
what was done to base weights, and the hooks on the root that tell an adapted place which batch it is in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.codecs.library import keep_stored
from rankwise.errors import AttachError, ViewError, unknown
from rankwise.forms.base import Form, Plan, SiteDelta
from rankwise.forms.fused import InputGroup
from rankwise.place import Place, Tap
from rankwise.recipe import Part, Recipe
from rankwise.sites import Site, find_sites
from rankwise.view import HERE, View, current, keep_view


class Shelf(nn.Module):
    """Modules by free name: a dot, a slash or a method's name in a key is no harm."""

    def put(self, name: str, module: nn.Module) -> None:
        self._modules[name.replace(".", "/")] = module

    def get(self, name: str) -> nn.Module:
        found = self._modules[name.replace(".", "/")]
        assert found is not None
        return found

    def take(self, name: str) -> None:
        del self._modules[name.replace(".", "/")]


class AdapterModule(nn.Module):
    """One adapter's tensors: a SiteDelta each site, banks, and copies of modules it trains whole."""

    def __init__(self) -> None:
        super().__init__()
        self.sites = Shelf()
        self.banks = Shelf()


@dataclasses.dataclass
class Installed:
    """One part as it stands in the model."""

    part: Part
    form: Form
    plan: Plan
    sites: dict[str, Site]


@dataclasses.dataclass
class Record:
    """What the roster knows of one adapter."""

    name: str
    slot: str
    recipe: Recipe
    parts: list[Installed]
    deltas: dict[str, SiteDelta]
    followers: dict[str, list[str]]  # site → names of the sites at the other ends of its tie
    merged: bool = False
    checked: bool = False

    def site_of(self) -> dict[str, Site]:
        return {n: s for p in self.parts for n, s in p.sites.items()}


class Roster(nn.Module):
    """The model's one added child: its adapters, the default view, and the journal of what was done to base weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.records: dict[str, Record] = {}
        self.known: dict[str, Site] = find_sites(model)
        self.journal: dict[tuple[str, str], Any] = {}  # (module, parameter) → its snapshot from before the first merge
        self.moved: dict[tuple[str, str], tuple[str, Tensor | None]] = {}  # … → the adapter that moved it, and the original
        self.merged: list[str] = []
        self.moving: list[str] = []  # adapters that train base weights in place
        self.groups: dict[str, tuple[InputGroup, list[Place]]] = {}  # sites that one tensor feeds, for the fast path
        self.frozen: list[str] = []
        self._model = (model,)  # a tuple, so that it is not a child
        self._count = 0
        self._hooks: list[Any] = []
        self.default = View(self, {})

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def forward(self, *args: Any) -> Any:
        """The identity: an nn.Sequential calls every child, this one last."""
        return args[0] if len(args) == 1 else args

    # --- views --------------------------------------------------------------------------------------------
    def check_view(self, strengths: Mapping[str, Any]) -> None:
        names = list(strengths)
        for n in names:
            if n not in self.records:
                raise unknown("adapter attached to this model", n, self.records)
        for n in self.moving:
            if n in strengths and float(strengths[n]) != 1.0:
                raise ViewError(
                    f"Adapter {n!r} trains the base weights themselves, so its strength is 1 or it is left out; it got {float(strengths[n])}."
                )
            if n not in strengths and any(d.in_place and d.original is None for d in self.records[n].deltas.values()):
                raise ViewError(
                    f"Adapter {n!r} moved the base weights and kept no copy (keep='none'), so no view can leave it out."
                )
        for n in self.merged:
            if n not in names or float(strengths[n]) != 1.0:
                given = "leaves it out" if n not in names else f"has it at strength {float(strengths[n]):g}"
                raise ViewError(
                    f"Adapter {n!r} is merged into the weights and acts in every view at strength 1, but this one {given}; "
                    "include it so, or unmerge() it first."
                )

    def check_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Refuse row or token masks that would keep an adapter in the weights themselves from some rows."""
        inside = {*self.moving, *(owner for owner, _ in self.moved.values())}
        for n, mask in masks.items():
            if n in inside and not bool((mask == 1).all()):
                raise ViewError(
                    f"Adapter {n!r} stands in the base weights themselves, so it acts on every row; a mask cannot keep it from some. "
                    "Split the batch."
                )
            if n in self.merged and not bool((mask == 1).all()):
                raise ViewError(
                    f"Adapter {n!r} is merged into the weights, so it acts on every row; unmerge() it before masking rows."
                )

    def unmaskable(self, names: Iterable[str]) -> str | None:
        """The first site of these adapters that no row mask can reach."""
        for n in names:
            for name, site in self.records[n].site_of().items():
                if site.spec.mode in ("read", "plain"):
                    return name
        return None

    def prepare(self) -> None:
        """Make the model's checkpointing functions carry the view in force into the recompute."""
        for module in self._checkpointed():
            fn = module._gradient_checkpointing_func
            if not getattr(fn, "keeps_view", False):
                module._gradient_checkpointing_func = _carrying(self, fn)

    def _checkpointed(self) -> list[Any]:
        parts = [self.model, *(m for child in self.model.children() if child is not self for m in child.modules())]
        return [m for m in parts if "_gradient_checkpointing_func" in m.__dict__]

    # --- the journal of moved weights -----------------------------------------------------------------------
    @torch.no_grad()
    def untouched(self, site: Site) -> Tensor:
        """W at a site (fp32, fp64 stays) as it was before anything was merged into it."""
        snapshot = self.journal.get((site.spec.module, site.spec.param))
        if snapshot is None:
            return site.read()
        if isinstance(snapshot, Tensor) and not site.spec.quantised:
            W = site.view(snapshot)
            return W if W.dtype == torch.float64 else W.float()
        now = site.snapshot()  # codes and scales: only the site itself can read them
        site.restore(snapshot)
        try:
            return site.read().clone()
        finally:
            site.restore(now)

    @torch.no_grad()
    def replace(self, site: Site, record: Record, weight: Tensor) -> None:
        """Write ``weight`` over a site's W for one adapter; the original acts wherever that adapter does not."""
        key = (site.spec.module, site.spec.param)
        if key in self.moved:
            raise AttachError(f"{site.name!r} was already replaced by adapter {self.moved[key][0]!r}; detach() that one first.")
        original = nn.Parameter(site.param.detach().clone(), requires_grad=False)
        self.moved[key] = (record.name, original.detach())
        for end in [site, *(self.known[f] for f in record.followers.get(site.name, ()))]:
            end.module.__dict__["_rankwise"].originals.setdefault(record.name, {})[end.spec.param] = original
        site.write(weight)

    @torch.no_grad()
    def put_back(self, site: Site, record: Record) -> None:
        """Undo :meth:`replace`, to the bit."""
        key = (site.spec.module, site.spec.param)
        if key in self.moved and self.moved[key][0] == record.name:
            site.restore(self.moved.pop(key)[1])

    # --- hooks on the root: the batch a forward sees --------------------------------------------------------
    def watch(self) -> None:
        if not self._hooks:
            self._hooks = [
                self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ]

    def unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and module.training:
            self.prepare()
        x = _main_input(module, args, kwargs)
        if x is not None:
            HERE.batch = (x.shape[0], x.shape[1] if x.dim() > 1 else 1)
        HERE.padding = _real(kwargs, HERE.batch)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not torch.compiler.is_compiling():
            HERE.batch = HERE.padding = None

    def check_acted(self, names: Iterable[str]) -> None:
        """Refuse to go on when a site of these adapters took no part in a forward that has run."""
        for n in names:
            record = self.records[n]
            idle = [t.site.name for t in self._taps(n) if not t.acted]
            if idle and not record.checked:
                raise AttachError(
                    f"Adapter {n!r}: {len(idle)} of its places took no part in the forward ({', '.join(idle[:4])}{', …' if len(idle) > 4 else ''}): "
                    "their module was not called. Leave them out with exclude=[…], or feed the inputs that reach them."
                )
            record.checked = True

    def _taps(self, name: str) -> list[Tap]:
        places = {id(m._rankwise): m._rankwise for m in self._places(name)}
        return [t for p in places.values() for t in p.taps.get(name, ())]

    def _places(self, name: str) -> list[Any]:
        record = self.records[name]
        out = [s.module for s in record.site_of().values()]
        out += [self.known[f].module for fs in record.followers.values() for f in fs]
        return [m for m in out if "_rankwise" in m.__dict__]

    def module_of(self, name: str) -> AdapterModule:
        return self._modules[self.records[name].slot]  # type: ignore[return-value]


def roster_of(model: nn.Module, *, create: bool = False) -> Roster:
    """The model's roster; an AttachError where nothing is attached and none is to be made."""
    found = model._modules.get("rankwise")
    if isinstance(found, Roster):
        return found
    inner = getattr(model, "module", None)  # DDP and the like
    if isinstance(inner, nn.Module) and isinstance(inner._modules.get("rankwise"), Roster):
        return inner._modules["rankwise"]  # type: ignore[return-value]
    if not create:
        raise AttachError("No adapter is attached to this model; call rw.attach(model, recipe) first.")
    if found is not None or hasattr(model, "rankwise"):
        raise AttachError("The model already has a child or attribute called 'rankwise'; rename it before attaching.")
    _refuse_sharded(model)
    keep_stored(model)  # it stays so after the last adapter has left, or a forward would change the bits that detaching gave back
    roster = Roster(model)
    model.add_module("rankwise", roster)
    return roster


def _main_input(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose rows are the batch's: the model's main input by name, embeddings in its place, else the one with most rows."""
    for name in (getattr(model, "main_input_name", None), "input_ids", "inputs_embeds"):
        if isinstance(found := kwargs.get(name), Tensor) and found.dim():  # type: ignore[arg-type]
            return found
    given = [t for t in args if isinstance(t, Tensor) and t.dim()][:1]
    given = given or [t for t in kwargs.values() if isinstance(t, Tensor) and t.dim()]
    return max(given, key=lambda t: t.shape[0], default=None)


def _real(kwargs: Mapping[str, Any], shape: tuple[int, int] | None) -> Tensor | None:
    """(B, T): which tokens are no padding, by the attention mask, or in packed rows by positions; None where neither tells.

    The collator gives each token of padding position 0, as a document of its own; a document that has but one is taken for padding.
    """
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask
    if isinstance(position, Tensor) and position.shape == shape:
        return (position > 0) | (nn.functional.pad(position[:, 1:], (0, 1)) == 1)
    return None


def _refuse_sharded(model: nn.Module) -> None:
    kinds = {c.__name__ for m in model.modules() for c in type(m).__mro__}
    for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "FSDP"):
        if wrapper in kinds:
            raise AttachError(
                f"The model is already wrapped by {wrapper}, so an adapter's gradients would never be reduced; attach first, then wrap."
            )


def _carrying(roster: Roster, fn: Any) -> Any:
    def checkpointed(inner: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(keep_view(inner, current(roster)), *args, **kwargs)

    checkpointed.keeps_view = True  # type: ignore[attr-defined]
    return checkpointed
