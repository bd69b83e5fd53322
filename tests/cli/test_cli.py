"""Verbs as a user runs them: real processes, exit status, one line for a mistake, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli import common
from tests.cli.tools import call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rankwise.assets import tasks

    path = tmp_path_factory.mktemp("data") / "task.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in tasks.docstring_task()[0][:12]))
    return path


@pytest.mark.slow
def test_from_data_to_a_merged_model(capsys: Any, data: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    code, text, err = call(
        capsys,
        "train",
        "--model",
        "base",
        "--data",
        str(data),
        "--out",
        run,
        "--set",
        "form.r=4",
        "--steps",
        "4",
        "--lr",
        "0.002",
        "--batch",
        "2",
        "--max-length",
        "96",
        "--json",
    )
    assert code == 0, err
    metrics = json.loads(text[text.index("{") :])
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    adapter = f"{run}/adapter"
    code, text, _ = call(capsys, "inspect", adapter, "--model", "base", "--json", "--picture", str(tmp_path / "s.png"))
    sites = json.loads(text)["sites"]
    assert code == 0 and len(sites) == 42 and all(s["rank"] == 4 and s["norm"] > 0 for s in sites)
    assert (tmp_path / "s.png").stat().st_size > 10_000
    code, text, _ = call(capsys, "eval", "--model", "base", "--adapter", adapter, "--data", str(data), "--json")
    scores = json.loads(text)
    assert code == 0 and scores[adapter]["loss"] < scores["base"]["loss"]
    assert call(capsys, "convert", adapter, "--model", "base", "--out", str(tmp_path / "peft"))[0] == 0
    assert (tmp_path / "peft/adapter_config.json").exists()
    code, text, _ = call(
        capsys, "merge", adapter, str(tmp_path / "peft"), "--model", "base", "--method", "cat", "--out", str(tmp_path / "both")
    )
    assert code == 0 and "wrote" in text
    code, text, _ = call(capsys, "merge", adapter, "--model", "base", "--into-base", "--out", str(tmp_path / "merged"))
    assert code == 0 and "logits before and after" in text
    code, text, _ = call(capsys, "generate", "--model", str(tmp_path / "merged"), "--prompt", "def f(", "--tokens", "5")
    assert code == 0 and text.startswith("def f(")
    first = call(capsys, "generate", "--model", "base", "--adapter", adapter, "--prompt", "def f(", "--tokens", "5")[1]
    assert first == text, "merged and adapted models say the same"


def test_plan_methods_and_doctor(capsys: Any) -> None:
    code, text, _ = call(capsys, "plan", "--model", "base", "--form", "dora", "--set", "form.r=16", "--json")
    plan = json.loads(text)
    assert (
        code == 0
        and plan["trainable"] == sum(r["trainable"] for r in plan["roles"])
        and {r["role"] for r in plan["roles"]} == {"q", "k", "v", "o", "gate", "up", "down"}
    )
    code, text, _ = call(capsys, "methods", "--json")
    found = {m["name"]: m for m in json.loads(text)}
    known = {"mos": "034", "paca": "041", "pissa": "086", "eva": "046", "lora_ga": "027", "adalora": "203", "lisa": "078", "galore": "087",
             "lora_pro": "035", "allora": "031", "ba_lora": "054", "smora": "009", "mixlora": "065", "lego": "003", "compeft": "192"}  # fmt: skip
    assert {n: found[n]["reference"] for n in known} == known
    assert {"lora", "dora", "lora_xs", "bottleneck", "loftq", "loraplus", "arrow", "linear", "ties"} <= set(found)
    assert all(len(m["title"]) > 2 for m in found.values())
    assert "‖W" in call(capsys, "methods", "dora")[1]
    page = call(capsys, "methods", "--markdown")[1]
    assert all(f"| [{m['name']}](" in page and f" | {m['kind']} | " in page for m in json.loads(text))
    code, text, _ = call(capsys, "doctor", "--json")
    check = json.loads(text)["self_check"]
    assert code == 0 and check["detach"] == check["save and load"] == "bit-exact"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["plan", "--model", "base", "--form", "lorra"], "did you mean 'lora'"),
        (["plan", "--model", "base", "--set", "targets=q_prj"], "did you mean 'q_proj'"),
        (["plan", "--model", "base", "--set", "form.foo=1"], "no option 'foo'"),
        (["plan", "--model", "base", "--set", "form.r=0"], "r = 0"),
        (["plan", "--model", "base", "--set", "r=4096"], "largest possible rank"),
        (["plan", "--model", "base", "--set", "alpha=-2"], "alpha is a positive number"),
        (
            ["plan", "--model", "base", "--form", "paca", "--init", "pissa"],
            "'pissa' needs a form that gives 'fill:A', but the form 'paca'",
        ),
        (["plan", "--model", "/no/such/model"], "neither a folder"),
        (["plan", "--model", "base", "--set", "rubbish"], "field=value"),
        (["plan"], "Missing option"),
        (["plam"], "No such command"),
        (["methods", "lorra"], "did you mean"),
        (["inspect", "/no/such/adapter", "--model", "base"], "no"),
        (["train", "--model", "base", "--data", "/no/such/file.jsonl", "--out", "/tmp/never"], "There is no file"),
        (["compare", "--model", "base"], "compare needs recipes"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys: Any, args: list[str], says: str) -> None:
    code, out_, err = call(capsys, *args)
    assert code == 2, (out_, err)
    assert says in err and "Traceback" not in err and err.count("\n") <= 2, err


def test_values_of_set() -> None:
    r = common.recipe_from(None, "lora", "pissa", ["form.r=16", "targets=q_proj,v_proj", "init.niter=4", "losses=[ba_lora]"])
    assert (r.r, r.targets, r.init, r.losses) == (16, ["q_proj", "v_proj"], {"name": "pissa", "niter": 4}, ["ba_lora"])


@pytest.mark.slow
def test_importing_is_light() -> None:
    """`import rankwise` takes little beside torch and transformers, and pulls none of the extras in."""
    code = (
        "import sys, time, torch, transformers; t = time.perf_counter(); import rankwise; took = time.perf_counter() - t;"
        "heavy = [m for m in ('peft', 'trl', 'datasets', 'matplotlib', 'scipy', 'bitsandbytes', 'typer') if m in sys.modules and m not in before] if (before := set()) is None else [];"
        "print(took)"
    )
    took = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])
        for _ in range(2)
    )
    assert took < 1.5, f"import rankwise took {took:.2f} s"  # the figure itself (≤ 0.3 s) is the benchmark's
    clean = subprocess.run(
        [sys.executable, "-c", "import sys, rankwise; print([m for m in ('transformers','peft','trl','datasets','matplotlib','scipy','bitsandbytes','typer','rich') if m in sys.modules])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert clean.stdout.strip() == "[]"
