"""A small server with real adapters of many sorts, and what each request must answer: the model merged with its adapter, alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise.serve.adapters.kinds import Limits
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.server import Server, Sizes, build_server
from rankwise.serve.types import Event, Finished, Outcome, Request, Sampling, Token
from tests.models import VOCAB, llama, move

TIE = 2e-4  #: of logits: below it two tokens are equally likely, and rounding may choose either

#: name → recipe.  Plain pairs of several ranks, some on few modules; kinds that are no pair; a whole head.
RECIPES: dict[str, dict[str, Any]] = {
    "one": {"form": "lora", "r": 1},
    "three": {"form": "lora", "r": 3, "targets": ["q_proj", "v_proj"]},
    "eight": {"form": "lora", "r": 8},
    "nine": {"form": "lora", "r": 9, "targets": ["o_proj", "down_proj"]},
    "rs": {"form": "lora", "r": 16, "scale": "alpha/sqrt_r", "alpha": 4},
    "dora": {"form": "dora", "r": 4},
    "paca": {"form": "paca", "r": 4},
    "xs": {"form": "lora_xs", "r": 4},
    "headed": {"form": "lora", "r": 2, "modules_to_save": ["lm_head"]},
}


def base_model() -> Any:
    """A Llama with grouped heads whose weights are large enough for its answers to be decided."""
    model = llama(seed=1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3)
    return model


@functools.cache
def folder() -> Path:
    """One folder of adapters for all tests of a process."""
    root = Path(tempfile.mkdtemp(prefix="rankwise-adapters-"))
    for i, (name, recipe) in enumerate(RECIPES.items()):
        adapter = rw.attach(base_model(), recipe)
        move(adapter, seed=i, std=0.3)
        adapter.save(root / name)
    return root


@functools.cache
def merged(adapters: tuple[tuple[str, float], ...]) -> Any:
    """The plain model with one adapter folded into its weights; all of them attached, for mixes; the base."""
    model = base_model()
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        rw.load(model, folder() / adapters[0][0]).merge()
    elif adapters:
        for name in RECIPES:
            rw.load(model, folder() / name, name=name, activate=False)
    return model


#: (adapters, tokens) → (the likeliest next token, its lead over the second) of the plain model on its own
_KNOWN: dict[tuple[tuple[tuple[str, float], ...], tuple[int, ...]], tuple[int, float]] = {}


def next_tokens(adapters: tuple[tuple[str, float], ...], tokens: tuple[int, ...], start: int) -> list[tuple[int, float]]:
    """(likeliest next token, its lead over the second) after the first ``start`` tokens, after one more, … after all.

    One call of the plain model gives all of them: a token depends on those before it only.
    """
    ends = range(start, len(tokens) + 1)
    if any((adapters, tokens[:n]) not in _KNOWN for n in ends):
        mix = len(adapters) > 1 or any(w != 1.0 for _, w in adapters)
        model = merged((("every adapter", 0.0),) if mix else adapters)
        with torch.inference_mode(), rw.view(model, dict(adapters)) if mix else contextlib.nullcontext():
            top = model(input_ids=torch.tensor([tokens])).logits[0].topk(2)
        leads = (top.values[:, 0] - top.values[:, 1]).tolist()
        for n in ends:
            _KNOWN[adapters, tokens[:n]] = int(top.indices[n - 1, 0]), leads[n - 1]
    return [_KNOWN[adapters, tokens[:n]] for n in ends]


def check_greedy(request: Request, ids: list[int], adapters: tuple[tuple[str, float], ...]) -> None:
    """Every token is the one that the model alone gives after those before it; a tie may go either way."""
    if not ids:
        return
    alone = next_tokens(adapters, (*request.prompt, *ids[:-1]), len(request.prompt))
    for i, (got, (want, lead)) in enumerate(zip(ids, alone, strict=True)):
        assert got == want or lead < TIE, (
            f"{request.id}: token {i} is {got}, alone it is {want} (by {lead:.4f}); adapters {adapters}, prompt {request.prompt}"
        )


@functools.cache
def server(page: int, blocks: int, pages: int, op: str, pack: bool, policy: str, loop: bool | None = None) -> Server:
    """A server of these sizes; one for all scenarios that ask for the same."""
    sizes = Sizes(kv_tokens=blocks * page, page=page, max_lora_blocks=pages)
    return build_server(
        base_model(),
        lambda adapter_loader: FolderSource(folder(), adapter_loader),
        sizes=sizes,
        op=op,
        pack=pack,
        loop=loop,
        policy=policy,
        base="rig",
        limits=Limits(),
    )


def configure(made: Server, **options: Any) -> None:
    """Other options for a server that is idle."""
    engine = made.engine
    engine.options = engine.scheduler.options = chosen = EngineOptions(**options)
    engine.pace.max_num_batched_tokens, engine.pace.slo = chosen.max_num_batched_tokens, chosen.step_seconds


@dataclasses.dataclass
class Run:
    """One scenario's requests as they went."""

    requests: dict[str, Request] = dataclasses.field(default_factory=dict)
    adapters: dict[str, tuple[tuple[str, float], ...]] = dataclasses.field(default_factory=dict)
    events: dict[str, list[Event]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    cancelled: set[str] = dataclasses.field(default_factory=set)

    def outcome(self, name: str) -> Finished:
        last = self.events[name][-1]
        assert isinstance(last, Finished)
        return last


#: (page, blocks, pages, operator, packed, policy, by the loop): loose and tight, every page and operator at least once
SERVERS = (
    (1, 40, 6, "reference", False, "fcfs", True),
    (2, 22, 4, "bags", True, "default", False),
    (4, 12, 24, "auto", False, "fcfs", False),
    (8, 6, 6, "auto", True, "default", True),
    (4, 50, 4, "reference", True, "fcfs", False),
    (8, 25, 24, "bags", False, "default", True),
)


#: beginnings that prompts of all scenarios share, so that blocks of earlier scenarios are found, and given up, too
STARTS = tuple(tuple(random.Random(n).choices(range(VOCAB), k=n)) for n in (9, 16))


def scenario(seed: int) -> tuple[Run, Server]:
    """Random requests on a random server: arrivals, chunks, pages, tight memory, shared prefixes, mixes, cancels, evictions."""
    rnd = random.Random(seed)
    made = server(*rnd.choice(SERVERS))
    configure(
        made,
        max_num_seqs=rnd.choice([1, 2, 4, 8]),
        max_num_batched_tokens=rnd.choice([1, 3, 8, 64]),
        eos=(2,),
        speculate=rnd.choice([0, 0, 2, 5]),
    )
    made.engine.scheduler.index.share = rnd.random() < 0.85
    run = Run()
    due: list[tuple[int, Request]] = []
    for k in range(rnd.randrange(2, 9)):
        prompt = (rnd.choice(STARTS) if rnd.random() < 0.7 else ()) + tuple(
            rnd.randrange(VOCAB) for _ in range(rnd.randrange(1, 10))
        )
        adapters = draw_adapters(rnd)
        digest = digest_of(made, adapters)
        request = Request(
            f"r{k}", prompt, Sampling(max_tokens=rnd.randrange(1, 9), ignore_eos=rnd.random() < 0.7), digest,
            tenant=rnd.choice(["", "a"]), group=None,
        )  # fmt: skip
        run.requests[request.id], run.adapters[request.id] = request, adapters
        due.append((rnd.randrange(12), request))
    try:
        drive(made, run, due, rnd)
    except BaseException:
        server.cache_clear()  # what a failure leaves behind must not fail the scenarios after it
        raise
    return run, made


def draw_adapters(rnd: random.Random) -> tuple[tuple[str, float], ...]:
    kind = rnd.random()
    if kind < 0.2:
        return ()
    if kind < 0.85:
        return ((rnd.choice(list(RECIPES)[: rnd.choice([2, len(RECIPES)])]), 1.0),)
    two = rnd.sample([n for n in RECIPES if n not in ("dora", "headed")], 2)
    return tuple((n, rnd.choice([0.5, 1.0, -0.3])) for n in sorted(two))


def digest_of(made: Server, adapters: tuple[tuple[str, float], ...]) -> str | None:
    if not adapters:
        return None
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return made.cache.resolve(adapters[0][0]).digest
    return made.cache.mix(adapters).digest


def drive(made: Server, run: Run, due: list[tuple[int, Request]], rnd: random.Random) -> None:
    """Step until all has ended; some are cancelled on the way."""
    step = 0
    while due or not made.engine.idle():
        for when, request in list(due):
            if when <= step:
                made.engine.submit(request, run.events[request.id].append)
                due.remove((when, request))
        if rnd.random() < 0.02 and run.events:
            victim = rnd.choice(sorted(run.events))
            run.cancelled.add(victim)
            made.engine.cancel(victim)
        made.engine.step()
        step += 1
        assert step < 20_000, made.engine.stats()


def check(run: Run, made: Server) -> None:
    """Each answer is that of its merged model, and nothing is left behind."""
    assert not made.engine.error, made.engine.error
    for name, request in run.requests.items():
        done = run.outcome(name)
        ids = [e.id for e in run.events[name] if isinstance(e, Token)]
        check_greedy(request, ids, run.adapters[name])
        if done.outcome is Outcome.CANCELLED:
            assert name in run.cancelled
            continue
        eos = bool(ids) and ids[-1] == 2 and not request.sampling.ignore_eos
        assert done.outcome is (Outcome.STOP if eos else Outcome.LENGTH), (name, done)
        assert eos or len(ids) == request.sampling.max_tokens
        assert done.generated_tokens == len(ids) and done.prompt_tokens == len(request.prompt)
    nothing_is_held(made)


def nothing_is_held(made: Server) -> None:
    """No request is known any more, no adapter pinned, and every block can be had."""
    index = made.engine.scheduler.index
    assert not made.engine.inbox.ids and not made.cache._pins and not any(s.use.pins for s in made.table.slots.values())
    assert index.available() == made.engine.scheduler.total_blocks and not index.refs
