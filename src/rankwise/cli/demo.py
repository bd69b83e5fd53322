"""``rankwise demo``: six methods on real text, from nothing to a merged and exported adapter, in a few minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli import compare as comparison
from rankwise.cli.common import emit_json, out

#: name → (recipe, learning rate): one method for each way of going about it
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"form": "lora", "r": 8, "alpha": 16}, 3e-3),
    "dora": ({"form": "dora", "r": 8, "alpha": 16}, 3e-3),
    "pissa": ({"form": "lora", "r": 8, "init": "pissa"}, 1e-3),
    "eva": ({"form": "lora", "r": 8, "alpha": 16, "init": "eva"}, 3e-3),
    "adalora": ({"preset": "adalora", "r": 12, "alpha": 48, "budget": {"name": "adalora", "target_r": 8, "every": 5}}, 6e-3),
    "galore": ({"form": "full", "targets": "all-linear", "optimizer": {"name": "galore", "r": 32, "every": 20}}, 2e-3),
}


def add(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    to: Annotated[str, typer.Option("--out", "-o", help="Folder for everything the demo makes.")] = "demo-output",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps a method.")] = 60,
    data: Annotated[str, typer.Option(help="Shipped domain to adapt to.")] = "prose",
    json: Annotated[bool, typer.Option("--json", help="Print JSON at the end.")] = False,
) -> None:
    """Adapt the shipped base to unseen text with six methods, compare them, merge the best, export it.

    Example: rankwise demo --out demo-output
    """
    import rankwise as rw
    from rankwise import assets
    from rankwise.assets import tasks
    from rankwise.recipe import Recipe
    from rankwise.train.compare import best

    start = time.perf_counter()
    folder = Path(to)
    net, tokenizer = assets.load_base()
    train, test = tasks.domains()[data]
    out.print(
        f"A Llama of {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, pretrained on Python's standard library, meets text it has never read: [bold]{data}[/].\n",
        highlight=False,
    )
    recipes = {name: (Recipe(**fields), lr) for name, (fields, lr) in METHODS.items()}
    adapters = folder / "adapters"

    def samples(rows: list[Any]) -> list[tuple[str, str, str]]:
        winner = best(rows)
        prompts = prompts_of(test)
        before = [generate(net, tokenizer, p) for p in prompts]
        adapter = rw.load(net, adapters / winner.name)
        after = [generate(net, tokenizer, p) for p in prompts]
        adapter.detach()
        return list(zip(prompts, before, after, strict=True))

    what: dict[str, Any] = {"base": "the shipped base", "data": data, "steps": steps, "tokens": 128, "batch": 8}
    rows, refused, page = comparison.run(
        net, tokenizer, recipes, train, test, folder, with_peft=True, keep=adapters, samples=samples, **what
    )
    out.print()
    comparison.show(rows)
    for sentence in refused:
        out.print(f"refused — {sentence}", style="yellow", highlight=False)
    lines = finish(net, tokenizer, rows, folder)
    lines |= {"seconds": round(time.perf_counter() - start, 1), "report": str(page)}
    if json:
        emit_json(lines)
    else:
        _tell(lines, adapters)


def _tell(lines: dict[str, Any], adapters: Path) -> None:
    """What was made and where it is, and what to try next."""
    gap = f"logits moved by {lines['logit_gap']:.1e} of the largest"
    out.print(f"\nmerged the best low-rank adapter ({lines['best']}) into {lines['merged']}: {gap}", highlight=False)
    out.print(f"exported it for PEFT to {lines['peft']}", highlight=False)
    out.print(f"report: [bold]{lines['report']}[/]  ({lines['seconds']:.0f} s in all)\n", highlight=False)
    out.print("Next:", style="bold")
    for line in (
        f"rankwise inspect {adapters / lines['best']} --model base --picture spectra.png",
        "rankwise plan --model base --form dora --set form.r=16",
        "rankwise train --model base --data YOUR.txt --stage pt --out run",
        "rankwise methods",
    ):
        out.print(f"  {line}", highlight=False)


def finish(net: Any, tokenizer: Any, rows: list[Any], folder: Path) -> dict[str, Any]:
    """Merge the best adapter that can be merged, write the whole model, and export the adapter for PEFT.

    Args:
        net: the base.
        tokenizer: its tokenizer.
        rows: of the comparison.
        folder: the demo's, which holds the adapters.
    """
    import rankwise as rw
    from rankwise.cli.merge import write_merged
    from rankwise.train.compare import best

    winner = best(r for r in rows if r.name != "galore")
    adapter = rw.load(net, folder / "adapters" / winner.name)
    peft = adapter.export(folder / "peft")
    report = adapter.merge()
    write_merged(net, tokenizer, str(folder / "merged"))
    adapter.detach()
    return {"best": winner.name, "merged": str(folder / "merged"), "peft": str(peft), "logit_gap": report.logit_gap}


def prompts_of(texts: list[str], count: int = 2, length: int = 60) -> list[str]:
    """Openings of sentences from different documents, cut at a word: lines long enough to be prose or code, not rules or marks."""
    found = []
    for text in texts:
        lines = [line.strip() for line in text.splitlines()]
        line = next((x for x in lines if len(x) > length and sum(c.isalpha() for c in x) > 0.7 * len(x)), None)
        if line:
            found.append(line[:length].rsplit(" ", 1)[0])
        if len(found) == count:
            break
    return found


def generate(net: Any, tokenizer: Any, prompt: str, tokens: int = 60, seed: int = 0) -> str:
    """A sampled continuation (nucleus 0.9, temperature 0.7): greedy text of a model this small runs in circles.

    Args:
        net: the model, under the view in force.
        tokenizer: its tokenizer.
        prompt: to go on from.
        tokens: new ones, at most.
        seed: of the sampling.
    """
    import torch

    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = net.generate(
            ids, max_new_tokens=tokens, do_sample=True, top_p=0.9, temperature=0.7, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.decode(made[0][ids.shape[1] :], skip_special_tokens=True)
