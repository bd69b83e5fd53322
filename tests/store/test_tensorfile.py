"""Headers that lie, limits on both sides, tensors that lie, memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.errors import ArtefactError
from rankwise.store import tensorfile
from rankwise.store.atomic import replace_file
from rankwise.store.tensorfile import DTYPES, pack, parse, read_tensors


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def sample() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        out[name] = (torch.rand(3, 5, generator=g) * 100).to(dtype) if name != "BOOL" else torch.rand(3, 5, generator=g) > 0.5
    out["scalar"], out["empty"], out["odd"] = torch.tensor(1.5), torch.zeros(0, 4), torch.ones(7, dtype=torch.int8)
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and tensorfile.tensor_bytes(a[k]) == tensorfile.tensor_bytes(b[k])
        for k in a
    )


def test_every_dtype_there_and_back() -> None:
    tensors = sample()
    data = bytearray(b"".join(pack(tensors, {"a": "b"})))
    again, metadata = parse(data, "x")
    assert same(tensors, again) and metadata == {"a": "b"}
    assert b"".join(pack(again, metadata)) == data


def test_lengths_that_look_like_a_pickle() -> None:
    for size in range(560, 1400, 8):
        data = bytearray(b"".join(pack({"a": torch.ones(2)}, {"x": "y" * size})))
        assert same(parse(data, "x")[0], {"a": torch.ones(2)})


def test_the_reference_library_agrees(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = sample()
    replace_file(tmp_path / "ours", pack(tensors, {"format": "pt"}))
    assert same(load_file(tmp_path / "ours"), tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert same(read_tensors(tmp_path, "theirs.safetensors")[0], tensors)


LIES: dict[str, bytearray] = {
    "too short": bytearray(b"\x02\0\0"),
    "only a length": raw(b"", b""),
    "length past the end": raw({}, b"", 100),
    "length of 2^63": raw({}, b"", 1 << 63),
    "not JSON": raw(b"{nonsense}"),
    "not UTF-8": raw(b'{"\xff":1}'),
    "a list": raw(b"[]       "),
    "leading space": raw(b" {}"),
    "two values": raw(b"{}{}"),
    "trailing NUL": raw(b"{}\0\0"),
    "NaN": raw(b'{"__metadata__":NaN}'),
    "duplicate": raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"x" * 8),
    "deep": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep object": raw(b'{"a":' * 60_000 + b"1" + b"}" * 60_000),
    "metadata is a list": raw({"__metadata__": ["a"]}),
    "metadata holds a number": raw({"__metadata__": {"a": 1}}),
    "unknown dtype": raw({"a": entry("F31")}, b"x" * 8),
    "complex": raw({"a": entry("C64", (1,))}, b"x" * 8),
    "extra key": raw({"a": {**entry(), "x": 1}}, b"x" * 8),
    "missing key": raw({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8),
    "negative shape": raw({"a": entry(shape=(-2,))}, b"x" * 8),
    "float shape": raw({"a": entry(shape=(2.0,))}, b"x" * 8),
    "true in a shape": raw({"a": entry(shape=(True, 2))}, b"x" * 8),
    "shape too large": raw({"a": entry(shape=(3,))}, b"x" * 8),
    "2^62 elements": raw({"a": entry(shape=(1 << 62, 4))}, b"x" * 8),
    "2^62 and zero": raw({"a": entry(shape=(1 << 62, 0), offsets=(0, 0))}),
    "product overflows to 8": raw({"a": entry(shape=((1 << 62) + 1, 2))}, b"x" * 8),
    "offsets reversed": raw({"a": entry(offsets=(8, 0))}, b"x" * 8),
    "three offsets": raw({"a": entry(offsets=(0, 8, 8))}, b"x" * 8),
    "hole": raw({"a": entry(offsets=(8, 16))}, b"x" * 16),
    "overlap": raw({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12),
    "shared range": raw({f"{i}": entry() for i in range(1000)}, b"x" * 8),
    "past the end": raw({"a": entry()}, b"x" * 7),
    "tail": raw({"a": entry()}, b"x" * 9),
    "no name": raw({"": entry()}, b"x" * 8),
    "33 dimensions": raw({"a": entry(shape=[1] * 32 + [2])}, b"x" * 8),
    "huge number": raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"x" * 8),
    "bool of 7": raw({"a": entry("BOOL", (2,), (0, 2))}, b"\x00\x07"),
    "not finite": raw({"a": entry()}, b"\0\0\x80\x7f" * 2),
    "many brackets": raw(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_quickly_and_cheaply(lie: str) -> None:
    data = LIES[lie]
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ArtefactError):
        parse(data, "file")
    took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 5.0 and peak <= 4 * len(data) + (16 << 20)


def test_non_finite_numbers_only_where_allowed() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2):
        for value in (float("nan"), float("inf")):
            data = bytearray(b"".join(pack({"a": torch.tensor([1.0, value]).to(dtype)}, {})))
            with pytest.raises(ArtefactError, match="not finite"):
                parse(data, "x")
            parse(data, "x", allow_nonfinite=True)


def test_both_sides_of_each_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    parse(raw({"n" * 512: entry()}, b"\0" * 8), "x")
    with pytest.raises(ArtefactError, match="513 bytes"):
        parse(raw({"n" * 513: entry()}, b"\0" * 8), "x")
    pack({"n" * 512: torch.ones(1)}, {})
    with pytest.raises(ArtefactError):
        pack({"n" * 513: torch.ones(1)}, {})
    parse(raw({"a": entry(shape=[1] * 31 + [2])}, b"\0" * 8), "x")
    head = b'{"__metadata__":{"a":"%s"}}'
    parse(raw(head % (b"x" * (tensorfile.MAX_HEADER - len(head) + 2))), "x")
    with pytest.raises(ArtefactError, match="the limit is"):
        parse(raw(head % (b"x" * (tensorfile.MAX_HEADER - len(head) + 3))), "x")
    monkeypatch.setattr(tensorfile, "MAX_TENSORS", 50)  # the real 100,000 is below
    table = {f"{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(51)}
    with pytest.raises(ArtefactError, match="51 tensors"):
        parse(raw(table), "x")
    del table["0"]
    assert len(parse(raw(table), "x")[0]) == 50


def test_a_hundred_thousand_tensors() -> None:
    table = {f"{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(100_000)}
    assert len(parse(raw(table), "x")[0]) == 100_000
    table |= {f"x{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(50_000)}
    began = time.process_time()
    with pytest.raises(ArtefactError):
        parse(raw(table), "x")
    assert time.process_time() - began < 5.0


class Sub(torch.Tensor):
    pass


def test_tensors_that_lie_are_not_saved() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    lies: list[Any] = [
        torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1), (10,)),
        torch.eye(3).to_sparse_csr(),
        torch.empty(3, device="meta"),
        quantised,
        torch.ones(3, dtype=torch.complex64),
        torch.zeros(1).expand(1 << 62),
        torch.ones(3).as_subclass(Sub),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        [1.0, 2.0],
        torch.ones([1] * 33),
    ]
    for lie in lies:
        with pytest.raises(ArtefactError):
            pack({"a": lie}, {})
    fine = {
        "view": torch.arange(12.0).reshape(3, 4).mT[1:3, ::2],
        "expanded": torch.ones(1).expand(3),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    again, _ = parse(bytearray(b"".join(pack(fine, {}))), "x")
    assert all(torch.equal(again[k], v) for k, v in fine.items())


def test_memory_of_a_large_file(tmp_path: Path) -> None:
    """Reading costs one file, not several (the peak resident size of a child process is compared)."""
    import subprocess
    import sys

    size = 64 << 20
    replace_file(tmp_path / "f.safetensors", pack({"a": torch.zeros(size // 8), "b": torch.zeros(size // 8)}, {}))
    code = (
        "import resource,sys,torch\nfrom rankwise.store.tensorfile import read_tensors\n"
        "torch.isfinite(torch.ones(9)).all()\nbefore=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "t,_=read_tensors(sys.argv[1],'f.safetensors')\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(out.stdout) * 1024 < 1.5 * size + (16 << 20)


def test_save_over_a_mapped_file(tmp_path: Path) -> None:
    tensors = sample()
    replace_file(tmp_path / "f.safetensors", pack(tensors, {}))
    mapped, _ = read_tensors(tmp_path, "f.safetensors", mapped=True)
    mapped["F32"] += 1  # private to this process
    assert torch.equal(read_tensors(tmp_path, "f.safetensors")[0]["F32"], tensors["F32"])
    replace_file(tmp_path / "f.safetensors", pack(mapped, {}))
    again, _ = read_tensors(tmp_path, "f.safetensors")
    assert same(again, mapped) and torch.equal(again["F32"], tensors["F32"] + 1)


def test_pickled_files_are_refused_by_name_and_by_magic(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("zip.safetensors", "old.safetensors"):
        with pytest.raises(ArtefactError, match="run code"):
            read_tensors(tmp_path, name)
    for suffix in (".bin", ".pt", ".PTH", ".ckpt", ".pkl", ".npz"):
        replace_file(tmp_path / f"f{suffix}", pack({"a": torch.ones(2)}, {}))
        with pytest.raises(ArtefactError, match="run code"):
            read_tensors(tmp_path, f"f{suffix}")
    assert os.listdir(tmp_path)
