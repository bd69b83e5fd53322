"""A run stopped at any step and gone on with in a fresh model ends in the same bits, whatever parts it is made of."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import rankwise as rw
from tests.models import batch_for, llama

RECIPES: dict[str, dict[str, Any]] = {
    "lora, dropout": {"form": "lora", "r": 2, "dropout": 0.3},
    "adalora": {"preset": "adalora", "r": 4, "budget": {"name": "adalora", "target_r": 2, "every": 2}},
    "mos": {"form": "mos", "r": 2},
    "smora": {"form": "lora", "r": 4, "router": {"name": "smora", "k": 2}},
    "galore": {"form": "full", "targets": "all-linear", "optimizer": {"name": "galore", "r": 4, "every": 3}},
    "lisa": {"form": "full", "targets": "all", "budget": {"name": "lisa", "blocks": 1, "every": 3}},
}


def start(recipe: dict[str, Any], total: int) -> tuple[Any, Any, Any]:
    model = llama()
    adapter = rw.attach(model, recipe)
    model.train()
    return model, adapter, rw.Session(model, adapter, lr=1e-2, total_steps=total, schedule="cosine", warmup=2, max_grad_norm=0.5)


def go(model: Any, session: Any, batch: dict[str, torch.Tensor], until: int) -> None:
    while session.t < until:
        rows = torch.randint(6, (2,))
        session.step_begin()
        part = {k: v[rows] for k, v in batch.items()}
        out = model(**part)
        (out.loss + session.penalty(out, part)).backward()
        session.step()


def packed(adapter: Any, session: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"run": session.state_dict(), "adapter": adapter.tensors()}, file)
    return file.getvalue()


def unpacked(data: bytes, adapter: Any, session: Any) -> None:
    saved = torch.load(io.BytesIO(data), weights_only=True)
    with torch.no_grad():
        for k, t in adapter.tensors().items():
            t.copy_(saved["adapter"][k])
    session.load_state_dict(saved["run"])


def interrupted_everywhere(recipe: dict[str, Any], total: int) -> None:
    batch = batch_for(llama(), rows=6)
    torch.manual_seed(0)
    model, adapter, session = start(recipe, total)
    at: dict[int, bytes] = {}
    for step in range(1, total):
        go(model, session, batch, step)
        at[step] = packed(adapter, session)
    go(model, session, batch, total)
    want = {k: t.detach().clone() for k, t in adapter.tensors().items()}
    moved = sum(
        float((t.detach().float() - u.detach().float()).abs().sum())
        for t, u in zip(want.values(), start(recipe, total)[1].tensors().values(), strict=True)
    )
    assert moved > 0
    for step, data in at.items():
        torch.manual_seed(999)
        model, adapter, session = start(recipe, total)
        unpacked(data, adapter, session)
        go(model, session, batch, total)
        for k, t in adapter.tensors().items():
            assert torch.equal(t, want[k]), f"stopped after step {step}: {k}"


@pytest.mark.parametrize("name", RECIPES)
def test_stopped_at_every_step(name: str) -> None:
    interrupted_everywhere(RECIPES[name], 10)  # 9 points × 6 recipes


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RECIPES)
def test_stopped_at_every_step_long(name: str) -> None:
    interrupted_everywhere(RECIPES[name], 85)  # 84 × 6: 504 points


CHILD = """
import hashlib, torch
from tests.train.test_interruptions import RECIPES, go, start
from tests.models import batch_for, llama
torch.manual_seed(0)
model, adapter, session = start(RECIPES["adalora"], 4)
go(model, session, batch_for(llama(), rows=6), 4)
h = hashlib.sha256()
for k, t in adapter.tensors().items():
    h.update(k.encode() + t.detach().numpy().tobytes())
print(h.hexdigest())
"""


def test_equal_bits_under_two_hash_seeds_and_in_two_processes() -> None:
    assert hashlib.sha256(b"").hexdigest() not in (
        digests := {
            subprocess.run(
                [sys.executable, "-c", CHILD], check=True, capture_output=True, text=True, timeout=240,
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["src", "."])},
            ).stdout.strip()
            for seed in ("1", "2")
        }
    )  # fmt: skip
    assert len(digests) == 1
