"""Jobs beside serving: the same trajectory as a plain Session's, cancelling, failing, restarting, publishing."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise import assets
from rankwise.errors import ArtefactError, DataError, OptionError, RankwiseError
from rankwise.recipe import Recipe
from rankwise.serve.finetune.chunked_backward import Sample
from rankwise.serve.finetune.job import FineTuningJob, Status, TrainSpec
from rankwise.serve.finetune.layerwise import LayerwiseModel
from rankwise.serve.finetune.queue import TrainStream
from rankwise.serve.finetune.training import Task, Training
from rankwise.serve.types import Sampling
from tests.models import VOCAB, llama


def samples(n: int, least: int = 6) -> tuple[Sample, ...]:
    g = torch.Generator().manual_seed(7)
    out = []
    for i in range(n):
        ids = torch.randint(3, VOCAB, (least + 3 * i,), generator=g).tolist()
        out.append(Sample.of(ids, [-100] * (i % 3) + ids[i % 3 :]))
    return tuple(out)


class Served:
    """What is published, by name."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}

    def __call__(self, name: str, folder: Path) -> None:
        self.folders[name] = folder


@pytest.fixture
def served() -> Served:
    return Served()


def drive(stream: TrainStream, job: FineTuningJob, budget: int = 16, until: Any = None, seconds: float = 60) -> None:
    """Steps of an engine that has nothing to serve."""
    end = time.monotonic() + seconds
    while not job.status.final and not (until is not None and until()):
        assert time.monotonic() < end, f"{job.status}: {[n.message for n in job.notes]}"
        if stream.ready():
            assert 0 <= stream.run(budget) <= budget + 1
        else:
            time.sleep(0.001)


def trained(folder: Path) -> dict[str, Tensor]:
    from rankwise.store.native import load_native

    return load_native(folder)[0]


@pytest.mark.parametrize("recipe", [{"r": 2}, {"form": "dora", "r": 2, "optimizer": "loraplus"}, {"r": 2, "init": "eva"}], ids=str)
def test_a_job_takes_the_steps_of_a_plain_session(recipe: dict[str, Any], tmp_path: Path, served: Served) -> None:
    base = llama().double()
    spec = TrainSpec("tone", samples(5), recipe, epochs=2, batch_size=2, lr=2e-2, schedule="cosine", warmup=1, weight_decay=0.1)
    stream = TrainStream(base, tmp_path, served)
    job = stream.submit(spec)
    drive(stream, job, budget=5)
    assert job.status is Status.SUCCEEDED and job.step == spec.total_steps == 5

    batches = [{"input_ids": torch.tensor([s.tokens]), "labels": torch.tensor([s.labels])} for s in spec.samples]
    adapter = rw.attach(base, {"seed": 0, **recipe}, calibration=batches)
    session = rw.Session(base, adapter, **spec.session_options())
    losses = []
    for step in range(spec.total_steps):
        batch = spec.batch(step)
        session.step_begin()
        total = sum(s.learnt for s in batch)
        loss = sum(
            nn.functional.cross_entropy(base(torch.tensor([s.tokens])).logits[0, :-1], torch.tensor(s.labels[1:]), reduction="sum")
            for s in batch
        )
        (loss / total).backward()
        losses.append(float(loss.detach()) / total)
        session.step()
    assert [r["loss"] for r in job.records] == pytest.approx(losses, rel=1e-6)
    assert losses[-1] < losses[0]
    got = trained(served.folders["tone"])
    for name, t in adapter.tensors().items():
        assert torch.allclose(got[name], t, rtol=1e-4, atol=1e-6), name


def test_every_sample_is_learnt_once_an_epoch() -> None:
    spec = TrainSpec("a", samples(5), epochs=2, batch_size=2)
    seen = [s for i in range(spec.total_steps) for s in spec.batch(i)]
    assert len(seen) == 10 and set(seen[:5]) == set(seen[5:]) == set(spec.samples) and seen[:5] != seen[5:]


def test_base_bits_and_the_base_model_stay(tmp_path: Path, served: Served) -> None:
    base = llama()
    before = {n: p.clone() for n, p in base.named_parameters()}
    ids = torch.tensor([samples(1, 20)[0].tokens])
    with torch.inference_mode():
        logits = base(ids).logits
    stream = TrainStream(base, tmp_path, served)
    job = stream.submit(TrainSpec("a", samples(4), {"form": "dora", "r": 4}, lr=5e-2))
    seen = 0
    while not job.status.final:
        if stream.ready():
            stream.run(7)
            with torch.inference_mode():
                assert torch.equal(base(ids).logits, logits), "in the midst of training"
            seen += 1
    assert seen > 20 and job.status is Status.SUCCEEDED
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in base.named_parameters())
    again = rw.load(base, served.folders["a"])
    assert again.numel() > 0
    with torch.no_grad():
        assert not torch.equal(base(ids).logits, logits)


