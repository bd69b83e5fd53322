"""Put an adapter into a model and take it out again, bit-exactly.

Attaching swaps the class of each adapted module for a subclass made on the fly; names, types, the base's state
dict and ``deepcopy`` stay as they were.  All adapter tensors live on the model's one added child, ``rankwise``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.forms.base import Form, Plan, SiteDelta
from rankwise.forms.fused import InputGroup
from rankwise.inits.base import Fill, Init
from rankwise.place import Place, Tap, adapted_class
from rankwise.recipe import Part, Recipe, build
from rankwise.roster import AdapterModule, Installed, Record, Roster, roster_of
from rankwise.seeds import generator
from rankwise.sites import Site, block_site, resolve
from rankwise.store.names import check_name
from rankwise.view import View, entered

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


def attach(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str = "lora",
    *,
    calibration: Iterable[Any] | None = None,
    name: str = "default",
    activate: bool = True,
) -> Adapter:
    """Put an adapter into ``model`` (changed in place) and return its handle.

    Args:
        recipe: a Recipe, its fields, a file, or the name of a form or preset.
        calibration: batches (dicts of the model's keyword inputs) for inits that read statistics.
        name: free text; one adapter a name.
        activate: make it the one that acts by default.

    Raises:
        AttachError: the name is taken, the model is sharded, no calibration where the init needs it.
        TargetError, RecipeError, OptionError: see the recipe.
    """
    from rankwise.adapter import Adapter

    recipe = Recipe.of(recipe)
    check_name(name)
    had = isinstance(model._modules.get("rankwise"), Roster)
    roster = roster_of(model, create=True)
    try:
        if name in roster.records:
            raise AttachError(f"An adapter called {name!r} is already attached; choose another name, or detach() it first.")
        installed, deltas, followers = _build(roster, recipe, calibration)
        _install(roster, name, recipe, installed, deltas, followers)
    except BaseException:
        if not had and not roster.records:
            model._modules.pop("rankwise", None)
        raise
    if activate:
        activate_adapters(model, name)
    return Adapter(roster, name)


def activate_adapters(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Set the default view: which attached adapters act, each at strength 1 (several sum; None is the base)."""
    roster = roster_of(model)
    wanted = [names] if isinstance(names, str) else list(names or ())
    wanted = [*wanted, *(m for m in roster.merged if m not in wanted)]
    roster.default = View(roster, dict.fromkeys(wanted, 1.0))


# --- building -----------------------------------------------------------------------------------------------
def choose_sites(roster: Roster, part: Part, form: Form) -> tuple[list[Site], dict[str, list[str]]]:
    """The sites of a part, one for each tie group, and the sites at the other ends of ties."""
    if form.reads == ("block",):
        return _choose_blocks(roster.model, part, form), {}
    sites = resolve(
        roster.known,
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
    followers: dict[str, list[str]] = {}
    for s in sites:
        group = s.spec.tie_group
        if group and not part.untie:
            if group in leaders:
                continue
            leaders[group] = s.name
            others = [
                o.name for o in roster.known.values() if o.spec.tie_group == group and o.name != s.name and o.spec.mode != "plain"
            ]
            followers[s.name] = others
        out.append(s)
    return out, followers


def _choose_blocks(model: nn.Module, part: Part, form: Form) -> list[Site]:
    from rankwise.errors import TargetError, nearest

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


def _build(
    roster: Roster, recipe: Recipe, calibration: Iterable[Any] | None
) -> tuple[list[Installed], dict[str, SiteDelta], dict[str, list[str]]]:
    if torch.is_inference_mode_enabled():
        raise AttachError("attach() inside torch.inference_mode() makes tensors that can never be trained; attach outside of it.")
    installed: list[Installed] = []
    deltas: dict[str, SiteDelta] = {}
    followers: dict[str, list[str]] = {}
    for part in recipe.all_parts():
        form: Form = build("form", part.form)
        sites, ties = choose_sites(roster, part, form)
        part.refuse_ignored(form.info.name, form.ranked, sites)
        for s in sites:
            if s.name in deltas:
                raise AttachError(f"Two parts of the recipe are at {s.name!r}; give each place to one part (targets, exclude).")
        init: Init | None = build("init", part.init) if part.init else None
        ranks = {s.name: part.rank_of(s.spec.module, s.spec.role) for s in sites}
        scales = {n: _scale(part, s, ranks[n]) for n, s in ((s.name, s) for s in sites)}
        stats = _calibrate(roster, init, sites, ranks, calibration)
        if init is not None:
            ranks = init.allocate(sites, stats, ranks)
            sites = [s for s in sites if ranks[s.name] > 0]
            ties = {k: v for k, v in ties.items() if ranks[k] > 0}
        made, plan = make_deltas(form, part, sites, ranks, scales, recipe.seed, roster.model)
        if init is not None:
            _fill(roster, init, made, sites, stats, plan, recipe.seed)
        _refuse_dead(made)
        deltas.update(made)
        followers.update(ties)
        installed.append(Installed(part, form, plan, {n: d.site for n, d in made.items()}))
    return installed, deltas, followers


def make_deltas(
    form: Form,
    part: Part,
    sites: list[Site],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    seed: int,
    model: nn.Module,
    restoring: bool = False,
) -> tuple[dict[str, SiteDelta], Plan]:
    """Plan all sites, then build each; with a router, the router's modules take the place of the form's."""
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
    from rankwise.forms.base import SCALES

    alpha = part.alpha_of(site.spec.module, site.spec.role)
    if part.alpha is None and not part.alpha_pattern and part.policy == "alpha/r":
        alpha = float(r)
    return SCALES[part.policy](alpha, r)


def _calibrate(
    roster: Roster, init: Init | None, sites: list[Site], ranks: Mapping[str, int], batches: Iterable[Any] | None
) -> Any:
    from rankwise.calibration.base import Stats, calibrate

    requests = init.requests(sites, ranks) if init is not None else {}
    if not requests:
        return Stats({})
    if batches is None:
        assert init is not None
        raise AttachError(f"The init {init.info.name!r} reads statistics of your data; give attach(…, calibration=batches).")
    merged = dict.fromkeys(roster.merged, 1.0)
    with entered(View(roster, merged)):  # the base's own statistics, whatever else is attached
        return calibrate(roster.model, sites, requests, batches)


def _fill(roster: Roster, init: Init, made: Mapping[str, SiteDelta], sites: list[Site], stats: Any, plan: Plan, seed: int) -> None:
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
            delta.hold_start()
        elif got.rule == "replace":
            assert got.weight is not None
            delta.base_weight = got.weight


def _refuse_dead(made: Mapping[str, SiteDelta]) -> None:
    """A pair whose factors are both zero can never move."""
    for name, delta in made.items():
        A, B = getattr(delta, "A", None), getattr(delta, "B", None)
        if isinstance(A, Tensor) and isinstance(B, Tensor) and not A.any() and not B.any():
            raise AttachError(
                f"Both factors at {name!r} start at zero, so neither ever gets a gradient; use an init that fills one of them."
            )


# --- installing ---------------------------------------------------------------------------------------------
def _install(
    roster: Roster,
    name: str,
    recipe: Recipe,
    installed: list[Installed],
    deltas: dict[str, SiteDelta],
    followers: dict[str, list[str]],
) -> None:
    _refuse_over_merged(roster, deltas)
    slot = f"a{roster._count}"
    roster._count += 1
    record = Record(name, slot, recipe, installed, deltas, followers)
    home = AdapterModule()
    for site_name, delta in deltas.items():
        home.sites.put(site_name, delta)
    for part in installed:
        for key, bank in part.plan.banks.items():
            home.banks.put(key, bank)
    home.train(roster.model.training)
    if not roster.records:
        _freeze(roster)
        roster.watch()
    roster.add_module(slot, home)
    roster.records[name] = record
    if any(d.in_place for d in deltas.values()):
        roster.moving.append(name)
    attached: list[SiteDelta] = []
    try:
        for site_name, delta in deltas.items():
            _tap(roster, Tap(name, delta.site, delta))
            for other in followers.get(site_name, ()):
                far = roster.known[other]
                flipped = (far.spec.kind == "embedding") != (delta.site.spec.kind == "embedding")
                _tap(roster, Tap(name, far, delta, transposed=flipped))
            delta.on_attach(roster, record)
            attached.append(delta)
    except BaseException:
        uninstall(roster, name, attached)  # an adapter is attached whole or not at all
        raise


def _refuse_over_merged(roster: Roster, deltas: Mapping[str, SiteDelta]) -> None:
    """A form that reads or moves W needs the base's own, not one that holds a merged adapter."""
    for name, delta in deltas.items():
        if (delta.site.spec.module, delta.site.spec.param) not in roster.journal or delta.site.spec.mode == "block":
            continue
        if delta.in_place or delta.base_weight is not None or delta.effective().needs_weight:
            raise AttachError(
                f"{type(delta).__name__} at {name!r} works on the base weight itself, which holds {', '.join(map(repr, roster.merged))} merged; "
                "unmerge() it, attach, and merge again."
            )


def _tap(roster: Roster, tap: Tap) -> None:
    module: Any = tap.site.module
    place = module.__dict__.get("_rankwise")
    if place is None:
        place = Place(roster, type(module))
        module.__dict__["_rankwise"] = place
    place.taps.setdefault(tap.name, []).append(tap)
    group = tap.site.spec.input_group
    if group and tap.site.spec.rows is None and tap.site.spec.mode == "called":
        shared, members = roster.groups.setdefault(group, (InputGroup(), []))
        if place not in members:
            members.append(place)
        place.fast.group, place.fast.members = shared, members
    set_class(module)


def set_class(module: Any) -> None:
    """The class that fits what is at this module now: adapted while anything is, else its own."""
    place: Place = module._rankwise
    taps = [t for ts in place.taps.values() for t in ts]
    if not taps and not place.originals:
        module.__class__ = place.base
        del module.__dict__["_rankwise"]
        if place in place.fast.members:
            place.fast.members.remove(place)
        return
    modes = {t.site.spec.mode for t in taps}
    if "block" in modes and len(modes) > 1:
        raise AttachError(f"{type(module).__name__} cannot be wrapped as a block and adapted in its weight at once; choose one.")
    reads = tuple(sorted({t.site.spec.param for t in taps if t.site.spec.mode in ("read", "plain") and not t.form.in_place}))
    mode = "block" if "block" in modes else "called" if "called" in modes else "read"
    module.__class__ = adapted_class(place.base, mode, reads)


def uninstall(roster: Roster, name: str, attached: Iterable[SiteDelta] | None = None) -> None:
    """Take an adapter out: its taps, its class swaps, its tensors; the last one takes the roster along.

    ``attached``: the deltas that had come as far as ``on_attach``, where installing stopped half-way.
    """
    record = roster.records[name]
    for delta in record.deltas.values() if attached is None else attached:
        delta.on_detach(roster, record)
    for module in dict.fromkeys(roster._places(name)):
        module._rankwise.taps.pop(name, None)
        module._rankwise.originals.pop(name, None)
        set_class(module)
    del roster._modules[record.slot]
    del roster.records[name]
    if name in roster.moving:
        roster.moving.remove(name)
    left = {n: s for n, s in roster.default.strengths.items() if n != name}
    roster.default = View(roster, left)
    if not roster.records:
        roster.unwatch()
        params = dict(roster.model.named_parameters())
        for path in roster.frozen:
            params[path].requires_grad_(True)
        del roster.model._modules["rankwise"]


def _freeze(roster: Roster) -> None:
    """Freeze the base; remember what was trainable, so that detaching gives it back."""
    for path, p in roster.model.named_parameters():
        if not path.startswith("rankwise.") and p.requires_grad:
            roster.frozen.append(path)
            p.requires_grad_(False)
