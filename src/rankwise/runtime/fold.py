"""Fold an adapter into the base weights and take it out again; every merge verifies itself or is undone whole.

ΔW is always against the untouched W (:meth:`AdapterRegistry.untouched`), whatever else is merged; what the weights held before is
in the registry's ``weight_backups``.  A merge that fails half-way, or is interrupted, leaves every weight as it was.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import MergeError, Option
from rankwise.runtime.install import add_branch
from rankwise.runtime.module_state import AdapterBranch
from rankwise.runtime.view import entered

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer
    from rankwise.runtime.record import AdapterRecord
    from rankwise.runtime.registry import AdapterRegistry
    from rankwise.sites.site import Site


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
        return max(self.sites, key=lambda s: math.inf if math.isnan(s.error) else s.error)


def merge(
    registry: AdapterRegistry, record: AdapterRecord, probe: Mapping[str, Any] | None, force: bool, tolerance: float
) -> MergeReport:
    """See :meth:`rankwise.adapter.Adapter.merge`.

    Args:
        registry: the model's.
        record: the adapter to merge.
        probe: a batch of the model's inputs for the check of the logits; None: made up from the configuration.
        force: keep a merge that fails its check, labelled so.
        tolerance: largest share of ‖ΔW‖ that storing may round away.
    """
    if record.merged:
        raise MergeError(f"Adapter {record.name!r} is already merged.")
    refuse(registry, record)
    model, names, default = registry.model, [*registry.merged, record.name], registry.default
    probe = probe if probe is not None else made_up_probe(model)
    base = _logits(model, registry, registry.merged, probe)
    before = _logits(model, registry, names, probe)
    try:
        marks = {n: _merge_site(registry, s, record.deltas[n]) for n, s in record.site_of().items()}
        for n, site in record.site_of().items():  # what is in memory now, not what writing said
            if _mark(site.read()) != marks[n][1]:
                raise MergeError(f"The weight at {n!r} does not hold what was written to it; do two modules share its storage?")
        for module in dict.fromkeys(registry.adapted_modules(record.name)):
            module._rankwise.branches.pop(record.name, None)
        record.merged = True
        registry.merged.append(record.name)
        if record.name not in registry.default.strengths:
            registry.default = registry.view({**registry.default.strengths, record.name: 1.0})
        after = _logits(model, registry, names, probe)
        gap = None if before is None or after is None else float((before - after).abs().max() / before.abs().max().clamp_min(1e-12))
        report = MergeReport(tuple(row for row, _ in marks.values()), gap, forced=False)
        trouble = _trouble(report, tolerance, before, base, model)
        if trouble and not force:
            raise MergeError(
                f"The merge of {record.name!r} was undone: {trouble} Use ", Option("force", True), " to keep it all the same."
            )
    except BaseException:
        unmerge(registry, record)
        registry.default = default
        raise
    return dataclasses.replace(report, forced=bool(trouble))


def unmerge(registry: AdapterRegistry, record: AdapterRecord) -> None:
    """The original bits at this adapter's weights, the other merged adapters merged again in order; it acts beside W again."""
    if record.name in registry.merged:
        registry.merged.remove(record.name)
    record.merged = False
    keys = {_key(s) for s in record.site_of().values()}
    for site in record.site_of().values():
        snapshot = registry.weight_backups.pop(_key(site), None)
        if snapshot is not None:
            site.restore(snapshot)
    for other in registry.merged:
        theirs = registry.records[other]
        for n, s in theirs.site_of().items():
            if _key(s) in keys:
                _merge_site(registry, s, theirs.deltas[n])
    for branch in branches_of(registry, record):
        state = branch.site.module.__dict__.get("_rankwise")
        if state is None or not any(t.site is branch.site and t.form is branch.form for t in state.branches.get(record.name, ())):
            add_branch(registry, branch)


def branches_of(registry: AdapterRegistry, record: AdapterRecord) -> Iterator[AdapterBranch]:
    for name, delta in record.deltas.items():
        yield AdapterBranch(record.name, delta.site, delta)
        for other in record.tied_sites.get(name, ()):
            far = registry.known[other]
            yield AdapterBranch(record.name, far, delta, (far.spec.kind == "embedding") != (delta.site.spec.kind == "embedding"))


# --- what cannot be merged ------------------------------------------------------------------------------------
def refuse(registry: AdapterRegistry, record: AdapterRecord) -> None:
    """Raise MergeError, before anything is touched, where this adapter cannot be folded into W as W stands."""
    for part in record.parts:
        if "weight" in part.form.provides:
            raise MergeError(f"The form {part.form.info.name!r} trains the base weights themselves; they hold the change already.")
        if not part.form.info.mergeable:
            raise MergeError(
                f"The form {part.form.info.name!r} is not a change of weight, so it cannot be merged; keep the adapter attached."
            )
        shared = next((s for s in part.sites.values() if s.spec.tie_group and part.part.separate_tied), None)
        if shared is not None:
            raise MergeError(
                f"{shared.name!r} shares its weight with another module and is adapted apart from it (separate_tied), so merging would change "
                "both; keep the adapter attached, or untie the model's weights first (config.tie_word_embeddings=False)."
            )
    for name, delta in record.deltas.items():
        if delta.total_delta().kind == "gated":
            raise MergeError(
                f"The change at {name!r} depends on x (a router decides), so it cannot be merged; export its experts, or collapse() it."
            )
    _refuse_neighbours(registry, record)
    if not any(float(_norm(d)) > 0 or not math.isfinite(float(_norm(d))) for d in record.deltas.values()):
        raise MergeError("Every change of this adapter is zero; merging would leave a copy of the base. Train it first.")


