"""``rankwise methods`` and ``rankwise doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Annotated, Any

import typer

from rankwise.cli.common import emit_json, out, table


def add(app: typer.Typer) -> None:
    app.command("methods")(methods)
    app.command("doctor")(doctor)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its page.")] = None,
    kind: Annotated[str | None, typer.Option(help="form, init, router, budget, optimizer, loss, merge, codec or policy.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/methods/README.md.")] = False,
) -> None:
    """List every method, or show one's page.

    Example: rankwise methods dora
    """
    from rankwise import catalogue
    from rankwise.errors import unknown

    found = catalogue.methods(kind)
    if name is not None:
        chosen = [m for m in found if m.name == name]
        if not chosen:
            raise unknown("method", name, [m.name for m in found])
        for m in chosen:
            emit_json(_row(m) | {"doc": m.doc}) if json else _page(m)
        return
    if json:
        emit_json([_row(m) for m in found])
        return
    if markdown:
        typer.echo(_markdown(found))
        return
    rows = [(m.kind, m.name, m.reference or "", m.title, m.mergeable, m.exports_to_peft) for m in found]
    table(f"{len(found)} methods", ["kind", "name", "reference", "title", "merges", "to PEFT"], rows)
    out.print("\nrankwise methods NAME shows one with its formula and options.", style="dim")


def _row(m: Any) -> dict[str, Any]:
    names = ["name", "kind", "title", "paper", "reference", "requires", "mergeable", "exports_to_peft", "options"]
    row = {n: getattr(m, n) for n in names}
    return row | {"requires": list(m.requires), "options": {k: str(v) for k, v in m.options.items()}}


def _page(m: Any) -> None:
    out.rule(f"[bold]{m.name}[/] · {m.kind}", align="left")
    out.print(
        f"{m.title}" + (f"  ({m.paper})" if m.paper else "") + (f"  reference {m.reference}" if m.reference else ""),
        highlight=False,
    )
    out.print("\n" + "\n".join(line.removeprefix("    ") for line in m.doc.splitlines()) + "\n", highlight=False, markup=False)
    if m.requires:
        out.print(f"needs a form that gives: {', '.join(m.requires)}", highlight=False)
    if m.options:
        table("options", ["name", "default"], [(k, repr(v)) for k, v in m.options.items()])
    out.print()


#: kind → the page of docs/methods that has a section on each of its methods
PAGES = {
    "form": "forms.md", "init": "inits.md", "router": "routers.md", "budget": "budgets.md", "optimizer": "optimizers.md", "loss": "losses.md",
    "merge": "merging.md", "logits": "merging.md", "codec": "codecs.md", "policy": "serving.md",
}  # fmt: skip
_HEAD = """# Methods

Every method that is built, as `rankwise methods` lists it, and what it was built from: the idea, the formula with shapes, initial values and
defaults, what tests check, the source, and where the code departs from the paper or from its authors' program, with the reason. The number is
the method's `reference`; methods with one number were built from one reference. What the serving engine is built from, beside its policies, heads
[serving.md](serving.md).

Made by `make docs` from the catalogue; a test holds it against that. The pages behind the links are written by hand."""


def _markdown(found: list[Any]) -> str:
    """The catalogue as one table: a row a method, linked to its section of docs/methods where the method is this package's own."""
    lines = [_HEAD, "", "| method | kind | title | paper | number |", "|---|---|---|---|---|"]
    for m in found:
        own = m.cls.__module__.partition(".")[0] == "rankwise"  # an entry point's method has its page elsewhere
        name = f"[{m.name}]({PAGES[m.kind]}#{m.name})" if own else m.name
        cells = (name, m.kind, m.title, m.paper or "", m.reference or "")
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


#: module, what it is for, how to get it
_LIBRARIES = [
    ("torch", "everything", "core"), ("safetensors", "files", "core"), ("numpy", "data", "core"), ("pydantic", "recipes", "core"),
    ("transformers", "models, Trainer", "hf"), ("tokenizers", "tokenizers", "hf"), ("accelerate", "many devices", "hf"), ("typer", "command line", "cli"),
    ("rich", "command line", "cli"), ("yaml", "recipes in YAML", "cli"), ("matplotlib", "plots", "plots"), ("datasets", "data folders", "data"),
    ("bitsandbytes", "4- and 8-bit bases", "quant"), ("torchao", "int8 bases", "quant"), ("scipy", "solvers", "solve"), ("trl", "preference training", "rl"),
    ("sklearn", "the digits", "vision"), ("peft", "outside judge in tests", "dev"),
]  # fmt: skip


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this machine: versions, devices, threads, and a small adapter trained, saved, loaded and merged.

    Example: rankwise doctor
    """
    import torch

    from rankwise.forms.packed import probe

    rows = []
    for module, use, extra in _LIBRARIES:
        dist = {"sklearn": "scikit-learn", "yaml": "PyYAML"}.get(module, module)
        try:
            version: str | None = importlib.metadata.version(dist)
        except importlib.metadata.PackageNotFoundError:
            version = None
        rows.append({"library": module, "version": version, "for": use, "extra": extra})
    machine = {
        "python": platform.python_version(), "platform": platform.platform(), "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "bf16": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }  # fmt: skip
    check = _self_check()
    for dtype in (torch.float32, torch.bfloat16):
        choice = probe(1024, 1024, dtype)
        machine[f"frozen products in {str(dtype).removeprefix('torch.')}"] = f"{choice.kind} ({choice.why})"
    if json:
        emit_json({"machine": machine, "libraries": rows, "self_check": check})
        return
    table("machine", ["what", "value"], machine.items())
    out.print()
    table(
        "libraries",
        ["library", "version", "for", "install"],
        [
            (r["library"], r["version"] or "—", r["for"], "" if r["version"] else f"pip install 'rankwise[{r['extra']}]'")
            for r in rows
        ],
    )
    out.print()
    table("self-check", ["step", "result"], check.items())


def _self_check() -> dict[str, str]:
    """Attach, train, save, load, merge and detach on a toy, and say what came out."""
    import tempfile

    import torch
    from torch import nn

    import rankwise as rw

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    before = [p.clone() for p in model.parameters()]
    x, y = torch.randn(32, 16), torch.randn(32, 4)
    adapter = rw.attach(model, rw.Recipe(form="lora", r=2))
    session = rw.Session(model, adapter, lr=1e-2, total_steps=20)
    losses = []
    for _ in range(20):
        session.step_begin()
        out_ = model(x)
        loss = (out_ - y).square().mean()
        losses.append(loss.item())
        (loss + session.penalty(out_, {"x": x})).backward()
        session.step()
    trained = model(x).detach()
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        adapter.detach()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        again = rw.load(model, folder)
        loaded = torch.equal(model(x), trained)
    again.merge()
    gap = (model(x) - trained).abs().max().item()
    return {
        "train": f"loss {losses[0]:.3f} → {losses[-1]:.3f}",
        "detach": "bit-exact" if same else "FAILED",
        "save and load": "bit-exact" if loaded else "FAILED",
        "merge": f"output moved by {gap:.1e}",
    }
