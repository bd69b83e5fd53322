"""From a file to numbers in the pool: loading one adapter for serving, beside PEFT's load_adapter (warm page cache).

Beside the time on the clock stands the processor's own, which a busy neighbour moves less.

python -m benchmarks.serving_load [--rounds 40]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from benchmarks.common import write
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.ops.base import LoraPages


def base() -> Any:
    """Model M2 of the serving reference: 8 layers × 512, rank 8 at all linears is 2.4 MB."""
    import transformers as T

    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval()


def write_adapters(root: Path, count: int, recipe: dict[str, Any], format: str) -> None:
    """``count`` adapters with numbers of their own."""
    adapter = rw.attach(base(), recipe)
    for i in range(count):
        with torch.no_grad():
            for p in adapter.trainable_parameters():
                p.normal_(std=0.02)
        adapter.save(root / f"a{i}") if format == "native" else adapter.export(root / f"a{i}")


class Steps:
    """Milliseconds of each step, on the clock and of the processor; medians over all adapters."""

    def __init__(self) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {}

    def run(self, step: str, fn: Callable[[], Any]) -> Any:
        start, cpu = time.perf_counter(), time.thread_time()
        out = fn()
        self.times.setdefault(step, []).append((1e3 * (time.perf_counter() - start), 1e3 * (time.thread_time() - cpu)))
        return out

    def row(self) -> dict[str, float]:
        found = {}
        for step, times in self.times.items():
            found[f"{step} ms"] = statistics.median(t for t, _ in times)
            found[f"{step} processor ms"] = statistics.median(t for _, t in times)
        return found


def ours(root: Path, count: int) -> dict[str, float]:
    """Never seen (read, checked, prepared), seen before, let go and read again, and into the pages of the pool."""
    source = FolderSource(root, AdapterLoader(base()))
    pages = LoraPages(source.adapter_loader.layout.groups, 16)
    steps = Steps()
    for i in range(count):
        name = f"a{i}"
        served = steps.run("load", lambda name=name: source.fetch(source.resolve(name)))
        manifest = steps.run("resolve again", lambda name=name: source.resolve(name))
        steps.run("load again", lambda manifest=manifest: source.fetch(manifest))
        at = list(range(i % 8, i % 8 + served.manifest.pages))
        pages.write(at, served.pairs)  # the first touch of its memory is the system's time
        steps.run("into cells", lambda at=at, served=served: pages.write(at, served.pairs))
    return steps.row()


def peft(root: Path, count: int) -> dict[str, float]:
    """PEFT's load_adapter for one more adapter, the last one taken out again so that none slows the next."""
    from peft import PeftModel

    net = PeftModel.from_pretrained(base(), str(root / "a0"), adapter_name="first")
    steps = Steps()
    for i in range(1, count):
        steps.run("load", lambda i=i: net.load_adapter(str(root / f"a{i}"), adapter_name="next"))
        net.delete_adapter("next")
    return steps.row()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="adapters of each kind")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    plans = (
        ("lora", {"r": 8}, "native", a.rounds), ("lora", {"r": 8}, "peft", a.rounds),
        ("dora", {"form": "dora", "r": 8}, "native", 8), ("smora", {"r": 8, "router": {"name": "smora", "k": 4}}, "native", 8),
    )  # fmt: skip
    for kind, recipe, format, count in plans:
        with tempfile.TemporaryDirectory() as folder:
            write_adapters(Path(folder), count, recipe, format)
            rows.append({"what": f"rankwise, {kind} ({format})", "adapters": count, **ours(Path(folder), count)})
            print(rows[-1], flush=True)
            if format == "peft":
                rows.append({"what": f"PEFT, {kind}", "adapters": count - 1, **peft(Path(folder), count)})
                print(rows[-1], flush=True)
    write("serving_load", rows, note=f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors.")


if __name__ == "__main__":
    main()
