"""``rankwise sweep``: a grid over recipes, many jobs trained at once on one base."""

from __future__ import annotations

import dataclasses
import itertools
import json as _json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from rankwise.cli.common import _put, _value, count, emit_json, err, load_text_model, out, recipe_from, table
from rankwise.cli.data_options import Overlong, Truncating, truncating
from rankwise.cli.plan import Model, Settings
from rankwise.errors import OptionError

#: grid fields that are the job's, not the recipe's → what they must be
NUMBERS = {"lr": float, "steps": int, "batch": int, "seed": int, "warmup": float, "weight_decay": float, "max_grad_norm": float}
Choice = dict[str, Any]


def add(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    model: Model,
    data: Annotated[str, typer.Option(help="File or folder: text, .jsonl, .json, .csv, .parquet, a saved dataset.")],
    to: Annotated[str, typer.Option("--out", "-o", help="Folder for a folder a job, sweep.json and sweep.png.")],
    recipes: Annotated[
        list[str] | None, typer.Option("--recipes", "-r", help="Recipe files, or names of forms and presets; repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", "-g",
            help="field=value,value,…: lr, steps, batch, seed, warmup, weight_decay, or a recipe's field (form.r, alpha, init); repeatable. "
            "Values that hold commas are parted by semicolons.",
        ),
    ] = None,
    set: Settings = None,
    together: Annotated[int, typer.Option(min=1, help="Jobs in one batch.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate where the grid has none.")] = 2e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of epochs.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step of each job.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the adapters' draws and the order of the data.")] = 0,
    eval_data: Annotated[str | None, typer.Option(help="Held-out data; default a tenth kept aside.")] = None,
    format: Annotated[str, typer.Option(help="auto, text, completion, alpaca, messages or sharegpt.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of a saved dataset to train on.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split of it (or of --eval-data) that is held out.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 512,
    truncation: Truncating = "auto",
    overlong: Overlong = None,
    packing: Annotated[bool, typer.Option(help="Several documents a row, isolated from each other.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the jobs that are finished in --out, train the others.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew over finished jobs in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
    """Train a grid of recipes at once on one base and one data set, and say which is best.

    Example: rankwise sweep --model base --data notes.txt -r lora -r dora --grid form.r=4,8 --grid lr=1e-4,3e-4 --out sweep
    """
    if not (epochs > 0 and math.isfinite(epochs)):
        raise OptionError(f"With --epochs {epochs} nothing would be learnt; give a number above 0.")
    axes = dict(_axis(g) for g in grid or ())
    if len(axes) < len(grid or ()):
        raise OptionError("--grid names a field twice; give all its values at once.")
    points = choices(recipes or ["lora"], axes)
    source: dict[str, Any] = {"eval_data": eval_data, "fmt": format, "split": split, "eval_split": eval_split, "packing": packing}
    source |= {"max_length": max_length, "truncation": truncating(truncation, overlong)}
    numbers = {"lr": lr, "batch": batch, "seed": seed, "steps": steps, "epochs": epochs}
    keep = {"together": together, "resume": resume, "overwrite": overwrite}
    if not _run(model, data, points, axes, Path(to), source, numbers, set or (), keep, json):
        raise typer.Exit(1)


def _run(
    model: str, data: str, points: Mapping[str, Choice], axes: Mapping[str, Any], folder: Path, source: Mapping[str, Any],
    numbers: Mapping[str, Any], settings: Sequence[str], keep: Mapping[str, Any], json: bool,
) -> bool:  # fmt: skip
    """Train every point, write and show what came out; whether a job is best."""
    from rankwise.host import keep_freed_memory
    from rankwise.train.advice import advice
    from rankwise.train.job_result import best
    from rankwise.train.sweep import prepare, sweep

    keep_freed_memory()
    net, reader = load_text_model(model)
    shared = prepare(net, reader, data, **source)
    jobs = [_job(name, point, numbers, settings, shared.rows) for name, point in points.items()]
    with _bar(jobs) as progress:
        outcomes = sweep(net, jobs, shared, folder, progress=progress, tell=_tell, **keep)
    chosen = {name: {k: v for k, v in p.items() if k in axes} for name, p in points.items()}
    top = best(outcomes)
    report = {"base": model, "data": data, "scored_on": shared.scored, "together": keep["together"], "grid": axes}
    report |= {"best": top and top.name, "next": advice(outcomes, axes, chosen)}
    report["jobs"] = [{**dataclasses.asdict(o), "chosen": chosen[o.name]} for o in outcomes]
    picture = _write(folder, report, outcomes)
    if json:
        emit_json(report)
    else:
        _show(report, outcomes, chosen, folder, picture)
    return top is not None


# --- the grid -------------------------------------------------------------------------------------------------
def _axis(text: str) -> tuple[str, list[Any]]:
    """``form.r=4,8`` as (field, values)."""
    field, sep, raw = text.partition("=")
    parts = [p.strip() for p in raw.split(";" if ";" in raw else ",")]
    if not sep or not field.strip() or not all(parts):
        raise OptionError(f"--grid takes field=value,value,… (lr=1e-4,3e-4; form.r=4,8); it got {text!r}.")
    values = [_value(p) for p in parts]
    field = field.strip()
    if field in NUMBERS:
        values = [_number(field, v) for v in values]
    if len({str(v) for v in values}) < len(values):
        raise OptionError(f"--grid {text!r} has a value twice.")
    return field, values


def _number(field: str, value: Any) -> Any:
    kind = NUMBERS[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not isinstance(value, int)):
        raise OptionError(f"--grid {field} takes {'whole numbers' if kind is int else 'numbers'}; it got {value!r}.")
    return kind(value)


def choices(recipes: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> dict[str, Choice]:
    """Job name → {"recipe": …, field: value, …} of every point of the grid."""
    found: dict[str, Choice] = {}
    for recipe in recipes:
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            name = "-".join([_plain(Path(recipe).stem), *(f"{_short(k)}{_plain(v)}" for k, v in point.items())])
            if name in found:
                raise OptionError(f"Two jobs would be called {name!r}; give the recipe files different names.")
            found[name] = {"recipe": recipe, **point}
    return found


def _short(field: str) -> str:
    return field.rpartition(".")[2]


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else "_".join(value) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


def _job(name: str, point: Choice, base: Mapping[str, Any], settings: Sequence[str], rows: Sequence[Any]) -> Any:
    from rankwise.recipe import Recipe
    from rankwise.train.together import AdapterJob

    file = point["recipe"].endswith((".yaml", ".yml", ".json"))
    recipe = recipe_from(point["recipe"], None, None, settings) if file else recipe_from(None, point["recipe"], None, settings)
    numbers = {**base, **{k: v for k, v in point.items() if k in NUMBERS}}
    fields = recipe.to_json()
    for key, value in point.items():
        if key != "recipe" and key not in NUMBERS:
            _put(fields, key, value)
    if numbers["seed"] or "seed" in point:
        fields["seed"] = numbers["seed"]
    return AdapterJob(name=name, recipe=Recipe(**fields), rows=rows, **numbers)


# --- what is shown --------------------------------------------------------------------------------------------
class _Total:
    """One bar over the steps of all jobs, from the first on; called with a job's name and its steps so far."""

    def __init__(self, bars: Any, jobs: Sequence[Any]):
        self.bars, self.done = bars, dict.fromkeys([j.name for j in jobs], 0)
        self.task = bars.add_task(f"{len(jobs)} jobs", total=sum(j.total_steps for j in jobs))

    def __call__(self, name: str, step: int) -> None:
        self.bars.start()
        self.done[name] = step
        self.bars.update(self.task, completed=sum(self.done.values()))

    def __enter__(self) -> _Total:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()


def _bar(jobs: Sequence[Any]) -> _Total:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    return _Total(Progress(*columns, console=err), jobs)


def _tell(sentence: str) -> None:
    err.print(escape(sentence), style="yellow", highlight=False, soft_wrap=True)


def _write(folder: Path, report: Mapping[str, Any], outcomes: Sequence[Any]) -> Path | None:
    """sweep.json, and the picture where matplotlib is there and something finished."""
    from rankwise.cli.sweep_picture import draw
    from rankwise.store.atomic import replace_file

    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "sweep.json", _json.dumps(report, indent=2, default=str).encode())
    return draw(outcomes, folder / "sweep.png")


def _show(
    report: Mapping[str, Any], outcomes: Sequence[Any], chosen: Mapping[str, Choice], folder: Path, picture: Path | None
) -> None:
    fields = list(report["grid"])
    measures = ["loss"] + (["bits_per_byte"] if any("bits_per_byte" in o.after for o in outcomes) else [])
    heads = ["recipe", *fields, *(m.replace("_", " ") for m in measures), "against base", "trained", "seconds", ""]
    order = sorted(outcomes, key=lambda o: o.score())
    rows = [
        (_stem(o.name, chosen[o.name]), *(_plain(chosen[o.name][f]) for f in fields), *(o.after.get(m) for m in measures), _against(o), count(o.trainable), f"{o.seconds:.1f}", _remark(o, report))
        for o in order
    ]  # fmt: skip
    base = outcomes[0].before
    rows.append(("base", *("" for _ in fields), *(base.get(m) for m in measures), "", "", "", ""))
    out.print()
    table(f"scored on {report['scored_on']}", heads, rows, right=heads[1:-1])
    if report["best"]:
        out.print(f"\nbest: {report['best']}, {folder / report['best'] / 'adapter'}", highlight=False, soft_wrap=True)
    for sentence in report["next"]:
        out.print(f"next: {escape(sentence)}", highlight=False, soft_wrap=True)
    wrote = " and ".join(str(p) for p in (folder / "sweep.json", picture) if p is not None)
    out.print(f"wrote {wrote}", highlight=False, soft_wrap=True)


def _stem(name: str, chosen: Choice) -> str:
    """The recipe's part of a job's name; its settings have columns of their own."""
    return name.removesuffix("".join(f"-{_short(k)}{_plain(v)}" for k, v in chosen.items()))


def _against(o: Any) -> str:
    return f"{o.score() / o.before['loss'] - 1:+.1%}" if o.after else ""


def _remark(o: Any, report: Mapping[str, Any]) -> str:
    words = ["best"] if o.name == report["best"] else []
    words += ["kept"] if o.kept else []
    words += ["not finished"] if o.error else []
    return ", ".join([*words, *(["trained apart"] if o.note else [])])
