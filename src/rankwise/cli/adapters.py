"""``rankwise inspect``: what an adapter holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankwise.cli.common import emit_json, load_model, out, picture_path, table
from rankwise.errors import OptionError


def add(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    adapter: Annotated[list[str], typer.Argument(help="Adapter folder; several are compared with each other.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base of the adapter; several plain LoRAs of one base do without.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(help="Write the spectra and norms (of several: what they share) as a PNG or SVG.")
    ] = None,
    source_rank: Annotated[
        int | None, typer.Option(help="Several: cut them to this rank first (needed for DoRA and the like).")
    ] = None,
    match: Annotated[float, typer.Option(help="Several: how alike two components are that count as one.")] = 0.5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an adapter: layers, ranks, spectra, norms. Of several: what they share, and where they pull apart.

    Example: rankwise inspect run/a run/b --picture overlap.png
    """
    picture_path(picture)
    if len(adapter) > 1:
        from rankwise.cli.overlap import compare

        compare(adapter, model, picture, source_rank, match, json)
        return
    if source_rank is not None or match != 0.5:
        raise OptionError("--source-rank and --match compare several adapters; give two or more, or leave them out.")
    _one(adapter[0], model, picture, json)


def _one(adapter: str, model: str | None, picture: str | None, json: bool) -> None:
    import torch

    import rankwise as rw

    if model is None:
        raise OptionError("inspect of one adapter needs its base, to measure the change beside W: give --model.")
    net, _ = load_model(model)
    loaded = rw.load(net, adapter)
    rows = []
    spectra: dict[str, list[float]] = {}
    for name, delta in loaded.sites.items():
        d = loaded.delta(name)
        W = delta.site.read()
        dense = d.dense(W) if d.needs_weight else d.dense()
        S = torch.linalg.svdvals(dense.reshape(-1, *dense.shape[-2:]).double()).mean(0)
        share = (S.square().cumsum(0) / S.square().sum().clamp_min(1e-30)).tolist()
        spectra[name] = S[: max(delta.component_count() * 2, 8)].tolist()
        what = {
            "site": name,
            "role": delta.site.spec.role,
            "shape": "×".join(map(str, delta.site.spec.shape)),
            "rank": d.exact_rank,
        }
        norms = {"norm": float(dense.norm()), "relative": float(dense.norm() / W.norm())}
        rows.append({**what, "effective_rank": 1 + sum(1 for s in share if s < 0.9), **norms, "spectrum": spectra[name]})
    head = {"adapter": adapter, "form": loaded.recipe.form, "trainable": loaded.numel(), "sites": rows}
    if picture:
        _draw(spectra, rows, picture)
    if json:
        emit_json(head)
        return
    columns = ["layer", "role", "shape", "rank", "90 % in", "‖ΔW‖", "‖ΔW‖/‖W‖"]
    table(
        repr(loaded),
        columns,
        [(r["site"], r["role"], r["shape"], r["rank"], r["effective_rank"], r["norm"], r["relative"]) for r in rows],
        right=columns[3:],
    )
    if picture:
        out.print(f"\nwrote {picture}", highlight=False)


def _draw(spectra: dict[str, list[float]], rows: list[dict[str, Any]], path: str) -> None:
    from rankwise.errors import need

    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise need("matplotlib", "plots", "A picture") from error
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.22 * max(len(rows), 12)), constrained_layout=True)
    roles = list(dict.fromkeys(r["role"] for r in rows))
    colours = {role: f"C{i % 10}" for i, role in enumerate(roles)}
    for r in rows:
        left.semilogy(
            range(1, len(r["spectrum"]) + 1), [max(s, 1e-12) for s in r["spectrum"]], color=colours[r["role"]], alpha=0.6, lw=1
        )
    for role in roles:
        left.plot([], [], color=colours[role], label=role)
    left.set(xlabel="component", ylabel="singular value of ΔW", title="Spectra")
    left.legend(fontsize=8, frameon=False)
    left.set_ylim(bottom=max(min(min(s for s in r["spectrum"] if s > 1e-9) for r in rows if max(r["spectrum"]) > 1e-9), 1e-6) / 2)
    right.barh([r["site"] for r in rows][::-1], [r["relative"] for r in rows][::-1], color=[colours[r["role"]] for r in rows][::-1])
    right.set(xlabel="‖ΔW‖ / ‖W‖", title="Size of the change")
    right.tick_params(axis="y", labelsize=6)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=120)
    plt.close(fig)
