"""Adapters behind URLs, through fsspec: copied by version, noticed when they change, checked as folders are."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.cache import AdapterCache
from rankwise.serve.adapters.kinds import Limits
from rankwise.serve.adapters.source import FolderSource, Sources
from rankwise.serve.adapters.uri import UriSource
from rankwise.serve.types import AdapterRefused, UnknownAdapter
from tests.models import llama
from tests.serve.adapters.helpers import attached, folder_of


@pytest.fixture
def bucket() -> Iterator[str]:
    name = f"memory://adapters-{uuid.uuid4().hex}"
    yield name
    fs = fsspec.filesystem("memory")
    if fs.exists(name):
        fs.rm(name, recursive=True)


def put(folder: Path, url: str) -> None:
    fs = fsspec.core.url_to_fs(url)[0]
    for f in folder.iterdir():
        with fs.open(f"{url}/{f.name}", "wb") as out:
            out.write(f.read_bytes())


def test_memory_and_file_urls(tmp_path: Path, bucket: str) -> None:
    model, root = folder_of(tmp_path, "a", "b")
    attached(llama(), {"r": 2}).export(root / "p")
    adapter_loader = AdapterLoader(model)
    local = FolderSource(root, adapter_loader)
    for base in (bucket, f"file://{tmp_path}/remote"):
        fsspec.core.url_to_fs(base)[0].makedirs(base.removeprefix("file://"), exist_ok=True)
        for name in ("a", "b", "p"):
            fsspec.core.url_to_fs(base)[0].makedirs(f"{base}/{name}".removeprefix("file://"), exist_ok=True)
            put(root / name, f"{base}/{name}")
        source = UriSource(base, adapter_loader, tmp_path / "copies", refresh=0)
        assert source.names() == ["a", "b", "p"]
        for name in source.names():
            manifest = source.resolve(name)
            assert manifest.digest == local.resolve(name).digest and manifest.name == name and manifest.source == f"{base}/{name}"
        served = source.fetch(source.resolve("b"))
        want = local.fetch(local.resolve("b"))
        assert torch.equal(served.pairs["model.layers.0.mlp.down_proj"][0][0], want.pairs["model.layers.0.mlp.down_proj"][0][0])  # type: ignore[index]
        with pytest.raises(UnknownAdapter, match="did you mean|known"):
            source.resolve("c")


def test_a_version_is_copied_once_and_a_new_one_is_noticed(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a", "b", "c", "d")
    put(root / "a", f"{bucket}/live")
    source = UriSource(bucket, AdapterLoader(model, keep=0), tmp_path / "copies", refresh=0)
    copies: list[str] = []
    copy = source._copy
    monkeypatch.setattr(source, "_copy", lambda fs, files, name: (copies.append(name), copy(fs, files, name))[1])
    first = source.resolve("live")
    assert source.resolve("live") == first and copies == ["live"]
    put(root / "b", f"{bucket}/live")
    second = source.resolve("live")
    assert second.digest != first.digest and copies == ["live"] * 2
    assert source.fetch(first).manifest.digest == first.digest, "one version back is still here"
    for name in ("c", "d"):
        put(root / name, f"{bucket}/live")
        source.resolve("live")
    assert len(list((tmp_path / "copies").iterdir())) == 2
    with pytest.raises(AdapterRefused, match="changed on disk"):
        source.fetch(first)


def test_a_store_is_not_asked_for_every_request(tmp_path: Path, bucket: str) -> None:
    model, root = folder_of(tmp_path, "a", "b")
    put(root / "a", f"{bucket}/live")
    source = UriSource(bucket, AdapterLoader(model), tmp_path / "copies", refresh=60)
    first = source.resolve("live")
    put(root / "b", f"{bucket}/live")
    assert source.resolve("live") == first
    source.refresh = 0
    assert source.resolve("live").digest != first.digest


def test_files_replaced_while_they_are_copied(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a mixture of two versions: the copy is made again, and given up where it never holds still."""
    model, root = folder_of(tmp_path, "a", "b")
    put(root / "a", f"{bucket}/live")
    source = UriSource(bucket, AdapterLoader(model), tmp_path / "copies", refresh=0)
    copy, swaps = source._copy, ["b"]

    def disturbed(fs: Any, files: Any, name: str) -> Any:
        out = copy(fs, files, name)
        if swaps:
            put(root / swaps.pop(), f"{bucket}/live")
        return out

    monkeypatch.setattr(source, "_copy", disturbed)
    assert source.resolve("live").digest == FolderSource(root, source._adapter_loader).resolve("b").digest
    swaps += ["a", "b", "a", "b"]
    put(root / "a", f"{bucket}/live")
    with pytest.raises(AdapterRefused, match="being written to"):
        source.resolve("live")


