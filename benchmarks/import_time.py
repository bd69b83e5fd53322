"""What ``import rankwise`` adds to a process that has torch and transformers, beside ``import peft``.

python -m benchmarks.import_time [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks.common import write

CHILD = "import time, torch, transformers; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    seen: dict[str, list[float]] = {"rankwise": [], "peft": []}
    for _ in range(a.rounds + 1):
        for name, times in seen.items():
            done = subprocess.run([sys.executable, "-c", CHILD.format(name)], capture_output=True, text=True, check=True)
            times.append(float(done.stdout))
    rows = [{"import": n, "added s": statistics.median(t[1:]), "slowest s": max(t[1:])} for n, t in seen.items()]
    print(rows)
    write("import", rows)


if __name__ == "__main__":
    main()
