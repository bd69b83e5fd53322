"""The terminal of every test: wide, and whatever stdout is at the time."""

from __future__ import annotations

import sys
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    class Live(Console):  # write to whatever stdout is at the time, so that pytest sees it
        @property
        def file(self) -> Any:
            return sys.stderr if self.stderr else sys.stdout

        @file.setter
        def file(self, value: Any) -> None: ...

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("rankwise.cli"):
            if hasattr(module, "out"):
                monkeypatch.setattr(module, "out", Live(width=200))
            if hasattr(module, "err"):
                monkeypatch.setattr(module, "err", Live(stderr=True, width=200))