def test_refusals_of_stores(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a")
    data = bytearray((root / "a" / "rankwise.safetensors").read_bytes())
    put(root / "a", f"{bucket}/good")
    data[-3] ^= 4
    fs = fsspec.filesystem("memory")
    with fs.open(f"{bucket}/damaged/rankwise.safetensors", "wb") as out:
        out.write(bytes(data))
    with fs.open(f"{bucket}/pickled/adapter_model.bin", "wb") as out:
        out.write(b"\x80\x04.")
    source = UriSource(bucket, AdapterLoader(model), tmp_path / "copies", refresh=0)
    for name, why in {"damaged": "damaged", "pickled": "no .safetensors"}.items():
        with pytest.raises(AdapterRefused, match=why):
            source.resolve(name)
    for name in ("../good", "a/b", "..", ""):
        with pytest.raises(UnknownAdapter, match="no valid adapter name"):
            source.resolve(name)
    for url in ("s3://elsewhere/x", f"{bucket}/../x", "/etc", f"{bucket}/good/../good", "memory://other/good"):
        with pytest.raises(AdapterRefused, match="inside the stores"):
            source.resolve_path(url, "x")
    assert source.resolve_path(f"{bucket}/good", "x").name == "x"
    monkeypatch.setattr("rankwise.serve.adapters.kinds.HEADERS", 0)
    tight = UriSource(bucket, AdapterLoader(model, limits=Limits(nbytes=100)), tmp_path / "more", refresh=0)
    monkeypatch.setattr(fs, "cat_file", lambda *a, **k: pytest.fail("read before its size was looked at"))
    with pytest.raises(AdapterRefused, match="reads at most 200"):
        tight.resolve("good")


def test_a_store_that_fails_is_a_refusal(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a")
    put(root / "a", f"{bucket}/a")
    source = UriSource(bucket, AdapterLoader(model), tmp_path / "copies", refresh=0)

    def broken(*a: Any, **k: Any) -> Any:
        raise OSError("credentials in this message must not reach a client")

    monkeypatch.setattr(fsspec.filesystem("memory"), "ls", broken)
    with pytest.raises(AdapterRefused, match="cannot be read from its store: OSError") as raised:
        source.resolve("a")
    assert "credentials" not in str(raised.value)


def test_loading_by_url_at_run_time(tmp_path: Path, bucket: str) -> None:
    model, root = folder_of(tmp_path, "a", "b")
    put(root / "b", f"{bucket}/b")
    adapter_loader = AdapterLoader(model)
    cache = AdapterCache(
        Sources(FolderSource(root, adapter_loader), UriSource(bucket, adapter_loader, tmp_path / "copies", refresh=0)),
        adapter_loader.layout,
        registry=tmp_path / "names.json",
    )
    assert cache.load("far", f"{bucket}/b").digest == cache.resolve("b").digest
    again = AdapterCache(cache.source, adapter_loader.layout, registry=tmp_path / "names.json")
    assert again.resolve("far").digest == cache.resolve("b").digest


def test_many_files_are_bounded_together_and_a_size_that_lies_too(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, root = folder_of(tmp_path, "a")
    limits = Limits(nbytes=1 << 20)
    source = UriSource(bucket, AdapterLoader(model, limits=limits), tmp_path / "copies", refresh=0)
    put(root / "a", f"{bucket}/many")
    fs = fsspec.core.url_to_fs(bucket)[0]
    each = limits.most_in_files // 4
    for i in range(4):
        fs.pipe(f"{bucket}/many/part{i}.safetensors", bytes(each))
    got: list[int] = []
    read = type(fs).cat_file
    monkeypatch.setattr(type(fs), "cat_file", lambda *a, **k: (got.append(len(found := read(*a, **k))), found)[1])
    with pytest.raises(AdapterRefused, match="has files of"):
        source.resolve("many")
    assert not got, "they were read before they were refused"
    listed = source._list

    def lying(url: str, name: str) -> Any:
        fs, files = listed(url, name)
        return fs, [e | {"size": 10} for e in files]

    monkeypatch.setattr(source, "_list", lying)
    with pytest.raises(AdapterRefused, match="has files of"):
        source.resolve("many")
    assert 0 < sum(got) <= limits.most_in_files + 1
    assert not list((tmp_path / "copies").iterdir())


def test_copies_are_bounded_on_disk_and_come_again(tmp_path: Path, bucket: str) -> None:
    model, root = folder_of(tmp_path, "a", "b", "c")
    for name in "abc":
        put(root / name, f"{bucket}/{name}")
    size = sum(f.stat().st_size for f in (root / "a").iterdir())
    make = lambda keep: UriSource(bucket, AdapterLoader(model, keep=0), tmp_path / "copies", refresh=60, keep_bytes=keep)
    source, times = make(2 * size + 100), iter(range(1000, 2000))

    def used(name: str) -> set[str]:
        """The folders after ``name`` was asked for, which is now the one last of use."""
        assert source.fetch(source.resolve(name)).manifest.name == name
        version = source._asked[f"{bucket}/{name}"][1]
        os.utime(tmp_path / "copies" / str(version), (0, next(times)))
        return {p.name for p in (tmp_path / "copies").iterdir()}

    first, second, third = used("a"), used("b"), used("c")
    assert len(first) == 1 and len(second) == 2 and len(third) == 2 and not first & third
    assert used("b") == third
    again = used("a")
    assert first < again and len(again) == 2, "c, or b, made room for a"
    source = make(1)  # another process, with less room: what it asks for stays
    assert len(used("c")) == 1
