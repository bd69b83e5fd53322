"""Every method is found from its name: its folder's docstring names the file it is in, and nothing that is not there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from rankwise import catalogue

LINE = re.compile(r"^\* ``(\w+)`` → (\w+)\.py: \S.+\.$", re.MULTILINE)


@pytest.mark.parametrize("kind", ["form", "init", "router", "optimizer", "budget", "loss"])
def test_the_index_is_the_registry(kind: str) -> None:
    folder = catalogue.FOLDERS[kind]
    doc = importlib.import_module(folder).__doc__ or ""
    registered = {m.name: m.cls.__module__ for m in catalogue.methods(kind) if m.cls.__module__.startswith("rankwise.")}
    listed = [(name, f"{folder}.{file}") for name, file in LINE.findall(doc)]
    assert listed == sorted(registered.items())
    assert doc.count("→") == len(listed) + 1, "a line that is not written as the others"


@pytest.mark.parametrize("kind", ["form", "init", "router", "optimizer", "budget", "loss"])
def test_a_file_of_another_name_says_what_is_in_it(kind: str) -> None:
    for method in catalogue.methods(kind):
        module = method.cls.__module__
        if module.startswith("rankwise.") and module.rpartition(".")[2] != method.name:
            first = (importlib.import_module(module).__doc__ or "").splitlines()[0]
            assert f"``{method.name}``" in first, f"{Path(*module.split('.'))}.py does not say that it holds {method.name}"
