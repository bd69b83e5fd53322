"""Files that an earlier version wrote (``write_kept.py``) are read to the bit, and a run that it left half-way goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import rankwise as rw
from tests.models import batch_for, logits
from tests.store.write_kept import base, digest, run

KEPT = Path(__file__).parent / "kept"
EXPECTED = json.loads((KEPT / "expected.json").read_text())


def test_every_kept_file_is_expected() -> None:
    written = {p.name for p in KEPT.iterdir() if p.is_dir()} - {"run"}
    assert written == set(EXPECTED["files"])


@pytest.mark.parametrize("name", sorted(EXPECTED["files"]))
def test_file_is_read_to_the_bit(name: str) -> None:
    model = base(tied=EXPECTED["files"][name].get("tied", False))
    path = next((KEPT / name).glob("*.gguf"), None) or next((KEPT / name).glob("lora.safetensors"), None) or KEPT / name
    adapter = rw.load(model, path)
    wanted = EXPECTED["files"][name]
    assert digest(adapter) == wanted["digest"]
    if "logits" in wanted:  # products may differ in the last bit between processors
        got = logits(model, batch_for(model)).flatten()[:64]
        torch.testing.assert_close(got, torch.tensor(wanted["logits"]), rtol=1e-4, atol=1e-5)


def test_run_left_half_way_goes_on(tmp_path: Path) -> None:
    shutil.copytree(KEPT / "run", tmp_path / "run")
    done = run(tmp_path / "run", resume=True)
    whole = run(tmp_path / "whole", resume=False)
    for (name, resumed), (_, uninterrupted) in zip(sorted(done.adapter.tensors().items()), sorted(whole.adapter.tensors().items())):
        torch.testing.assert_close(resumed, uninterrupted, rtol=1e-3, atol=1e-4, msg=name)
