"""``rankwise merge``: adapters into one, an adapter into its base, whole models into one, or a mergekit file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.common import _value, emit_json, err, load_model, out, table
from rankwise.errors import OptionError

#: what --set may not reach: it has a flag of its own, or is the verb's affair
_TAKEN = {"seed", "force", "progress", "dtype", "base", "weights", "out", "method", "folders", "states", "shard_bytes"}


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
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
    """Merge adapters into one, fold them into their base, merge whole models, or run a mergekit file.

    The result is checked against its parts: how far it is from the plain weighted sum, what cutting to a rank lost, and what
    storing rounded away.

    Example: rankwise merge run/a run/b --method ties --set density=0.3 --weights 0.6,0.4 --out both
    """
    kind = _kind(sources, model)
    given = {"--model": model, "--method": method, "--weights": weights, "--base": base, "--into-base": into_base or None, "--set": set or None,
             "--dtype": dtype, "--source-rank": source_rank}  # fmt: skip
    idle = {"yaml": {*given}, "models": {"--model", "--into-base", "--source-rank"}, "adapters": {"--base", "--dtype"}}[kind]
    if wrong := [f for f in given if f in idle and given[f] is not None]:
        raise OptionError(f"{wrong[0]} says nothing to a merge of {_NAMES[kind]}; leave it out.")
    options = _options(set or [])
    numbers = _numbers(weights, len(sources))
    if kind == "yaml":
        from rankwise.merge.mergekit import merge_yaml

        with _bar("tensors") as tick:
            _told(merge_yaml(sources[0], to, seed=seed, force=force, progress=tick), json)
    elif kind == "models":
        from rankwise.merge.checkpoints import merge_checkpoints
        from rankwise.merge.mergekit import _dtype

        with _bar("tensors") as tick:
            report = merge_checkpoints(
                sources, to, method or "average", numbers, base, seed=seed, force=force, progress=tick, dtype=_dtype(dtype), **options
            )  # fmt: skip
        _told(report, json)
    elif model is None:
        if into_base:
            raise OptionError("--into-base folds into a model; give it with --model.")
        _without_model(sources, to, method or "cat", numbers, options, seed, force, source_rank, json)
    else:
        _with_model(sources, model, to, method or "cat", numbers, options, seed, force, source_rank, into_base, json)


_NAMES = {"yaml": "a mergekit file", "models": "whole models", "adapters": "adapters"}


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
    if len(given) != sources:
        raise OptionError(f"--weights has {len(given)} numbers for {sources} sources; give one each.")
    return given


@contextlib.contextmanager
def _bar(what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that is gone afterwards; called with the name of what is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task("merging", total=total)
        yield lambda name: bars.advance(task)


# --- adapters --------------------------------------------------------------------------------------------------
def _without_model(
    folders: Sequence[str], to: str, method: str, weights: Any, options: Any, seed: int, force: bool, source_rank: int | None, json: bool
) -> None:  # fmt: skip
    """Folders of plain LoRA, one site at a time; the result in PEFT's format."""
    from rankwise.merge import merge_states
    from rankwise.merge.folders import export_merged, open_folders

    if source_rank is not None:
        raise OptionError("--source-rank cuts what is read with its model; give --model.")
    found = open_folders(folders, check_base=not force)
    with _bar("places", len({n for f in found for n in f.sites})) as tick:
        state = merge_states(found, weights, method, seed=seed, progress=tick, **options)
    export_merged(to, state, found)
    _state_told(state, method, to, json)


def _with_model(
    folders: Sequence[str], model: str, to: str, method: str, weights: Any, options: Any, seed: int, force: bool, source_rank: int | None,
    into_base: bool, json: bool,
) -> None:  # fmt: skip
    """Read with the base at hand, so that any form may come; saved natively, or folded in."""
    import rankwise as rw
    from rankwise.merge import attach_state, merge_states, read_state

    net, tokenizer = load_model(model)
    state = None
    if len(folders) == 1 and source_rank is None and weights is None and not options and method == "cat":
        adapter = rw.load(net, folders[0], name="merged")
    else:
        with _bar("adapters read", len(folders)) as tick:
            states = []
            for f in folders:
                states.append(read_state(net, f, rank=source_rank))
                tick(f)
        with _bar("places", len({n for s in states for n in s.sites})) as tick:
            state = merge_states(states, weights, method, seed=seed, progress=tick, **options)
        adapter = attach_state(net, state)
    if not into_base:
        adapter.save(to)
        if state is None:
            out.print(f"wrote {to}: {adapter}", highlight=False)
        else:
            _state_told(state, method, to, json)
        return
    report = adapter.merge(force=force)
    write_merged(net, tokenizer, to)
    _folded(report, state, method, to, json)