def test_a_cancelled_job_frees_everything_and_the_next_begins(tmp_path: Path, served: Served) -> None:
    stream = TrainStream(llama(), tmp_path, served)
    first = stream.submit(TrainSpec("a", samples(4), {"r": 2}, epochs=1e5))
    waiting = stream.submit(TrainSpec("never", samples(1), {"r": 2}))
    last = stream.submit(TrainSpec("b", samples(2), {"r": 2}))
    drive(stream, first, until=lambda: first.step >= 2)
    assert stream.training is not None
    held = [weakref.ref(stream.training.adapter.trainable_parameters()[0]), weakref.ref(stream.training.net.model)]
    stream.run(3)  # in the midst of a sample
    stream.cancel(first.id)
    stream.cancel(waiting.id)
    drive(stream, last)
    gc.collect()
    assert [h() for h in held] == [None, None]
    assert (first.status, waiting.status, last.status) == (Status.CANCELLED, Status.CANCELLED, Status.SUCCEEDED)
    assert waiting.step == 0 and list(served.folders) == ["b"]
    assert not stream.ready() and stream.run(100) == 0
    assert stream.cancel(last.id).status is Status.SUCCEEDED, "too late"
    with pytest.raises(RankwiseError, match="No fine-tuning job is called 'x'"):
        stream.cancel("x")


def test_a_request_that_comes_in_is_let_by_after_one_piece(tmp_path: Path, served: Served) -> None:
    stream = TrainStream(llama(), tmp_path, served, most=4)
    job = stream.submit(TrainSpec("a", samples(4), {"r": 2}, epochs=100))
    drive(stream, job, until=stream.ready)
    begun: list[float] = []
    piece = stream._piece
    stream._piece = lambda budget: begun.append(budget) or piece(budget)  # type: ignore[method-assign,func-returns-value]
    assert 30 <= stream.run(40) <= 41 and min(begun) >= 10, "no sliver is begun"
    stream.wanted = lambda: True
    assert 1 <= stream.run(40) <= 5
    assert 30 <= stream.run(40, seconds=60) <= 41, "a limit of its own: nobody waits for longer"

    def slow(budget: float) -> float:
        time.sleep(0.02)
        return piece(budget)

    stream._piece = slow  # type: ignore[method-assign]
    start = time.monotonic()
    assert 1 <= stream.run(10_000, seconds=0.05) < 100, "what was thought of its price does not count"
    assert time.monotonic() - start < 5
    stream.cancel(job.id)
    drive(stream, job)


def test_a_job_that_breaks_ends_alone(tmp_path: Path, served: Served) -> None:
    stream = TrainStream(llama(), tmp_path, served)
    bad = stream.submit(TrainSpec("bad", samples(4), {"r": 2}, lr=1e38, max_grad_norm=None, epochs=9))
    good = stream.submit(TrainSpec("good", samples(2), {"r": 2}))
    unfit = stream.submit(TrainSpec("unfit", samples(2), {"targets": ["nothing_of_that_name"]}))
    for job in (bad, good, unfit):
        drive(stream, job)
    assert bad.status is Status.FAILED and ("finite" in bad.error or "loss is" in bad.error)
    assert good.status is Status.SUCCEEDED and list(served.folders) == ["good"]
    assert unfit.status is Status.FAILED and "nothing_of_that_name" in unfit.error


def test_what_cannot_be_served_fails_by_its_reason(tmp_path: Path) -> None:
    def refuse(name: str, folder: Path) -> None:
        raise ArtefactError(f"{name} is not for this server.")

    stream = TrainStream(llama(), tmp_path, refuse)
    job = stream.submit(TrainSpec("a", samples(1), {"r": 2}))
    drive(stream, job)
    assert job.status is Status.FAILED and job.error == "a is not for this server."


def test_versions_count_up(tmp_path: Path, served: Served) -> None:
    stream = TrainStream(llama(), tmp_path, served)
    for n in (1, 2):
        job = stream.submit(TrainSpec("a", samples(1), {"r": 2}, seed=n))
        drive(stream, job)
        assert job.version == n and served.folders["a"] == job.folder and job.folder.name == f"v{n}"
    assert len(list((tmp_path / "adapters" / "a").iterdir())) == 2


def test_a_restarted_job_ends_where_it_would_have(tmp_path: Path, served: Served) -> None:
    spec = TrainSpec("a", samples(6), {"r": 2}, epochs=2, lr=1e-2, checkpoint_every=3)
    straight = TrainStream(llama(), tmp_path / "straight", served)
    drive(straight, straight.submit(spec))
    wanted = trained(served.folders["a"])

    stream = TrainStream(llama(), tmp_path / "cut", served)
    job = stream.submit(spec)
    drive(stream, job, until=lambda: job.step >= 5)
    assert not job.status.final
    stream.close()
    again = TrainStream(llama(), tmp_path / "cut", served)
    same = again.get(job.id)
    assert same.status is Status.QUEUED and same.spec == spec
    drive(again, same)
    assert same.step == 12 and same.tokens == sum(len(s.tokens) for s in spec.samples) * 2
    assert "The job goes on after step 3." in [n.message for n in same.notes]
    got = trained(served.folders["a"])
    assert all(torch.equal(got[n], t) for n, t in wanted.items())
    again.close()
    third = TrainStream(llama(), tmp_path / "cut", served).get(job.id)
    assert third.status is Status.SUCCEEDED and third.version == 1 and third.records[-1]["step"] == 12
    assert not list(third.home.glob("checkpoint-*"))


