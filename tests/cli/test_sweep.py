"""``rankwise sweep`` on the shipped base and real text: the grid, the table, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.tools import call


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rankwise.assets import tasks

    path = tmp_path_factory.mktemp("data") / "notes.txt"
    path.write_text("\n".join(tasks.domains()["email"][0])[:6000], encoding="utf-8")
    return path


SMALL = ["sweep", "--model", "base", "--set", "targets=q_proj", "--steps", "3", "--max-length", "48", "--lr", "0.005"]


def run(capsys: Any, text: Path, out: Path, *args: str) -> tuple[int, str, str]:
    return call(capsys, *SMALL, "--data", str(text), "--out", str(out), *args)


def test_a_grid_from_text_to_the_best_adapter(text: Path, tmp_path: Path, capsys: Any) -> None:
    import rankwise as rw
    from rankwise.assets import load_base

    out = tmp_path / "sweep"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("form: dora\nr: 2\n")
    code, shown, err = run(
        capsys, text, out, "-r", "lora", "-r", str(recipe), "-g", "form.r=2,4", "-g", "lr=1e-3,1e-2", "--together", "3"
    )
    assert code == 0, err
    report = json.loads((out / "sweep.json").read_text())
    names = {f"{stem}-r{r}-lr{lr}" for stem in ("lora", "mine") for r in (2, 4) for lr in ("0.001", "0.01")}
    assert {j["name"] for j in report["jobs"]} == names
    assert (out / "sweep.png").stat().st_size > 10_000
    scores = {j["name"]: j["after"]["loss"] for j in report["jobs"]}
    assert report["best"] == min(scores, key=lambda n: scores[n]) and f"best: {report['best']}" in shown and "next: " in shown
    assert all(len(j["losses"]) == 3 and 0 < j["after"]["bits_per_byte"] != j["before"]["bits_per_byte"] for j in report["jobs"])
    by = {j["name"]: j["trainable"] for j in report["jobs"]}
    assert by["lora-r4-lr0.01"] == 2 * by["lora-r2-lr0.01"] < by["mine-r4-lr0.01"]
    model, _ = load_base()
    for name in names:
        adapter = rw.load(model, out / name / "adapter", name=name)
        assert adapter.recipe.r == (4 if "-r4-" in name else 2)
        adapter.detach()


def test_one_job_is_what_it_is_alone(text: Path, tmp_path: Path, capsys: Any) -> None:
    """Together, and one after another with --together 1: the same held-out loss and the same adapters to rounding."""
    grid = ["-g", "form.r=2,3", "--json"]
    both = {}
    for width in ("1", "2"):
        code, shown, err = run(capsys, text, tmp_path / width, *grid, "--together", width)
        assert code == 0, err
        both[width] = {j["name"]: j["after"]["loss"] for j in json.loads(shown)["jobs"]}
    assert both["1"] == pytest.approx(both["2"], abs=1e-5)


def test_finished_jobs_are_kept_and_the_others_trained(text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sweep"
    assert run(capsys, text, out, "-g", "form.r=2")[0] == 0
    kept = (out / "lora-r2" / "adapter" / "rankwise.safetensors").stat()
    code, _, err = run(capsys, text, out, "-g", "form.r=2,3")
    assert code == 2 and "already holds 1 of these jobs (lora-r2)" in err and "--resume" in err
    code, shown, err = run(capsys, text, out, "-g", "form.r=2,3", "--resume")
    assert code == 0 and "lora-r2: finished before, kept" in err, err
    now = (out / "lora-r2" / "adapter" / "rankwise.safetensors").stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns) and (out / "lora-r3" / "job.json").exists()
    code, _, err = run(capsys, text, out, "-g", "form.r=2,3", "--resume", "--steps", "4")
    assert code == 2 and "was made with steps = 3, but this job has 4" in err
    code, _, err = run(capsys, text, out, "-g", "form.r=2", "--overwrite", "--steps", "4")
    assert code == 0, err
    assert json.loads((out / "lora-r2" / "job.json").read_text())["settings"]["steps"] == 4
    (out / "lora-r2" / "job.json").write_text("{")
    code, _, err = run(capsys, text, out, "-g", "form.r=2", "--resume")
    assert code == 2 and "cannot be read" in err


def test_what_diverges_is_named_and_what_cannot_share_a_batch_trains_apart(text: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "routed.yaml"
    recipe.write_text("r: 4\nrouter: {name: smora, k: 2}\n")
    out = tmp_path / "sweep"
    code, shown, err = run(
        capsys, text, out, "-r", "lora", "-r", str(recipe), "-g", "lr=1e-3,1e30", "--set", "form.r=4", "--steps", "8", "--json"
    )
    assert code == 0, err
    assert "routed-lr0.001: trained apart from the others, since the router 'smora'" in err.replace("\n", " ")
    jobs = {j["name"]: j for j in json.loads(shown)["jobs"]}
    for name, job in jobs.items():
        bad = name.endswith("lr1e+30")
        assert bool(job["error"]) == bad and bool(job["after"]) == (not bad), (name, job["error"])
        assert (out / name).exists() == (not bad)
    assert jobs["routed-lr0.001"]["note"] and not jobs["lora-lr0.001"]["note"]
    code, _, err = run(capsys, text, tmp_path / "none", "-g", "form.r=9999")
    assert code == 1 and "lora-r9999: refused" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-g", "lr"], "--grid takes field=value"),
        (["-g", "lr=1e-3,fast"], "--grid lr takes numbers; it got 'fast'"),
        (["-g", "batch=1.5"], "whole numbers"),
        (["-g", "lr=1e-3,1e-3"], "a value twice"),
        (["-g", "lr=1e-3", "-g", "lr=1e-2"], "names a field twice"),
        (["-g", "lr=0,1e-3"], "nothing would be learnt"),
        (["-g", "rank=2"], "no field 'rank'"),
        (["-r", "lara"], "lara"),
        (["-r", "lora", "-r", "lora"], "Two jobs would be called 'lora'"),
        (["--resume", "--overwrite"], "--resume keeps the finished jobs and --overwrite gives them up"),
        (["--epochs", "0"], "nothing would be learnt"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--model", "digits"], "no tokenizer"),
    ],
)
def test_mistakes_are_one_line(args: list[str], says: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    code, shown, err = run(capsys, text, tmp_path / "out", *args)
    assert code == 2 and says in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_one_record_is_split_or_refused(tmp_path: Path) -> None:
    from rankwise.errors import DataError
    from rankwise.train.data import Record
    from rankwise.train.sweep import kept_aside

    train, held, _ = kept_aside([Record("text", {"text": "0123456789" * 3}, "a:1")])
    assert train[0].fields["text"] + held[0].fields["text"] == "0123456789" * 3 and len(held[0].fields["text"]) == 3
    with pytest.raises(DataError, match="only record"):
        kept_aside([Record("completion", {"prompt": "a", "completion": "b"}, "a:1")])
    many = [Record("text", {"text": str(i)}, f"a:{i}") for i in range(20)]
    train, held, said = kept_aside(many)
    assert (train, held) == (many[:18], many[18:]) and said.startswith("2 of 20")


def test_advice_follows_from_the_numbers() -> None:
    from rankwise.train.advice import advice
    from rankwise.train.job_result import JobResult

    g = torch.Generator().manual_seed(0)
    noise = (torch.randn(60, generator=g) * 0.01).tolist()
    flat, falling = noise, [n - 0.05 * i for i, n in enumerate(noise)]

    def sweep_of(scores: dict[float, float], losses: list[float] = flat) -> list[str]:
        done = [JobResult(f"lr{lr}", {}, {"loss": 5.0}, {"loss": s}, losses=losses) for lr, s in scores.items()]
        return advice(done, {"lr": list(scores)}, {f"lr{lr}": {"lr": lr} for lr in scores})

    assert sweep_of({1e-4: 4.5, 1e-3: 4.0}) == ["lr = 0.001 is the highest tried and the best: try 0.01."]
    assert sweep_of({1e-4: 4.0, 1e-3: 4.5}) == ["lr = 0.0001 is the lowest tried and the best: try 1e-05."]
    assert sweep_of({1e-4: 4.5, 1e-3: 4.0, 1e-2: 4.4}) == ["The best values lie inside the grid: refine around them."]
    assert "train longer" in sweep_of({1e-4: 4.5, 1e-3: 4.0, 1e-2: 4.4}, falling)[0]
    assert "another seed" in sweep_of({1e-4: 4.5, 1e-3: 4.0, 1e-2: 4.001})[0]
    assert "No job is better than the base" in sweep_of({1e-3: 5.1})[0]
    assert "No job finished" in advice([JobResult("a", {}, {"loss": 5.0})], {}, {})[0]
