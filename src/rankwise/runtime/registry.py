"""The model's one added child, ``model.rankwise``: its adapters, the default view, and backups of the weights that were moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.codecs.library import keep_stored
from rankwise.errors import AttachError, Option, ViewError, unknown
from rankwise.runtime.hooks import RootHooks
from rankwise.runtime.view import Rows, View, is_finite
from rankwise.sites.discover import find_sites

if TYPE_CHECKING:
    from rankwise.forms.input_group import InputGroup
    from rankwise.runtime.module_state import AdaptedModuleState, AdapterBranch
    from rankwise.runtime.record import AdapterRecord
    from rankwise.sites.site import Site


class AdapterRegistry(nn.Module):
    """The model's one added child: its adapters, the default view, and backups of base weights.

    Attributes:
        records: adapter → what is known of it.
        known: every site of the model, by name.
        weight_backups: (module, parameter) → its snapshot from before the first merge into it.
        replaced_weights: (module, parameter) → (the adapter whose own weight stands there, the original or None).
        merged: names of merged adapters, in order.
        moving: names of adapters that train base weights in place.
        groups: input group → what its sites share for the fast path.
        frozen: paths of parameters that attaching froze.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.records: dict[str, AdapterRecord] = {}
        self.known: dict[str, Site] = find_sites(model)
        self.weight_backups: dict[tuple[str, str], Any] = {}
        self.replaced_weights: dict[tuple[str, str], tuple[str, Tensor | None]] = {}
        self.merged: list[str] = []
        self.moving: list[str] = []
        self.groups: dict[str, tuple[InputGroup, list[AdaptedModuleState]]] = {}
        self.frozen: list[str] = []
        self._model = (model,)  # a tuple, so that it is not a child
        self._count = 0
        self.hooks = RootHooks(model, self)
        self.default = View(self, {})

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def forward(self, *args: Any) -> Any:
        """The identity: an nn.Sequential calls every child, this one last."""
        return args[0] if len(args) == 1 else args

    # --- views --------------------------------------------------------------------------------------------
    def view(
        self, strengths: Mapping[str, float | Tensor], rows: Rows | None = None, tokens: Mapping[str, Tensor] | None = None
    ) -> View:
        """A view of this model's adapters, held against what is attached, merged and moved.

        Args:
            strengths: {adapter: strength}.
            rows: one adapter name (or None for the base) for each batch row, or {name: mask (B,)}.
            tokens: {name: mask (B, T)}.

        Raises:
            ViewError: a strength that is no finite number; a merged or moving adapter left out or scaled; masks that cannot reach a site.
            UnknownName: no such adapter.
        """
        for n, s in strengths.items():
            if not is_finite(s):
                raise ViewError(f"The strength of {n!r} is {float(s)}; it is a finite number.")
        self.check_view(strengths)
        view = View(self, strengths, rows, tokens)
        self.check_masks({**view.rows, **view.tokens})
        if (view.rows or view.tokens) and (bad := self.unmaskable(view.strengths)):
            raise ViewError(
                f"Row and token masks cannot reach {bad!r}: another forward reads that weight for all rows at once; "
                "leave that site out of the adapter, or split the batch."
            )
        return view

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
                    f"Adapter {n!r} moved the base weights and kept no copy (",
                    Option("keep", "none"),
                    "), so no view can leave it out.",
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
        inside = {*self.moving, *(owner for owner, _ in self.replaced_weights.values())}
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

    # --- backups of base weights ----------------------------------------------------------------------------
    @torch.no_grad()
    def untouched(self, site: Site) -> Tensor:
        """W at a site (fp32, fp64 stays) as it was before anything was merged into it."""
        snapshot = self.weight_backups.get((site.spec.module, site.spec.param))
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
    def replace(self, site: Site, record: AdapterRecord, weight: Tensor) -> None:
        """Write ``weight`` over a site's W for one adapter; the original acts wherever that adapter does not."""
        key = (site.spec.module, site.spec.param)
        if key in self.replaced_weights:
            raise AttachError(
                f"{site.name!r} was already replaced by adapter {self.replaced_weights[key][0]!r}; detach() that one first."
            )
        original = nn.Parameter(site.param.detach().clone(), requires_grad=False)
        self.replaced_weights[key] = (record.name, original.detach())
        for end in [site, *(self.known[f] for f in record.tied_sites.get(site.name, ()))]:
            end.module.__dict__["_rankwise"].originals.setdefault(record.name, {})[end.spec.param] = original
        site.write(weight)

    @torch.no_grad()
    def put_back(self, site: Site, record: AdapterRecord) -> None:
        """Undo :meth:`replace`, to the bit."""
        key = (site.spec.module, site.spec.param)
        if key in self.replaced_weights and self.replaced_weights[key][0] == record.name:
            site.restore(self.replaced_weights.pop(key)[1])

    def check_called(self, names: Iterable[str]) -> None:
        """Refuse to go on when a site of these adapters took no part in a forward that has run."""
        for n in names:
            record = self.records[n]
            idle = [t.site.name for t in self.branches_of(n) if not t.was_called]
            if idle and not record.checked:
                raise AttachError(
                    f"Adapter {n!r}: {len(idle)} of its layers took no part in the forward ({', '.join(idle[:4])}{', …' if len(idle) > 4 else ''}): "
                    "their module was not called. Leave them out with ",
                    Option("exclude", [...]),
                    ", or feed the inputs that reach them.",
                )
            record.checked = True

    def branches_of(self, name: str) -> list[AdapterBranch]:
        states = {id(m._rankwise): m._rankwise for m in self.adapted_modules(name)}
        return [t for p in states.values() for t in p.branches.get(name, ())]

    def adapted_modules(self, name: str) -> list[Any]:
        record = self.records[name]
        out = [s.module for s in record.site_of().values()]
        out += [self.known[f].module for fs in record.tied_sites.values() for f in fs]
        return [m for m in out if "_rankwise" in m.__dict__]


def registry_of(model: nn.Module, *, create: bool = False) -> AdapterRegistry:
    """The model's registry; an AttachError where nothing is attached and none is to be made."""
    found = model._modules.get("rankwise")
    if isinstance(found, AdapterRegistry):
        return found
    inner = getattr(model, "module", None)  # DDP and the like
    if isinstance(inner, nn.Module) and isinstance(inner._modules.get("rankwise"), AdapterRegistry):
        return inner._modules["rankwise"]  # type: ignore[return-value]
    if not create:
        raise AttachError("No adapter is attached to this model; call rw.attach(model, recipe) first.")
    if found is not None or hasattr(model, "rankwise"):
        raise AttachError("The model already has a child or attribute called 'rankwise'; rename it before attaching.")
    _refuse_sharded(model)
    keep_stored(model)  # it stays so after the last adapter has left, or a forward would change the bits that detaching gave back
    registry = AdapterRegistry(model)
    model.add_module("rankwise", registry)
    return registry


def _refuse_sharded(model: nn.Module) -> None:
    kinds = {c.__name__ for m in model.modules() for c in type(m).__mro__}
    for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "FSDP"):
        if wrapper in kinds:
            raise AttachError(
                f"The model is already wrapped by {wrapper}, so an adapter's gradients would never be reduced; attach first, then wrap."
            )
