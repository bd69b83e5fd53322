"""Put a built adapter into a model and take it out again, bit-exactly.

The class of each adapted module is swapped for a subclass made on the fly; names, types, the base's state dict and ``deepcopy``
stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rankwise.errors import AttachError
from rankwise.forms.input_group import InputGroup
from rankwise.runtime.forward import adapted_class
from rankwise.runtime.module_state import AdaptedModuleState, AdapterBranch
from rankwise.runtime.record import AdapterModule, AdapterRecord, InstalledPart

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer
    from rankwise.recipe import Recipe
    from rankwise.runtime.registry import AdapterRegistry


def install(
    registry: AdapterRegistry,
    name: str,
    recipe: Recipe,
    installed: list[InstalledPart],
    deltas: dict[str, AdapterLayer],
    tied_sites: dict[str, list[str]],
) -> AdapterRecord:
    """Put built layers into the model: tensors on the registry, a branch at each site, the class swaps.

    Args:
        registry: the model's registry.
        name: the adapter's.
        recipe: of the whole adapter.
        installed: its parts, as built.
        deltas: site → its layer.
        tied_sites: site → the sites at the other ends of its tie.

    Raises:
        AttachError: a layer that works on the base weight, where another adapter is merged into it; nothing is left behind.
    """
    _refuse_over_merged(registry, deltas)
    slot = f"a{registry._count}"
    registry._count += 1
    home = AdapterModule()
    record = AdapterRecord(name, slot, recipe, installed, deltas, tied_sites, home)
    for site_name, delta in deltas.items():
        home.sites.put(site_name, delta)
    for part in installed:
        for key, bank in part.plan.banks.items():
            home.banks.put(key, bank)
    home.train(registry.model.training)
    if not registry.records:
        _freeze(registry)
        registry.hooks.install()
    registry.add_module(slot, home)
    registry.records[name] = record
    if any(d.in_place for d in deltas.values()):
        registry.moving.append(name)
    attached: list[AdapterLayer] = []
    try:
        for site_name, delta in deltas.items():
            add_branch(registry, AdapterBranch(name, delta.site, delta))
            for other in tied_sites.get(site_name, ()):
                far = registry.known[other]
                flipped = (far.spec.kind == "embedding") != (delta.site.spec.kind == "embedding")
                add_branch(registry, AdapterBranch(name, far, delta, transposed=flipped))
            delta.on_attach(registry, record)
            attached.append(delta)
    except BaseException:
        uninstall(registry, name, attached)  # an adapter is attached whole or not at all
        raise
    return record


def _refuse_over_merged(registry: AdapterRegistry, deltas: Mapping[str, AdapterLayer]) -> None:
    """A form that reads or moves W needs the base's own, not one that holds a merged adapter."""
    for name, delta in deltas.items():
        if (delta.site.spec.module, delta.site.spec.param) not in registry.weight_backups or delta.site.spec.mode == "block":
            continue
        if delta.in_place or delta.base_weight is not None or delta.total_delta().needs_weight:
            raise AttachError(
                f"{type(delta).__name__} at {name!r} works on the base weight itself, which holds {', '.join(map(repr, registry.merged))} merged; "
                "unmerge() it, attach, and merge again."
            )


def add_branch(registry: AdapterRegistry, branch: AdapterBranch) -> None:
    module: Any = branch.site.module
    state = module.__dict__.get("_rankwise")
    if state is None:
        state = AdaptedModuleState(registry, type(module))
        module.__dict__["_rankwise"] = state
    state.branches.setdefault(branch.name, []).append(branch)
    group = branch.site.spec.input_group
    if group and branch.site.spec.rows is None and branch.site.spec.mode == "called":
        shared, members = registry.groups.setdefault(group, (InputGroup(), []))
        if state not in members:
            members.append(state)
        state.fast.group, state.fast.members = shared, members
    set_class(module)


def set_class(module: Any) -> None:
    """The class that fits what is at this module now: adapted while anything is, else its own."""
    state: AdaptedModuleState = module._rankwise
    branches = [t for ts in state.branches.values() for t in ts]
    if not branches and not state.originals:
        module.__class__ = state.base
        del module.__dict__["_rankwise"]
        if state in state.fast.members:
            state.fast.members.remove(state)
        return
    modes = {t.site.spec.mode for t in branches}
    if "block" in modes and len(modes) > 1:
        raise AttachError(f"{type(module).__name__} cannot be wrapped as a block and adapted in its weight at once; choose one.")
    reads = tuple(sorted({t.site.spec.param for t in branches if t.site.spec.mode in ("read", "plain") and not t.form.in_place}))
    mode = "block" if "block" in modes else "called" if "called" in modes else "read"
    module.__class__ = adapted_class(state.base, mode, reads)


def uninstall(registry: AdapterRegistry, name: str, attached: Iterable[AdapterLayer] | None = None) -> None:
    """Take an adapter out: its branches, its class swaps, its tensors; the last one takes the registry along.

    ``attached``: the deltas that had come as far as ``on_attach``, where installing stopped half-way.
    """
    record = registry.records[name]
    for delta in record.deltas.values() if attached is None else attached:
        delta.on_detach(registry, record)
    for module in dict.fromkeys(registry.adapted_modules(name)):
        module._rankwise.branches.pop(name, None)
        module._rankwise.originals.pop(name, None)
        set_class(module)
    del registry._modules[record.slot]
    del registry.records[name]
    if name in registry.moving:
        registry.moving.remove(name)
    left = {n: s for n, s in registry.default.strengths.items() if n != name}
    registry.default = registry.view(left)
    if not registry.records:
        registry.hooks.remove()
        params = dict(registry.model.named_parameters())
        for path in registry.frozen:
            params[path].requires_grad_(True)
        del registry.model._modules["rankwise"]


def _freeze(registry: AdapterRegistry) -> None:
    """Freeze the base; remember what was trainable, so that detaching gives it back."""
    for path, p in registry.model.named_parameters():
        if not path.startswith("rankwise.") and p.requires_grad:
            registry.frozen.append(path)
            p.requires_grad_(False)
