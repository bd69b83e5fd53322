"""What ``rankwise merge`` says of its result: as lines, or as JSON with every place once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rankwise.catalogue import find
from rankwise.cli.common import emit_json, out, table
from rankwise.cli.merge_score import show


def state_told(state: Any, method: str, to: str, json: bool) -> None:
    """What was merged, and how far the result is from its parts.

    Args:
        state: the merged value, with its meta.
        method: the merge.
        to: the folder written.
        json: print JSON.
    """
    ranks = {n: int(d.exact_rank or 0) for n, d in state.sites.items()}
    if json:
        emit_json({"out": to, **_head(state.meta), "sites": _rows(state.meta, {n: {"rank": r} for n, r in ranks.items()})})
        return
    out.print(f"wrote {to}: {len(ranks)} places, rank {_span(ranks.values())}", highlight=False)
    losses(state.meta, method)


def losses(meta: Mapping[str, Any], method: str) -> None:
    """How far from the weighted sum, what a rank lost; of a soup also who is in it and what they score."""
    for key, what in (("errors", "from the weighted sum"), ("truncation", "lost by cutting to a rank")):
        if meta[key]:
            worst = max(meta[key], key=meta[key].__getitem__)
            mean = sum(meta[key].values()) / len(meta[key])
            out.print(f"{method}: {meta[key][worst]:.3g} {what} at most ({worst}), {mean:.3g} in the mean", highlight=False)
    for option, value in meta.get("found", {}).items():
        said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        out.print(f"{method}: {option} found to be {said or 'none'}", highlight=False, markup=False)
    if (shared := sum(meta.get("shared", {}).values())) or "shared" in meta:
        out.print(f"{method}: {shared} entries are changed by more than one source", highlight=False)
    if found := meta.get("search"):
        show(found)
    if found := meta.get("score"):
        scored(found, meta["weights"] if find("merge", meta["method"]).cls.uses_weights else None)  # type: ignore[attr-defined]


def scored(found: Mapping[str, Any], weights: Any) -> None:
    """Each source's score and weight (the mean of its weights by place; no column where weights mean nothing), and the result's."""
    if weights is None:
        rows = [*found["sources"].items(), ("merged", found["merged"])]
        table(f"{found['of']} on {found['data']}", ["source", found["of"]], rows, right=[found["of"]])
        return
    each = list(zip(*weights.values(), strict=True)) if isinstance(weights, Mapping) else [[w] for w in weights]
    rows = [(f, s, f"{sum(w) / len(w):.3f}") for (f, s), w in zip(found["sources"].items(), each, strict=True)]
    rows.append(("merged", found["merged"], ""))
    table(f"{found['of']} on {found['data']}", ["source", found["of"], "weight"], rows, right=[found["of"], "weight"])


def folded(report: Any, state: Any, method: str, to: str, json: bool) -> None:
    """Of adapters folded into their base.

    Args:
        report: what folding measured, by site.
        state: the merged value, with its meta; None where one adapter was folded as it is.
        method: the merge.
        to: the folder written.
        json: print JSON.
    """
    worst = report.worst
    rows = sorted(report.sites, key=lambda s: -s.error)
    if json:
        sites = {s.site: {"change": s.change, "rounded_away": s.error} for s in rows}
        meta = {} if state is None else state.meta
        emit_json({"out": to, "logit_gap": report.logit_gap, "forced": report.forced, **_head(meta), "sites": _rows(meta, sites)})
        return
    if state is not None:
        losses(state.meta, method)
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


def models_told(report: Any, json: bool) -> None:
    """Of whole models."""
    if json:
        tensors = [
            {"tensor": n, "error": e, **({"moved": report.moved[n]} if n in report.moved else {})} for n, e in report.errors.items()
        ]
        extra = {"score": report.score, "weights": report.weights} if report.score else {}
        extra |= {"search": report.search} if report.search else {}
        emit_json({"out": str(report.path), "method": report.method, **extra, "tensors": tensors, "copied": report.copied})
        return
    copied = f", {len(report.copied)} copied" if report.copied else ""
    out.print(f"wrote {report.path}: {len(report.errors)} tensors merged{copied}", highlight=False)
    for found, what in ((report.errors, "from the weighted sum"), (report.moved, "from the base")):
        if found:
            worst = max(found, key=found.__getitem__)
            out.print(f"{report.method}: {found[worst]:.3g} {what} at most ({worst})", highlight=False)
    if report.search:
        show(report.search)
    if report.score:
        scored(report.score, report.weights)


_BY_SITE = {"errors": "error", "truncation": "truncation"}


def _head(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What is said once."""
    return {k: v for k, v in meta.items() if k not in _BY_SITE and not (k == "weights" and isinstance(v, Mapping))}


def _rows(meta: Mapping[str, Any], sites: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is said of each place, in one row each."""
    own = {name: meta[k] for k, name in _BY_SITE.items() if k in meta}
    if isinstance(meta.get("weights"), Mapping):
        own["weights"] = meta["weights"]
    return [{"site": n, **row, **{k: v[n] for k, v in own.items() if n in v}} for n, row in sites.items()]


def _span(values: Iterable[int]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"
