"""Eight small jobs trained together on one base beside the same jobs one after another, ours and PEFT's, interleaved.

One thread, and the process's own time, which a busy neighbour does not count in; with more threads, and on a GPU, the wall's.

python -m benchmarks.sweep [--jobs 8] [--rounds 5] [--threads 1] [--dtypes float32 bfloat16] [--bases shipped 512x8]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import device, interleaved, llama, write
from rankwise.host import keep_freed_memory
from rankwise.recipe import Recipe
from rankwise.train.data import Collator, Example
from rankwise.train.together import AdapterJob, Running, step

NOTE = (
    "Time is the process's own on one thread, the wall's on more. One step of each of the eight jobs, in one batch or in turn; what a batch can gain is what a "
    "small step loses to calls and thin products, so it shrinks as rows grow."
)


def model_of(base: str, dtype: torch.dtype) -> Any:
    if base == "shipped":
        from rankwise.assets import load_base

        return load_base()[0].to(device(), dtype).train()
    hidden, layers = map(int, base.split("x"))
    return llama(hidden, layers, dtype).train()


def rows_of(tokens: int, n: int = 64) -> list[Example]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (n, tokens), generator=g).tolist()
    return [Example(i, list(i)) for i in ids]


def ours(base: str, dtype: torch.dtype, jobs: list[AdapterJob]) -> tuple[Callable[[], None], Callable[[], None]]:
    """(one step of all jobs together, one step of each job after another), each on a model of its own."""
    models = [model_of(base, dtype) for _ in range(2)]
    collator = Collator.for_model(models[0], 0)
    joint, apart = ([Running(m, j, collator) for j in jobs] for m in models)

    def after_another() -> None:
        for r in apart:
            step(models[1], [r], collator)

    return lambda: step(models[0], joint, collator), after_another


def peft(base: str, dtype: torch.dtype, jobs: list[AdapterJob]) -> Callable[[], None]:
    """As many steps of PEFT's LoRA as there are jobs, one after another (one adapter, for their time is the same)."""
    import peft as library

    config = library.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    net = library.get_peft_model(model_of(base, dtype), config).train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    rows = jobs[0].rows
    ids = torch.tensor([r.input_ids for r in rows[: jobs[0].batch]], device=device())

    def run() -> None:
        for _ in jobs:
            net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def measure(base: str, dtype: str, batch: int, tokens: int, count: int, rounds: int) -> dict[str, Any]:
    recipe, rows, kind = Recipe(r=8), rows_of(tokens), getattr(torch, dtype)
    jobs = [AdapterJob(name=f"job {i}", recipe=recipe, rows=rows, lr=1e-4, steps=10_000, batch=batch, seed=i) for i in range(count)]
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time
    together, apart = ours(base, kind, jobs)
    times = interleaved({"together": together, "apart": apart, "PEFT": peft(base, kind, jobs)}, rounds, clock=clock)
    ratio = lambda name: statistics.median(t / j for t, j in zip(times[name], times["together"], strict=True))
    middle = {n: statistics.median(t) for n, t in times.items()}
    return {
        "base": base, "dtype": dtype, "threads": torch.get_num_threads(), "jobs": count, "rows a job": batch, "tokens a row": tokens,
        **{f"{n} ms": 1e3 * t for n, t in middle.items()},
        "tokens/s together": count * batch * tokens / middle["together"],
        "one after another / together": ratio("apart"), "PEFT one after another / together": ratio("PEFT"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bases", nargs="*", default=["shipped", "512x8"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    a = parser.parse_args()
    keep_freed_memory()  # as `rankwise sweep` does, for everybody in this process
    rows: list[dict[str, Any]] = []
    for threads, base, dtype in itertools.product(a.threads, a.bases, a.dtypes):
        torch.set_num_threads(threads)
        for batch, tokens in ((1, 64), (1, 128), (2, 64)):
            rows.append(measure(base, dtype, batch, tokens, a.jobs, a.rounds))
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            write("sweep", rows, note=NOTE)


if __name__ == "__main__":
    main()
