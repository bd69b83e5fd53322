"""``rankwise merge``: adapters into one, an adapter into its base, whole models into one, or a mergekit file."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.common import _value, err, load_model, out
from rankwise.cli.merge_report import folded, models_told, state_told
from rankwise.cli.merge_score import HeldOut, draw, fits, held_from, progress_of, told
from rankwise.codecs.library import find_bridge
from rankwise.errors import OptionError

#: options of a merge of whole models, whatever the method
_FILES = {"missing", "vocabulary", "untie", "on"}
#: what --set may not reach: it has a flag of its own, or is the verb's affair
_TAKEN = {"evaluator", "seed", "force", "progress", "dtype", "base", "weights", "out", "method", "folders", "states", "shard_bytes"}


def add(app: typer.Typer) -> None:
    app.command("merge")(merge)


def merge(
    sources: Annotated[list[str], typer.Argument(help="Adapter folders, or whole models' folders, or one mergekit file (.yaml).")],
    to: Annotated[str, typer.Option("--out", "-o", help="Folder for the result.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The adapters' base; without it plain LoRA folders are read alone.")] = None,
    method: Annotated[str | None, typer.Option(help="cat, svd, ties, lego … (adapters: cat; models: average).")] = None,
    weights: Annotated[str | None, typer.Option(help="Comma-separated weights, one a source.")] = None,
    base: Annotated[str | None, typer.Option(help="Whole models: the folder that changes are measured from.")] = None,
    into_base: Annotated[bool, typer.Option("--into-base", help="Write a whole model with the adapter folded in.")] = False,
    force: Annotated[bool, typer.Option(help="Keep a merge that fails its check.")] = False,
    set: Annotated[list[str] | None, typer.Option("--set", help="option=value of the method; for models also missing=, vocabulary=, untie=, on=.")] = None,
    seed: Annotated[int, typer.Option(help="Of random drops.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Whole models: float32, float16 or bfloat16; default the base's own.")] = None,
    source_rank: Annotated[int | None, typer.Option(help="Cut sources to this rank first (needed for DoRA and the like).")] = None,
    score_data: Annotated[list[str] | None, typer.Option("--score-data", help="Held-out text or images that choose (a file, a folder, or a shipped domain): of soups, stragglers and --search; more of them are scored beside the first.")] = None,
    score: Annotated[str, typer.Option(help="loss, perplexity, bits_per_byte or accuracy on that data.")] = "loss",
    search: Annotated[list[str] | None, typer.Option("--search", help="option=0:1:0.25 or option=a,b,c: try these, keep the best by --score-data.")] = None,
    picture: Annotated[str | None, typer.Option(help="Draw the search of one option (.png, .svg, .pdf).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
    """Merge adapters into one, fold them into their base, merge whole models, or run a mergekit file.

    The result is checked against its parts: how far it is from the plain weighted sum, what cutting to a rank lost, and what
    storing rounded away.

    Example: rankwise merge run/a run/b --method ties --set density=0.3 --weights 0.6,0.4 --out both

    Example: rankwise merge run/a run/b -m base --method slerp --search t=0:1:0.1 --score-data held.txt --picture sweep.svg --out both
    """
    kind = _kind(sources, model)
    given: dict[str, Any] = {
        "--model": model,
        "--method": method,
        "--weights": weights,
        "--base": base,
        "--into-base": into_base,
        "--set": set,
    }
    given |= {"--dtype": dtype, "--source-rank": source_rank, "--score-data": score_data}
    _no_idle(kind, {**given, "--score": score != "loss", "--search": search, "--picture": picture})
    options = _options(set or [])
    numbers = _numbers(weights, len(sources))
    _fresh(to, sources)
    if kind == "yaml":
        _mergekit(sources[0], to, seed, force, json)
        return
    name = method or ("average" if kind == "models" else "cat")
    held = held_from(score_data or [], score, search or [], picture)
    own = {k: v for k, v in options.items() if kind != "models" or k not in _FILES}
    fits(held, name, own, {"weights": numbers, "model": model}, kind)
    if kind == "models":
        _models(sources, to, name, numbers, base, {**options, "seed": seed, "force": force, "dtype": dtype}, held, json)
    elif model is None:
        if into_base:
            raise OptionError("--into-base folds into a model; give it with --model.")
        _without_model(sources, to, name, numbers, options, seed, force, source_rank, json)
    else:
        _with_model(sources, model, to, name, numbers, options, seed, force, source_rank, into_base, json, held)


_NAMES = {"yaml": "a mergekit file", "models": "whole models", "adapters": "adapters"}


def _no_idle(kind: str, given: dict[str, Any]) -> None:
    """Refuse a flag that says nothing to this kind of merge."""
    idle = {"yaml": {*given}, "models": {"--model", "--into-base", "--source-rank"}, "adapters": {"--base", "--dtype"}}[kind]
    if wrong := [f for f, v in given.items() if f in idle and v is not None and v is not False and v != []]:
        raise OptionError(f"{wrong[0]} says nothing to a merge of {_NAMES[kind]}; leave it out.")


def _kind(sources: Sequence[str], model: str | None) -> str:
    """What the sources are: all of one kind."""
    kinds = {}
    for s in sources:
        path = Path(s)
        if path.suffix in (".yaml", ".yml"):
            kinds[s] = "yaml"
        elif (
            any((path / f).exists() for f in ("adapter_config.json", "rankwise.safetensors")) or path.name == "rankwise.safetensors"
        ):
            kinds[s] = "adapters"
        elif (path / "config.json").exists():
            kinds[s] = "models"
        elif model is not None and not path.exists() and s.count("/") == 1:
            kinds[s] = "adapters"  # of the hub
        else:
            what = "holds neither an adapter nor a model" if path.exists() else "does not exist"
            raise OptionError(f"{s!r} {what}; merge takes adapter folders, model folders or one mergekit file.")
    if len({*kinds.values()}) > 1:
        one, other = (next(s for s in kinds if kinds[s] == k) for k in sorted({*kinds.values()})[:2])
        raise OptionError(f"{one!r} is {_NAMES[kinds[one]]} and {other!r} is {_NAMES[kinds[other]]}; merge one kind at a time.")
    kind = next(iter(kinds.values()))
    if kind == "yaml" and len(sources) > 1:
        raise OptionError("A mergekit file names its models itself; give one file and nothing else.")
    return kind


def _options(settings: Sequence[str]) -> dict[str, Any]:
    made = {}
    for s in settings:
        key, sep, raw = s.partition("=")
        if not sep or not key:
            raise OptionError(f"--set takes option=value (density=0.3); it got {s!r}.")
        if key in _TAKEN:
            raise OptionError(f"--set {key}: that is no option of a method; see rankwise merge --help.")
        made[key] = _value(raw)
    return made


def _numbers(weights: str | None, sources: int) -> list[float] | None:
    if weights is None:
        return None
    try:
        given = [float(w) for w in weights.split(",")]
    except ValueError as error:
        raise OptionError(f"--weights takes numbers with commas between; it got {weights!r}.") from error
    if not all(map(math.isfinite, given)):
        raise OptionError(f"--weights takes finite numbers; it got {weights!r}.")
    if len(given) != sources:
        raise OptionError(f"--weights has {len(given)} numbers for {sources} sources; give one each.")
    return given


def _fresh(to: str, sources: Sequence[str]) -> None:
    """Refuse a folder that holds something, and a source that comes twice; before any work."""
    path = Path(to)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OptionError(f"--out {to} exists and is not an empty folder; give a new one.")
    if above := next((p for p in path.absolute().parents if p.exists() and not p.is_dir()), None):
        raise OptionError(f"--out {to} cannot be made: {above} is a file; give another place.")
    seen: dict[Path, str] = {}
    for s in sources:
        if (was := seen.setdefault(Path(s).resolve(), s)) is not s or sources.count(s) > 1:
            raise OptionError(f"{was!r} is given twice; give each source once, and what it shall count with --weights.")


@contextlib.contextmanager
def _bar(what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that is gone afterwards; called with the name of what is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task("merging", total=total)
        yield lambda name: bars.advance(task)


def _drawn(picture: str, json: bool) -> None:
    if not json:
        out.print(f"wrote {picture}", highlight=False)


def _mergekit(file: str, to: str, seed: int, force: bool, json: bool) -> None:
    from rankwise.merge.mergekit import merge_yaml

    with _bar("tensors") as tick:
        report = merge_yaml(file, to, seed=seed, force=force, progress=tick)
    models_told(report, json)


# --- whole models ---------------------------------------------------------------------------------------------
def _models(
    folders: Sequence[str], to: str, method: str, weights: Any, base: str | None, options: dict[str, Any], held: HeldOut, json: bool
) -> None:
    from rankwise.merge.checkpoints import merge_checkpoints
    from rankwise.merge.mergekit import _dtype
    from rankwise.merge.search import search_models

    options["dtype"] = _dtype(options["dtype"])
    models = held.models(folders) if held.data else None
    if held.search and models is not None:
        with _bar("places of the search") as tick:
            found, report = search_models(
                folders, to, method, held.search, models, weights, base, progress=progress_of(tick), **options
            )
        report.search = told(found, held)
    else:
        with _bar("tensors") as tick:
            report = merge_checkpoints(folders, to, method, weights, base, progress=tick, models=models, **options)
        if report.score:
            report.score |= {"of": held.score, "data": held.data[0]}
    models_told(report, json)
    if held.picture is not None:
        _drawn(held.picture, json)
        draw(found, held, f"{method} of {len(folders)} models")


# --- adapters --------------------------------------------------------------------------------------------------
def _without_model(
    folders: Sequence[str],
    to: str,
    method: str,
    weights: Any,
    options: Any,
    seed: int,
    force: bool,
    source_rank: int | None,
    json: bool,
) -> None:
    """Folders of plain LoRA, one site at a time; the result in PEFT's format."""
    from rankwise.merge.engine.base import merge_states
    from rankwise.merge.engine.folders import export_merged, open_folders

    if source_rank is not None:
        raise OptionError("--source-rank cuts what is read with its model; give --model.")
    found = open_folders(folders, check_base=not force)
    with _bar("places", len({n for f in found for n in f.sites})) as tick:
        state = merge_states(found, weights, method, seed=seed, progress=tick, **options)
    export_merged(to, state, found)
    state_told(state, method, to, json)


