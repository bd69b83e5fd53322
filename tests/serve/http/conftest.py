"""One server for the tests of a module; three adapters on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.http.live import Live, serving, write_adapter


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, seed) for seed, name in enumerate(("ada", "bob"), 1)}


@pytest.fixture(scope="module")
def live(folders: dict[str, Path]) -> Iterator[Live]:
    with serving(folders["ada"].parent) as server:
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(api_key="none", base_url=live.url + "/v1", max_retries=0, timeout=60) as c:
        yield c
