"""Policies of admission on the virtual clock: published setting S2 on an A10G, as a step-time model of its roofline.

One number is fitted: ``SLOW``, the factor between the roofline and the published server, so that first come, first served at
2.5 requests a second and 200 adapters finishes what it finished there (1.54 a second).  All else follows.

python -m benchmarks.serving_policies [--seeds 42 43 44] [--seconds 300]
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
from benchmarks.table import table
from rankwise.serve.cache.block_pool import ADAPTER, KV, PoolUnit
from rankwise.serve.engine.step_time import Coefficients
from rankwise.serve.policies.chain import make
from rankwise.serve.simulate.admission import PeakTest
from rankwise.serve.simulate.pool import SharedBlockPool, split
from rankwise.serve.simulate.requests import Sent, SimOptions, sent
from rankwise.serve.simulate.score import Report
from rankwise.serve.simulate.simulator import Simulator
from rankwise.serve.simulate.trace import TraceOptions, generate, setting

SLOW = 1.45
ROW = 512 * 1024  #: bytes of a cached token of Llama-7B in 16 bits; an adapter of rank r on q, k, v, o takes 4r such rows
PAGE, ROWS, SLO = 16, 14_000, 6.0
#: 13.5 GB of weights at 600 GB/s; 13.4 GFLOP a token at 70 TFLOP/s above the balance; a row; 2.1 MB a unit of rank; 256 launches
STEP = Coefficients(22.5e-3 * SLOW, 0.0, 1.9e-4 * SLOW, 8.7e-7 * SLOW, 3.5e-6 * SLOW, 2e-3 * SLOW, knee=64)
UNITS = {KV: PoolUnit(PAGE * ROW, ROWS // PAGE), ADAPTER: PoolUnit(32 * ROW, ROWS // 32)}
OPTIONS = SimOptions(page=PAGE, max_num_seqs=256, max_num_batched_tokens=2048, slo=SLO)
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


def unified() -> SharedBlockPool:
    return SharedBlockPool(UNITS, ROWS * ROW)


def play(policy: Any, requests: list[Sent], rate: float, pool: Callable[[], SharedBlockPool] = unified) -> tuple[Report, Simulator]:
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
        "satisfaction": mean("satisfaction"), "aborted": mean("aborted"),
        "TTFT p50 s": mean("ttft_p50"), "TTFT p99 s": mean("ttft_p99"), "ITL p50 s": mean("itl_p50"), "running": mean("running_mean"),
    } | ({"± over seeds": (max(attained) - min(attained)) / 2} if len(attained) > 1 else {})  # fmt: skip


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


def pivot(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Attainment, a row a policy."""
    rows = []
    for name in POLICIES:
        mine = [r for r in runs if r["policy"] == name]
        swept = {f"{r['swept']} {r['value']:g}": r["attainment"] for r in mine if r["swept"] in SWEEPS}
        crowd = next(r for r in mine if r["swept"] == "tenant")
        rows.append({"policy": name} | swept | {"the crowd": crowd["attainment, crowd"], "the few": crowd["attainment, few"]})
    return rows


def text(data: dict[str, Any]) -> str:
    """The report, its figures from the results."""
    runs = data["runs"]
    at = {(r["swept"], r.get("value"), r["policy"]): r for r in runs}
    beside = [
        {"swept": w, "value": v, "fcfs, published": f, "fcfs, strict": at[w, v, "fcfs, strict"]["attainment"], "fcfs": at[w, v, "fcfs"]["attainment"],
         "abort, published": a, "early_abort, patience 0": at[w, v, "early_abort, patience 0"]["attainment"], "early_abort": at[w, v, "early_abort"]["attainment"]}
        for (w, v), (f, a) in PUBLISHED.items()
    ]  # fmt: skip
    keys = ("policy", "finished/s", "attainment", "satisfaction", "aborted", "TTFT p50 s", "TTFT p99 s", "ITL p50 s", "running")
    heavy = [{k: at["rate", 2.5, n][k] for k in keys} for n in POLICIES]
    ablation = [{k: r[k] for k in ("value", "finished/s", "attainment", "running")} for r in runs if r["swept"] == "pool"]
    return REPORT.format(
        seconds=data["seconds"], seeds=", ".join(map(str, data["seeds"])), slow=SLOW, attainment=table(data["rows"]), beside=table(beside),
        heavy=table(heavy), pools=table(ablation),
    )  # fmt: skip


REPORT = """# Admission policies on the virtual clock

`python -m benchmarks.serving_policies`: {seconds:g} s of the published trace (setting S2: Llama-7B, 200 adapters of ranks 64, 32, 16, 8; prompts and
answers of 8 to 511 tokens; seed {seeds}) through the very policies, block pool and admission test that the engine serves with. A step takes what the
roofline of an A10G says, times {slow}: the one fitted number, chosen so that 2.5 requests a second come out as published (1.54 finished a second).
*Attainment*: share of all requests whose first token came within 6 s; *satisfaction*: mean of max(0, 1 − (t/6 s)²); requests let go count as 0 in both.
Unless it is swept: 2 requests a second, cv = 1, α = 1.

![attainment and satisfaction by rate, burstiness and popularity](serving_policies.svg)

## Attainment

{attainment}

*The crowd* and *the few*: two tenants at 2.5 requests a second, one with four adapters in five.
`merge_mode` is left out: its decision is for the engine to act on, and the simulator's steps know no merged weights.

## Beside the published figures (300 s there)

{beside}

The published first-come-first-served stops at the first request that does not fit, as *strict* does. Its early abort has no patience.
At cv = 1 early abort agrees and first come first served attains more than published; bursts cost ours more, on a shorter trace of one seed.

## Reading

- Under overload letting go of who would be late anyway is worth more than any order among the rest, and finishes more too.
- The newest first (`patience 0`) buys satisfaction, not attainment: with a predicted first token, oldest first meets as many limits.
- Ageing has a price: once everybody waits longer than `max_wait` (10 s), `cluster` and `drain` are strict order. `default` lets go first.
- `vtc` keeps the few apart from the crowd; `default` does both. `pets` is for work that is all there before it begins.
- `lorax` rotates 32 adapters of 200 here and gains only where few are popular.

## Overload: 2.5 requests a second

{heavy}

## One pool or two halves, 2.5 requests a second, fcfs

{pools}
"""


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
        axes[0][column].set_title(f"attainment by {what}")
        axes[1][column].set_title(f"satisfaction by {what}")
    handles, labels = axes[0][1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--draw", action="store_true", help="only the figure and the report, from the results there are")
    a = parser.parse_args()
    if not a.draw:
        rows = sweep(a.seeds, a.seconds) + pools(a.seeds, a.seconds) + crowding(a.seeds, a.seconds)
        write("serving_policies", pivot(rows), runs=rows, seconds=a.seconds, seeds=a.seeds)
    data = json.loads((RESULTS / "serving_policies.json").read_text())
    reports = Path(__file__).parents[1] / "docs" / "reports"
    draw(data["runs"], reports / "serving_policies.svg")
    (reports / "serving_policies.md").write_text(text(data))


if __name__ == "__main__":
    main()