def _with_model(
    folders: Sequence[str],
    model: str,
    to: str,
    method: str,
    weights: Any,
    options: Any,
    seed: int,
    force: bool,
    source_rank: int | None,
    into_base: bool,
    json: bool,
    held: HeldOut,
) -> None:
    """Read with the base at hand, so that any form may come; saved natively, or folded in."""
    import rankwise as rw
    from rankwise.catalogue import find
    from rankwise.merge.engine.base import Merge
    from rankwise.merge.engine.files import attach_state, read_state

    net, tokenizer = load_model(model)
    state = found = None
    if len(folders) == 1 and source_rank is None and weights is None and not options and method == "cat":
        adapter = rw.load(net, folders[0], name="merged")
    else:
        states = []
        rule: type[Merge] = find("merge", method).cls
        with _bar("adapters read", len(folders)) as tick:
            for f in folders:
                states.append(read_state(net, f, rank=source_rank, as_is=rule.any_kind and source_rank is None))
                tick(f)
        state, found = _merged(net, tokenizer, folders, states, method, weights, options, seed, held)
        adapter = attach_state(net, state)
    if not into_base:
        adapter.save(to)
        if state is None:
            out.print(f"wrote {to}: {adapter}", highlight=False)
        else:
            state_told(state, method, to, json)
    else:
        report = adapter.merge(force=force)
        write_merged(net, tokenizer, to)
        folded(report, state, method, to, json)
    if held.picture is not None and found is not None:
        _drawn(held.picture, json)
        draw(found, held, f"{method} of {len(folders)} adapters")


