"""The wheel: it holds every file of the package, and works where nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import rankwise

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/rankwise"
#: what is no Python and the package cannot do without
DATA = {
    "rankwise/py.typed",
    "rankwise/serve/ops/native.c",
    "rankwise/assets/base/model.safetensors",
    "rankwise/assets/base/config.json",
    "rankwise/assets/base/tokenizer.json",
    "rankwise/assets/base/chat_template.jinja",
    "rankwise/assets/base/README.md",
    "rankwise/assets/digits_vit/model.safetensors",
    "rankwise/assets/digits_vit/config.json",
}


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would let a checkout shine through."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | more


def run(command: list[str], folder: Path, seconds: float = 300) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def copied(folder: Path) -> Path:
    """What a wheel is made of, copied into ``folder`` without leavings of earlier builds."""
    leavings = shutil.ignore_patterns("*.egg-info", "__pycache__", "*.pyc", ".*")
    shutil.copytree(ROOT / "src", folder / "copy/src", ignore=leavings)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy" / name)
    return folder / "copy"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel made from it."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(copied(folder))], folder)
    return folder / "dist"


@pytest.mark.slow
def test_wheel_and_source_archive_hold_every_file(built: Path) -> None:
    files = {p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert files >= DATA
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name == f"rankwise-{rankwise.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as held:
        names = set(held.namelist())
        told = held.read(f"rankwise-{rankwise.__version__}.dist-info/METADATA").decode()
    assert {n for n in names if ".dist-info/" not in n} == files
    assert f"rankwise-{rankwise.__version__}.dist-info/licenses/LICENSE" in names
    assert "Requires-Python: >=3.11" in told and "License-Expression: Apache-2.0" in told and "Provides-Extra: hf" in told
    with tarfile.open(archive) as sources:
        inner = {n.split("/", 1)[1].removeprefix("src/") for n in sources.getnames() if "/" in n}
    assert files <= inner, sorted(files - inner)


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_the_demo_runs_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    run([sys.executable, "-m", "venv", str(tmp_path / "empty")], tmp_path)
    python, rankwise_ = (str(tmp_path / "empty/bin" / name) for name in ("python", "rankwise"))
    run([python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}"], tmp_path, 1200)
    run([python, "-m", "pip", "install", "-q", f"{wheel}[hf,cli,plots]"], tmp_path, 1200)
    run([python, "-m", "pip", "check"], tmp_path)

    where = "import rankwise, importlib.util as u; print(rankwise.__file__, u.find_spec('peft'), u.find_spec('pytest'))"
    told = run([python, "-c", where], tmp_path).split()
    assert Path(told[0]).is_relative_to(tmp_path / "empty") and told[1:] == ["None", "None"]
    assert len(json.loads(run([rankwise_, "methods", "--json"], tmp_path))) > 60
    told = json.loads(run([rankwise_, "doctor", "--json"], tmp_path))["self_check"]
    assert (told["detach"], told["save and load"]) == ("bit-exact", "bit-exact")

    assert "Example: rankwise demo" in run([rankwise_, "demo", "--help"], tmp_path)
    told = run([rankwise_, "demo", "--out", "demo-output"], tmp_path, 1200)
    out = tmp_path / "demo-output"
    assert "merged the best low-rank adapter" in told and (out / "report.html").stat().st_size > 10_000
    assert {p.name for p in (out / "adapters").iterdir()} >= {"lora", "dora", "pissa", "eva", "adalora", "galore"}
    with safe_open(out / "merged/model.safetensors", framework="pt") as merged:
        assert any("q_proj" in name for name in merged.keys())  # noqa: SIM118
    assert (out / "peft/adapter_config.json").exists()
    text = run([rankwise_, "generate", "--model", "demo-output/merged", "--prompt", "It was", "--tokens", "5"], tmp_path)
    assert text.strip()
