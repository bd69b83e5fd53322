"""The handle of an attached adapter, and the base journal: what was done to W, so that off, export and resume stay true."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise import merging
from rankwise.attach import uninstall
from rankwise.delta import AdapterState, Delta
from rankwise.errors import AttachError, MergeError, unknown
from rankwise.forms.base import SiteDelta
from rankwise.merging import MergeReport
from rankwise.roster import Record, Roster, roster_of
from rankwise.view import View, entered


class Adapter:
    """Handle of adapter ``name`` in a model: its tensors, its values, its switches, its files."""

    def __init__(self, roster: Roster, name: str):
        self._roster = roster
        self.name = name

    # --- what it is ---------------------------------------------------------------------------------------
    @property
    def _record(self) -> Record:
        if self.name not in self._roster.records:
            raise AttachError(f"Adapter {self.name!r} is no longer attached to this model.")
        return self._roster.records[self.name]

    @property
    def model(self) -> nn.Module:
        return self._roster.model

    @property
    def recipe(self) -> Any:
        return self._record.recipe

    @property
    def sites(self) -> dict[str, SiteDelta]:
        """The modules that hold this adapter's tensors, by site name, in model order."""
        return dict(self._record.deltas)

    @property
    def module(self) -> nn.Module:
        """The module that holds every tensor of the adapter once (sites and banks)."""
        return self._roster.module_of(self.name)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name, ``<site>::<tensor>`` or ``bank:<key>::<tensor>``; a base weight in training under its own path."""
        out: dict[str, nn.Parameter] = {}
        for key, t in self.tensors(buffers=False).items():
            if t.requires_grad:
                out[key] = t  # type: ignore[assignment]
        return out

    def tensors(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """Every tensor the adapter holds, by the same names; ``buffers`` includes frozen ones."""
        out: dict[str, Tensor] = {}
        home = self._roster.module_of(self.name)
        groups: list[tuple[str, nn.Module]] = [(n, d) for n, d in self._record.deltas.items()]
        groups += [(f"bank:{k}", b) for k, b in home.banks._modules.items() if b is not None]
        for key, module in groups:
            for name, t in _tensors_of(module, buffers):
                out[f"{key}::{name}"] = t
        return out

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The tensors that training moves, each once."""
        return list({id(p): p for p in self.named_parameters().values()}.values())

    def numel(self, *, trainable: bool = True) -> int:
        """Number of trainable (or of all stored) elements."""
        tensors = self.trainable_parameters() if trainable else list(self.tensors().values())
        return sum(t.numel() for t in tensors)

    def by_role(self) -> dict[str, int]:
        """Trainable elements by role of their site (q, up, experts' gate_up, …; "shared" for banks)."""
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
        """In this block the adapter does not act; the others stay as they are."""
        roster = self._roster
        now = _now(roster)
        with entered(View(roster, {n: s for n, s in now.items() if n != self.name})):
            yield

    @contextlib.contextmanager
    def enable(self, strength: float = 1.0) -> Iterator[None]:
        """In this block the adapter acts, beside those that already do."""
        with entered(View(self._roster, {**_now(self._roster), self.name: strength})):
            yield

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """In this block the model is the original one: no adapter acts, no gradient is recorded."""
        with torch.no_grad(), entered(View(self._roster, {})):
            yield

    # --- values -------------------------------------------------------------------------------------------
    def delta(self, site: str) -> Delta:
        """The change of one site's weight against the untouched W, detached."""
        deltas = self._record.deltas
        if site not in deltas:
            raise unknown("site of this adapter", site, deltas)
        with torch.no_grad():
            return deltas[site].effective().detach()

    def lower(self, rank: int | None = None, energy: float | None = None) -> AdapterState:
        """The adapter as a value, every site low-rank: exactly, or cut to ``rank`` or to a share ``energy`` of ‖ΔW‖².

        Components that a budget has masked are left out, and so is a site that keeps none.  The relative errors made are in ``meta["errors"]`` by site.
        """
        from rankwise.delta.lowrank import standing

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
        return AdapterState(standing(sites), meta={"errors": errors, "name": self.name})

    # --- merge and detach ---------------------------------------------------------------------------------
    def merge(self, *, probe: Mapping[str, Any] | None = None, force: bool = False, tolerance: float = 0.5) -> MergeReport:
        """Fold the adapter into the base weights, and check it: W against W + ΔW a site, logits before and after.

        Args:
            probe: a batch of the model's inputs for the check of the logits; made up where the model is a language model.
            force: keep a merge that fails its check, labelled so.
            tolerance: largest share of ‖ΔW‖ that storing may round away (a quantised or 16-bit base).

        Raises:
            MergeError: a site's delta depends on x, another adapter reads or moves that weight, places that share a weight are
                adapted apart, ‖ΔW‖ is zero everywhere or not finite, or the check fails; W is then as before.
        """
        return merging.merge(self._roster, self._record, probe, force, tolerance)

    def unmerge(self) -> None:
        """Take the adapter out of the weights again: the original bits, with the other merged adapters put back in order."""
        if not self._record.merged:
            raise MergeError(f"Adapter {self.name!r} is not merged.")
        merging.unmerge(self._roster, self._record)

    def detach(self) -> None:
        """Take the adapter out of the model; classes, names and bits are the base's own again."""
        if self._record.merged:
            self.unmerge()
        uninstall(self._roster, self.name)

    # --- files --------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write the adapter to the folder ``path`` in the native format, atomically."""
        from rankwise.files import save

        return save(self, Path(path))

    def export(self, path: str | Path, format: str = "peft", **options: Any) -> Path:
        """Write the adapter in another library's format (``peft``)."""
        from rankwise.files import export

        return export(self, Path(path), format, **options)

    def __repr__(self) -> str:
        r = self._record
        form = " + ".join(sorted({p.form.info.name for p in r.parts}))
        return f"Adapter({self.name!r}, {form}, {len(r.deltas)} sites, {self.numel():,} trainable{', merged' if r.merged else ''})"


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Handles of all adapters attached to ``model``, by name."""
    roster = roster_of(model)
    return {n: Adapter(roster, n) for n in roster.records}


# --- inside -------------------------------------------------------------------------------------------------
def _tensors_of(module: nn.Module, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    extra = getattr(module, "base_parameters", None)  # the form `full` trains the base's own
    if extra is not None:
        yield from extra().items()
    if buffers:
        yield from module.named_buffers()


def _now(roster: Roster) -> dict[str, Tensor]:
    from rankwise.view import current

    return dict(current(roster).strengths)
