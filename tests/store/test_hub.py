"""Where an adapter lies: a folder is taken as it is, a repository is asked for by name, everything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import ArtefactError
from rankwise.store.hub import local_folder

NAMES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What the hub's own function was called with."""
    calls: list[tuple[Any, ...]] = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_folder_is_never_asked_for(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    assert local_folder("owner/name", NAMES, hub=True) == Path("owner/name")
    assert local_folder(tmp_path, NAMES, hub=False) == tmp_path and not asked


def test_a_repository_is_asked_for_with_just_its_files(asked: list[Any], tmp_path: Path) -> None:
    assert local_folder("some-one/a.b_c", NAMES, hub=True, revision="v1") == tmp_path / "snapshot"
    assert asked == [("some-one/a.b_c", "v1", list(NAMES))]


@pytest.mark.parametrize("path", ["no-such-folder", "a/b/c", "../x", "/no/such", "a b/c", "-a/b", "a/b\n", ""])
def test_what_is_no_id_is_refused_unasked(asked: list[Any], path: str) -> None:
    with pytest.raises(ArtefactError, match="There is no folder"):
        local_folder(path, NAMES, hub=True)
    assert not asked


def test_a_mistyped_path_is_no_id(asked: list[Any], tmp_path: Path) -> None:
    """What begins with a folder that is there, or is a file, was meant as a path."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/file").write_text("")
    for path in ("runs/missing", "runs/file"):
        with pytest.raises(ArtefactError, match="There is no folder"):
            local_folder(path, NAMES, hub=True)
    with pytest.raises(ArtefactError, match="There is no folder"):
        local_folder("owner/name", NAMES, hub=False)
    assert not asked


@pytest.mark.parametrize(("offline", "why"), [("1", "HF_HUB_OFFLINE is set"), ("0", "OSError: no route")])
def test_what_cannot_be_fetched_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: str, why: str) -> None:
    def fails(*args: Any, **more: Any) -> str:
        raise OSError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match=f"could not be fetched: {why}") as said:
        local_folder("owner/name", NAMES, hub=True)
    assert "\n" not in str(said.value)
