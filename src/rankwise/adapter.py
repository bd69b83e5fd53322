"""The handle of an attached adapter; ``attach`` adds one to a model from a recipe, ``load`` from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.codecs.library import keep_stored
from rankwise.delta.lowrank import drop_zero_sites
from rankwise.delta.state import AdapterState
from rankwise.errors import ArtefactError, AttachError, MergeError, Option, OptionError, unknown
from rankwise.recipe import Recipe
from rankwise.runtime import fold, read, write
from rankwise.runtime.build import build_parts
from rankwise.runtime.install import install, uninstall
from rankwise.runtime.registry import AdapterRegistry, registry_of
from rankwise.runtime.switch import activate_adapters
from rankwise.runtime.view import current, entered
from rankwise.store.names import check_name

if TYPE_CHECKING:
    from rankwise.delta.base import Delta
    from rankwise.forms.base import AdapterLayer
    from rankwise.runtime.fold import MergeReport
    from rankwise.runtime.record import AdapterRecord


class Adapter:
    """An adapter in a model: its tensors, its ΔW's, switching it on and off, merging, saving.

    Returned by :func:`attach`, :func:`load` and :func:`adapters`; holds no tensors itself.

    >>> import rankwise as rw
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> adapter = rw.attach(model, rw.Recipe(form="lora", r=2), name="mine")
    >>> adapter
    Adapter('mine', lora, 2 sites, 56 trainable)
    >>> with adapter.disable():
    ...     base = model(torch.ones(1, 8))
    >>> torch.equal(base, model(torch.ones(1, 8))), adapter.delta("1").shape  # B = 0 at the start
    (True, torch.Size([4, 8]))
    """

    def __init__(self, registry: AdapterRegistry, name: str):
        self._registry = registry
        self.name = name

    # --- what it is ---------------------------------------------------------------------------------------
    @property
    def _record(self) -> AdapterRecord:
        if self.name not in self._registry.records:
            raise AttachError(f"Adapter {self.name!r} is no longer attached to this model.")
        return self._registry.records[self.name]

    @property
    def model(self) -> nn.Module:
        return self._registry.model

    @property
    def recipe(self) -> Any:
        return self._record.recipe

    @property
    def sites(self) -> dict[str, AdapterLayer]:
        """The modules that hold this adapter's tensors, by site (adapted weight), in model order."""
        return dict(self._record.deltas)

    @property
    def module(self) -> nn.Module:
        """The module that holds every tensor of the adapter once (those of its sites, and shared ones)."""
        return self._record.home

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name: ``<site>::<tensor>``, ``bank:<key>::<tensor>`` of shared ones, a trained base weight's own path."""
        return self._record.named_parameters()

    def tensors(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """Every tensor the adapter holds, by the same names; ``buffers`` includes frozen ones."""
        return self._record.tensors(buffers=buffers)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, each once."""
        return list({id(p): p for p in self.named_parameters().values()}.values())

    def numel(self, *, trainable: bool = True) -> int:
        """Number of trainable (or of all stored) elements."""
        tensors = self.trainable_parameters() if trainable else list(self.tensors().values())
        return sum(t.numel() for t in tensors)

    def by_role(self) -> dict[str, int]:
        """Trainable elements by role of their site (q, up, experts' gate_up, …; "shared" for shared tensors)."""
        out: dict[str, int] = {}
        sites = self._record.site_of()
        for key, p in self.named_parameters().items():
            owner = key.split("::")[0]
            role = sites[owner].spec.role if owner in sites else "shared"
            out[role] = out.get(role, 0) + p.numel()
        return out

    # --- views --------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Context manager: this adapter is off, the others stay as they are."""
        registry = self._registry
        now = _now(registry)
        with entered(registry.view({n: s for n, s in now.items() if n != self.name})):
            yield

    @contextlib.contextmanager
    def enable(self, strength: float = 1.0) -> Iterator[None]:
        """Context manager: this adapter is on, multiplied by ``strength``, beside those that are on already."""
        with entered(self._registry.view({**_now(self._registry), self.name: strength})):
            yield

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Context manager: the original model, with every adapter off and no gradient recorded."""
        with torch.no_grad(), entered(self._registry.view({})):
            yield

    # --- values -------------------------------------------------------------------------------------------
    def delta(self, site: str) -> Delta:
        """ΔW of one site, relative to the original W, detached."""
        deltas = self._record.deltas
        if site not in deltas:
            raise unknown("site of this adapter", site, deltas)
        with torch.no_grad():
            return deltas[site].total_delta().detach()

    def lower(self, rank: int | None = None, energy: float | None = None) -> AdapterState:
        """The adapter as a value with every ΔW low-rank: exactly, or cut to ``rank`` or to a share ``energy`` of ‖ΔW‖².

        Components that AdaLoRA has pruned are left out, and so is a site that keeps none.  The relative errors are in
        ``meta["errors"]`` by site.
        """
        record = self._record
        sites: dict[str, Delta] = {}
        errors: dict[str, float] = {}
        for name, site in record.site_of().items():
            if site.spec.mode == "block":
                raise MergeError(f"{name!r} is a wrapped block, not a change of weight; it has no low-rank form.")
            d = self.delta(name)
            weight = site.untouched() if d.needs_weight else None
            low, error = d.to_lowrank(rank=rank, energy=energy, weight=weight)
            sites[name], errors[name] = low, error
        return AdapterState(drop_zero_sites(sites), meta={"errors": errors, "name": self.name})

    # --- merge and detach ---------------------------------------------------------------------------------
    def merge(self, *, probe: Mapping[str, Any] | None = None, force: bool = False, tolerance: float = 0.5) -> MergeReport:
        """Merge the adapter into the base weights, and check it: W against W + ΔW at each site, logits before and after.

        Args:
            probe: a batch of the model's inputs for the check of the logits; made up where the model is a language model.
            force: keep a merge that fails its check; the report says so.
            tolerance: largest share of ‖ΔW‖ that may be lost to rounding (a quantised or 16-bit base).

        Raises:
            MergeError: a ΔW depends on x, another adapter reads or trains that weight, tied weights are adapted separately,
                ‖ΔW‖ is zero everywhere or not finite, or the check fails; W is then as before.
        """
        return fold.merge(self._registry, self._record, probe, force, tolerance)

    def unmerge(self) -> None:
        """Undo :meth:`merge`: the original bits, with the other merged adapters merged again in order."""
        if not self._record.merged:
            raise MergeError(f"Adapter {self.name!r} is not merged.")
        fold.unmerge(self._registry, self._record)

    def detach(self) -> None:
        """Remove the adapter from the model; classes, names and bits are the base's own again."""
        if self._record.merged:
            self.unmerge()
        uninstall(self._registry, self.name)

    # --- files --------------------------------------------------------------------------------------------
    def save(self, path: str | Path, *, codec: str | Mapping[str, Any] | None = None, reference: str | Path | None = None) -> Path:
        """Write the adapter to the folder ``path`` in the native format, atomically.

        Args:
            path: the folder; an older file there is replaced only once the new one is complete.
            codec: compress the matrices: ``"compeft"`` or ``{"name": "intk", "k": 8}``.
            reference: for the codec ``delta`` the other adapter: a folder, or the name of one attached to this model.
        """
        if codec is not None:
            return write.save_coded(self._record, self.model, path, codec, reference=reference)
        if reference is not None:
            raise OptionError(
                "A plain native file is no difference from another adapter; leave the reference out, or give ",
                Option("codec", "delta"),
                ".",
            )
        return write.save(self._record, self.model, path)

    def export(self, path: str | Path, format: str = "peft", **options: Any) -> Path:
        """Write the adapter in another library's format (``peft``, ``diffusers``, ``kohya``, ``gguf``)."""
        return write.export(self._record, self.model, self._registry.known, Path(path), format, **options)

    def __repr__(self) -> str:
        r = self._record
        form = " + ".join(sorted({p.form.info.name for p in r.parts}))
        return f"Adapter({self.name!r}, {form}, {len(r.deltas)} sites, {self.numel():,} trainable{', merged' if r.merged else ''})"


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Handles of all adapters attached to ``model``, by name."""
    registry = registry_of(model)
    return {n: Adapter(registry, n) for n in registry.records}


def _now(registry: AdapterRegistry) -> dict[str, Tensor]:
    return dict(current(registry).strengths)


def attach(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str = "lora",
    *,
    calibration: Iterable[Any] | None = None,
    name: str = "default",
    activate: bool = True,
) -> Adapter:
    """Add an adapter to ``model`` (changed in place) and return its handle.

    Args:
        model: any ``nn.Module``.
        recipe: a Recipe, its fields, a file, or the name of a form or preset.
        calibration: batches (dicts of the model's keyword inputs) for inits that read statistics.
        name: free text; one adapter a name.
        activate: make it the active adapter, in place of those that were.

    Raises:
        AttachError: the name is taken, the model is sharded, no calibration where the init needs it.
        TargetError, RecipeError, OptionError: see the recipe.

    >>> import rankwise as rw
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> adapter = rw.attach(model, {"form": "lora", "r": 2, "targets": ["1"]})
    >>> list(adapter.sites), [tuple(p.shape) for p in adapter.trainable_parameters()]
    (['1'], [(2, 8), (4, 2)])
    >>> adapter.detach()
    >>> type(model[1])
    <class 'torch.nn.modules.linear.Linear'>
    """
    recipe = Recipe.of(recipe)
    check_name(name)
    had = isinstance(model._modules.get("rankwise"), AdapterRegistry)
    registry = registry_of(model, create=True)
    try:
        if name in registry.records:
            raise AttachError(f"An adapter called {name!r} is already attached; choose another name, or detach() it first.")
        installed, deltas, tied_sites = build_parts(registry, recipe, calibration)
        install(registry, name, recipe, installed, deltas, tied_sites)
    except BaseException:
        if not had and not registry.records:
            model._modules.pop("rankwise", None)
        raise
    if activate:
        activate_adapters(model, name)
    return Adapter(registry, name)


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    activate: bool = True,
    check_base: bool = True,
    reference: str | Path | None = None,
) -> Adapter:
    """Attach the adapter in ``path`` (a native, PEFT, diffusers, kohya or GGUF folder or file, or a hub id) and return its handle.

    Args:
        model: the base.
        path: of the adapter.
        name: what to call it here; default its own name, or "default".
        activate: make it the active adapter.
        check_base: refuse an adapter whose base differs in its weights, not only one that differs in shape.
        reference: of a file that is a difference (codec ``delta``), the other adapter: a folder, or the name of an attached one.

    Raises:
        ArtefactError: damaged, hostile or foreign file; the message names what differs.
    """
    keep_stored(model)  # a base that inference has repacked is recognised, not taken for another one
    folder = Path(path)
    if (folder / "rankwise.safetensors").exists() or folder.name == "rankwise.safetensors":
        record = read.load_native_file(model, folder, name, check_base=check_base, reference=reference)
    elif reference is not None:
        raise ArtefactError(f"{path} is no native file, so it is no difference from another adapter; leave the reference out.")
    else:
        record = read.load_foreign_file(model, str(path), name)
    return _handle(model, record, activate)


def rebuild(
    model: nn.Module, recipe: Recipe, head: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, activate: bool
) -> Adapter:
    """Attach from a description and its tensors, as a native file holds them, and return the handle.

    Args:
        model: the base.
        recipe: of the adapter.
        head: ``parts`` and ``states`` as a native header has them.
        tensors: by our names, exactly those that the parts have.
        name: what to call the adapter here.
        activate: make it the active adapter.
    """
    return _handle(model, read.rebuild(model, recipe, head, tensors, name), activate)


def _handle(model: nn.Module, record: AdapterRecord, activate: bool) -> Adapter:
    if activate:
        activate_adapters(model, record.name)
    return Adapter(registry_of(model), record.name)
