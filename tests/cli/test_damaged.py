"""Adapters that are damaged or another model's, and runs that overflow: status 2, one line that names what is wrong, nothing lost."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rankwise as rw
from rankwise import assets
from rankwise.store import tensorfile
from tests.cli.tools import call
from tests.models import llama, move

DATA = "rankwise.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = assets.load_base()
    adapter = rw.attach(model, {"r": 2, "targets": ["q_proj"]})
    move(adapter)
    adapter.save(folder / "native")
    adapter.export(folder / "peft")
    other = rw.attach(llama(), {"r": 2, "targets": ["q_proj"]})
    move(other)
    other.save(folder / "another")
    return folder


def data_of(folder: Path) -> Path:
    return folder / (DATA if (folder / DATA).exists() else "adapter_model.safetensors")


def truncated(folder: Path) -> None:
    path = data_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(folder: Path) -> None:
    path = data_of(folder)
    data = bytearray(path.read_bytes())
    data[-40] ^= 0x10
    path.write_bytes(data)


def renamed(folder: Path) -> None:
    data_of(folder).rename(folder / "weights.safetensors")


def pickled(folder: Path) -> None:
    path = data_of(folder)
    path.write_bytes(pickle.dumps({"a": [1, 2]}))


def nan(folder: Path) -> None:
    path = data_of(folder)
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    with safe_open(path, "pt") as file:
        head = dict(file.metadata() or {})
    if "rankwise" in head:  # a digest that fits, so that nothing but the value is wrong
        head["sha256"] = tensorfile.digest(tensors, head["rankwise"])
    save_file(tensors, path, head)


#: what was done, to which format, under which verb → words of the refusal.  PEFT's files have no checksum: a flipped bit is another number.
DAMAGE: dict[tuple[Callable[[Path], None], str, str], str] = {
    (truncated, "native", "eval"): DATA,
    (flipped, "native", "merge"): "its digest does not fit its content",
    (renamed, "native", "generate"): f"under another name; call it {DATA}",
    (pickled, "native", "inspect"): DATA,
    (nan, "native", "convert"): "not finite",
    (truncated, "peft", "merge"): "adapter_model",
    (renamed, "peft", "inspect"): "adapter_model",
    (pickled, "peft", "convert"): "adapter_model",
    (nan, "peft", "generate"): "not finite",
}
VERBS: dict[str, list[str]] = {
    "eval": ["--adapter", "{}", "--data", "{data}"],
    "generate": ["--adapter", "{}", "--prompt", "def f(", "--tokens", "2"],
    "merge": ["{}", "--into-base", "--out", "{out}"],
    "convert": ["{}", "--out", "{out}"],
    "inspect": ["{}"],
}


def refused(capsys: Any, verb: str, folder: Path, out: Path) -> str:
    data = out.parent / "texts.jsonl"
    data.write_text(json.dumps({"text": "def f(x):\n    return x\n"}))
    args = [a.format(folder, out=out, data=data) for a in VERBS[verb]]
    code, text, err = call(capsys, verb, *args, "--model", "base")
    assert code == 2 and not text.strip(), (code, text, err)
    assert err.count("\n") == 1 and "Traceback" not in err and not out.exists(), err
    return err


@pytest.mark.parametrize("damage, kind, verb", DAMAGE, ids=lambda v: getattr(v, "__name__", v))
def test_a_damaged_adapter_is_refused(damage: Any, kind: str, verb: str, whole: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(whole / kind, tmp_path / "a")
    damage(tmp_path / "a")
    assert DAMAGE[damage, kind, verb] in refused(capsys, verb, tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_of_another_base_is_refused_with_the_shapes_that_differ(
    verb: str, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    err = refused(capsys, verb, whole / "another", tmp_path / "out")
    assert "another base" in err and "embed_tokens.weight is 1× 4096×256 float32, not 1× 64×32" in err, err


def test_a_run_that_overflows_stops_and_keeps_its_last_checkpoint(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(12)))
    args = ["--lr", "1e18", "--steps", "8", "--batch", "2", "--max-length", "64", "--no-packing", "--arg", "save_steps=1", "--arg", "save_strategy=steps", "--arg", "max_grad_norm=0"]  # fmt: skip
    code, _, err = call(
        capsys, "train", "--model", "base", "--data", str(data), "--out", str(tmp_path / "run"), *args, "--arg", "warmup_steps=2"
    )
    assert code == 2 and "Traceback" not in err, err
    assert "not finite" in err or "The loss is nan" in err, err
    assert "model.layers." in err, "it says where"
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert kept, "the last good checkpoint is kept"
    model, _ = assets.load_base()
    assert all(torch.isfinite(t).all() for t in rw.load(model, kept[-1]).tensors().values())
