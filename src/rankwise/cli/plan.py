"""``rankwise plan``: what a recipe would do to a model, before anything is trained."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from rankwise.cli.common import emit_json, load_model, out, recipe_from, size, table

MODEL = typer.Option("--model", "-m", help="Folder, hub id, or 'base' / 'digits' for the shipped ones.")
Model = Annotated[str, MODEL]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="A recipe in YAML or JSON.")]
FormName = Annotated[str | None, typer.Option("--form", help="Form or preset: lora, dora, mos, adalora …")]
InitName = Annotated[str | None, typer.Option("--init", help="Init: pissa, eva, lora_ga …")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="field=value, e.g. form.r=16 or targets=q_proj,v_proj; repeatable.")
]


def add(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    model: Model,
    recipe: RecipeFile = None,
    form: FormName = None,
    init: InitName = None,
    set: Settings = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step, for the memory foreseen.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Resolve targets to tensors, count by role, and foresee memory and time; nothing is trained.

    Example: rankwise plan --model base --form dora --set form.r=16
    """
    chosen = recipe_from(recipe, form, init, set or ())
    net, _ = load_model(model)
    report = foresee(net, chosen, batch, tokens)
    if json:
        emit_json(report)
        return
    rows = [(r["role"], r["sites"], r["where"], r["shape"], r["rank"], r["trainable"]) for r in report["roles"]]
    columns = ["role", "layers", "where", "shape", "rank", "trainable"]
    table(f"{model}: {report['form']}", columns, rows, right=["layers", "rank", "trainable"])
    out.print(
        f"\n{report['trainable']:,} trainable of {report['base']:,} parameters ({report['trainable'] / report['base']:.2%})",
        highlight=False,
    )
    out.print()
    table(
        f"memory foreseen, {batch} × {tokens} tokens",
        ["what", "bytes"],
        [(k, size(v)) for k, v in report["memory"].items()],
        right=["bytes"],
    )
    if report["product"]:
        out.print(f"\nfrozen products: {report['product']}", highlight=False)
    out.print(f"\nabout {report['seconds_per_step']:.2g} s a step at {report['gflops']:.0f} GFLOP/s measured here", highlight=False)


def foresee(model: Any, recipe: Any, batch: int, tokens: int) -> dict[str, Any]:
    """Counts by role; bytes by category; seconds a step from a measured product (data-driven inits are left out).

    Args:
        model: the base; left as it was.
        recipe: of the adapter.
        batch: rows of a step.
        tokens: of a row.
    """
    import rankwise as rw

    light = recipe.model_copy(update={"init": None})
    base = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    adapter = rw.attach(model, light, name="plan")
    try:
        groups: dict[tuple[str, str, int | None], list[str]] = defaultdict(list)
        per_site: dict[str, int] = defaultdict(int)
        tensors: dict[str, dict[str, list[int]]] = defaultdict(dict)
        for key, p in adapter.named_parameters().items():
            owner, _, tensor = key.partition("::")
            per_site[owner] += p.numel()
            tensors[owner][tensor] = list(p.shape)
        for name, delta in adapter.sites.items():
            spec = delta.site.spec
            groups[spec.role, "×".join(map(str, spec.shape)), _rank(delta)].append(name)
        copies, product = _products(adapter, batch * tokens)
        shared = sum(n for owner, n in per_site.items() if owner.startswith("bank:"))
        trainable = adapter.numel()
        saved = _saved(adapter, batch * tokens)
    finally:
        adapter.detach()
    rows = [
        {"role": r, "shape": s, "rank": k, "sites": len(v), "where": ", ".join(folded(v)), "trainable": sum(per_site[n] for n in v)}
        for (r, s, k), v in groups.items()
    ]
    if shared:
        rows.append({"role": "shared", "shape": "banks", "rank": None, "sites": 1, "where": "rankwise", "trainable": shared})
    layers = max((d for d in [getattr(getattr(model, "config", None), "num_hidden_layers", 0)] if d), default=1)
    hidden = getattr(getattr(model, "config", None), "hidden_size", 0)
    memory = {
        "base weights": weights,
        "adapter": 4 * trainable,
        "gradients": 4 * trainable,
        "optimiser state": 8 * trainable,
        **({"packed copies of frozen weights": copies} if copies else {}),
        "adapter's saved activations": saved,
        "model's saved activations (about)": 16 * layers * hidden * batch * tokens * 4,
    }
    gflops = _measured_gflops()
    flops = 4 * base * batch * tokens  # forward and the gradient of the input: no gradient of frozen weights
    form = " + ".join(str(p.form if isinstance(p.form, str) else (p.form or {}).get("name")) for p in recipe.all_parts())
    counts = {"form": form, "roles": rows, "tensors": tensors, "product": product, "trainable": trainable, "base": base}
    return {**counts, "memory": memory, "gflops": gflops, "seconds_per_step": flops / gflops / 1e9}


def _rank(delta: Any) -> int | None:
    """Rank-one components of a layer; of a form whose tensors stand elsewhere (banks), the rank of its change."""
    return delta.component_count() or (None if delta.site.spec.mode == "block" else delta.delta().exact_rank)


def folded(names: Sequence[str]) -> list[str]:
    """Names that differ in one number as one: ``layers.0.q``, ``layers.1.q`` → ``layers.{0…1}.q``."""
    runs: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        key, i = (name, -1) if number is None else (f"{name[: number.start()]}{{}}{name[number.end() :]}", int(number[0]))
        runs.setdefault(key, []).append(i)
    out = []
    for key, found in runs.items():
        whole = found == list(range(found[0], found[-1] + 1)) and len(found) > 1
        shown = (
            f"{{{found[0]}…{found[-1]}}}" if whole else str(found[0]) if len(found) == 1 else "{" + ",".join(map(str, found)) + "}"
        )
        out.append(key.replace("{}", shown, 1))
    return out


def _products(adapter: Any, rows: int) -> tuple[int, str | None]:
    """(bytes of packed copies, how most frozen products run here and why), timed by the probe that a run decides by."""
    from rankwise.forms.packed import PACKED
    from rankwise.runtime.fast import foreseen

    found = [(c, d.site.spec.out * d.site.spec.inp) for d in adapter.sites.values() if (c := foreseen(d, rows)) is not None]
    if not found:
        return 0, None
    copies = sum(8 * n for c, n in found if c.kind == PACKED)  # W and Wᵀ in fp32
    choice = max(found, key=lambda f: f[1])[0]
    return copies, f"{choice.kind} ({choice.why})"


def _saved(adapter: Any, rows: int) -> int:
    """Bytes of x and of r-wide products that the adapter keeps for backward, one x for each input group."""
    seen: dict[str, int] = {}
    total = 0
    for name, delta in adapter.sites.items():
        spec = delta.site.spec
        total += 4 * rows * delta.component_count()
        seen[spec.input_group or name] = 4 * rows * spec.inp
    return total + sum(seen.values())


def _measured_gflops() -> float:
    import time

    import torch

    a, b = torch.randn(512, 512), torch.randn(512, 512)
    a @ b
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 512**3 / sorted(times)[2] / 1e9
