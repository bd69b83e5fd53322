"""``rankwise train`` and ``eval``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.common import _value, emit_json, load_model, out, recipe_from, table
from rankwise.cli.data_options import Overlong, Truncating, truncating
from rankwise.cli.plan import MODEL, FormName, InitName, Model, RecipeFile, Settings
from rankwise.errors import OptionError


def add(app: typer.Typer) -> None:
    app.command("train")(train)
    app.command("eval")(evaluate)


def train(
    data: Annotated[
        str, typer.Option(help="File or folder: text, .jsonl, .json, .csv, .parquet, a saved dataset; class folders of images.")
    ],
    model: Annotated[str | None, MODEL] = None,
    to: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the adapter, metrics, log and checkpoints.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Train on a running server instead, beside what it serves; RANKWISE_API_KEY is its key.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --server: the name under which it serves the adapter.")] = None,
    stage: Annotated[str, typer.Option(help="pt (all of a text), sft (completions, chats) or dpo (preferences).")] = "sft",
    recipe: RecipeFile = None,
    form: FormName = None,
    init: InitName = None,
    set: Settings = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out data; default a tenth kept aside.")] = None,
    format: Annotated[str, typer.Option(help="auto, text, completion, alpaca, messages, sharegpt or preference.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of a saved dataset to train on.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split of it (or of --eval-data) that is held out.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 512,
    truncation: Truncating = "auto",
    overlong: Overlong = None,
    packing: Annotated[bool, typer.Option(help="Several documents a row, isolated from each other.")] = True,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of epochs.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows a step on each device.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew over an earlier run in --out, which is lost.")] = False,
    arg: Annotated[list[str] | None, typer.Option("--arg", help="Any TrainingArguments field as field=value; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train an adapter on your data.

    Example: rankwise train --model base --data notes.txt --stage pt --form dora --out run
    Example: rankwise train --server http://127.0.0.1:8000 --data notes.jsonl --name notes
    """
    chosen = recipe_from(recipe, form, init, set or ())
    cut = truncating(truncation, overlong)
    if server is not None:
        from rankwise.cli.train_server import refuse, train_on_server

        flags = {"--out": to, "--eval-data": eval_data, "--eval-split": eval_split, "--no-packing": not packing}
        refuse({**flags, "--resume": resume, "--overwrite": overwrite, "--arg": arg})
        if name is None:
            raise OptionError("--server needs --name, under which the adapter will be served.")
        fields: dict[str, Any] = {"lr": lr, "steps": steps, "max_length": max_length, "truncation": cut, "seed": chosen.seed}
        fields["hyperparameters"] = _given(n_epochs=epochs, batch_size=batch)
        source: dict[str, Any] = {"model": model, "stage": stage, "format": format, "split": split}
        train_on_server(server, data, name, chosen.to_json(), as_json=json, fields=fields, **source)
        return
    if model is None or to is None:
        raise OptionError(f"{'--model' if model is None else '--out'} is missing; only --server does without it.")
    if name is not None:
        raise OptionError("--name is what a server calls the adapter; without --server leave it out.")
    numbers = _given(learning_rate=lr, num_train_epochs=epochs, max_steps=steps, per_device_train_batch_size=batch)
    options = {"stage": stage, "eval_data": eval_data, "fmt": format, "split": split, "eval_split": eval_split, "packing": packing}
    more = {"max_length": max_length, "truncation": cut, "resume": resume, "overwrite": overwrite, "disable_tqdm": json}
    _train_here(model, data, chosen, to, {**options, **more, **numbers, **_arguments(arg or ())}, json)


