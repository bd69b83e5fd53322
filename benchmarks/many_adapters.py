"""Attaching and switching many adapters, beside PEFT: total time to add, and time to switch as their number grows.

python -m benchmarks.many_adapters [--counts 16 64 256] [--peft 16 64]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import rankwise as rw
from benchmarks.common import llama, write


def clock(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", nargs="*", type=int, default=[16, 64, 256])
    parser.add_argument("--peft", nargs="*", type=int, default=[16, 64], help="counts PEFT is run at (it grows quadratically)")
    a = parser.parse_args()
    rows = []
    for n in a.counts:
        model = llama(512, 8)
        added = clock(lambda m=model, n=n: [rw.attach(m, {"r": 8}, name=f"a{i}") for i in range(n)])
        switch = statistics.median(clock(lambda i=i, m=model, n=n: rw.activate(m, f"a{i % n}")) for i in range(50))
        rows.append({"what": "rankwise", "adapters": n, "added in s": added, "switch ms": 1e3 * switch})
        print(rows[-1], flush=True)
        if n in a.peft:
            import peft

            config = peft.LoraConfig(r=8, target_modules="all-linear")
            net = peft.get_peft_model(llama(512, 8), config, adapter_name="a0")
            added = clock(lambda net=net, n=n, config=config: [net.add_adapter(f"a{i}", config) for i in range(1, n)])
            switch = statistics.median(clock(lambda i=i, net=net, n=n: net.set_adapter(f"a{i % n}")) for i in range(10))
            rows.append({"what": "peft", "adapters": n, "added in s": added, "switch ms": 1e3 * switch})
            print(rows[-1], flush=True)
    write("many_adapters", rows)


if __name__ == "__main__":
    main()
