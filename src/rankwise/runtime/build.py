"""A recipe to layers: choose the sites, plan and build each form, gather statistics, fill first values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.calibration.base import Stats, calibrate
from rankwise.errors import AttachError, TargetError, nearest
from rankwise.forms.base import SCALES, AdapterLayer, Form, Plan
from rankwise.recipe import Part, Recipe, build
from rankwise.runtime.record import InstalledPart
from rankwise.runtime.view import entered
from rankwise.seeds import generator
from rankwise.sites.discover import block_site
from rankwise.sites.targets import resolve

if TYPE_CHECKING:
    from rankwise.inits.base import Fill, Init
    from rankwise.runtime.registry import AdapterRegistry
    from rankwise.sites.site import Site


def choose_sites(registry: AdapterRegistry, part: Part, form: Form) -> tuple[list[Site], dict[str, list[str]]]:
    """The sites of a part, one for each tie group, and the sites at the other ends of ties."""
    if form.reads == ("block",):
        return _choose_blocks(registry.model, part, form), {}
    sites = resolve(
        registry.known,
        part.targets,
        exclude=part.exclude,
        layers=part.layers,
        kinds=form.kinds,
        part=f"the form {form.info.name!r}",
    )
    refused = [s for s in sites if s.spec.mode not in form.reads]
    if refused:
        s = refused[0]
        raise AttachError(
            f"The form {form.info.name!r} cannot be at {s.name!r}: another forward reads that weight, and the form needs to be called with x. "
            "Choose a form with a weight delta there, or exclude it."
        )
    leaders: dict[str, str] = {}
    out: list[Site] = []
    tied_sites: dict[str, list[str]] = {}
    for s in sites:
        group = s.spec.tie_group
        if group and not part.separate_tied:
            if group in leaders:
                continue
            leaders[group] = s.name
            others = [
                o.name for o in registry.known.values() if o.spec.tie_group == group and o.name != s.name and o.spec.mode != "plain"
            ]
            tied_sites[s.name] = others
        out.append(s)
    return out, tied_sites


def _choose_blocks(model: nn.Module, part: Part, form: Form) -> list[Site]:
    words = [part.targets] if isinstance(part.targets, str) else part.targets
    paths = [p for p, _ in model.named_modules() if p and not p.startswith("rankwise")]
    out: dict[str, Site] = {}
    for word in words:
        word = form.default_block if word == "all-linear" else word  # type: ignore[attr-defined]
        hits = [p for p in paths if p == word or p.endswith(f".{word}")]
        if not hits:
            raise TargetError(
                f"The target {word!r} matches no module to wrap; {nearest(word, {p.rpartition('.')[2] for p in paths})}"
            )
        out.update((p, block_site(model, p)) for p in hits)
    narrow = next((s for s in out.values() if not (s.spec.inp and s.spec.out)), None)
    if narrow is not None:
        raise TargetError(
            f"The form {form.info.name!r} cannot wrap {narrow.name!r} ({narrow.spec.parent}): it has no linear layer inside that would "
            "tell its width. Target another block, such as 'self_attn'."
        )
    layers = part.layers
    return [s for n, s in out.items() if n not in part.exclude and (layers is None or s.spec.layer in layers)]


def build_parts(
    registry: AdapterRegistry, recipe: Recipe, calibration: Iterable[Any] | None
) -> tuple[list[InstalledPart], dict[str, AdapterLayer], dict[str, list[str]]]:
    if torch.is_inference_mode_enabled():
        raise AttachError("attach() inside torch.inference_mode() makes tensors that can never be trained; attach outside of it.")
    installed: list[InstalledPart] = []
    deltas: dict[str, AdapterLayer] = {}
    tied_sites: dict[str, list[str]] = {}
    for part in recipe.all_parts():
        form: Form = build("form", part.form)
        sites, ties = choose_sites(registry, part, form)
        part.refuse_ignored(form.info.name, form.ranked, sites)
        for s in sites:
            if s.name in deltas:
                raise AttachError(f"Two parts of the recipe are at {s.name!r}; give each layer to one part (targets, exclude).")
        init: Init | None = build("init", part.init) if part.init else None
        ranks = {s.name: part.rank_of(s.spec.module, s.spec.role) for s in sites}
        scales = {n: _scale(part, s, ranks[n]) for n, s in ((s.name, s) for s in sites)}
        stats = _calibrate(registry, init, sites, ranks, calibration)
        if init is not None:
            ranks = init.allocate(sites, stats, ranks)
            sites = [s for s in sites if ranks[s.name] > 0]
            ties = {k: v for k, v in ties.items() if ranks[k] > 0}
        made, plan = make_deltas(form, part, sites, ranks, scales, recipe.seed, registry.model)
        if init is not None:
            _fill(registry, init, made, sites, stats, plan, recipe.seed)
        _refuse_dead(made)
        deltas.update(made)
        tied_sites.update(ties)
        installed.append(InstalledPart(part, form, plan, {n: d.site for n, d in made.items()}))
    return installed, deltas, tied_sites


def make_deltas(
    form: Form,
    part: Part,
    sites: list[Site],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    seed: int,
    model: nn.Module,
    restoring: bool = False,
) -> tuple[dict[str, AdapterLayer], Plan]:
    """Plan all sites, then build each; with a router, the router's modules replace the form's.

    Args:
        form: of the part.
        part: of the recipe.
        sites: where, in model order.
        ranks: site → r.
        scales: site → factor of B·A.
        seed: of the run; each draw is by purpose and site name.
        model: the base.
        restoring: values come from a file, so nothing is read from outside.
    """
    router = build("router", part.router) if part.router else None
    ranks = dict(ranks)
    if router is not None:
        ranks = router.ranks(model, sites, ranks) if not restoring else ranks
    if form.ranked:
        form.check_ranks(
            sites,
            ranks if router is None else {n: min(r, s.spec.max_rank) for s in sites for n, r in [(s.name, ranks[s.name])]},
        )
    plan = Plan(ranks=ranks, scales=dict(scales), seed=seed, dropout=part.dropout, notes={"restoring": True} if restoring else {})
    plan = form.plan(sorted(sites, key=lambda s: s.name), plan)
    made = {s.name: form.build(s, plan) for s in sites}
    if router is not None:
        made = router.install(model, sites, made, plan)
    return made, plan


def _scale(part: Part, site: Site, r: int) -> float:
    alpha = part.alpha_of(site.spec.module, site.spec.role)
    if part.alpha is None and not part.alpha_pattern and part.policy == "alpha/r":
        alpha = float(r)
    return SCALES[part.policy](alpha, r)


def _calibrate(
    registry: AdapterRegistry, init: Init | None, sites: list[Site], ranks: Mapping[str, int], batches: Iterable[Any] | None
) -> Any:
    requests = init.requests(sites, ranks) if init is not None else {}
    if not requests:
        return Stats({})
    if batches is None:
        assert init is not None
        raise AttachError(f"The init {init.info.name!r} reads statistics of your data; give attach(…, calibration=batches).")
    merged = dict.fromkeys(registry.merged, 1.0)
    with entered(registry.view(merged)):  # the base's own statistics, whatever else is attached
        return calibrate(registry.model, sites, requests, batches)


def _fill(
    registry: AdapterRegistry, init: Init, made: Mapping[str, AdapterLayer], sites: list[Site], stats: Any, plan: Plan, seed: int
) -> None:
    for site in sites:
        delta = made[site.name]
        if site.spec.kind not in init.kinds:
            raise AttachError(
                f"The init {init.info.name!r} cannot fill {site.name!r}, a {site.spec.kind}; it fills {', '.join(init.kinds)}."
            )
        got: Fill = init.fill(
            site, stats, plan.ranks[site.name], plan.scales[site.name], generator(seed, init.info.name, site.name)
        )
        delta.fill(got.tensors)
        if got.rule == "subtract":
            delta.freeze_initial_delta()
        elif got.rule == "replace":
            assert got.weight is not None
            delta.base_weight = got.weight


def _refuse_dead(made: Mapping[str, AdapterLayer]) -> None:
    """A pair whose factors are both zero can never move."""
    for name, delta in made.items():
        A, B = getattr(delta, "A", None), getattr(delta, "B", None)
        if isinstance(A, Tensor) and isinstance(B, Tensor) and not A.any() and not B.any():
            raise AttachError(
                f"Both factors at {name!r} start at zero, so neither ever gets a gradient; use an init that fills one of them."
            )
