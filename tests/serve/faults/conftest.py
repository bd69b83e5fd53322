"""Adapters in files for the servers that are put under load or killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.http.live import write_adapter

#: two at the top, which a server offers by itself, and two below, which must be loaded
FOLDERS = ("s0", "s1", "deep/x", "deep/y")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    for seed, name in enumerate(FOLDERS, 20):
        write_adapter(root / name, seed, rank=2 + 3 * (seed % 4))
    return root
