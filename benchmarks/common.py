"""What every benchmark shares: the machine's description, interleaved timing, results as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "rankwise")
    return {
        "processor": torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {n: importlib.metadata.version(n) for n in names},
    }


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run by ``clock``, one after the other in every round, so that a busy neighbour slows all alike."""
    times: dict[str, list[float]] = {n: [] for n in runs}
    for i in range(rounds + warm):
        for name, run in runs.items():
            sync()
            start = clock()
            run()
            sync()
            if i >= warm:
                times[name].append(clock() - start)
    return times


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(times: Mapping[str, list[float]], bound: str) -> dict[str, float]:
    """Median over rounds of each run's time over the bound's of the same round."""
    return {n: statistics.median(a / b for a, b in zip(t, times[bound], strict=True)) for n, t in times.items()}


def write(name: str, rows: Any, **more: Any) -> None:
    """``rows`` are what the table shows; ``more`` is kept beside them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), "rows": rows} | more, indent=2) + "\n")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def llama(hidden: int, layers: int, dtype: torch.dtype = torch.float32, vocab: int = 1024) -> Any:
    import transformers as T

    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        intermediate_size=hidden * 11 // 4, max_position_embeddings=2048,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).to(device(), dtype)