def test_a_damaged_job_file_is_told(tmp_path: Path, served: Served) -> None:
    stream = TrainStream(llama(), tmp_path, served)
    job = stream.submit(TrainSpec("a", samples(1), {"r": 2}))
    text = json.loads((job.home / "job.json").read_text())
    (job.home / "job.json").write_text(json.dumps({**text, "status": "gone"}))
    with pytest.raises(ArtefactError, match="cannot be read"):
        TrainStream(llama(), tmp_path, served)


REFUSED = [
    ({"dropout": 0.1}, "dropout"), ({"form": "full"}, "'full'"), ({"init": "loftq"}, "'loftq'"), ({"losses": ["orthogonality"]}, "losses"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "why"), REFUSED)
def test_recipes_that_do_not_fit_are_refused_at_once(recipe: dict[str, Any], why: str) -> None:
    with pytest.raises(RankwiseError, match=why):
        TrainSpec("a", samples(1), {"r": 2, **recipe})


def test_wrong_values_are_refused_at_once(tmp_path: Path, served: Served) -> None:
    for wrong in (
        {"lr": 0.0},
        {"epochs": 0.0},
        {"batch_size": 0},
        {"steps": 0},
        {"lr": math.nan},
        {"samples": ()},
        {"warmup": 99.0},
        {"name": "../x"},
    ):
        with pytest.raises(OptionError):
            TrainSpec(**{"name": "a", "samples": samples(2), **wrong})  # type: ignore[arg-type]
    stream = TrainStream(llama(), tmp_path, served, context=10)
    for bad in (Sample.of([1] * 11), Sample.of([1, VOCAB]), Sample.of([-1, 1])):
        with pytest.raises(OptionError, match="Sample 0 has"):
            stream.submit(TrainSpec("a", (bad,)))
    assert not stream.jobs
    with pytest.raises(DataError):
        Sample.of([1])


def done(task: Task, budget: float = 4) -> Any:
    while not task.done:
        task.take(budget)
    return task.result.result()


def test_a_loop_of_ones_own_by_the_primitives(tmp_path: Path) -> None:
    """Reward the token 5: sample, weigh, step; and greedy samples are those of the adapted model."""
    base = llama()
    training = Training(
        LayerwiseModel(base),
        Recipe.of({"r": 4, "targets": ["all-linear", "lm_head"]}),
        lr=5e-2,
        total_steps=60,
        schedule="constant",
    )
    prompt = [3, 9, 4]
    for step in range(60):
        loss = done(training.forward_backward([Sample.of([*prompt, 5, 5, 5], [-100, -100, -100, 5, 5, 5])]))
        logs = done(training.optim_step(lr=2e-2 if step == 40 else None))
        assert logs["lr"] == (5e-2 if step < 40 else 2e-2)
    assert loss < 0.5
    greedy = Sampling(max_tokens=6, ignore_eos=True)
    got = done(training.sample(prompt, greedy), 2)
    training.save(tmp_path / "a")
    training.close()
    rw.load(base, tmp_path / "a")
    ids = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
    assert got == ids[3:] and got[:3] == [5, 5, 5]
    with pytest.raises(OptionError):
        training.optim_step(lr=-1.0)


def test_real_text_improves(tmp_path: Path, served: Served) -> None:
    """A style that the shipped base has not seen: every word said twice."""
    model, tokenizer = assets.load_base()
    words = tuple("the old man went down to the river and sat under a tall tree for a while".split())  # noqa: SIM905
    lines = [" ".join(w for w in words[i : i + 6] for _ in range(2)) for i in range(8)]
    spec = TrainSpec("twice", tuple(Sample.of(tokenizer(line)["input_ids"]) for line in lines), {"r": 8}, steps=16, lr=1e-2)
    stream = TrainStream(model, tmp_path, served)
    job = stream.submit(spec)
    drive(stream, job, budget=64)
    losses = [r["loss"] for r in job.records]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    other = tuple("under the tree an old river went down and a man sat for a tall while".split())  # noqa: SIM905
    ids = torch.tensor([tokenizer(" ".join(w for w in other for _ in range(2)))["input_ids"]])
    with torch.no_grad():
        before = float(model(ids, labels=ids).loss)
        rw.load(model, served.folders["twice"])
        assert float(model(ids, labels=ids).loss) < before, "a sentence that was not learnt"
