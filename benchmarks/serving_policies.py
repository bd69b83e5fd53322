"""Policies of admission on the virtual clock: published setting S2 on an A10G, as a step-time model of its roofline.

One number is fitted: ``SLOW``, the factor between the roofline and the published server, so that first come, first served at
2.5 requests a second and 200 adapters finishes what it finished there (1.54 a second).  All else follows.

python -m benchmarks.serving_policies [--seeds 42 43] [--seconds 120]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, write
from rankwise.serve.pool import ADAPTER, KV, BlockPool, Unit, split
from rankwise.serve.sched.admission import PeakTest
from rankwise.serve.sched.chain import make
from rankwise.serve.score import Report
from rankwise.serve.simulator import Sent, SimOptions, Simulator, sent
from rankwise.serve.timing import Coefficients
from rankwise.serve.trace import TraceOptions, generate, setting

SLOW = 1.45
ROW = 512 * 1024  #: bytes of a cached token of Llama-7B in 16 bits; an adapter of rank r on q, k, v, o takes 4r such rows
PAGE, ROWS, SLO = 16, 14_000, 6.0
#: 13.5 GB of weights at 600 GB/s; 13.4 GFLOP a token at 70 TFLOP/s above the balance; a row; 2.1 MB a unit of rank; 256 launches
STEP = Coefficients(22.5e-3 * SLOW, 0.0, 1.9e-4 * SLOW, 8.7e-7 * SLOW, 3.5e-6 * SLOW, 2e-3 * SLOW, knee=64)
UNITS = {KV: Unit(PAGE * ROW, ROWS // PAGE), ADAPTER: Unit(32 * ROW, ROWS // 32)}
OPTIONS = SimOptions(page=PAGE, max_running=256, step_tokens=2048, slo=SLO)
POLICIES: dict[str, Any] = {
    "fcfs": "fcfs",
    "fcfs, strict": {"name": "fcfs", "strict": True},
    "early_abort": {"name": "early_abort", "slo": SLO},
    "early_abort, patience 0": {"name": "early_abort", "slo": SLO, "patience": 0.0},
    "early_abort, patience 1": {"name": "early_abort", "slo": SLO, "patience": 1.0},
    "cluster": "cluster",
    "vtc": "vtc",
    "drain": "drain",
    "lorax": {"name": "lorax", "slots": 32},
    "pets": "pets",
    "default": {"name": "default", "slo": SLO},
}
SWEEPS: dict[str, tuple[Any, ...]] = {"rate": (1.0, 1.5, 2.0, 2.5), "cv": (1.0, 4.0, 8.0), "alpha": (0.1, 0.3, 1.0)}
#: attainment published for this setting (300 s, 200 adapters): first come first served, and with early abort
PUBLISHED = {("rate", 1.0): (1.0, None), ("rate", 1.5): (0.98, None), ("rate", 2.0): (0.27, 0.86), ("rate", 2.5): (0.06, None),
             ("cv", 1.0): (0.27, 0.86), ("cv", 4.0): (0.43, 0.74), ("cv", 8.0): (0.32, 0.64)}  # fmt: skip


def unified() -> BlockPool:
    return BlockPool(UNITS, ROWS * ROW)


def play(policy: Any, requests: list[Sent], rate: float, pool: Callable[[], BlockPool] = unified) -> tuple[Report, Simulator]:
    sim = Simulator(make(policy), pool(), STEP, OPTIONS, PeakTest(PAGE))
    return sim.run(requests, rate), sim


def options(seconds: float, seed: int, **changed: float) -> TraceOptions:
    base = TraceOptions(200, 1.0, 2.0, 1.0, seconds, (8, 512), (8, 512), setting("S2").ranks, seed)
    return dataclasses.replace(base, **changed)  # type: ignore[arg-type]


def row(what: str, value: Any, policy: str, reports: list[Report]) -> dict[str, Any]:
    def mean(field: str) -> float:
        return statistics.fmean(getattr(r, field) for r in reports)

    attained = [r.attainment for r in reports]
    return {
        "swept": what, "value": value, "policy": policy, "finished/s": mean("throughput"), "attainment": mean("attainment"),
        "± over seeds": (max(attained) - min(attained)) / 2, "satisfaction": mean("satisfaction"), "aborted": mean("aborted"),
        "TTFT p50 s": mean("ttft_p50"), "TTFT p99 s": mean("ttft_p99"), "ITL p50 s": mean("itl_p50"), "running": mean("running_mean"),
    }  # fmt: skip


def sweep(seeds: list[int], seconds: float) -> list[dict[str, Any]]:
    rows = []
    for what, values in SWEEPS.items():
        for value in values:
            rate = value if what == "rate" else 2.0
            traces = [sent(generate(options(seconds, s, **{what: value})), 4) for s in seeds]
            for name, policy in POLICIES.items():
                rows.append(row(what, value, name, [play(policy, t, rate)[0] for t in traces]))
                print(rows[-1], flush=True)
    return rows


def pools(seeds: list[int], seconds: float) -> list[dict[str, Any]]:
    """The ablation of unified paging: half of the memory for adapters, or all for who needs it."""
    rows = []
    traces = [sent(generate(options(seconds, s, rate=2.5))) for s in seeds]
    for name, pool in (("unified", unified), ("split in halves", lambda: split(UNITS, {KV: 0.5, ADAPTER: 0.5}, ROWS * ROW))):
        rows.append(row("pool", name, "fcfs", [play("fcfs", t, 2.5, pool)[0] for t in traces]))
    return rows


def crowding(seeds: list[int], seconds: float) -> list[dict[str, Any]]:
    """One of two tenants sends four fifths of an overload: attainment of each."""
    rows = []
    for name, policy in POLICIES.items():
        got: dict[str, list[float]] = {"crowd": [], "few": []}
        for s in seeds:
            trace = generate(options(seconds, s, rate=2.5))
            requests = [
                dataclasses.replace(r, tenant="few" if a.adapter % 5 == 0 else "crowd")
                for r, a in zip(sent(trace), trace, strict=True)
            ]
            _, sim = play(policy, requests, 2.5)
            for tenant, into in got.items():
                mine = [r for r in sim.records if r.tenant == tenant]
                into.append(sum(r.ttft <= SLO for r in mine) / len(mine))
        rows.append({"swept": "tenant", "policy": name} | {f"attainment, {t}": statistics.fmean(v) for t, v in got.items()})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rankwise"
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    fig, axes = plt.subplots(2, 3, figsize=(13, 7.5), sharey="row", constrained_layout=True)
    titles = {"rate": "requests a second", "cv": "variation of the gaps (cv)", "alpha": "popularity α (small: skewed)"}
    for column, (what, title) in enumerate(titles.items()):
        values = [str(v) for v in SWEEPS[what]]
        for line, field in enumerate(("attainment", "satisfaction")):
            ax = axes[line][column]
            for i, name in enumerate(POLICIES):
                points = [r[field] for r in rows if r["swept"] == what and r["policy"] == name]
                bold = name in ("fcfs", "early_abort", "default")
                ax.plot(values, points, "-o" if bold else "--", color=colours[i], lw=2.2 if bold else 1.2, ms=4, label=name)
            if line == 0:
                for k, (mark, text) in enumerate((("x", "published, fcfs"), ("*", "published, abort"))):
                    at = [(str(v), p[k]) for (w, v), p in PUBLISHED.items() if w == what and p[k] is not None]
                    ax.plot([v for v, _ in at], [p for _, p in at], mark, color="black", ms=9, ls="", label=text)
            ax.set_ylim(-0.02, 1.04)
            ax.grid(alpha=0.3)
            ax.set_xlabel(title)
        axes[0][column].set_title(f"{'attainment'} by {what}")
        axes[1][column].set_title(f"{'satisfaction'} by {what}")
    handles, labels = axes[0][1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--draw", action="store_true", help="only the figure, from the results there are")
    a = parser.parse_args()
    if not a.draw:
        rows = sweep(a.seeds, a.seconds) + pools(a.seeds, a.seconds) + crowding(a.seeds, a.seconds)
        write("serving_policies", rows)
    rows = json.loads((RESULTS / "serving_policies.json").read_text())["rows"]
    draw(rows, Path(__file__).parents[1] / "docs" / "reports" / "serving_policies.svg")


if __name__ == "__main__":
    main()