def _state_told(state: Any, method: str, to: str, json: bool) -> None:
    ranks = {n: int(d.exact_rank or 0) for n, d in state.sites.items()}
    if json:
        emit_json({"out": to, **state.meta, "ranks": ranks})
        return
    out.print(f"wrote {to}: {len(ranks)} places, rank {_span(ranks.values())}", highlight=False)
    _losses(state.meta, method)


def _losses(meta: Mapping[str, Any], method: str) -> None:
    for key, what in (("errors", "from the weighted sum"), ("truncation", "lost by cutting to a rank")):
        if meta[key]:
            worst = max(meta[key], key=meta[key].__getitem__)
            mean = sum(meta[key].values()) / len(meta[key])
            out.print(f"{method}: {meta[key][worst]:.3g} {what} at most ({worst}), {mean:.3g} in the mean", highlight=False)


def _span(values: Any) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _folded(report: Any, state: Any, method: str, to: str, json: bool) -> None:
    worst = report.worst
    rows = sorted(report.sites, key=lambda s: -s.error)
    if json:
        emit_json(
            {
                "out": to, "logit_gap": report.logit_gap, "forced": report.forced,
                "sites": [{"site": s.site, "change": s.change, "rounded_away": s.error} for s in rows],
                **({} if state is None else state.meta),
            }
        )  # fmt: skip
        return
    if state is not None:
        _losses(state.meta, method)
    if worst.error > 1e-3:  # a base of few bits: what each place lost
        shown = [(s.site, s.change, f"{s.error:.1%}") for s in rows[:10]]
        table("Storing rounded away", ["place", "‖ΔW‖/‖W‖", "of the change"], shown, right=["‖ΔW‖/‖W‖", "of the change"])
    if report.forced:
        out.print("a check failed; kept all the same, as --force says", highlight=False)
    gap = "not probed" if report.logit_gap is None else f"{report.logit_gap:.1e} of the largest"
    out.print(
        f"wrote {to}; logits before and after differ by {gap}; largest rounding {worst.error:.1e} of the change at {worst.site}",
        highlight=False,
    )


def write_merged(model: Any, tokenizer: Any, to: str) -> None:
    """Save a model with its merged adapters as an ordinary model folder: the roster taken off, the bits kept."""
    roster = model._modules.pop("rankwise")
    conversions = getattr(model, "_weight_conversions", None)
    try:
        if conversions is not None:  # transformers undoes how it read the weights, but cannot for codes, which need no undoing
            model._weight_conversions = [c for c in conversions if _reversible(c)] or None
        model.save_pretrained(to)
        if tokenizer is not None:
            tokenizer.save_pretrained(to)
    finally:
        model._modules["rankwise"] = roster
        if conversions is not None:
            model._weight_conversions = conversions


def _reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


# --- whole models ----------------------------------------------------------------------------------------------
def _told(report: Any, json: bool) -> None:
    if json:
        emit_json(
            {
                "out": str(report.path),
                "method": report.method,
                "errors": report.errors,
                "moved": report.moved,
                "copied": report.copied,
            }
        )
        return
    copied = f", {len(report.copied)} copied" if report.copied else ""
    out.print(f"wrote {report.path}: {len(report.errors)} tensors merged{copied}", highlight=False)
    for found, what in ((report.errors, "from the weighted sum"), (report.moved, "from the base")):
        if found:
            worst = max(found, key=found.__getitem__)
            out.print(f"{report.method}: {found[worst]:.3g} {what} at most ({worst})", highlight=False)
