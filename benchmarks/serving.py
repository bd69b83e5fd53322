"""Serving: tokens a second and ratios, everything on one model with the same requests, in random order, interleaved.

python -m benchmarks.serving [--rounds 7] [--quick]

Model M2: a random Llama, 512 wide, 8 layers, grouped heads, fp32.  ``generate`` is transformers' own as shipped; ``base`` is
this engine without adapters, the bound of every row with adapters.  Adapters are random and on all linears; a ratio alone
rewards a slow base, so tokens a second stand beside it.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import write
from rankwise.host import keep_freed_memory
from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
from rankwise.serve.adapters.layout import Layout
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.ops.base import WIDTH
from rankwise.serve.server import Server, Sizes, build_server
from rankwise.serve.simulate.trace import TraceOptions
from rankwise.serve.simulate.trace import generate as trace
from rankwise.serve.types import Request, Sampling

BATCH, PROMPT, OUTPUT = 16, 32, 32
POOL = 1000


def m2() -> Any:
    import transformers as T

    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval()


class RandomSource:
    """Adapters named ``r{rank}-{i}`` with random numbers on every linear; nothing is read, loading is measured elsewhere."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def names(self) -> list[str]:
        return []

    def resolve(self, name: str) -> AdapterMetadata:
        rank = int(name[1:].partition("-")[0])
        return AdapterMetadata(f"digest-{name}", name, "random", "lora", rank, -(-rank // WIDTH), 0)

    def fetch(self, manifest: AdapterMetadata) -> LoadedAdapter:
        g = torch.Generator().manual_seed(abs(hash(manifest.name)) % (1 << 31))
        pairs = {
            group.name: tuple(
                (torch.randn(manifest.rank, group.inp, generator=g) * 0.01, torch.randn(out, manifest.rank, generator=g) * 0.01)
                for out in group.outs
            )
            for group in self.layout.groups
        }
        return LoadedAdapter(manifest, pairs)


def server(model: Any, pages: int, *, native: bool = False, pack: bool | None = None, loop: bool | None = None) -> Server:
    return build_server(
        copy.deepcopy(model), lambda adapter_loader: RandomSource(adapter_loader.layout), sizes=Sizes(kv_tokens=16_384, max_lora_blocks=pages),
        options=EngineOptions(max_num_seqs=BATCH, max_num_batched_tokens=1024), policy="fcfs", native=native, pack=pack, loop=loop,
        share_prefixes=False,
    )  # fmt: skip


class Work:
    """Requests of one row, run again and again: (prompt, answer length, adapter or None)."""

    def __init__(self, made: Server, jobs: list[tuple[tuple[int, ...], int, str | None]]):
        self.made = made
        self.jobs = [(p, n, None if a is None else made.cache.resolve(a).digest) for p, n, a in jobs]
        self.tokens = sum(n for _, n, _ in self.jobs)
        self.runs = 0

    def __call__(self) -> None:
        engine = self.made.engine
        self.runs += 1
        for i, (prompt, n, digest) in enumerate(self.jobs):
            engine.submit(Request(f"{id(self)}-{self.runs}-{i}", prompt, Sampling(max_tokens=n, ignore_eos=True), digest), _ignore)
        while not engine.idle():
            engine.step()
        if engine.error:
            raise RuntimeError(engine.error)


def _ignore(_: Any) -> None:
    pass


def prompts(count: int, low: int, high: int, seed: int = 1) -> list[tuple[int, ...]]:
    rnd = random.Random(seed)
    return [tuple(rnd.randrange(3, 4096) for _ in range(rnd.randrange(low, high) if high > low else low)) for _ in range(count)]


def closed(made: Server, ranks: list[int] | None) -> Work:
    """The closed batch: 16 requests of 32 + 32 tokens, each under an adapter of its own, or all under the base."""
    names = [None] * BATCH if ranks is None else [f"r{r}-{i}" for i, r in enumerate(ranks)]
    return Work(made, list(zip(prompts(BATCH, PROMPT, PROMPT), [OUTPUT] * BATCH, names, strict=True)))


def ragged(made: Server, alpha: float | None, count: int) -> Work:
    """The trace of 1,000 rank-8 adapters by the power law, prompts and answers of 16 to 47 tokens, all there at once."""
    rate = 50.0
    drawn = trace(
        TraceOptions(
            adapters=POOL,
            ranks=(8,),
            alpha=alpha or 1.0,
            rate=rate,
            cv=1.0,
            duration=count / rate,
            prompt=(16, 48),
            output=(16, 48),
        )
    )
    texts = prompts(len(drawn), 48, 48, seed=2)
    return Work(
        made, [(t[: a.prompt], a.output, None if alpha is None else f"r8-{a.adapter}") for t, a in zip(texts, drawn, strict=True)]
    )


def prefill(made: Server, count: int, length: int, adapters: bool) -> Work:
    return Work(made, [(p, 1, f"r8-{i}" if adapters else None) for i, p in enumerate(prompts(count, length, length, seed=3))])


def generate(model: Any) -> Callable[[], None]:
    ids = torch.tensor(prompts(BATCH, PROMPT, PROMPT))

    def run() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT, min_new_tokens=OUTPUT, do_sample=False)

    return run


def continuous(model: Any) -> Callable[[], None] | None:
    """transformers' continuous batching of the same closed batch, base only, with its sizes set for a processor."""
    if not hasattr(model, "generate_batch"):
        return None
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    inputs = [list(p) for p in prompts(BATCH, PROMPT, PROMPT)]
    settings = GenerationConfig(max_new_tokens=OUTPUT, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, page_size=32, max_batch_tokens=512, allow_block_sharing=False)

    def run() -> None:
        out = model.generate_batch(inputs, generation_config=settings, continuous_batching_config=sizes)
        if sum(len(o.generated_tokens) for o in out.values()) != BATCH * OUTPUT:
            raise RuntimeError("transformers' continuous batching did not finish")

    return run


def peft_mixed(model: Any) -> Callable[[], None]:
    """PEFT's mixed batch: sixteen adapters on one model, ``adapter_names`` row by row."""
    import peft

    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="a0")
    for i in range(1, BATCH):
        wrapped.add_adapter(f"a{i}", config)
    wrapped.eval()
    ids = torch.tensor(prompts(BATCH, PROMPT, PROMPT))
    names = [f"a{i}" for i in range(BATCH)]

    def run() -> None:
        with torch.inference_mode():
            wrapped.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, max_new_tokens=OUTPUT, min_new_tokens=OUTPUT,
                do_sample=False,
            )  # fmt: skip

    return run


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run; the order is drawn anew each round, since a fixed one moves ratios by up to a tenth."""
    times: dict[str, list[float]] = {n: [] for n in runs}
    rnd = random.Random(0)
    for i in range(rounds + 1):
        for name in rnd.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def rows_of(
    part: str, runs: dict[str, Callable[[], None]], tokens: dict[str, int], bounds: dict[str, str], rounds: int
) -> list[dict[str, Any]]:
    times = measure(runs, rounds)
    out = []
    for name, seconds in times.items():
        row: dict[str, Any] = {"part": part, "what": name, "tokens/s": round(tokens[name] / statistics.median(seconds), 1)}
        for label, bound in bounds.items():
            if bound in times and bound != name:
                pairs = zip(times[bound], seconds, strict=True)
                row[label] = round(statistics.median(b / s * tokens[name] / tokens[bound] for b, s in pairs), 3)
        out.append(row)
        print(row, flush=True)
    return out


def index_share(made: Server, work: Work) -> float:
    """Share of a run's time that making plans and beginning the operator takes."""
    import rankwise.serve.engine.engine as engine

    spent = 0.0

    def timed(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            out = fn(*args)
            spent += time.perf_counter() - start
            return out

        return run

    plan, begin = engine.make_plan, made.runner.op.begin
    engine.make_plan, made.runner.op.begin = timed(plan), timed(begin)  # type: ignore[assignment,method-assign]
    try:
        start = time.perf_counter()
        work()
        return spent / (time.perf_counter() - start)
    finally:
        engine.make_plan, made.runner.op.begin = plan, begin  # type: ignore[method-assign]


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--rounds", type=int, default=7)
    args.add_argument("--quick", action="store_true", help="small counts, to see that it runs")
    given = args.parse_args()
    rounds, count = (1, 8) if given.quick else (given.rounds, 48)
    keep_freed_memory()  # for everybody in this process, `generate` too
    model = m2()
    plain, native = server(model, POOL), _native(model)
    unpacked, modules = server(model, 64, pack=False), server(model, 64, loop=False)
    print(
        "packed:", sum(b.packed is not None for b in plain.runner.bundles), "of", len(plain.runner.bundles), "products", flush=True
    )
    rows: list[dict[str, Any]] = []
    mixed, large = [64, 32, 16, 8] * 4, [64] * BATCH
    runs: dict[str, Callable[[], None]] = {
        "generate": generate(model),
        "base": closed(plain, None),
        "base, plain linears": closed(unpacked, None),
        "base, by transformers' modules": closed(modules, None),
        "16 distinct, rank 8": closed(plain, [8] * BATCH),
        "16 distinct, rank 8, by transformers' modules": closed(modules, [8] * BATCH),
        "16 distinct, rank 8, plain linears": closed(unpacked, [8] * BATCH),
        "ranks 64 32 16 8 × 4": closed(plain, mixed),
        "16 distinct, rank 64": closed(plain, large),
        "peft, 16 distinct, rank 8": peft_mixed(model),
    }
    batching = continuous(copy.deepcopy(model))
    if batching is not None:
        runs["transformers' continuous batching"] = batching
    if native is not None:
        runs["16 distinct, rank 8, native"] = closed(native, [8] * BATCH)
        runs["ranks 64 32 16 8 × 4, native"] = closed(native, mixed)
    rows += rows_of(
        "closed batch 16 × (32 + 32)",
        runs,
        dict.fromkeys(runs, BATCH * OUTPUT),
        {"of generate": "generate", "of base": "base"},
        rounds,
    )

    works = {"base": ragged(plain, None, count)}
    for alpha in (0.1, 0.3, 1.0):
        works[f"1,000 adapters, α = {alpha}"] = ragged(plain, alpha, count)
        if native is not None:
            works[f"1,000 adapters, α = {alpha}, native"] = ragged(native, alpha, count)
    more: dict[str, Callable[[], None]] = {**works, "generate": generate(model)}
    tokens = {n: w.tokens for n, w in works.items()} | {"generate": BATCH * OUTPUT}
    rows += rows_of("trace, prompts and answers 16–47", more, tokens, {"of generate": "generate", "of base": "base"}, rounds)

    for n, length in ((16, 32), (4, 128), (1, 512)):
        pair: dict[str, Callable[[], None]] = {"base": prefill(plain, n, length, False), "rank 8": prefill(plain, n, length, True)}
        if native is not None:
            pair["rank 8, native"] = prefill(native, n, length, True)
        rows += rows_of(f"prefill {n} × {length}", pair, dict.fromkeys(pair, n * length), {"of base": "base"}, rounds)

    few = server(model, 64)
    few_work, many_work = closed(few, [8] * BATCH), closed(plain, [8] * BATCH)
    fill(plain)
    pair = {f"{BATCH} loaded": few_work, f"{len(plain.table.slots)} loaded": many_work}
    rows += rows_of(
        "16 distinct, rank 8, by adapters loaded",
        pair,
        dict.fromkeys(pair, BATCH * OUTPUT),
        {"of the few": f"{BATCH} loaded"},
        rounds,
    )
    pair = {"none loaded": closed(server(model, 64), None), f"{len(plain.table.slots)} loaded, none used": closed(plain, None)}
    rows += rows_of("base, by adapters loaded", pair, dict.fromkeys(pair, BATCH * OUTPUT), {"of none": "none loaded"}, rounds)
    share = index_share(plain, ragged(plain, 0.3, count))
    rows.append({"part": "plans and index of a step", "what": "share of the trace's time, α = 0.3", "share": round(share, 4)})
    print(rows[-1])
    write("serving", rows)


def fill(made: Server) -> None:
    """Load adapters until no page is free."""
    for i in range(POOL - 8):
        if not made.pool.room("adapter"):
            break
        digest = made.cache.resolve(f"r8-{i}").digest
        served = made.engine.adapters.fetch(digest).result()
        slot = made.engine.adapters.enter(digest, served)
        if slot is not None:
            made.engine.adapters.leave(slot)
        made.engine.adapters.release(digest)


def _native(model: Any) -> Server | None:
    from rankwise.errors import RankwiseError

    try:
        return server(model, POOL, native=True)
    except RankwiseError as error:
        print("no native operator here:", error)
        return None


if __name__ == "__main__":
    main()
