"""Adapters coded and back by the verb: sizes, errors, references, a searched scale, and what is refused in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise import assets
from rankwise.errors import ArtefactError, OptionError
from rankwise.seeds import generator
from rankwise.store.native import load_native
from tests.cli.tools import call

BASE = ["--model", "base"]


def made(folder: Path, form: str = "lora", seed: int = 0, **options: Any) -> Path:
    """An adapter of the shipped base with all its tensors moved."""
    model, _ = assets.load_base()
    adapter = rw.attach(model, rw.Recipe(form=form, r=4, targets=["q_proj", "down_proj"], seed=seed, **options))
    with torch.no_grad():
        for n, t in adapter.named_parameters().items():
            t.add_(torch.randn(t.shape, generator=generator(seed, "test", n)) * 0.02)
    adapter.save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("adapter") / "a")


@pytest.mark.parametrize(
    ("codec", "factor", "error"),
    [
        (["compeft"], 9, 1.0),
        (["ternary", "--set", "density=0.3", "--set", "per_tensor=true"], 7, 1.0),
        (["intk", "--set", "k=8"], 3.2, 0.02),
        (["nf4"], 5, 0.2),
        (["lossless"], 1.0, 0.0),
    ],
)
def test_there_and_back(codec: list[str], factor: float, error: float, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    code, text, err = call(
        capsys, "convert", str(adapter), *BASE, "--codec", codec[0], *codec[1:], "--out", str(tmp_path / "c"), "--json"
    )
    assert code == 0, err
    report = json.loads(text)
    assert report["bytes"] == (tmp_path / "c" / "rankwise.safetensors").stat().st_size
    assert report["native"] == (adapter / "rankwise.safetensors").stat().st_size
    assert report["native"] / report["bytes"] > factor
    tensors, _ = load_native(adapter)
    assert report["fp32"] == sum(t.nbytes for t in tensors.values()) == 2 * report["bf16"]
    assert max(report["errors"].values()) <= error and (error == 0 or min(report["errors"].values()) > 1e-4)
    assert call(capsys, "convert", str(tmp_path / "c"), *BASE, "--format", "native", "--out", str(tmp_path / "n"))[0] == 0
    back, head = load_native(tmp_path / "n")
    assert head["kind"] == "adapter" and {n: (t.shape, t.dtype) for n, t in back.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    if codec[0] == "lossless":
        assert (tmp_path / "n" / "rankwise.safetensors").read_bytes() == (adapter / "rankwise.safetensors").read_bytes()
    code, text, _ = call(capsys, "convert", str(tmp_path / "c"), *BASE, "--out", str(tmp_path / "p"))
    assert code == 0 and (tmp_path / "p" / "adapter_config.json").exists() and "(0 B)" not in text


def test_a_difference_needs_its_reference(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    other, third = made(tmp_path / "b", seed=1), made(tmp_path / "x", seed=2)
    line = ["convert", str(adapter), *BASE, "--codec", "delta", "--out", str(tmp_path / "d")]
    code, text, err = call(capsys, *line, "--reference", str(other))
    assert code == 0 and "relative error" in text and "largest 0 " in text, err
    back = ["convert", str(tmp_path / "d"), *BASE, "--format", "native", "--out", str(tmp_path / "n")]
    assert call(capsys, *back, "--reference", str(other))[0] == 0
    assert (tmp_path / "n" / "rankwise.safetensors").read_bytes() == (adapter / "rankwise.safetensors").read_bytes()
    for extra, says in (([], "give that one"), (["--reference", str(third)], "SHA-256"), (["--reference", "none"], "neither")):
        code, _, err = call(capsys, *back, *extra)
        assert code == 2 and says in err and "Traceback" not in err
    assert call(capsys, *line, "--reference", str(other), "--set", "inner=intk", "--set", "inner.k=4")[0] == 0
    assert (tmp_path / "d" / "rankwise.safetensors").stat().st_size < 0.3 * (adapter / "rankwise.safetensors").stat().st_size
    model, _ = assets.load_base()
    rw.load(model, other, name="other")
    assert rw.load(model, tmp_path / "d", name="mine", reference="other").name == "mine"


def test_the_scale_is_searched_on_data(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "notes.txt"
    data.write_text("def add(a, b):\n    return a + b\n\n\n" * 10)
    line = [
        "convert",
        str(adapter),
        *BASE,
        "--codec",
        "compeft",
        "--out",
        str(tmp_path / "c"),
        "--search-data",
        str(data),
        "--json",
    ]
    code, text, err = call(capsys, *line)
    assert code == 0, err
    report = json.loads(text)
    losses = {t["alpha"]: t["loss"] for t in report["tried"]}
    assert len(losses) == 9 and report["codec"]["alpha"] == min(losses, key=losses.__getitem__)
    code, text, _ = call(capsys, "eval", *BASE, "--data", str(data), "--adapter", str(tmp_path / "c"), "--json")
    assert json.loads(text)[str(tmp_path / "c")]["loss"] == pytest.approx(min(losses.values()), rel=1e-4)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--codec", "compft"], "did you mean 'compeft'"),
        (["--codec", "compeft", "--set", "densty=0.1"], "did you mean 'density'"),
        (["--codec", "compeft", "--set", "density=0"], "density=0"),
        (["--codec", "compeft", "--set", "density"], "option=value"),
        (["--codec", "intk", "--set", "k=99"], "k=99"),
        (["--codec", "intk", "--format", "peft"], "one of the two"),
        (["--codec", "delta"], "--reference"),
        (["--codec", "delta", "--reference", "SELF"], "the adapter itself"),
        (["--codec", "delta", "--reference", "SELF/..", "--set", "inner=delta"], "another codec"),
        (["--codec", "lossless", "--reference", "SELF"], "leave the reference out"),
        (["--reference", "SELF"], "leave the reference out"),
        (["--set", "k=4"], "--codec"),
        (["--search-data", "prose"], "--codec"),
        (["--codec", "intk", "--search-data", "prose"], "alpha"),
        (["--codec", "compeft", "--set", "alpha=2", "--search-data", "prose"], "leave one"),
        (["--codec", "compeft", "--rank", "9999"], "no cut"),
    ],
)
def test_refusals(args: list[str], says: str, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    args = [a.replace("SELF", str(adapter)) for a in args]
    code, _, err = call(capsys, "convert", str(adapter), *BASE, "--out", str(tmp_path / "o"), *args)
    assert code == 2 and says in err and "Traceback" not in err and not (tmp_path / "o").exists()


def test_blocks_are_coded_too(tmp_path: Path, capsys: Any) -> None:
    model, _ = assets.load_base()
    rw.attach(model, rw.Recipe(form="bottleneck", targets=["self_attn"])).save(tmp_path / "b")
    code, text, err = call(capsys, "convert", str(tmp_path / "b"), *BASE, "--codec", "intk", "--out", str(tmp_path / "c"))
    assert code == 0 and "times smaller" in text and "relative error" not in text, err


def test_residual_starts_stay_and_whole_weights_are_refused(tmp_path: Path) -> None:
    model, _ = assets.load_base()
    here = rw.load(model, made(tmp_path / "p", init="pissa"), name="p")
    here.save(tmp_path / "c", codec={"name": "intk", "k": 8})
    was = {n: here.delta(n).dense() for n in here.sites}
    here.detach()
    back = rw.load(model, tmp_path / "c")
    # of A alone int8 errs by 0.7 %; against the small change that errs by far more than the 2 % of A − A0
    assert all((back.delta(n).dense() - d).norm() < 0.02 * d.norm() for n, d in was.items())
    back.detach()
    full = rw.attach(model, rw.Recipe(form="full", targets=["q_proj"]))
    with pytest.raises(OptionError, match="trained whole"):
        full.save(tmp_path / "f", codec="compeft")
    full.save(tmp_path / "f", codec="lossless")


def test_a_damaged_file_is_refused_in_one_sentence(adapter: Path, tmp_path: Path) -> None:
    model, _ = assets.load_base()
    here = rw.load(model, adapter)
    file = here.save(tmp_path / "c", codec="compeft")
    here.detach()
    good, rng = file.read_bytes(), random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        if rng.random() < 0.3:
            del bad[rng.randrange(len(bad)) :]
        else:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(bad))
        with pytest.raises(ArtefactError):
            rw.load(model, tmp_path / "c")
    assert "rankwise" not in model._modules or not model.rankwise.records
