"""Whole models merged folder to folder: bits, shards, ties, and what does not match."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import ArtefactError, MergeError, OptionError
from rankwise.merge.checkpoints import merge_checkpoints
from rankwise.merge.engine.model_folder import Checkpoint

SHAPES = {"model.embed_tokens.weight": (12, 8), "model.layers.0.up.weight": (10, 8), "model.norm.weight": (8,)}


def folder(path: Path, seed: int, near: dict[str, torch.Tensor] | None = None, config: dict[str, Any] | None = None,
           extra: dict[str, torch.Tensor] | None = None, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES,
           shards: bool = False) -> Path:  # fmt: skip
    """A random checkpoint, or one ``near`` others' tensors."""
    g = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    if near is not None:
        tensors = {n: near[n] + 0.1 * t for n, t in tensors.items()}
    tensors = {n: t.to(dtype) for n, t in tensors.items()} | (extra or {})
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"vocab_size": 12, "tie_word_embeddings": False, "torch_dtype": "float32"} | (config or {}))
    )
    (path / "tokenizer.json").write_text('{"of": "' + path.name + '"}')
    if shards:
        where = {n: f"model-{i}.safetensors" for i, n in enumerate(tensors)}
        for n, f in where.items():
            save_file({n: tensors[n]}, path / f)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def whole(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def trio(tmp_path: Path, **options: Any) -> tuple[Path, Path, Path]:
    base = folder(tmp_path / "base", 0, **options)
    return base, folder(tmp_path / "a", 1, whole(base), **options), folder(tmp_path / "b", 2, whole(base), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "karcher", "multislerp", "dare_linear", "sce"])
def test_one_source_at_weight_one_is_its_bits(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    a = folder(tmp_path / "a", 1, dtype=dtype)
    base = folder(
        tmp_path / "base", 0, {n: 1e4 * t.float() for n, t in whole(a).items()}, dtype=dtype
    )  # a − base loses a's last bits
    options = {"density": 1.0} if method in ("ties", "dare_linear") else {}
    merge_checkpoints([a], tmp_path / "out", method, None if method == "sce" else [1.0], base, **options)
    assert all(torch.equal(t, whole(a)[n]) and t.dtype == dtype for n, t in whole(tmp_path / "out").items())


def test_sums_are_wide_cast_once_and_sharded(tmp_path: Path) -> None:
    base, a, b = trio(tmp_path, dtype=torch.bfloat16, shards=True)
    report = merge_checkpoints([a, b], tmp_path / "out", "task_arithmetic", [0.7, -0.4], base, lam=0.9, shard_bytes=200)
    W, A, B = ({n: t.float() for n, t in whole(p).items()} for p in (base, a, b))
    got = whole(tmp_path / "out")
    assert set(got) == set(SHAPES) and len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    for n, t in got.items():
        wanted = W[n] + (0.9 * 0.7 * (A[n] - W[n]) - 0.9 * 0.4 * (B[n] - W[n]))
        assert t.dtype == torch.bfloat16 and torch.equal(t, wanted.bfloat16())
        plain = 0.7 * (A[n] - W[n]) - 0.4 * (B[n] - W[n])
        assert report.errors[n] == pytest.approx(0.1, rel=1e-4) and report.moved[n] == pytest.approx(
            float((t.float() - W[n]).norm() / W[n].norm())
        )
        assert plain.norm() > 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES) and index["metadata"]["total_size"] == sum(t.numel() * 2 for t in got.values())
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": "base"}


