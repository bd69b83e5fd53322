"""A merge's name leads to its file: by the index of ``rankwise.merge.methods``, and by the file's name or first line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rankwise.catalogue import methods
from rankwise.merge import methods as folder

#: name → file, of the merges of this package (plug-ins that other tests install have their own)
FILES = {m.name: m.cls.__module__ for m in methods("merge") if m.cls.__module__.startswith(folder.__name__)}


def test_the_index_is_the_registry() -> None:
    listed = re.findall(r"(\w+) +(\w+\.py)", folder.__doc__ or "")
    assert dict(listed) == {name: f"{module.rpartition('.')[2]}.py" for name, module in FILES.items()}
    assert len(listed) == len(FILES) > 25


def test_each_file_says_which_merges_it_holds() -> None:
    for name, module in FILES.items():
        found = sys.modules[module]
        first = (found.__doc__ or "").splitlines()[0]
        words = {Path(found.__file__ or "").stem, *re.findall(r"\w+", first.lower())}
        assert name in words, f"{name!r} is in {module}, whose first line does not say so"