def _train_here(model: str, data: str, recipe: Any, to: str, options: Mapping[str, Any], json: bool) -> None:
    """Train in this process, and show the figures before and after."""
    import rankwise as rw
    from rankwise.host import keep_freed_memory
    from rankwise.train import stages

    keep_freed_memory()
    net, reader = load_model(model)
    if not stages.sees(net) and reader is None:
        raise OptionError(f"{model} has no tokenizer, so text cannot be read for it.")
    metrics = rw.train(net, reader, data, recipe, output_dir=to, **options).metrics
    if json:
        emit_json(metrics)
        return
    if "before" in metrics:
        before, after = metrics["before"], metrics["after"]
        rows = [(k, before[k], after[k]) for k in ("loss", "perplexity", "accuracy") if k in before]
        out.print()
        table(f"scored on {metrics.get('scored_on', 'held-out data')}", ["", "before", "after"], rows, right=["before", "after"])
    if "first" in metrics:
        _preferences(metrics["first"], metrics["last"])
    out.print(f"\nadapter: {Path(to) / 'adapter'}", highlight=False)


def _given(**options: Any) -> dict[str, Any]:
    """Those that were given."""
    return {k: v for k, v in options.items() if v is not None}


def _arguments(settings: Sequence[str]) -> dict[str, Any]:
    """``--arg field=value`` as TrainingArguments."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, sep, raw = setting.partition("=")
        if not sep:
            raise OptionError(f"--arg takes field=value; it got {setting!r}.")
        found[key] = raw if key.endswith("_strategy") else _value(raw)  # YAML reads their 'no' as false
    return found


def _preferences(first: Mapping[str, Any], last: Mapping[str, Any]) -> None:
    """What preference training logged at its first and at its last logged step."""
    names = {"loss": "loss", "rewards/accuracies": "pairs right", "rewards/margins": "margin"}
    rows = [(shown, first[key], last[key]) for key, shown in names.items() if key in first and key in last]
    out.print()
    table(
        "preferences",
        ["", "first step", f"step {last.get('step', '?')}"],
        rows,
        right=["first step", f"step {last.get('step', '?')}"],
    )


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="File or folder of the same layouts as for train, or a shipped domain.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="Adapter folder; repeatable. The base is always shown.")
    ] = None,
    format: Annotated[str, typer.Option(help="auto, text, completion, alpaca, messages or sharegpt.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of a saved dataset.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, perplexity and bits a byte (of images: accuracy) on held-out data, of the base and of each adapter.

    Example: rankwise eval --model base --adapter run/adapter --data notes.txt
    """
    import rankwise as rw

    net, reader = load_model(model)
    score, size = _scorer(net, reader, model, data, format, split, max_length)
    rows: dict[str, dict[str, float]] = {"base": score()}
    for folder in adapter or ():
        loaded = rw.load(net, folder, name=folder.replace("/", " ").strip(". ") or "adapter")
        rows[folder] = score()
        loaded.detach()
    if json:
        emit_json(rows)
        return
    keys = list(rows["base"])
    table(f"{size} rows of {data}", ["model", *keys], [(n, *(r[k] for k in keys)) for n, r in rows.items()], right=keys)


def _scorer(
    net: Any, reader: Any, model: str, data: str, fmt: str, split: str | None, max_length: int
) -> tuple[Callable[[], dict[str, float]], int]:
    """(what scores the model under the view of the moment, number of rows)."""
    from rankwise.train import stages
    from rankwise.train.data.readers import read
    from rankwise.train.data.tokens import tokenize
    from rankwise.train.evaluate import classify, evaluate

    if stages.sees(net):
        stages.refuse_text_options(fmt, split)
        pixels, labels = stages.images(data, net, reader)
        return lambda: classify(net, pixels, labels), len(labels)
    if reader is None:
        raise OptionError(f"{model} has no tokenizer, so text cannot be read for it.")
    source: Any = data
    if not Path(data).exists():
        from rankwise.cli.compare import texts_of

        source = [{"text": t} for t in texts_of(data)[1]]
    records = read(source, fmt, split)
    examples = tokenize(records, reader, max_length)
    size = sum(len(r.fields["text"].encode()) for r in records) if records[0].kind == "text" else None
    return lambda: evaluate(net, examples, pad_id=reader.pad_token_id or 0, bytes_=size), len(examples)
