"""Fine-tuning jobs by the real client: data in the request or in a file, progress, a new version, refusals."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import rankwise as rw
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.finetune.queue import beside
from rankwise.serve.http.app import make_app
from rankwise.serve.http.server import HttpServer
from rankwise.serve.http.settings import Settings
from rankwise.serve.server import Sizes, build_server
from tests.serve.http.live import base, greedy, wait

TEXTS = [" ".join(w for w in line.split() for _ in range(2)) for line in ("the old man sat down", "a river went to the tall tree", "the man saw a tree")]  # fmt: skip


@contextlib.contextmanager
def running(home: Path, training: bool = True) -> Iterator[tuple[str, Any]]:
    """(URL, engine) of a server of the shipped base over its own adapters."""
    model, tokenizer = base()
    (home / "adapters").mkdir(parents=True, exist_ok=True)
    (home / "data").mkdir(exist_ok=True)
    made = build_server(
        copy.deepcopy(model), lambda adapter_loader: FolderSource(home / "adapters", adapter_loader), sizes=Sizes(2048, 16, 8),
        options=EngineOptions(eos=(1,), train_tokens=48), pack=False,
    )  # fmt: skip
    stream = beside(made, home, context=128) if training else None
    settings = Settings(
        model="base", context=512, vocabulary=4096, ends=frozenset({1}), train_roots=(home / "data",), train_bytes=5000
    )
    server = HttpServer(make_app(made.engine, made.cache, tokenizer, settings, training=stream), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait(lambda: server.started and server.service.phase.value == "ready")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", made.engine
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    with running(home) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(api_key="none", base_url=url + "/v1", max_retries=0, timeout=60) as c:
        yield c


def create(client: Any, suffix: str, data: Any = None, **more: Any) -> Any:
    data = [{"text": t} for t in TEXTS] if data is None else data
    named = {k: more.pop(k) for k in ("hyperparameters", "seed", "model") if k in more}
    body = {"training_data": data, **more}
    return client.fine_tuning.jobs.create(
        **{"model": "base", "training_file": openai.omit, "suffix": suffix, "extra_body": body, **named}
    )


def ended(client: Any, id: str) -> Any:
    wait(lambda: client.fine_tuning.jobs.retrieve(id).status in ("succeeded", "failed", "cancelled"), 60)
    return client.fine_tuning.jobs.retrieve(id)


def test_a_job_is_trained_and_served(client: Any, home: Path) -> None:
    job = create(client, "twice", recipe={"r": 4}, steps=20, lr=1e-2)
    assert job.status in ("queued", "running") and job.object == "fine_tuning.job"
    said = client.completions.create(model="base", prompt="the", max_tokens=8, temperature=0).choices[0].text
    done = ended(client, job.id)
    assert done.status == "succeeded" and done.fine_tuned_model == "twice" and done.trained_tokens > 100, done.error
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    losses = [e.data["loss"] for e in events if e.type == "metrics"][::-1]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert events.data[0].message == "The adapter is served as 'twice', version 1."

    assert "twice" in [m.id for m in client.models.list()]
    got = client.completions.create(model="twice", prompt="the the old old", max_tokens=12, temperature=0)
    model, tokenizer = copy.deepcopy(base()[0]), base()[1]
    rw.load(model, home / "adapters" / "twice" / "v1").merge()
    ids = greedy(model, tokenizer("the the old old")["input_ids"], 12)
    assert got.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)
    again = client.completions.create(model="base", prompt="the", max_tokens=8, temperature=0)
    assert again.choices[0].text == said


def test_data_in_a_file_and_openais_hyperparameters(client: Any, home: Path) -> None:
    rows = [{"prompt": "say it twice: ", "completion": t} for t in TEXTS]
    (home / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = client.fine_tuning.jobs.create(
        model="base", training_file="rows.jsonl", suffix="filed", seed=3,
        hyperparameters={"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 2.0},
    )  # fmt: skip
    done = ended(client, job.id)
    assert done.status == "succeeded" and (done.step, done.total_steps, done.samples) == (3, 3, 3), done.error
    assert done.hyperparameters.learning_rate_multiplier == 2.0 and done.seed == 3


def test_a_job_is_cancelled(client: Any) -> None:
    job = create(client, "never", steps=100_000)
    wait(lambda: client.fine_tuning.jobs.retrieve(job.id).step >= 1)
    client.fine_tuning.jobs.cancel(job.id)
    assert ended(client, job.id).status == "cancelled"
    assert "never" not in [m.id for m in client.models.list()]
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_lists_go_by_pages(client: Any) -> None:
    jobs = [create(client, f"page{i}", steps=1).id for i in range(3)]
    for id in jobs:
        ended(client, id)
    listed = [j.id for j in client.fine_tuning.jobs.list(limit=2)]  # goes on by itself
    assert listed[:3] == jobs[::-1] and len(set(listed)) == len(listed)
    events = [e.message for e in client.fine_tuning.jobs.list_events(jobs[0], limit=1)]
    assert events[-1] == "The job is queued." and len(events) == 4
    assert client.get(f"/fine_tuning/jobs/{jobs[0]}/events?since=2", cast_to=object)["data"][0]["id"] == "ftevent-2"


def refused(call: Any, status: int, words: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert caught.value.status_code == status and words in caught.value.message, caught.value.message


def test_wrong_jobs_are_refused_before_they_are_queued(client: Any, home: Path) -> None:
    before = len(client.fine_tuning.jobs.list(limit=100).data)
    refused(lambda: create(client, "x", recipe={"form": "full"}), 400, "'full'")
    refused(lambda: create(client, "x", recipe={"r": 0}), 400, "r")
    refused(lambda: create(client, "x", recipe={"nonsense": 1}), 400, "nonsense")
    refused(lambda: create(client, "x", data=[]), 400, "no records")
    refused(lambda: create(client, "x", data=[{"nothing": "known"}]), 400, "record 1")
    refused(lambda: create(client, "x", data=[{"prompt": "a", "chosen": "b", "rejected": "c"}]), 400, "preference")
    refused(lambda: create(client, "x", data=[{"prompt": "a", "completion": "b " * 300}]), 400, "tokens")
    refused(lambda: create(client, "x", data=[{"text": "b " * 9000}]), 413, "bytes")
    refused(lambda: create(client, "x", steps=0), 400, "steps = 0")
    refused(lambda: create(client, "x", lr="fast"), 400, "lr")
    refused(lambda: create(client, "x", lr=1e-3, hyperparameters={"learning_rate_multiplier": 2}), 400, "either lr")
    refused(lambda: create(client, "base"), 400, "the base's name")
    refused(lambda: create(client, "../x"), 400, "suffix")
    refused(lambda: create(client, "x", model="other"), 400, "'base'")
    refused(lambda: create(client, "x", training_file="rows.jsonl"), 400, "either training_file")
    for path in ("../secret.jsonl", "/etc/passwd"):
        refused(lambda p=path: client.fine_tuning.jobs.create(model="base", training_file=p, suffix="x"), 400, "does not lie below")
    refused(lambda: client.fine_tuning.jobs.retrieve("ftjob-none"), 404, "ftjob-none")
    refused(lambda: client.fine_tuning.jobs.list(after="x"), 400, "not in this list")
    assert len(client.fine_tuning.jobs.list(limit=100).data) == before


def test_a_server_without_training_says_so(tmp_path: Path) -> None:
    with running(tmp_path, training=False) as (url, _), openai.OpenAI(api_key="none", base_url=url + "/v1", max_retries=0) as c:
        refused(lambda: create(c, "x"), 403, "--train")


def test_jobs_go_on_after_the_server_was_restarted(tmp_path: Path) -> None:
    with running(tmp_path) as (url, _), openai.OpenAI(api_key="none", base_url=url + "/v1", max_retries=0) as c:
        job = create(c, "long", steps=300, checkpoint_every=2)
        wait(lambda: c.fine_tuning.jobs.retrieve(job.id).step >= 5)
    with running(tmp_path) as (url, engine), openai.OpenAI(api_key="none", base_url=url + "/v1", max_retries=0) as c:
        went_on = "The job goes on after step"
        wait(lambda: any(e.message.startswith(went_on) for e in c.fine_tuning.jobs.list_events(job.id, limit=1000)))
        c.fine_tuning.jobs.cancel(job.id)
        assert ended(c, job.id).status == "cancelled"
        assert torch.is_inference_mode_enabled() is False and engine.stats().healthy
