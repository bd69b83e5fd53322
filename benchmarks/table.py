"""docs/performance.md from the results, so that no figure in it is typed by hand.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

TITLES = {
    "train_step": "A training step against the bound (frozen base: forward and gradient of the input)",
    "many_adapters": "Many adapters on one base (8 layers × 512)",
    "inits": "Initialisation beside PEFT's (a process each, medians)",
    "memory": "Memory of a step by category (4 layers × 512, 512 tokens)",
    "serving_load": "From a file to numbers ready to serve, one adapter of rank 8 at all linears (8 layers × 512), beside PEFT",
    "serving_policies": "Attainment of admission policies on the virtual clock (A10G, S2, 200 adapters, 6 s to the first token)",
    "merge": "Merging beside PEFT and mergekit, in turn in one process",
    "merge_memory": "Peak memory of merging (a process each)",
    "merge_scale": "A hundred adapters of rank 16 on a 1B-shaped model, merged from folders site by site",
    "serving": "Serving on one model with the same requests, everything in turn in random order (8 layers × 512)",
    "serving_ops": "Serving: the adapters' changes of one step beside the base's packed linears (8 layers × 512)",
    "sweep": "Eight small LoRA jobs (r = 8) trained together on one base, and one after another",
    "coserving": "Fine-tuning beside serving: the share of the stand-alone token rate that is kept, and limits attained",
    "import": "What importing adds to torch and transformers",
}


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(k for r in rows for k in r))
    lines = ["| " + " | ".join(keys) + " |", "|" + "|".join("---" for _ in keys) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(r.get(k)) for k in keys) + " |" for r in rows])


def main() -> None:
    parts = [
        "# Performance",
        "",
        "Made by `python -m benchmarks.table` from `benchmarks/results`; each by `python -m benchmarks.NAME`.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        m = data["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
        parts += ["", f"## {TITLES.get(data['benchmark'], data['benchmark'])}", "", table(data["rows"]), ""]
        parts += [f"`{data['benchmark']}`, {m['date']}, {m['processor']}, {m['threads']} threads, {versions}."] + (
            [data["note"]] if data.get("note") else []
        )
    (Path(__file__).parents[1] / "docs" / "performance.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