def _merged(
    net: Any,
    reader: Any,
    folders: Sequence[str],
    states: Sequence[Any],
    method: str,
    weights: Any,
    options: Any,
    seed: int,
    held: HeldOut,
) -> tuple[Any, Any]:
    """The merged value, and what a search found; what was scored is in its meta."""
    from rankwise.merge.engine.base import merge_states
    from rankwise.merge.search import search_states

    judge = held.evaluator(net, reader) if held.data else None
    meta: dict[str, Any] = {}
    if held.search and judge is not None:
        with _bar("places of the search") as tick:
            found, state = search_states(
                states, method, held.search, judge, weights, seed=seed, progress=progress_of(tick), **options
            )
        meta["search"] = told(found, held)
    else:
        found = None
        with _bar("places", len({n for s in states for n in s.sites})) as tick:
            state = merge_states(states, weights, method, seed=seed, progress=tick, evaluator=judge, **options)
    if judge is not None:
        plain = type(state)(state.sites)
        alone = {f: judge.score(type(s)(s.sites)) for f, s in zip(folders, states, strict=True)}
        meta["score"] = {"of": held.score, "data": held.data[0], "merged": judge.score(plain), "sources": alone}
    return dataclasses.replace(state, meta={**state.meta, **meta}), found


def write_merged(model: Any, tokenizer: Any, to: str) -> None:
    """Save a model with its merged adapters as an ordinary model folder: the roster taken off, the bits kept."""
    registry = model._modules.pop("rankwise")
    for module in {id(s.module): s.module for s in registry.known.values() if s.spec.quantised}.values():
        if (bridge := find_bridge(module)) is not None:
            bridge.settle(module)
    conversions = getattr(model, "_weight_conversions", None)
    try:
        if conversions is not None:  # transformers undoes how it read the weights, but cannot for codes, which need no undoing
            model._weight_conversions = [c for c in conversions if _reversible(c)] or None
        model.save_pretrained(to)
        if tokenizer is not None:
            tokenizer.save_pretrained(to)
    finally:
        model._modules["rankwise"] = registry
        if conversions is not None:
            model._weight_conversions = conversions


def _reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
