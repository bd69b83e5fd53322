"""Training beside serving in one engine: what is served does not notice, and a finished adapter is a new version."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.finetune.chunked_backward import Sample
from rankwise.serve.finetune.job import FineTuningJob, Status, TrainSpec
from rankwise.serve.finetune.queue import TrainStream, beside
from rankwise.serve.server import Server, Sizes, build_server
from rankwise.serve.types import Event, Finished, Outcome, Request, Sampling, Token
from tests.models import VOCAB
from tests.serve.rig import SERVERS, TIE, base_model, check, folder, scenario
from tests.serve.rig import server as rig_server


def made(home: Path) -> tuple[Server, TrainStream, list[torch.Tensor]]:
    """A server over the rig's adapters, its stream, and every logit that it computes."""
    (home / "adapters").mkdir(parents=True)
    server = build_server(
        base_model(), lambda adapter_loader: FolderSource([folder(), home / "adapters"], adapter_loader), sizes=Sizes(512, 4, 24),
        options=EngineOptions(max_num_batched_tokens=24, train_tokens=64), policy="fcfs", op="reference", pack=False, base="co",
    )  # fmt: skip
    stream = beside(server, home)
    seen: list[torch.Tensor] = []
    plain = server.runner.run
    server.engine.runner.run = lambda plan, slots: (seen.append(plain(plan, slots)), seen[-1])[1]  # type: ignore[method-assign]
    return server, stream, seen


def spec(name: str, steps: int = 6, seed: int = 0) -> TrainSpec:
    g = torch.Generator().manual_seed(seed)
    samples = tuple(Sample.of(torch.randint(3, VOCAB, (n,), generator=g).tolist()) for n in (9, 14, 20))
    return TrainSpec(name, samples, {"r": 3}, steps=steps, lr=5e-2, seed=seed)


def request(name: str, digest: str | None, n: int = 12, seed: int = 0) -> Request:
    prompt = torch.randint(3, VOCAB, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Request(name, tuple(prompt), Sampling(max_tokens=n, ignore_eos=True), digest)


def serve(server: Server, requests: list[Request], events: dict[str, list[Event]]) -> None:
    for r in requests:
        events[r.id] = []
        server.engine.submit(r, events[r.id].append)


def outcome(events: list[Event]) -> tuple[list[int], Outcome]:
    assert isinstance(events[-1], Finished), "it has not ended"
    return [e.id for e in events if isinstance(e, Token)], events[-1].outcome


def finish(server: Server, job: FineTuningJob | None = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not server.engine.idle() or (job is not None and not job.status.final):
        assert time.monotonic() < end, "it does not end"
        if not server.engine.step():
            time.sleep(0.001)


def test_logits_are_the_same_to_the_bit_whatever_is_trained_meanwhile(tmp_path: Path) -> None:
    found = []
    for training in (False, True):
        server, stream, seen = made(tmp_path / str(training))
        if training:
            job = stream.submit(spec("tone", steps=2000))
            while not stream.ready():
                time.sleep(0.001)
        events: dict[str, list[Event]] = {}
        names = [None, "one", "eight", "dora", "headed"]
        digests = [n and server.cache.resolve(n).digest for n in names]
        for d in filter(None, digests):  # read beforehand, or the disk would decide who shares a step
            server.cache.fetch(d).result()
        serve(server, [request(f"r{i}", d, 4 + i, i) for i, d in enumerate(digests)], events)
        finish(server)
        if training:
            assert job.step >= 3, "training went on meanwhile"
            assert server.engine.counters["train_tokens"] > 100
            stream.cancel(job.id)
            finish(server, job)
        found.append((seen, {n: outcome(e) for n, e in events.items()}))
    (plain, ended), (beside, ended_too) = found
    assert len(plain) == len(beside) > 7 and all(torch.equal(a, b) for a, b in zip(plain, beside, strict=True))
    assert ended == ended_too


def alone(adapter: Path | None, r: Request, ids: list[int]) -> None:
    """Every token is the likeliest of the merged model after those before it (a tie may go either way)."""
    model: Any = base_model()
    if adapter is not None:
        rw.load(model, adapter).merge()
    tokens = [*r.prompt, *ids]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, len(r.prompt) - 1 : -1]
    lead = logits.max(-1).values - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert float(lead.max()) < TIE


def test_a_finished_job_is_a_new_version_and_no_request_is_dropped(tmp_path: Path) -> None:
    server, stream, _ = made(tmp_path)
    first = stream.submit(spec("tone", seed=1))
    finish(server, first)
    assert first.status is Status.SUCCEEDED, first.error
    old = server.cache.resolve("tone")

    second = stream.submit(spec("tone", seed=2, steps=12))
    events: dict[str, list[Event]] = {}
    before: list[Request] = []
    while not second.status.final:  # somebody asks all the time
        before.append(request(f"b{len(before)}", old.digest, 40, len(before)))
        serve(server, before[-1:], events)
        for _ in range(9):
            server.engine.step()
    running = [r for r in before if not isinstance(events[r.id][-1] if events[r.id] else None, Finished)]
    assert running and second.status is Status.SUCCEEDED and second.version == 2
    new = server.cache.resolve("tone")
    assert new.digest != old.digest
    after = [request(f"a{i}", new.digest, 10, i) for i in range(3)]
    serve(server, after, events)
    finish(server)
    ends = {n: outcome(e) for n, e in events.items()}
    assert {o for _, o in ends.values()} == {Outcome.LENGTH}
    assert first.folder is not None and second.folder is not None
    for r in (before[0], running[-1]):
        alone(first.folder, r, ends[r.id][0])
    for r in after:
        alone(second.folder, r, ends[r.id][0])
    assert any(ends[a.id][0] != ends[b.id][0][:10] for a, b in zip(after, before, strict=False)), "the versions differ"


def test_the_master_identity_holds_while_a_job_is_trained(tmp_path: Path) -> None:
    """Random scenarios of the rig, on servers of its sizes, each with a job that never ends."""
    streams = []
    try:
        for i, sizes in enumerate(SERVERS):
            server = rig_server(*sizes)
            streams.append((server, beside(server, tmp_path / str(i))))
            streams[-1][1].submit(spec("endless", steps=10**6))
            while not streams[-1][1].ready():
                time.sleep(0.001)
        for seed in range(900_000, 900_010):
            check(*scenario(seed))
        assert sum(server.engine.counters["train_tokens"] > 50 for server, _ in streams) >= 2
    finally:
        for server, stream in streams:
            server.engine.stream = None
            stream.close()
