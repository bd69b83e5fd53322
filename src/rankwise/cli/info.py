"""``rankwise methods`` and ``rankwise doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
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
    markdown: Annotated[bool, typer.Option("--markdown", help="Print every page as one Markdown document.")] = False,
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
    table(f"{len(found)} methods", ["kind", "name", "card", "title", "merges", "to PEFT"], rows)
    out.print("\nrankwise methods NAME shows one with its formula and options.", style="dim")


def _row(m: Any) -> dict[str, Any]:
    return {
        "name": m.name, "kind": m.kind, "title": m.title, "paper": m.paper, "reference": m.reference, "requires": list(m.requires),
        "mergeable": m.mergeable, "exports_to_peft": m.exports_to_peft, "options": {k: str(v) for k, v in m.options.items()},
    }  # fmt: skip


def _page(m: Any) -> None:
    out.rule(f"[bold]{m.name}[/] · {m.kind}", align="left")
    out.print(
        f"{m.title}" + (f"  ({m.paper})" if m.paper else "") + (f"  card {m.reference}" if m.reference else ""), highlight=False
    )
    out.print("\n" + "\n".join(line.removeprefix("    ") for line in m.doc.splitlines()) + "\n", highlight=False, markup=False)
    if m.requires:
        out.print(f"needs a form that gives: {', '.join(m.requires)}", highlight=False)
    if m.options:
        table("options", ["name", "default"], [(k, repr(v)) for k, v in m.options.items()])
    out.print()


def _markdown(found: list[Any]) -> str:
    """The catalogue as one page: a table of contents by kind, then each method with formula and options."""
    kinds: dict[str, list[Any]] = {}
    for m in found:
        kinds.setdefault(m.kind, []).append(m)
    lines = ["# Methods", "", "Made by `make docs` from the catalogue.", ""]
    lines += [f"- **{kind}**: {', '.join(f'[{m.name}](#{kind}-{m.name})' for m in ms)}" for kind, ms in kinds.items()]
    for kind, ms in kinds.items():
        lines += ["", f"## {kind}"]
        for m in ms:
            lines += ["", f'<a id="{kind}-{m.name}"></a>', f"### {m.name}", ""]
            lines += [" · ".join(x for x in (m.title, m.paper, f"card {m.reference}" if m.reference else None) if x), ""]
            lines += ["```text", inspect.cleandoc(m.doc), "```"]
            if m.requires:
                lines += ["", f"Needs a form that gives: {', '.join(m.requires)}."]
            if m.options:
                lines += ["", "| option | default |", "|---|---|", *(f"| `{k}` | `{v!r}` |" for k, v in m.options.items())]
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
