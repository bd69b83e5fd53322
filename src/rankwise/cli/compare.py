"""``rankwise compare``: several recipes on the same data, with a report."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.common import count, emit_json, load_text_model, out, recipe_from, size, table
from rankwise.cli.plan import Model
from rankwise.errors import DataError, OptionError


def add(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Recipe files, or names of forms and presets.", show_default=False),
    ] = None,
    model: Model = "base",
    recipes: Annotated[list[str] | None, typer.Option("--recipes", "-r", help="The same; several may follow.")] = None,
    data: Annotated[str, typer.Option(help="A text file or folder, or the name of a shipped domain.")] = "email",
    to: Annotated[str, typer.Option("--out", "-o", help="Folder for report.html and report.json.")] = "comparison",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps a recipe.")] = 60,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate of all.")] = 2e-3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    peft: Annotated[bool, typer.Option(help="Run PEFT's implementation beside ours where it has one.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train several recipes on the same text in the same order, and compare quality, size, memory and time.

    Example: rankwise compare --recipes lora dora run.yaml --data email --out comparison
    """
    recipes = [*(recipes or ()), *(more or ())]
    if not recipes:
        raise OptionError("compare needs recipes: give --recipes lora dora, or files.")
    net, tokenizer = load_text_model(model)
    chosen = {
        Path(r).stem: (recipe_from(r) if r.endswith((".yaml", ".yml", ".json")) else recipe_from(None, r), lr) for r in recipes
    }
    train, test = texts_of(data)
    rows, refused, page = run(
        net,
        tokenizer,
        chosen,
        train,
        test,
        Path(to),
        steps=steps,
        tokens=tokens,
        batch=batch,
        with_peft=peft,
        base=model,
        data=data,
    )
    if json:
        emit_json({"rows": [dataclasses.asdict(r) for r in rows], "refused": refused, "report": str(page)})
        return
    show(rows)
    for sentence in refused:
        out.print(f"refused — {sentence}", style="yellow", highlight=False)
    out.print(f"\nreport: {page}", highlight=False)


def texts_of(name: str) -> tuple[list[str], list[str]]:
    """(train, test) texts of a shipped domain, or of a file or folder: the last tenth of it is for the test."""
    from rankwise.assets import tasks

    shipped = tasks.domains() if not Path(name).exists() else {}
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if not path.exists():
        raise DataError(f"{name!r} is neither a file, a folder, nor a shipped domain ({', '.join(shipped)}).")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py", ".rst"))
    try:
        texts = [p.read_text(encoding="utf-8") for p in files]
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}.") from error
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise DataError(f"{name} holds no text (.txt, .md, .py, .rst).")
    if len(texts) == 1:
        cut = int(len(texts[0]) * 0.9)
        return [texts[0][:cut]], [texts[0][cut:]]
    cut = max(1, len(texts) // 10)
    return texts[:-cut], texts[-cut:]


def run(
    net: Any,
    tokenizer: Any,
    recipes: Mapping[str, tuple[Any, float]],
    train: list[str],
    test: list[str],
    folder: Path,
    *,
    steps: int,
    tokens: int,
    batch: int,
    with_peft: bool,
    base: str,
    data: str,
    keep: Path | None = None,
    samples: Callable[[list[Any]], list[tuple[str, str, str]]] | None = None,
    test_chars: int = 24_000,
) -> tuple[list[Any], list[str], Path]:
    """Compare, with a progress bar, and write the report.

    Args:
        net: the base.
        tokenizer: its tokenizer.
        recipes: name → (recipe, peak learning rate).
        train, test: texts to learn, and held out.
        folder: for the report.
        steps: optimiser steps of each.
        tokens, batch: tokens a row, rows a step.
        with_peft: run PEFT's twins too.
        base, data: what they are, in words.
        keep: folder for the adapters; None: they are not kept.
        samples: rows → (prompt, before, after) texts for the report.
        test_chars: characters of the held-out texts that are scored.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rankwise.assets.tasks import bits_per_byte
    from rankwise.cli import report
    from rankwise.train.compare import compare as compare_recipes
    from rankwise.train.compare import windows

    batches = windows(tokenizer, train, tokens, batch)
    held = _head(test, test_chars)
    score = lambda m: bits_per_byte(m, tokenizer, held)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=False) as bars:
        tasks = {name: bars.add_task(name, total=steps, start=False) for name in recipes}

        def progress(name: str, n: int) -> None:
            if n == 1:
                bars.start_task(tasks[name])
            bars.update(tasks[name], completed=n)

        rows, refused = compare_recipes(
            net, recipes, batches, score, steps=steps, with_peft=with_peft, keep=keep, progress=progress
        )
    info = _info(base, data, steps, (batch, tokens), sum(map(len, held)))
    shown = samples(rows) if samples and rows else []
    return rows, refused, report.write(folder, rows, info, shown, refused)


def _info(base: str, data: str, steps: int, shape: tuple[int, int], characters: int) -> dict[str, Any]:
    """What was run, for the report."""
    import torch

    batch, tokens = shape
    scored = f"score on {characters:,} held-out characters."
    info: dict[str, Any] = {
        "what": f"{base} on {data}: {steps} steps of {batch} × {tokens} tokens; {scored}",
        "score": "bits per byte",
    }
    info |= {"base": base, "data": data, "steps": steps, "tokens a step": batch * tokens}
    info |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return info


def _head(texts: list[str], limit: int) -> list[str]:
    """Leading texts up to ``limit`` characters in all."""
    out_: list[str] = []
    left = limit
    for t in texts:
        if left <= 0:
            break
        out_.append(t[:left])
        left -= len(t)
    return out_


def show(rows: list[Any]) -> None:
    columns = ["method", "by", "before", "after", "change", "trained", "stored", "memory", "ms/step"]
    body = [
        (
            r.name,
            r.by,
            f"{r.before:.4f}",
            f"{r.after:.4f}",
            f"{(r.after - r.before) / r.before:+.1%}",
            count(r.trainable),
            size(r.stored_bytes),
            size(r.peak_bytes),
            f"{r.seconds * 1000:.0f}",
        )
        for r in rows
    ]
    table("held-out bits per byte", columns, body, right=columns[2:])
