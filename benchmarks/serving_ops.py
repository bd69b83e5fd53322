"""The changes of one serving step by every delta operator, beside the base's packed products they are added to.

Linears only, shapes of a small Llama (8 layers, 512 wide, 1408 within, 8 and 4 heads): `base` multiplies, `with` multiplies and
adds the changes, in turn and in random order; the delta is their difference, its bandwidth the bytes of the pages
that the step needs (a page read for a hundred tokens counts once) over it.

python -m benchmarks.serving_ops [--ops bags native …] [--rounds 30] [--threads 2 | --cpu]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.common import write
from rankwise.forms.packed import PackedWeight
from rankwise.host import keep_freed_memory
from rankwise.serve.batch import Segment, TokenPlan
from rankwise.serve.ops.base import WIDTH, Group, LoraPages
from rankwise.serve.ops.registry import make_op
from rankwise.serve.ops.step import Op

LAYERS = 8
SHAPES = {
    "qkv": (512, (512, 256, 256)),
    "o": (512, (512,)),
    "mlp": (512, (1408, 1408)),
    "down": (1408, (512,)),
}
#: case → (rank of each adapter, rows of each)
CASES = {
    "decode 16 × rank 8": ([8] * 16, 1),
    "decode 16, one rank 8": ([8], 16),
    "decode 16 × rank 64/32/16/8": ([64, 32, 16, 8] * 4, 1),
    "decode 16 × rank 64": ([64] * 16, 1),
    "decode 1 × rank 8": ([8], 1),
    "decode 1 × rank 64": ([64], 1),
    "prefill 16×32, rank 8": ([8] * 16, 32),
    "prefill 4×128, rank 8": ([8] * 4, 128),
    "prefill 1×512, rank 8": ([8], 512),
}
GROUPS = [
    Group(f"{layer}.{n}", tuple(f"{n}{j}" for j in range(len(outs))), inp, outs)
    for layer in range(LAYERS)
    for n, (inp, outs) in SHAPES.items()
]


class Linears:
    """All linears of the model, those with one input laid together, packed for oneDNN."""

    def __init__(self) -> None:
        self.weights = {g.name: torch.randn(sum(g.outs), g.inp).div_(g.inp**0.5) for g in GROUPS}
        self.packed = {name: PackedWeight(w, 16) for name, w in self.weights.items()}

    def run(self, xs: dict[int, Tensor], op: Op | None) -> None:
        for g in GROUPS:
            x = xs[g.inp]
            y = self.packed[g.name].linear(x, self.weights[g.name])
            if op is not None:
                op.apply(g, x, y.split(g.outs, 1))


def fill(pages: LoraPages) -> None:
    for t in (*pages.shrink.values(), *pages.packed.values()):
        t.normal_(std=0.02)


def deal(ranks: Sequence[int], count: int) -> dict[int, list[int]]:
    """Pages for adapters of ``ranks``, scattered as after hours of serving."""
    free = random.sample(range(count), count)
    return {slot: [free.pop() for _ in range(-(-r // WIDTH))] for slot, r in enumerate(ranks)}


def step(ranks: Sequence[int], rows: int) -> TokenPlan:
    runs = tuple(Segment(slot, slot * rows, (slot + 1) * rows) for slot in range(len(ranks)))
    none = torch.empty(0, dtype=torch.int64)
    return TokenPlan((), 16, none, none, none, (0, len(ranks) * rows), runs, none, runs)


@torch.inference_mode()
def measure(case: str, ops: Sequence[Op], linears: Linears, rounds: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    ranks, rows = CASES[case]
    plan, slots = step(ranks, rows), deal(ranks, ops[0].pages.count)
    xs = {inp: torch.randn(len(ranks) * rows, inp) for inp in {g.inp for g in GROUPS}}
    begin = {}
    for op in ops:
        start = clock()
        op.begin(plan, slots)
        linears.run(xs, op)
        begin[op.name] = clock() - start
    runs: dict[str, Op | None] = {"base": None, **{op.name: op for op in ops}}
    times: dict[str, list[float]] = {n: [] for n in runs}
    for _ in range(rounds):
        for name, op in random.sample(list(runs.items()), len(runs)):
            start = clock()
            if op is not None:
                op.begin(plan, slots)
            linears.run(xs, op)
            times[name].append(clock() - start)
    read = sum(len(c) for c in slots.values()) * ops[0].pages.page_bytes
    base = statistics.median(times["base"])
    out = []
    for op in ops:
        delta = statistics.median(a - b for a, b in zip(times[op.name], times["base"], strict=True))
        out.append({
            "case": case, "op": op.name, "base ms": 1e3 * base, "delta ms": 1e3 * delta, "least ms": 1e3 * (min(times[op.name]) - min(times["base"])),
            "base/(base+delta)": statistics.median(b / a for a, b in zip(times[op.name], times["base"], strict=True)),
            "GB/s": read / delta / 1e9, "MB": read / 1e6, "first step ms": 1e3 * begin[op.name],
        })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=["bags", "native", "auto", "grouped", "cat"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu", action="store_true", help="one thread, its processor time: for a machine that is busy with other work"
    )
    parser.add_argument("--dry", action="store_true", help="print only")
    a = parser.parse_args()
    torch.set_num_threads(1 if a.cpu else a.threads)
    clock = time.thread_time if a.cpu else time.perf_counter
    keep_freed_memory()
    pages = LoraPages(GROUPS, 144)
    fill(pages)
    linears, ops = Linears(), [make_op(name, pages) for name in a.ops]
    rows = []
    for case in a.cases:
        rows += measure(case, ops, linears, a.rounds, clock)
        for r in rows[-len(ops) :]:
            r["clock"] = "processor time" if a.cpu else "wall"
        for r in rows[-len(ops) :]:
            print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r.items()}, flush=True)
    if not a.dry:
        write("serving_ops", rows)


if __name__ == "__main__":
    main()