def test_average_without_a_base_takes_the_first_ones_files_and_dtype(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", 1), folder(tmp_path / "b", 2, dtype=torch.float16)
    merge_checkpoints([a, b], tmp_path / "out", "average", [3.0, 1.0], dtype=torch.bfloat16)
    got = whole(tmp_path / "out")
    for n, t in got.items():
        assert torch.equal(t, (0.75 * whole(a)[n] + 0.25 * whole(b)[n].float()).bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_slerp_and_ties_against_naive_formulas(tmp_path: Path) -> None:
    base, a, b = trio(tmp_path)
    W, A, B = whole(base), whole(a), whole(b)
    merge_checkpoints([a, b], tmp_path / "slerp", "slerp", t=0.3)
    merge_checkpoints([a, b], tmp_path / "ties", "ties", [0.6, 0.4], base, density=0.5)
    for n in SHAPES:
        x, y = A[n].double().flatten(), B[n].double().flatten()
        angle = torch.arccos(x @ y / x.norm() / y.norm())
        wanted = (torch.sin(0.7 * angle) * x + torch.sin(0.3 * angle) * y) / torch.sin(angle)
        assert torch.allclose(whole(tmp_path / "slerp")[n].flatten().double(), wanted, atol=1e-5)
        changes = []
        for X in (A, B):
            v = (X[n] - W[n]).flatten()
            keep = torch.zeros_like(v)
            keep[v.abs().topk(int(0.5 * v.numel())).indices] = 1
            changes.append(v * keep)
        v = torch.stack(changes)
        sign = torch.where(v.sum(0) >= 0, 1.0, -1.0)
        agree = (v * sign > 0).float() * torch.tensor([[0.6], [0.4]])
        wanted = W[n].flatten() + torch.where(agree.sum(0) > 0, (v * agree).sum(0) / agree.sum(0).clamp_min(1e-9), 0)
        assert torch.allclose(whole(tmp_path / "ties")[n].flatten(), wanted, atol=1e-6)


def test_tied_embeddings_are_merged_once(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    base = folder(tmp_path / "base", 0, config=tied)
    a = folder(tmp_path / "a", 1, whole(base), config=tied, extra={})
    E = whole(a)["model.embed_tokens.weight"]
    save_file(whole(a) | {"lm_head.weight": E.clone()}, a / "model.safetensors")  # the same tensor, stored twice
    merge_checkpoints([a], tmp_path / "out", "task_arithmetic", [0.5], base)
    assert set(whole(tmp_path / "out")) == set(SHAPES)
    save_file(whole(a) | {"lm_head.weight": E + 1}, a / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight', but the two differ"):
        merge_checkpoints([a], tmp_path / "no", "task_arithmetic", [0.5], base)


def test_some_tied_and_some_not(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", 1, config={"tie_word_embeddings": True})
    b = folder(tmp_path / "b", 2, shapes={**SHAPES, "lm_head.weight": (12, 8)})
    with pytest.raises(MergeError, match="tie their output"):
        merge_checkpoints([a, b], tmp_path / "no", "average")
    merge_checkpoints([a, b], tmp_path / "out", "average", untie=True)
    head = whole(tmp_path / "out")["lm_head.weight"]
    assert torch.allclose(head, (whole(a)["model.embed_tokens.weight"] + whole(b)["lm_head.weight"]) / 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_integers_must_agree(tmp_path: Path) -> None:
    ids = {"model.position_ids": torch.arange(5)}
    a, b = folder(tmp_path / "a", 1, extra=ids), folder(tmp_path / "b", 2, extra=ids)
    report = merge_checkpoints([a, b], tmp_path / "out", "average")
    assert torch.equal(whole(tmp_path / "out")["model.position_ids"], torch.arange(5)) and report.copied == ["model.position_ids"]
    c = folder(tmp_path / "c", 3, extra={"model.position_ids": torch.arange(5) + 1})
    with pytest.raises(MergeError, match=r"integers of 'model\.position_ids'"):
        merge_checkpoints([a, c], tmp_path / "no", "average")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".rankwise-*")), "nothing half-written stays"


def test_tensors_that_only_some_have(tmp_path: Path) -> None:
    base, a, _ = trio(tmp_path)
    b = folder(tmp_path / "c", 2, whole(base), extra={"score.weight": torch.ones(2, 8)})
    with pytest.raises(MergeError, match=r"has no 'score\.weight', which c has"):
        merge_checkpoints([a, b], tmp_path / "no", "task_arithmetic", base=base)
    merge_checkpoints([a, b], tmp_path / "out", "task_arithmetic", base=base, missing="copy")
    assert torch.equal(whole(tmp_path / "out")["score.weight"], torch.ones(2, 8))
    lacking = folder(tmp_path / "d", 4, whole(base), shapes={n: s for n, s in SHAPES.items() if n != "model.norm.weight"})
    merge_checkpoints([a, lacking], tmp_path / "zero", "task_arithmetic", base=base, missing="zero")
    W, A = whole(base)["model.norm.weight"], whole(a)["model.norm.weight"]
    assert torch.allclose(whole(tmp_path / "zero")["model.norm.weight"], W + 0.5 * (A - W))
    with pytest.raises(OptionError, match="works on changes"):
        merge_checkpoints([a, lacking], tmp_path / "no", "average", missing="zero")


def test_resized_vocabularies_and_other_shapes(tmp_path: Path) -> None:
    base, a, _ = trio(tmp_path)
    bigger = {**SHAPES, "model.embed_tokens.weight": (14, 8)}
    grown = {n: torch.cat([t, torch.ones(2, 8)]) if "embed" in n else t for n, t in whole(base).items()}
    b = folder(tmp_path / "big", 5, grown, shapes=bigger, config={"vocab_size": 14})
    with pytest.raises(MergeError, match=r"14×8 in big and 12×8 in base: their vocabularies differ"):
        merge_checkpoints([a, b], tmp_path / "no", "task_arithmetic", base=base)
    merge_checkpoints([a, b], tmp_path / "out", "task_arithmetic", [0, 1], base, vocabulary="base")
    E = whole(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.allclose(E, whole(b)["model.embed_tokens.weight"][:12], atol=1e-6)
    merge_checkpoints(
        [b, a], tmp_path / "up", "average", [1, 1], vocabulary="base"
    )  # the first's rows: a is filled up with b's own
    E = whole(tmp_path / "up")["model.embed_tokens.weight"]
    assert E.shape == (14, 8) and torch.allclose(E[12:], whole(b)["model.embed_tokens.weight"][12:])
    c = folder(tmp_path / "wide", 6, shapes={**SHAPES, "model.layers.0.up.weight": (11, 8)})
    with pytest.raises(MergeError, match="different architectures"):
        merge_checkpoints([a, c], tmp_path / "no", "average")


def test_a_result_that_equals_its_base_is_an_error(tmp_path: Path) -> None:
    base, a, _ = trio(tmp_path)
    for sources, weights in (([base], [1.0]), ([a], [0.0])):
        with pytest.raises(MergeError, match="equals its base to the last bit"):
            merge_checkpoints(sources, tmp_path / "no", "task_arithmetic", weights, base)
    assert not (tmp_path / "no").exists()
    merge_checkpoints([a], tmp_path / "kept", "task_arithmetic", [0.0], base, force=True)
    assert all(torch.equal(t, whole(base)[n]) for n, t in whole(tmp_path / "kept").items())


def test_wrong_input_is_told(tmp_path: Path) -> None:
    base, a, b = trio(tmp_path)
    with pytest.raises(OptionError, match="'ties' works on changes from a base"):
        merge_checkpoints([a, b], tmp_path / "no", "ties")
    with pytest.raises(OptionError, match="'cat' takes adapters, not whole models"):
        merge_checkpoints([a, b], tmp_path / "no", "cat")
    with pytest.raises(OptionError, match="not an empty folder"):
        merge_checkpoints([a, b], base, "average")
    quantised = folder(tmp_path / "q", 7, config={"quantization_config": {"bits": 4}})
    with pytest.raises(ArtefactError, match="is quantised"):
        merge_checkpoints([a, quantised], tmp_path / "no", "average")
    nan = folder(tmp_path / "nan", 8, extra={"model.norm.weight": torch.full((8,), torch.nan)})
    with pytest.raises(MergeError, match="not finite"):
        merge_checkpoints([a, nan], tmp_path / "no", "average")
    (a / "model.safetensors").rename(a / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="pickled"):
        merge_checkpoints([a, b], tmp_path / "no", "average")


def test_the_same_seed_draws_the_same_whatever_the_shards(tmp_path: Path) -> None:
    base, a, b = trio(tmp_path)
    for i, shard in enumerate((10**9, 100)):
        merge_checkpoints([a, b], tmp_path / str(i), "dare_linear", [1, 1], base, seed=3, shard_bytes=shard)
    assert all(torch.equal(t, whole(tmp_path / "1")[n]) for n, t in whole(tmp_path / "0").items())
    merge_checkpoints([a, b], tmp_path / "other", "dare_linear", [1, 1], base, seed=4)
    assert not torch.equal(whole(tmp_path / "other")["model.norm.weight"], whole(tmp_path / "0")["model.norm.weight"])


def test_only_the_tensor_at_hand_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = trio(tmp_path, shards=True)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: list[int] = []
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    merge_checkpoints([a, b], tmp_path / "out", "ties", None, base)
    assert len(most) == 3 * len(SHAPES) and max(most) == 3, "each is read once, and the base's and two sources' are held at a time"


def test_what_the_result_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A sum is finite in fp32 and infinite in the half precision that it is stored in."""
    n = "model.norm.weight"
    a, b = (
        folder(tmp_path / x, i, dtype=torch.float16, extra={n: torch.full((8,), 4e4, dtype=torch.float16)})
        for i, x in enumerate("ab")
    )
    with pytest.raises(MergeError, match=f"{n}' reaches 8e.04, which torch.float16 cannot hold"):
        merge_checkpoints([a, b], tmp_path / "out", "average", [1.0, 1.0], normalize=False)
    assert not (tmp_path / "out").exists()
    merge_checkpoints([a, b], tmp_path / "out", "average", [1.0, 1.0], normalize=False, dtype=torch.float32)
    assert torch.equal(whole(tmp_path / "out")[n], torch.full((8,), 8e4))


def test_integers_that_some_lack_are_copied_not_averaged(tmp_path: Path) -> None:
    """0.3·7 + 0.7·7 in fp32 is below 7, and would be cut to 6."""
    ids = torch.full((5,), 7)
    a, b = folder(tmp_path / "a", 0, extra={"model.ids": ids}), folder(tmp_path / "b", 1)
    report = merge_checkpoints([a, b], tmp_path / "out", "interpolation", [0.3, 0.7])
    assert torch.equal(whole(tmp_path / "out")["model.ids"], ids) and report.copied == ["model.ids"]


def test_untie_is_true_or_false(tmp_path: Path) -> None:
    _, a, b = trio(tmp_path)
    with pytest.raises(OptionError, match="untie is true or false; it got 'abc'"):
        merge_checkpoints([a, b], tmp_path / "out", untie="abc")  # type: ignore[arg-type]
