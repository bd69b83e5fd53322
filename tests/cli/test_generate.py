"""``rankwise generate --fuse``: what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise import assets
from rankwise.cli import generate as _verb  # noqa: F401 - so that its console is replaced
from tests.cli.tools import call


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two adapters of the shipped base that change what it says."""
    root = tmp_path_factory.mktemp("experts")
    model, _ = assets.load_base()
    for i, name in enumerate("ab"):
        adapter = rw.attach(model, {"form": "lora", "r": 2, "targets": ["down_proj"]}, name=name)
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapter.trainable_parameters():
                p.add_(0.4 * torch.randn(p.shape, generator=g))
        adapter.save(root / name)
        adapter.detach()
    return str(root / "a"), str(root / "b")


def said(capsys: Any, *args: str) -> str:
    code, text, err = call(capsys, "generate", "--model", "base", "--prompt", "def f(", "--tokens", "6", *args)
    assert code == 0, err
    return text


@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_one_expert_is_that_adapter_and_weight_0_the_base(capsys: Any, experts: tuple[str, str], how: str) -> None:
    a, b = experts
    base, alone = said(capsys), said(capsys, "--adapter", a)
    assert base != alone
    assert said(capsys, "--fuse", how, "--expert", a) == alone
    assert said(capsys, "--fuse", how, "--expert", f"{a}=0") == base
    both = said(capsys, "--fuse", how, "--expert", a, "--expert", f"{b}=0.5", "--base")
    assert both.startswith(f"base\n{base.strip()}") and both.split("adapted\n")[1].startswith("def f(")


def test_a_steered_adapter_and_experts_of_another_model(capsys: Any, experts: tuple[str, str]) -> None:
    """On top of an adapter: w = 1 then w = −1 of one expert is that adapter again; an equal base elsewhere says the same."""
    a, b = experts
    alone = said(capsys, "--adapter", a)
    assert said(capsys, "--adapter", a, "--fuse", "static", "--expert", b, "--expert", f"{b}=-1") == alone
    assert said(capsys, "--fuse", "dynamic", "--expert", a, "--expert-model", "base") == alone
    assert said(capsys, "--adapter", a, "--fuse", "static", "--expert", b) != alone


def test_what_is_refused(capsys: Any, experts: tuple[str, str], tmp_path: Path) -> None:
    a, _ = experts
    for args, word in (
        (["--expert", a], "--expert says nothing without --fuse"), (["--set", "cap=1"], "--set says nothing"), (["--fuse", "dynamic"], "needs experts"),
        (["--fuse", "dynamic", "--expert", f"{a}=x"], "folder=number"), (["--fuse", "dynamic", "--expert", f"{a}=0.5"], "single expert"),
        (["--fuse", "dynamc", "--expert", a], "dynamic"), (["--fuse", "dynamic", "--expert", a, "--set", "cap=0"], "cap"),
    ):  # fmt: skip
        code, text, err = call(capsys, "generate", "--model", "base", "--prompt", "x", *args)
        assert code == 2 and word in err.replace("\n", " "), (args, err)
