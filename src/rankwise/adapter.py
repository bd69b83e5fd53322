"""The handle of an attached adapter, and the base journal: what was done to W, so that off, export and resume stay true."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.attach import uninstall
from rankwise.delta import AdapterState, Delta
from rankwise.errors import AttachError, MergeError, unknown
from rankwise.forms.base import SiteDelta
from rankwise.roster import Record, Roster, roster_of
from rankwise.sites import Site
from rankwise.view import View, entered


@dataclasses.dataclass(frozen=True)
class SiteMerge:
    """How one site's merge went: ``error`` = ‖W_stored − (W + ΔW)‖ / ‖ΔW‖; ``change`` = ‖ΔW‖ / ‖W‖."""

    site: str
    change: float
    error: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did: one row a site, and the largest gap of the logits on probe inputs (None: no probe was run)."""

    sites: tuple[SiteMerge, ...]
    logit_gap: float | None = None
    forced: bool = False

    @property
    def worst(self) -> SiteMerge:
        return max(self.sites, key=lambda s: s.error)


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

        The relative errors made are in ``meta["errors"]`` by site.
        """
        record = self._record
        sites: dict[str, Delta] = {}
        errors: dict[str, float] = {}
        for name, site in record.site_of().items():
            if site.spec.mode == "block":
                raise MergeError(f"{name!r} is a wrapped block, not a change of weight; it has no low-rank form.")
            d = self.delta(name)
            weight = site.read() if d.needs_weight else None
            low, error = d.to_lowrank(rank=rank, energy=energy, weight=weight)
            sites[name], errors[name] = low, error
        return AdapterState(sites, meta={"errors": errors, "name": self.name})

    # --- merge and detach ---------------------------------------------------------------------------------
    def merge(self, *, probe: Mapping[str, Any] | None = None, force: bool = False, tolerance: float = 0.5) -> MergeReport:
        """Fold the adapter into the base weights, and check it: W against W + ΔW a site, logits before and after.

        Args:
            probe: a batch of the model's inputs for the check of the logits; made up where the model is a language model.
            force: keep a merge that fails its check, labelled so.
            tolerance: largest share of ‖ΔW‖ that storing may round away (a quantised or 16-bit base).

        Raises:
            MergeError: a site's delta depends on x, ‖ΔW‖ is zero everywhere, or the check fails; W is then as before.
        """
        roster, record = self._roster, self._record
        if record.merged:
            raise MergeError(f"Adapter {self.name!r} is already merged.")
        _refuse_unmergeable(record)
        probe = probe if probe is not None else _probe(self.model)
        names = [*roster.merged, self.name]
        before = _logits(self.model, roster, names, probe)
        rows = [_merge_site(roster, self.name, s, record.deltas[n]) for n, s in record.site_of().items()]
        for module in dict.fromkeys(roster._places(self.name)):
            module._rankwise.taps.pop(self.name, None)
        record.merged = True
        roster.merged.append(self.name)
        if self.name not in roster.default.strengths:
            roster.default = View(roster, {**roster.default.strengths, self.name: 1.0})
        after = _logits(self.model, roster, names, probe)
        gap = None if before is None or after is None else _gap(before, after)
        report = MergeReport(tuple(rows), gap, forced=False)
        trouble = _trouble(report, tolerance, before, self.model)
        if trouble and not force:
            self.unmerge()
            raise MergeError(f"The merge of {self.name!r} was undone: {trouble} Use force=True to keep it all the same.")
        return dataclasses.replace(report, forced=bool(trouble))

    def unmerge(self) -> None:
        """Take the adapter out of the weights again: the original bits, with the other merged adapters put back in order."""
        roster, record = self._roster, self._record
        if not record.merged:
            raise MergeError(f"Adapter {self.name!r} is not merged.")
        roster.merged.remove(self.name)
        record.merged = False
        _restore(roster, record)
        for other in roster.merged:
            theirs = roster.records[other]
            for n, s in theirs.site_of().items():
                if (s.spec.module, s.spec.param) in {(m.spec.module, m.spec.param) for m in record.site_of().values()}:
                    _merge_site(roster, other, s, theirs.deltas[n])
        _retap(roster, record)

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


