"""The comparison report: one self-contained HTML page with plots and a table, and the same as JSON."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.cli.common import size
from rankwise.errors import need
from rankwise.train.compare import Row

_STYLE = """
body{font:15px/1.55 system-ui,sans-serif;color:#1c2430;max-width:1040px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.6rem;margin:0 0 .2rem} h2{font-size:1.15rem;margin:2.2rem 0 .6rem} .sub{color:#5b6675;margin:0 0 1.4rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums} th,td{padding:.38rem .6rem;text-align:right;border-bottom:1px solid #e4e8ee}
th{font-weight:600;color:#5b6675;font-size:.84rem} td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
tr.best td{background:#eef7f0} tr.peer td{color:#6b7686} img{max-width:100%} pre{background:#f5f7fa;padding:.8rem 1rem;overflow:auto;font-size:.84rem;border-radius:6px}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem} .two>div{min-width:0} .two pre{white-space:pre-wrap} .two h3{font-size:.9rem;color:#5b6675;margin:.2rem 0} @media(max-width:700px){.two{grid-template-columns:1fr}}
"""


def write(
    folder: Path,
    rows: Sequence[Row],
    info: Mapping[str, Any],
    samples: Sequence[tuple[str, str, str]] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` and ``report.json``; returns the page's path.

    Args:
        info: what was run (base, data, steps, machine, unit of the score).
        samples: (prompt, before, after) texts.
        notes: sentences below the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "info": dict(info),
        "rows": [dataclasses.asdict(r) | {"peak_bytes": r.peak_bytes} for r in rows],
        "samples": list(samples),
        "notes": list(notes),
    }
    (folder / "report.json").write_text(json.dumps(data, indent=2, ensure_ascii=False, default=str), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(rows, info, samples, notes), encoding="utf-8")
    return page


def _page(rows: Sequence[Row], info: Mapping[str, Any], samples: Sequence[tuple[str, str, str]], notes: Sequence[str]) -> str:
    unit = str(info.get("score", "score"))
    parts = [
        f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>rankwise comparison</title><style>{_STYLE}</style>",
        "<h1>Comparison of adapters</h1>",
        f"<p class=sub>{html.escape(str(info.get('what', '')))}</p>",
        _table(rows, unit),
        "".join(f"<p>{html.escape(n)}</p>" for n in notes),
        f"<h2>Quality and size</h2><img alt='score and trainable parameters of each method' src='{_quality(rows, unit)}'>",
        f"<h2>Loss while training</h2><img alt='training loss' src='{_curves(rows)}'>",
        f"<h2>Where the memory goes</h2><img alt='memory by category' src='{_memory(rows)}'>",
    ]
    if samples:
        parts.append("<h2>Text before and after</h2>")
        for prompt, before, after in samples:
            parts.append(
                f"<p><code>{html.escape(prompt)}</code></p><div class=two><div><h3>base</h3><pre>{html.escape(before)}</pre></div>"
                f"<div><h3>adapted</h3><pre>{html.escape(after)}</pre></div></div>"
            )
    facts = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in info.items())
    parts.append(f"<h2>What was run</h2><table>{facts}</table>")
    return "\n".join(parts)


def _table(rows: Sequence[Row], unit: str) -> str:
    top = min((r for r in rows if r.by == "rankwise"), key=lambda r: r.after, default=None)
    head = ["method", "by", f"{unit} before", "after", "change", "trainable", "stored", "memory a step", "time a step"]
    body = []
    for r in rows:
        cls = "best" if r is top else "peer" if r.by != "rankwise" else ""
        cells = [
            r.name,
            r.by,
            f"{r.before:.4f}",
            f"{r.after:.4f}",
            f"{(r.after - r.before) / r.before:+.1%}",
            f"{r.trainable:,}",
            size(r.stored_bytes),
            size(r.peak_bytes),
            f"{r.seconds * 1000:.0f} ms",
        ]
        body.append(f"<tr class='{cls}'>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>" + "".join(body) + "</table>"


def _figure(width: float, height: float) -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise need("matplotlib", "plots", "A report") from error
    fig, ax = plt.subplots(figsize=(width, height), constrained_layout=True)
    ax.spines[["top", "right"]].set_visible(False)
    return plt, fig, ax


def _uri(plt: Any, fig: Any) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg")
    plt.close(fig)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _quality(rows: Sequence[Row], unit: str) -> str:
    """One line a row, best first: the score as a dot, trainable parameters in the margin, the base as a dashed line."""
    order = sorted(rows, key=lambda r: -r.after)
    plt, fig, ax = _figure(9.5, 0.9 + 0.34 * len(rows))
    for y, r in enumerate(order):
        peer = r.by != "rankwise"
        ax.plot([r.after, r.before], [y, y], color="#dde2e9", lw=2, zorder=1)
        ax.scatter(r.after, y, s=46, marker="x" if peer else "o", color="#8a94a3" if peer else "C0", zorder=3)
        ax.annotate(f"{r.trainable:,}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color="#5b6675")
    if order:
        ax.axvline(order[0].before, color="#c44", lw=1, ls="--")
        ax.annotate(
            "base", (order[0].before, 1), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=8.5, color="#c44"
        )
    ax.annotate("trainable", (1.01, 1), xycoords="axes fraction", va="bottom", fontsize=8.5, color="#5b6675")
    ax.set_yticks(range(len(order)), [f"{r.name} ({r.by})" if r.by != "rankwise" else r.name for r in order])
    ax.set(xlabel=f"{unit} (lower is better)")
    ax.grid(axis="x", alpha=0.25)
    return _uri(plt, fig)


def _curves(rows: Sequence[Row]) -> str:
    plt, fig, ax = _figure(9.5, 3.8)
    for i, r in enumerate(rows):
        if r.by == "rankwise":
            smooth, out = r.losses[0], []
            for value in r.losses:
                smooth = 0.8 * smooth + 0.2 * value
                out.append(smooth)
            ax.plot(range(1, len(out) + 1), out, label=r.name, color=f"C{i % 10}", lw=1.5)
    ax.set(xlabel="step", ylabel="loss (running mean)")
    ax.legend(frameon=False, fontsize=8.5, ncol=3)
    ax.grid(alpha=0.25)
    return _uri(plt, fig)


def _memory(rows: Sequence[Row]) -> str:
    plt, fig, ax = _figure(9.5, 0.7 + 0.36 * len(rows))
    names = [f"{r.name} ({r.by})" for r in rows][::-1]
    left = [0.0] * len(rows)
    for category in rows[0].memory if rows else ():
        values = [r.memory[category] / 1e6 for r in rows][::-1]
        ax.barh(names, values, left=left, label=category)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ax.set(xlabel="MB in one step")
    ax.legend(frameon=False, fontsize=8.5, ncol=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _uri(plt, fig)