def _refuse_neighbours(registry: AdapterRegistry, record: AdapterRecord) -> None:
    """Another adapter that reads or moves a weight this one would be folded into."""
    mine = {_key(s): n for n, s in record.site_of().items()}
    for key, name in mine.items():
        owner = registry.replaced_weights[key][0] if key in registry.replaced_weights else record.name
        if owner != record.name:
            raise MergeError(
                f"The weight at {name!r} is moved by adapter {owner!r}, so no other can be merged there; detach {owner!r} first."
            )
    for other in registry.records.values():
        if other is record or other.merged:
            continue
        for n, s in other.site_of().items():
            if _key(s) in mine and reads_weight(other.deltas[n]):
                raise MergeError(
                    f"Adapter {other.name!r} reads the weight at {n!r} in its own change, which a merge would alter; merge "
                    f"{other.name!r} first, or detach it."
                )


def reads_weight(delta: AdapterLayer) -> bool:
    """True where the change is a function of W (DoRA), so that it is only right against the untouched one."""
    return delta.site.spec.mode != "block" and delta.total_delta().needs_weight


# --- one site -------------------------------------------------------------------------------------------------
def _key(site: Site) -> tuple[str, str]:
    return site.spec.module, site.spec.param


@torch.no_grad()
def _norm(delta: AdapterLayer) -> Tensor:
    d = delta.total_delta()
    return d.dense(delta.site.untouched()).norm() if d.needs_weight else d.norm()


@torch.no_grad()
def _merge_site(registry: AdapterRegistry, site: Site, delta: AdapterLayer) -> tuple[SiteMerge, tuple[float, float]]:
    """W ← W + ΔW; how it went, and a mark of what is stored."""
    if _key(site) not in registry.weight_backups:
        registry.weight_backups[_key(site)] = site.snapshot()
    delta.before_merge(registry)
    d = delta.total_delta()
    W = site.read()
    change = d.dense(site.untouched() if d.needs_weight else None).to(W.dtype)
    wanted = W + change
    if not bool(torch.isfinite(wanted).all()):
        raise MergeError(
            f"W + ΔW at {site.name!r} holds NaN or infinity, so nothing was merged; look at the adapter's tensors there."
        )
    stored = site.write(wanted)
    size, before = change.norm().item(), W.norm().item()
    lost = (stored - wanted).norm().item() / size if size else 0.0
    return SiteMerge(site.name, size / max(before, 1e-30), lost), _mark(stored)


def _mark(W: Tensor) -> tuple[float, float]:
    """Two sums of a tensor that tell it from another."""
    flat = W.reshape(-1).double()
    return float(flat.sum()), float(flat[::7].sum())


# --- the check of the outputs ---------------------------------------------------------------------------------
def made_up_probe(model: nn.Module) -> dict[str, Tensor] | None:
    """Random inputs the model takes, made from its configuration (tokens, pixels, sound), or None where none fits."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    g = torch.Generator().manual_seed(0)
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    device, dtype = (first.device, first.dtype) if first is not None else (torch.device("cpu"), torch.float32)
    made: dict[str, Tensor] = {}
    vocab = getattr(getattr(config, "text_config", config), "vocab_size", None)
    if isinstance(vocab, int):
        made["input_ids"] = torch.randint(0, vocab, (2, 8), generator=g).to(device)
        if getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = torch.randint(0, vocab, (2, 8), generator=g).to(device)
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None)
    if isinstance(side, int):
        made["pixel_values"] = torch.randn(2, getattr(vision, "num_channels", 3), side, side, generator=g).to(device, dtype)
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if isinstance(bins, int) and isinstance(frames, int):
        made["input_features"] = torch.randn(2, bins, 2 * frames, generator=g).to(device, dtype)
        made.pop("input_ids", None)
    taken = set(inspect.signature(model.forward).parameters)
    made = {k: v for k, v in made.items() if k in taken}
    for names in (list(made), ["input_ids"], ["pixel_values"]):  # a model of text and images may take text alone
        chosen = {k: made[k] for k in names if k in made}
        if chosen and _runs(model, chosen):
            return chosen
    return None


def _runs(model: nn.Module, probe: Mapping[str, Any]) -> bool:
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**probe)
    except Exception:  # whatever it is, this made-up input is not one of the model's
        return False
    finally:
        model.train(training)
    return True


def _logits(model: nn.Module, registry: AdapterRegistry, names: list[str], probe: Mapping[str, Any] | None) -> Tensor | None:
    if probe is None:
        return None
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), entered(registry.view(dict.fromkeys(names, 1.0))):
            out = model(**probe)
    finally:
        model.train(training)
    for key in ("logits", "last_hidden_state", "logits_per_image"):
        if getattr(out, key, None) is not None:
            return getattr(out, key).float()
    return out.float() if isinstance(out, Tensor) else None


def _trouble(report: MergeReport, tolerance: float, before: Tensor | None, base: Tensor | None, model: nn.Module) -> str:
    """Why the merge is not to be trusted, or ""; the outputs' gap is held against what the adapter does to them."""
    worst = report.worst
    if not worst.error <= tolerance:
        return f"at {worst.site!r} storing rounded away {worst.error:.0%} of the change (allowed {tolerance:.0%})."
    if report.logit_gap is None or before is None or base is None:
        return ""
    size = float(before.abs().max().clamp_min(1e-12))
    effect = float((before - base).abs().max()) / size
    exact = worst.error <= 1e-3 and all(
        p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point()
    )
    bound = min(1e-3, 1e-4 + 0.01 * effect) if exact else min(0.1, 0.02 + (0.1 + 2 * worst.error) * effect)
    if not report.logit_gap <= bound:
        return f"the logits moved by {report.logit_gap:.2g} of their largest value (allowed {bound:.2g}; the adapter itself moves them by {effect:.2g})."
    return ""
