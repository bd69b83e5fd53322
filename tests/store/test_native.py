"""The native file: bit-exact, the same bytes in every process, and any damage is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise import delta as D
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import ArtefactError
from rankwise.store import tensorfile
from rankwise.store.native import FILE, is_native, load_native, load_state, save_native, save_state
from tests.store.test_tensorfile import same, sample


def states() -> dict[str, AdapterState]:
    g = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(3, 8, generator=g), torch.randn(6, 3, generator=g), 0.7)
    values: dict[str, D.Delta] = {
        "lowrank": low,
        "core": LowRank(low.A, low.B, 2.0, torch.randn(3, 3, generator=g)),
        "stack": LowRank(torch.randn(4, 3, 8, generator=g), torch.randn(4, 6, 3, generator=g), 1.0),
        "bf16": LowRank(low.A.bfloat16(), low.B.bfloat16(), 1.0),
        "dense": D.Dense(torch.randn(6, 8, generator=g)),
        "columns": D.Columns(torch.tensor([1, 5]), torch.randn(6, 2, generator=g), 8),
        "scale": D.Scale(torch.rand(6, generator=g)),
        "sum": D.Sum((D.Scale(torch.rand(6, generator=g), other=8), low)),
    }
    out = {k: AdapterState({"a.b.c": v}, {}, {"note": k}) for k, v in values.items()}
    out["many"] = AdapterState(
        {f"layers.{i}.x": v for i, v in enumerate(values.values())}, {"head.weight": torch.randn(2, 2, generator=g)}, {"n": 1}
    )
    return out


@pytest.mark.parametrize("name", states())
def test_states_there_and_back(name: str, tmp_path: Path) -> None:
    state = states()[name]
    save_state(tmp_path, state)
    again = load_state(tmp_path)
    assert list(again.sites) == list(state.sites) and dict(again.meta) == dict(state.meta)
    for site, delta in state.sites.items():
        other = again.sites[site]
        assert type(other) is type(delta) and other.meta() == delta.meta()
        assert same(dict(delta.tensors()), dict(other.tensors()))
    assert same(dict(again.full), dict(state.full))
    before = (tmp_path / FILE).read_bytes()
    save_state(tmp_path, again)
    assert (tmp_path / FILE).read_bytes() == before and os.listdir(tmp_path) == [FILE]


def test_any_tensors_and_header(tmp_path: Path) -> None:
    header = {
        "recipe": {"form": "lora", "r": 8},
        "banks": {"x": [1, 2.5, None]},
        "provenance": {"by": "{{7*7}} ${HOME} __import__('os')"},
    }
    tensors = sample()
    assert save_native(tmp_path / "new" / "folder", tensors, header) == tmp_path / "new" / "folder" / FILE
    again, head = load_native(tmp_path / "new" / "folder")
    assert same(again, tensors) and all(head[k] == v for k, v in header.items()) and head["version"] == 1
    assert is_native(tmp_path / "new" / "folder") and not is_native(tmp_path)
    load_native(tmp_path / "new" / "folder" / FILE)


def test_equal_bytes_under_two_hash_seeds(tmp_path: Path) -> None:
    code = (
        "import sys,torch\nfrom rankwise.store.native import save_native\n"
        "names=set('abcdefgh')\nsave_native(sys.argv[1],{n:torch.ones(3)*ord(n) for n in names},{'specs':{n:{'k':n} for n in names}})"
    )
    digests = set()
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", code, str(folder)], check=True, env={**os.environ, "PYTHONHASHSEED": seed}, timeout=120
        )
        digests.add((folder / FILE).read_bytes())
    assert len(digests) == 1


def rewrite(folder: Path, change: Any) -> None:
    """Write the file again with its metadata changed by ``change`` and the digest made to fit."""
    tensors, metadata = tensorfile.read_tensors(folder, FILE, allow_nonfinite=True)
    head = json.loads(metadata["rankwise"])
    change(tensors, head)
    text = json.dumps(head, sort_keys=True)
    data = tensorfile.pack(tensors, {"format": "rankwise", "rankwise": text, "sha256": tensorfile.digest(tensors, text)})
    (folder / FILE).write_bytes(b"".join(data))


HEADERS: list[tuple[str, Any]] = [
    ("version 2", lambda t, h: h.update(version=2)),
    ("version None", lambda t, h: h.pop("version")),
    ("version '1'", lambda t, h: h.update(version="1")),
    ("'surprise'", lambda t, h: h.update(surprise=1)),
    ("'sites'", lambda t, h: h.update(sites=[])),
    ("kind", lambda t, h: h["sites"]["a.b.c"].pop("kind")),
    ("no tensor 'site::a.b.c::A'", lambda t, h: t.pop("site::a.b.c::A")),
    ("does not name", lambda t, h: t.update(extra=torch.ones(1))),
    ("'warp'", lambda t, h: h["sites"]["a.b.c"].update(kind="warp")),
    ("no valid 'lowrank'", lambda t, h: t.update({"site::a.b.c::A": torch.ones(2, 8)})),
    ("no valid 'lowrank'", lambda t, h: h["sites"]["a.b.c"].update(meta={"scale": 1.0, "what": 1})),
    ("scale is 'x'", lambda t, h: h["sites"]["a.b.c"].update(meta={"scale": "x"})),
    ("missing 1 required", lambda t, h: (t.pop("site::a.b.c::A"), h["sites"]["a.b.c"].update(tensors=["B"]))),
    ("not finite", lambda t, h: t.update({"site::a.b.c::A": torch.full((3, 8), float("nan"))})),
]


@pytest.mark.parametrize("i", range(len(HEADERS)))
def test_well_formed_but_wrong(i: int, tmp_path: Path) -> None:
    message, change = HEADERS[i]
    save_state(tmp_path, states()["lowrank"])
    rewrite(tmp_path, change)
    with pytest.raises(ArtefactError, match=message):
        load_state(tmp_path)


def test_damage_is_seen(tmp_path: Path) -> None:
    save_state(tmp_path, states()["lowrank"])
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="digest"):
        load_state(tmp_path)
    (tmp_path / FILE).write_bytes(data[:-4])
    with pytest.raises(ArtefactError, match="cut short"):
        load_state(tmp_path)
    (tmp_path / FILE).write_bytes(b"".join(tensorfile.pack({"a": torch.ones(2)}, {"format": "pt"})))
    with pytest.raises(ArtefactError, match="not one of rankwise"):
        load_state(tmp_path)
    with pytest.raises(ArtefactError, match="not a native"):
        load_state(tmp_path / "nowhere")


def test_headers_that_are_not_data_are_not_saved(tmp_path: Path) -> None:
    for header in ({"what": 1}, {"meta": {"x": float("nan")}}, {"meta": {"x": object()}}, {"version": 3}, {"recipe": "lora"}):
        with pytest.raises(ArtefactError):
            save_native(tmp_path, {"a": torch.ones(1)}, header)
    assert os.listdir(tmp_path) == []


def test_mapped_state_saved_over_its_own_file(tmp_path: Path) -> None:
    state = states()["many"]
    save_state(tmp_path, state)
    again = load_state(tmp_path, mapped=True)
    save_state(tmp_path, again)
    third = load_state(tmp_path)
    for site, delta in state.sites.items():
        assert same(dict(delta.tensors()), dict(third.sites[site].tensors()))
        assert same(dict(delta.tensors()), dict(again.sites[site].tensors()))
