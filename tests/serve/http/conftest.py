"""One server for the tests of a module; three adapters on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.http.live import Live, Shelf, serving, write_adapter


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, seed) for seed, name in enumerate(("ada", "bob", "cyd"), 1)}


@pytest.fixture(scope="module")
def live(folders: dict[str, Path]) -> Iterator[Live]:
    shelf = Shelf()
    for name in ("ada", "bob"):
        shelf.load(name, str(folders[name]))
    with serving(shelf, adapter_roots=(folders["ada"].parent,)) as server:
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(api_key="none", base_url=live.url + "/v1", max_retries=0, timeout=60) as c:
        yield c
