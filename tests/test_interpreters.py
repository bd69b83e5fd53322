"""The fast tests on whatever other interpreters the machine has, each in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_wheel import ROOT, copied, environment, run

#: those that pyproject's requires-python allows; the running one is tested by everything else
VERSIONS = [v for v in ("3.11", "3.12", "3.13", "3.14") if v != f"{sys.version_info.major}.{sys.version_info.minor}"]
#: what an interpreter could break: values, targets, forms, training's parts, merging, the plug-in; under three minutes
SUBSET = [
    "tests/delta", "tests/sites", "tests/forms", "tests/inits", "tests/optim", "tests/budgets", "tests/losses", "tests/routers",
    "tests/calibration", "tests/merge", "tests/test_docstrings.py", "tests/test_project_files.py", "tests/test_first_method.py",
]  # fmt: skip


def interpreter(version: str) -> str | None:
    """A working Python of this version with venv: on the path, of the system, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [
        shutil.which(f"python{version}"),
        f"/usr/bin/python{version}",
        *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True),
    ]
    asks = "import sys, venv, ensurepip, ssl; print('%d.%d' % sys.version_info[:2])"
    for candidate in map(str, filter(None, candidates)):
        if Path(candidate).exists():
            done = subprocess.run(
                [candidate, "-c", asks], env=environment(), capture_output=True, text=True
            )  # a shim may lead nowhere
            if done.returncode == 0 and done.stdout.strip() == version:
                return candidate
    return None


def test_the_running_one_would_be_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    broken = tmp_path / f"python{version}"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    (tmp_path / f"versions/{version}.99/bin").mkdir(parents=True)
    (tmp_path / f"versions/{version}.99/bin/python").symlink_to(sys.executable)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert interpreter(version) not in (None, str(broken))
    assert interpreter("3.99") is None


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_fast_tests_pass(version: str, tmp_path: Path) -> None:
    found = interpreter(version)
    if found is None:
        pytest.skip(f"this machine has no Python {version} with venv")
    home = tmp_path / "venv"
    python = str(home / "bin/python")
    try:
        run([found, "-m", "venv", str(home)], tmp_path)
        run([python, "-m", "pip", "install", "-q", "--upgrade", "pip"], tmp_path)
        wanted = f"torch=={torch.__version__.split('+')[0]}"
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", wanted], env=environment(), capture_output=True, text=True, timeout=1200
        )
        if "No matching distribution found" in done.stderr:
            pytest.skip(f"{wanted} cannot be had for Python {version}: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr[-3000:]
        run([python, "-m", "pip", "install", "-q", f"{copied(tmp_path)}[dev]"], tmp_path, 1200)
        told = run([python, "-c", "import sys, rankwise; print(sys.version.split()[0], rankwise.__file__)"], ROOT).split()
        assert told[0].startswith(f"{version}.") and Path(told[1]).is_relative_to(home)
        command = [python, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow and not soak", *SUBSET]
        told_all = run(command, ROOT, 900)
        passed = re.search(r"(\d+) passed", told_all)
        assert passed is not None and int(passed[1]) > 1000, told_all[-1000:]
    finally:
        shutil.rmtree(home, ignore_errors=True)  # gigabytes, where torch comes with CUDA