def _refuse_unmergeable(record: Record) -> None:
    for part in record.parts:
        if "weight" in part.form.gives:
            raise MergeError(f"The form {part.form.info.name!r} trains the base weights themselves; they hold the change already.")
        if not part.form.info.mergeable:
            raise MergeError(
                f"The form {part.form.info.name!r} is not a change of weight, so it cannot be merged; keep the adapter attached."
            )
    for name, delta in record.deltas.items():
        d = delta.effective()
        if d.kind == "gated":
            raise MergeError(
                f"The change at {name!r} depends on x (a router decides), so it cannot be merged; export its experts, or collapse() it."
            )
    moving = [n for n, d in record.deltas.items() if float(_norm(d)) > 0]
    if not moving:
        raise MergeError("Every change of this adapter is zero; merging would leave a copy of the base. Train it first.")


@torch.no_grad()
def _norm(delta: SiteDelta) -> Tensor:
    d = delta.effective()
    return d.dense(delta.site.read()).norm() if d.needs_weight else d.norm()


@torch.no_grad()
def _merge_site(roster: Roster, name: str, site: Site, delta: SiteDelta) -> SiteMerge:
    key = (site.spec.module, site.spec.param)
    if key not in roster.journal:
        roster.journal[key] = site.snapshot()
    delta.before_merge(roster)
    d = delta.effective()
    W = site.read()
    change = d.dense(W if d.needs_weight else None).to(W.dtype)
    size, before, wanted = change.norm().item(), W.norm().item(), W + change
    stored = site.write(wanted)
    lost = (stored - wanted).norm().item() / size if size else 0.0
    return SiteMerge(site.name, size / max(before, 1e-30), lost)


@torch.no_grad()
def _restore(roster: Roster, record: Record) -> None:
    for site in record.site_of().values():
        snapshot = roster.journal.pop((site.spec.module, site.spec.param), None)
        if snapshot is not None:
            site.restore(snapshot)


def _retap(roster: Roster, record: Record) -> None:
    from rankwise.attach import _tap
    from rankwise.place import Tap

    for name, delta in record.deltas.items():
        _tap(roster, Tap(record.name, delta.site, delta))
        for other in record.followers.get(name, ()):
            far = roster.known[other]
            _tap(
                roster,
                Tap(record.name, far, delta, (far.spec.kind == "embedding") != (delta.site.spec.kind == "embedding")),
            )


def _probe(model: nn.Module) -> dict[str, Tensor] | None:
    """Random token ids where the model is plainly a language model, else None."""
    config = getattr(model, "config", None)
    vocab = getattr(config, "vocab_size", None)
    if (
        not isinstance(vocab, int)
        or getattr(model, "main_input_name", None) != "input_ids"
        or getattr(config, "is_encoder_decoder", False)
    ):
        return None
    g = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    return {"input_ids": torch.randint(0, vocab, (2, 8), generator=g).to(device)}


def _logits(model: nn.Module, roster: Roster, names: list[str], probe: Mapping[str, Any] | None) -> Tensor | None:
    if probe is None:
        return None
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), entered(View(roster, dict.fromkeys(names, 1.0))):
            out = model(**probe)
    finally:
        model.train(training)
    for key in ("logits", "last_hidden_state", "logits_per_image"):
        if getattr(out, key, None) is not None:
            return getattr(out, key).float()
    return out.float() if isinstance(out, Tensor) else None


def _gap(before: Tensor, after: Tensor) -> float:
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-12))


def _trouble(report: MergeReport, tolerance: float, before: Tensor | None, model: nn.Module) -> str:
    worst = report.worst
    if not worst.error <= tolerance:
        return f"at {worst.site!r} storing rounded away {worst.error:.0%} of the change (allowed {tolerance:.0%})."
    if report.logit_gap is None:
        return ""
    coarse = max(s.error for s in report.sites) > 1e-3
    bound = 1e-3 if next(model.parameters()).dtype == torch.float32 and not coarse else 0.1
    if not report.logit_gap <= bound:
        return f"the logits moved by {report.logit_gap:.2g} of their largest value (allowed {bound:g})."
    return ""
