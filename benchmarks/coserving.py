"""Fine-tuning beside serving: what a heavy trace leaves of the stand-alone token rate, and what training does to requests.

python -m benchmarks.coserving [--seconds 20] [--rounds 2]

Model M0 (a random Llama, 256 wide, 4 layers, grouped heads, fp32), requests of the S-LoRA trace (Poisson, 32 adapters of rank
8, prompts and answers of 4 to 63 tokens) at shares of the engine's capacity, one LoRA job of rank 8 on samples of 256 tokens.
Limits: a request's mean time a token, as a multiple of the unloaded one; its first token within 0.25 s or ten times the
unloaded one.  A request that misses one of them is not attained.  The rounds are interleaved, figures are medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write
from benchmarks.serving import RandomSource, prompts
from rankwise.host import keep_freed_memory
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.finetune.chunked_backward import Sample
from rankwise.serve.finetune.job import TrainSpec
from rankwise.serve.finetune.queue import TrainStream, beside
from rankwise.serve.server import Server, Sizes, build_server
from rankwise.serve.simulate.trace import Arrival, TraceOptions, generate
from rankwise.serve.types import Event, Finished, Outcome, Request, Sampling, Token

LENGTHS, SAMPLE = (4, 64), 256
LOADS, LIMITS = (0.25, 0.5, 0.75), (3.0, 10.0, 20.0)
SHARE = 0.85  #: of a limit, to which the steps are held, so that a request's mean lies within it


def m0() -> Any:
    import transformers as T

    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval()


@dataclasses.dataclass
class Seen:
    """One request: when it was sent, its tokens' times, how it ended."""

    at: float
    times: list[float] = dataclasses.field(default_factory=list)
    outcome: Outcome | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.times.append(time.perf_counter())
        elif isinstance(event, Finished):
            self.outcome = event.outcome

    @property
    def first(self) -> float:
        return self.times[0] - self.at

    @property
    def each(self) -> float:
        return (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)


class Bench:
    """A server, and a job without end that is let work or not."""

    def __init__(self, home: Path):
        (home / "adapters").mkdir()
        self.made: Server = build_server(
            m0(), lambda adapter_loader: RandomSource(adapter_loader.layout), sizes=Sizes(kv_tokens=16_384, max_lora_blocks=40),
            options=EngineOptions(max_num_seqs=128), policy="fcfs", share_prefixes=False,
        )  # fmt: skip
        self.engine = self.made.engine
        self.stream: TrainStream = beside(self.made, home)
        g = torch.Generator().manual_seed(0)
        samples = tuple(Sample.of(torch.randint(3, 4096, (SAMPLE,), generator=g).tolist()) for _ in range(16))
        self.stream.submit(TrainSpec("job", samples, {"r": 8}, steps=10**6, lr=1e-4))
        self.train(False)
        self.sent = 0
        self.engine.start()
        while not self.stream.ready():
            time.sleep(0.01)

    def train(self, on: bool) -> None:
        self.engine.stream = self.stream if on else None
        self.engine.call(lambda: None)

    def send(self, prompt: tuple[int, ...], n: int, adapter: str | None) -> Seen:
        digest = None if adapter is None else self.made.cache.resolve(adapter).digest
        self.sent += 1
        seen = Seen(time.perf_counter())
        self.engine.submit(Request(f"r{self.sent}", prompt, Sampling(max_tokens=n, ignore_eos=True), digest), seen)
        return seen

    def play(self, arrivals: list[Arrival]) -> list[Seen]:
        """Open loop: each request at its time, whatever happens."""
        texts = prompts(len(arrivals), LENGTHS[1], LENGTHS[1])
        start, out = time.perf_counter(), []
        for text, a in zip(texts, arrivals, strict=True):
            time.sleep(max(0.0, start + a.at - time.perf_counter()))
            out.append(self.send(text[: a.prompt], a.output, f"r8-{a.adapter}"))
        wait(lambda: all(s.outcome is not None for s in out))
        return out

    def trained(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """(training tokens a second while ``call`` ran, what it gave)."""
        before, start = self.engine.counters["train_tokens"], time.perf_counter()
        made = call()
        return (self.engine.counters["train_tokens"] - before) / (time.perf_counter() - start), made


def wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def trace(rate: float, seconds: float) -> list[Arrival]:
    return generate(TraceOptions(adapters=32, rate=rate, duration=seconds, prompt=LENGTHS, output=LENGTHS))


def capacity(bench: Bench) -> float:
    """Requests a second where all of 96 are there at once."""
    start = time.perf_counter()
    bench.play([dataclasses.replace(a, at=0.0) for a in trace(96.0, 1.0)])
    return 96 / (time.perf_counter() - start)


def unloaded(bench: Bench) -> tuple[float, float]:
    """Medians of (first token, a token) of requests that are alone."""
    seen = []
    for p in prompts(9, 32, 32):
        seen.append(bench.send(p, 32, "r8-0"))
        wait(lambda: seen[-1].outcome is not None)
    return statistics.median(s.first for s in seen), statistics.median(s.each for s in seen)


def attainment(seen: list[Seen], first: float, each: float) -> float:
    met = [s.outcome is Outcome.LENGTH and s.first <= first and s.each <= each for s in seen]
    return sum(met) / len(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    keep_freed_memory()  # as `rankwise serve` does
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        capacity(bench)  # warm
        most = capacity(bench)
        ttft, token = unloaded(bench)
        first = max(0.25, 10 * ttft)
        found: dict[tuple[float, float], list[tuple[float, ...]]] = {}
        for _ in range(asked.rounds):
            for load in LOADS:
                for times in LIMITS:
                    found.setdefault((load, times), []).append(one(bench, most * load, first, token * times, asked.seconds))
        bench.train(False)
        bench.engine.stop(drain=False)
    rows = []
    for (load, times), runs in found.items():
        alone, kept, before, after, each, late = (statistics.median(r) for r in zip(*runs, strict=True))
        rows.append({
            "load (of capacity)": load, "limit a token (x unloaded)": times, "training alone, tokens/s": alone, "beside serving": kept,
            "kept": kept / alone, "attained without training": before, "with training": after, "ms a token, with training": 1e3 * each, "p90 of the first token, ms": 1e3 * late,
        })  # fmt: skip
    note = (
        f"Capacity {most:.1f} requests/s; unloaded: {1e3 * ttft:.1f} ms to the first token, {1e3 * token:.2f} ms a token; first token "
        f"within {first:.2f} s. A training token is one pass through the layers; a sample's costs about three and its head."
    )
    write("coserving", rows, note=note, rounds=asked.rounds, seconds=asked.seconds)


def one(bench: Bench, rate: float, first: float, each: float, seconds: float) -> tuple[float, ...]:
    """(training alone, beside serving, attained without, with; with: mean time a token, late first token) at one rate and limit."""
    bench.engine.pace.slo = SHARE * each
    bench.train(True)
    alone, _ = bench.trained(lambda: time.sleep(seconds / 2))
    kept, seen = bench.trained(lambda: bench.play(trace(rate, seconds)))
    bench.train(False)
    plain = bench.play(trace(rate, seconds))
    late = sorted(s.first for s in seen)[int(0.9 * len(seen))]
    return alone, kept, attainment(plain, first, each), attainment(seen, first, each), statistics.mean(s.each for s in seen), late


if __name__ == "__main__":
    main()
